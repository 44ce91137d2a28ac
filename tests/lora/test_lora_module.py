"""lora.py and lora_example.py: LoRA in people's own loops."""

import copy
import importlib.util
import json
import pickle
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, ROOT
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import lora_example
from lora_training import families
from lora_training.lora.adapters import find_target_layers
from lora_training.lora.single_file import single_file

pytestmark = pytest.mark.unit
TOY = ROOT / "assets" / "toy_sd15"


class Attention(nn.Module):
    """One head of attention under the names of the original code, or of diffusers."""

    def __init__(self, names=("q_proj", "k_proj", "v_proj", "out_proj"), dim=8):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(dim, dim))
        self.names = names

    def forward(self, x):
        q, k, v, out = (self.get_submodule(name) for name in self.names)
        return out(torch.softmax(q(x) @ k(x).mT, dim=-1) @ v(x))


class Encoder(nn.Module):
    """torch's own block, which computes past its layers where nothing is trained."""

    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)

    def forward(self, x):
        return self.body(x)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (3, 8), 2),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        (2, 3, 6, 6),
        2,
    ),
    "signals and volumes": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Unflatten(2, (1, 2, 2)), nn.Conv3d(4, 2, 1)),
        (2, 3, 6),
        2,
    ),
    "original names": (lambda: nn.Sequential(Attention(), nn.Linear(8, 8)), (2, 5, 8), 4),
    "diffusers' names": (lambda: Attention(("to_q", "to_k", "to_v", "out_proj")), (2, 5, 8), 4),
    "torch's encoder": (Encoder, (2, 5, 8), 2),
    "nested names": (lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)), (2, 8), 2),
}


def train_a_step(model, shape, seed=1):
    """A LoRA away from its start; everything else must stay."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(lora.get_lora_parameters(model), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(shape)).abs().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", MODELS)
def test_any_module_is_trained_compared_saved_loaded_and_merged(name, tmp_path):
    make, shape, layers = MODELS[name]
    torch.manual_seed(0)
    base, x = make().eval(), torch.randn(shape)
    plain, model = copy.deepcopy(base), copy.deepcopy(base)
    assert lora.apply_lora_to_model(model, rank=2, alpha=3) is model
    assert len(lora.lora_layers(model)) == layers
    assert torch.allclose(model(x), plain(x), atol=1e-6)  # B is zero
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert {id(p) for p in lora.get_lora_parameters(model)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    train_a_step(model, shape)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    trained = model(x)
    with torch.no_grad():
        assert torch.allclose(model(x), trained, atol=1e-6)
    assert (trained - plain(x)).abs().max() > 1e-3
    lora.set_lora_enabled(model, False)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    lora.set_lora_enabled(model, True)
    assert torch.allclose(model(x), trained, atol=1e-6)
    file = lora.save_lora(model, tmp_path / "x.safetensors")
    other = lora.load_lora(copy.deepcopy(base), file)  # rank and alpha are the file's
    assert torch.allclose(other(x), trained, atol=1e-6)
    merged = lora.merge_lora_weights(other)
    assert torch.allclose(merged(x), trained, atol=1e-5)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_the_update_is_the_formula():
    linear = nn.Linear(6, 5)
    layer = lora.LoRALinear.of(linear, rank=2, alpha=3)
    a, b = lora.get_lora_parameters(layer)
    b.data.normal_()
    x = torch.randn(4, 6)
    expected = x @ linear.weight.T + linear.bias + 3 / 2 * x @ a.T @ b.T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    weight = linear.weight + 3 / 2 * b @ a
    assert torch.allclose(lora.merge_lora_weights(layer).weight, weight, atol=1e-6)
    assert lora.count_parameters(lora.LoRALinear.of(nn.Linear(6, 5), rank=2)) == {"lora": 22, "base": 35}


def test_counts_and_half_precision():
    model = lora.apply_lora_to_model(nn.Sequential(nn.Linear(8, 16)).bfloat16(), rank=4)
    assert lora.count_parameters(model) == {"lora": 4 * (8 + 16), "base": 8 * 16 + 16}
    assert {p.dtype for p in lora.get_lora_parameters(model)} == {torch.float32}
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_acts_in_training_alone():
    model = lora.apply_lora_to_model(nn.Sequential(nn.Linear(8, 8)), rank=4, dropout=0.5)
    lora.get_lora_parameters(model)[1].data.normal_()
    x = torch.randn(2, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["q_proj", "to_q"])
@pytest.mark.parametrize(
    "names", [("q_proj", "k_proj", "v_proj", "out_proj"), ("to_q", "to_k", "to_v", "out_proj")]
)
def test_either_spelling_means_the_same_layer(name, names):
    assert lora.lora_targets(nn.Sequential(Attention(names)), [name]) == [f"0.{names[0]}"]


def test_out_proj_is_to_out_0_of_a_unet():
    unet = lora.denoiser_without_weights(str(TOY))
    original = ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert lora.lora_targets(unet, original) == lora.lora_targets(unet, ["to_q", "to_k", "to_v", "to_out.0"])
    assert lora.lora_targets(unet, original) == lora.lora_targets(unet)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_lora_layers_of_the_training_scripts_take_the_original_names(name):
    denoiser = lora.denoiser_without_weights(FAMILIES[name].base)

    def targets(*names):
        args = SimpleNamespace(lora_layers=names, lora_blocks=None, family=families.FAMILIES[name])
        return find_target_layers(denoiser, args, usual=(), idle=())

    assert targets("q_proj", "out_proj") == targets("to_q", "to_out.0")
    assert targets("q_proj,k_proj,v_proj,out_proj") == targets("to_q", "to_k", "to_v", "to_out.0")


def filled(model, *, adapter="default", **options):
    """A model with one more LoRA, which is not zero."""
    lora.apply_lora_to_model(model, adapter=adapter, **options)
    for parameter in lora.get_lora_parameters(model, adapter):
        parameter.data.normal_()
    return model


@pytest.fixture
def two_loras():
    """(the base, the same with two LoRAs, of different layers, rank and alpha, inputs)."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = filled(copy.deepcopy(base), rank=2, adapter="style")
    filled(model, rank=3, alpha=6, target_modules=["2"], adapter="style_2")
    return base, model, torch.randn(3, 8)


def test_several_loras_are_switched_by_name(two_loras, tmp_path):
    base, model, x = two_loras
    assert lora.adapters_of(model) == ["style", "style_2"]
    both, plain = model(x), base(x)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("style", "style_2")}
    alone = {}
    for name, other in (("style", "style_2"), ("style_2", "style")):
        lora.save_lora(model, files[name], adapter=name)
        lora.set_lora_enabled(model, False, adapter=other)
        alone[name] = model(x)
        loaded = lora.load_lora(copy.deepcopy(base), files[name])
        assert torch.allclose(alone[name], loaded(x)) and not torch.allclose(alone[name], plain)
        lora.set_lora_enabled(model, False)  # to compare with the base
        assert torch.equal(model(x), plain)
        lora.set_lora_enabled(model, True)
        assert torch.equal(model(x), alone[name])
        lora.set_lora_enabled(model, True, adapter=other)
        assert torch.equal(model(x), both)
    lora.set_lora_enabled(model, False)
    lora.set_lora_enabled(model, True, adapter="style")  # where all were off, the other stays off
    assert torch.equal(model(x), alone["style"])
    for name in files:
        lora.set_lora_enabled(model, False, adapter=name)
    assert torch.equal(model(x), plain)
    lora.set_lora_enabled(model, True)
    assert torch.equal(model(x), both)
    fresh = copy.deepcopy(base)
    for name, file in files.items():
        lora.load_lora(fresh, file, adapter=name)
    assert torch.allclose(fresh(x), both)


def test_loras_are_blended_by_weights_and_one_of_them_merged(two_loras):
    base, model, x = two_loras
    lora.blend_adapters(model, {"style": 0.5, "style_2": 2.0})
    first, last = (layer.get_base_layer() for layer in lora.lora_layers(model).values())
    weights = {}
    for layer, scales in ((first, {"style": 0.5}), (last, {"style": 0.5, "style_2": 2.0 * 6 / 3})):
        wrapped = model[0] if layer is first else model[2]
        updates = [s * wrapped.lora_B[n].weight @ wrapped.lora_A[n].weight for n, s in scales.items()]
        weights[layer] = layer.weight + sum(updates)
    hidden = torch.relu(x @ weights[first].T + first.bias)
    blended = model(x)
    assert torch.allclose(blended, hidden @ weights[last].T + last.bias, atol=1e-5)
    part = lora.merge_lora_weights(copy.deepcopy(model), "style_2")
    assert lora.adapters_of(part) == ["style"] == list(part.peft_config)
    assert torch.allclose(part(x), blended, atol=1e-5)
    lora.set_lora_enabled(part, False)
    assert torch.equal(part[0](x), base[0](x)) and not torch.equal(part[2].weight, base[2].weight)
    whole = lora.merge_lora_weights(copy.deepcopy(model))
    assert torch.allclose(whole(x), blended, atol=1e-5)
    assert [type(m) for m in whole.modules()] == [type(m) for m in base.modules()]
    lora.blend_adapters(model, {"style_2": 1.0})
    assert torch.equal(model[0](x), base[0](x))


def test_several_loras_are_merged_with_one_rounding():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    model = filled(filled(copy.deepcopy(base), adapter="a"), adapter="b")
    layer = model[0]
    updates = [layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("a", "b")]
    expected = (base[0].weight.float() + updates[0] + updates[1]).bfloat16()
    assert torch.equal(lora.merge_lora_weights(model)[0].weight, expected)


def test_one_of_several_loras_is_trained(two_loras):
    _, model, x = two_loras
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(lora.get_lora_parameters(model, "style"), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".style." in n}


def test_a_lora_that_is_not_named_or_not_there_is_said(two_loras, tmp_path):
    base, model, _ = two_loras
    with pytest.raises(ValueError, match="has several LoRAs: adapter= names one of style, style_2"):
        lora.save_lora(model, tmp_path / "x.safetensors")
    for wrong in (
        lambda: lora.merge_lora_weights(model, "face"),
        lambda: lora.set_lora_enabled(model, False, adapter="face"),
        lambda: lora.blend_adapters(model, {"face": 1.0}),
    ):
        with pytest.raises(
            ValueError, match="adapter 'face' is none of this Sequential's LoRAs: style, style_2"
        ):
            wrong()
    with pytest.raises(ValueError, match="the weight of 'style' is a finite number"):
        lora.blend_adapters(model, {"style": float("nan")})
    with pytest.raises(ValueError, match="has a LoRA, 'style'"):
        lora.apply_lora_to_model(model, adapter="style")
    with pytest.raises(ValueError, match="has no LoRA"):
        lora.set_lora_enabled(base, True, adapter="style")


def test_a_loaded_file_brings_its_alpha_into_a_lora_that_is_there(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    model = filled(copy.deepcopy(base), rank=2, alpha=8)
    file = lora.save_lora(model, tmp_path / "x.safetensors")
    other = lora.apply_lora_to_model(copy.deepcopy(base), rank=2, alpha=1)
    assert torch.allclose(lora.load_lora(other, file)(x), model(x), atol=1e-5)


def test_layers_that_are_built_by_hand_are_saved_and_loaded(tmp_path):
    model = nn.Sequential(
        lora.LoRALinear(4, 8, rank=2, alpha=4), nn.ReLU(), lora.LoRALinear(8, 2, rank=2, alpha=4)
    )
    for parameter in lora.get_lora_parameters(model):
        parameter.data.normal_()
    plain = nn.Sequential(*(copy.deepcopy(getattr(m, "base_layer", m)) for m in model))
    x, file = torch.randn(3, 4), lora.save_lora(model, tmp_path / "x.safetensors")
    assert torch.allclose(lora.load_lora(plain, file)(x), model(x), atol=1e-5)
    mixed = nn.Sequential(lora.LoRALinear(4, 4, rank=2), lora.LoRALinear(4, 4, rank=3))
    with pytest.raises(ValueError, match="layers of different rank or alpha"):
        lora.save_lora(mixed, file)


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(TOY / "unet")


@pytest.fixture(scope="module")
def trained_unet(tmp_path_factory):
    """(UNet with a LoRA that is not zero, its file)."""
    model = lora.apply_lora_to_model(unet(), rank=3, alpha=6)
    torch.manual_seed(0)
    for parameter in lora.get_lora_parameters(model):
        parameter.data.normal_(0, 0.1)
    return model, lora.save_lora(model, tmp_path_factory.mktemp("lora") / "unet.safetensors")


def predict(model):
    torch.manual_seed(1)
    x, text = (
        torch.randn(1, model.config.in_channels, 8, 8),
        torch.randn(1, 77, model.config.cross_attention_dim),
    )
    with torch.no_grad():
        return model(x, 500, text).sample


def test_diffusers_reads_the_file_with_its_alpha(trained_unet):
    from diffusers import StableDiffusionPipeline

    model, file = trained_unet
    pipeline = StableDiffusionPipeline.from_pretrained(TOY)
    before = predict(pipeline.unet)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    assert torch.allclose(predict(pipeline.unet), predict(model), atol=1e-4)
    assert (predict(model) - before).abs().max() > 0.01


def test_a_text_encoders_lora_goes_to_diffusers_and_back(tmp_path):
    from diffusers import StableDiffusionPipeline

    models = lora.load_models(TOY, lora_rank=2, apply_to_clip=True)
    torch.manual_seed(0)
    for name in ("unet", "text_encoder"):
        assert lora.lora_layers(models[name])
        for parameter in lora.get_lora_parameters(models[name]):
            parameter.data.normal_(0, 0.2)
    assert models["diffusion"] is models["unet"] and models["clip"] is models["text_encoder"]
    file = lora.save_lora(models, tmp_path / "both.safetensors")
    assert {key.split(".")[0] for key in load_file(file)} == {"unet", "text_encoder"}
    ids = torch.arange(77)[None]
    expected = models["clip"](ids)[0]
    pipeline = StableDiffusionPipeline.from_pretrained(TOY)
    assert (pipeline.text_encoder(ids)[0] - expected).abs().max() > 0.01
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert torch.allclose(pipeline.text_encoder(ids)[0], expected, atol=1e-4)
    fresh = lora.load_models(TOY, apply_to_diffusion=False)
    assert not lora.lora_layers(fresh["unet"])
    lora.load_lora(fresh, file)
    assert torch.allclose(fresh["clip"](ids)[0], expected, atol=1e-5)
    assert torch.allclose(predict(fresh["unet"]), predict(models["unet"]), atol=1e-5)


def test_files_of_the_training_scripts_are_read(trained_unet, tmp_path):
    model, file = trained_unet
    theirs = {
        k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v
        for k, v in load_file(file).items()
    }
    about = {"unet.r": 3, "unet.lora_alpha": 6}
    save_file(theirs, tmp_path / "t.safetensors", metadata={"lora_adapter_metadata": json.dumps(about)})
    assert torch.allclose(
        predict(lora.load_lora(unet(), tmp_path / "t.safetensors")), predict(model), atol=1e-5
    )


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


WRONG = {
    "a pickle": (
        lambda t, s: (torch.save(s, t.with_suffix(".pt")), t.with_suffix(".pt"))[1],
        "only safetensors",
    ),
    "another name": (lambda t, s: t.rename(t.with_suffix(".bin")), "only safetensors"),
    "cut": (lambda t, s: (t.write_bytes(t.read_bytes()[:300]), t)[1], "damaged"),
    "empty": (lambda t, s: (t.write_bytes(b""), t)[1], "damaged"),
    "absent": (lambda t, s: (t.unlink(), t)[1], "not to be read"),
    "not a number": (
        lambda t, s: (save_file({k: v * float("nan") for k, v in s.items()}, t), t)[1],
        "not finite",
    ),
    "another width": (
        lambda t, s: (save_file({k: v[..., :2].contiguous() for k, v in s.items()}, t), t)[1],
        "in the model",
    ),
    "a layer missing": (lambda t, s: (save_file(dict(list(s.items())[1:]), t), t)[1], "missing"),
    "another model": (
        lambda t, s: (save_file({f"transformer.{k}": v for k, v in s.items()}, t), t)[1],
        "no layer",
    ),
    "a layer more": (
        lambda t, s: (save_file(s | {"unet.x.lora_A.weight": torch.ones(3, 2)}, t), t)[1],
        "no layer x",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(name, trained_unet, tmp_path):
    change, words = WRONG[name]
    file = tmp_path / "x.safetensors"
    shutil.copy(trained_unet[1], file)
    file = change(file, load_file(file))
    with pytest.raises(ValueError, match=words) as error:
        lora.load_lora(unet(), file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_pickles_are_refused_unexecuted(suffix, tmp_path):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "written")))
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="only safetensors"):
        lora.load_lora(model, file)
    with pytest.raises(ValueError, match="damaged, or no base"):
        lora.load_models(file)
    assert not (tmp_path / "written").exists()
    lora.apply_lora_to_model(model)
    if suffix == ".pt":
        assert load_file(lora.save_lora(model, file)).keys() == lora.lora_state(model, "default").keys()
        return
    with pytest.raises(ValueError, match="only safetensors"):
        lora.save_lora(model, file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"dropout": 1}, "dropout"),
        ({"target_modules": ["nothing"]}, "nothing is no layer of Sequential"),
        ({"target_modules": []}, "names no layer"),
        ({"adapter": "a.b"}, "adapter is a name of letters"),
        ({"adapter": ""}, "adapter is a name of letters"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        lora.apply_lora_to_model(nn.Sequential(nn.Linear(4, 4)), **options)


def test_what_cannot_be_is_said():
    model = nn.Sequential(nn.Linear(4, 4))
    for wrong in (lora.merge_lora_weights, lambda m: lora.save_lora(m, "x.safetensors")):
        with pytest.raises(ValueError, match="no LoRA"):
            wrong(model)
    for empty in (nn.ReLU(), nn.LSTM(3, 4), nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), nn.Linear(3, 3)):
        with pytest.raises(ValueError, match="takes a LoRA"):
            lora.apply_lora_to_model(empty)
    with pytest.raises(ValueError, match="takes a LoRA"):
        lora.apply_lora_to_model(nn.MultiheadAttention(8, 2))
    lora.apply_lora_to_model(model)
    with pytest.raises(ValueError, match="has a LoRA"):
        lora.apply_lora_to_model(model)
    lora.get_lora_parameters(model)[0].data[0, 0] = float("inf")
    before = model[0].get_base_layer().weight.clone()
    for wrong in (lora.merge_lora_weights, lambda m: lora.save_lora(m, "x.safetensors")):
        with pytest.raises(ValueError, match="not finite"):
            wrong(model)
    assert torch.equal(model[0].get_base_layer().weight, before)


def test_a_checkpoint_is_loaded_as_the_folder_is(tmp_path, monkeypatch):
    """A .ckpt and a .safetensors file, in a folder of configurations as the training scripts want it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TOY, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = single_file("sd15", TOY)
    torch.save({"state_dict": tensors}, tmp_path / "base" / "model.ckpt")
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    expected = predict(unet().float())
    for suffix in ("ckpt", "safetensors"):
        models = lora.load_models(
            tmp_path / "base" / f"model.{suffix}", lora_rank=2, lora_alpha=1, lora_dropout=0.1
        )
        lora.set_lora_enabled(models["diffusion"], False)
        assert torch.allclose(predict(models["diffusion"]), expected, atol=1e-2)
        assert len(lora.lora_layers(models["diffusion"])) and not lora.lora_layers(models["clip"])


def test_sizes_by_rank_are_those_of_the_page(capsys):
    assert lora.main([]) == 0
    table = capsys.readouterr().out.strip().splitlines()
    assert [row.split("|")[2].strip() for row in table[2:5]] == [
        "0.80 million",
        "1.59 million",
        "3.19 million",
    ]
    page = (ROOT / "docs" / "own-loop.md").read_text(encoding="utf-8")
    assert all(row in page for row in table)


def test_the_files_are_as_large_as_the_table_says(trained_unet):
    model, file = trained_unet
    size = 4 * lora.count_parameters(model)["lora"]
    assert size < file.stat().st_size < size + 2**17  # the rest is names


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    assert lora.main([str(tmp_path)]) == 2
    assert lora.main(["--rank", "0"]) == 2
    assert capsys.readouterr().err.count("lora.py: error:") == 2


def test_the_example_runs(tmp_path, capsys):
    output = tmp_path / "out"
    assert lora_example.main(["--steps", "60", "--output", str(output), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    first, last = (float(word) for word in said.split("loss ")[1].split("\n")[0].split(" -> "))
    assert last < 0.8 * first
    assert said.count("differs by 0 of 255") + said.count("differs by 1 of 255") == 2
    assert (output / "comparison.png").stat().st_size > 1000 and (output / "lora.safetensors").is_file()


def test_the_example_names_what_is_wrong(tmp_path, capsys):
    assert lora_example.main(["--base", str(tmp_path / "nowhere")]) == 2
    assert lora_example.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("lora_example.py: error:") == 2


def test_the_module_needs_nothing_but_torch_peft_and_safetensors(tmp_path):
    """A copy of it elsewhere trains people's own modules."""
    shutil.copy(ROOT / "lora.py", tmp_path / "copied_lora.py")
    spec = importlib.util.spec_from_file_location("copied_lora", tmp_path / "copied_lora.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["copied_lora"] = module
    spec.loader.exec_module(module)
    model = module.apply_lora_to_model(nn.Sequential(nn.Linear(4, 4)), 2)
    module.save_lora(model, tmp_path / "y.safetensors")
    assert module.load_lora(nn.Sequential(nn.Linear(4, 4)), tmp_path / "y.safetensors") is not None
