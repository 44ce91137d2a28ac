"""Ranks and alphas by layer, and LoCon: what is trained, what other tools get, and what starts from it."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, load_script, run_here
from safetensors.torch import load_file
from toy_parts import arguments, components_of

import lora
from lora_training.errors import UserError
from lora_training.families import FLUX
from lora_training.inference.adapters import load_adapter
from lora_training.layer_patterns import LayerPatterns
from lora_training.lora.adapters import add_denoiser_lora, add_lora, lora_state
from lora_training.lora.formats import kohya_state
from lora_training.lora.initial import rank_and_alpha
from lora_training.lora.layer_ranks import layer_ranks
from lora_training.lora.reading import read_lora
from lora_training.training.checkpoints import changed_settings
from scripts.lora import inspect_lora, resize_lora

PARTS = ("unet", "text_encoder", "text_encoder_2")
LORA = "pytorch_lora_weights.safetensors"
PATTERNS = ("--rank", 4, "--rank_pattern", "mid_block=8 attn2.to_[kv]=2", "text_encoder_2=3")
PATTERNS += ("--alpha_pattern", "mid_block=2", "--conv_rank", 3, "--conv_alpha", 1.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of SDXL's toy with ranks by layer, LoCon and both text encoders."""
    folder = tmp_path_factory.mktemp("patterns") / "mine"
    flags = ("-d", SAMPLE, "--train_text_encoder", "--learning_rate", 1e-2, "--upcast_before_saving")
    flags += ("--lr_pattern", "up_blocks=0.5 text_encoder=0.1 down_blocks.1.attentions.0=0")
    flags += ("--max_train_steps", 4, "--checkpointing_steps", 2)
    assert run_here(FAMILIES["sdxl"], folder, *flags, *PATTERNS) == 0
    return folder


def expected_pair(part: str, name: str) -> tuple[int, float]:
    """(rank, alpha) of a layer by the flags above."""
    if part == "text_encoder_2":
        return 3, 3.0
    if part == "unet" and name.startswith("mid_block"):
        return 8, 2.0
    if part == "unet" and name.endswith(("attn2.to_k", "attn2.to_v")):
        return 2, 2.0
    if name.endswith(("conv1", "conv2", "samplers.0.conv")):
        return 3, 1.5
    return 4, 4.0


def updates_in_pipeline(file, base, parts) -> dict[tuple[str, str], torch.Tensor]:
    """{(part, layer): the change of its weight} as infer_lora.py draws with a file.

    diffusers' own loader gives one alpha to all of the attention's layers of a file of kohya's scripts.
    """
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    load_adapter(pipeline, file, "x", base)
    return {
        (part, name.removeprefix("text_model.")): layer.get_delta_weight("x").detach()
        for part in parts
        for name, layer in getattr(pipeline, part).named_modules()
        if hasattr(layer, "get_delta_weight") and "x" in layer.scaling
    }


@pytest.mark.run
@pytest.mark.families("sdxl")
def test_every_tool_gets_each_layers_rank_and_alpha(trained):
    """Both files, as the tools read them and as infer_lora.py draws with them; kohya's has 3 x 3 kernels."""
    files = (trained / LORA, trained / "mine.safetensors")
    read = [read_lora(file, "sdxl", FAMILIES["sdxl"].base) for file in files]
    in_pipeline = [updates_in_pipeline(file, FAMILIES["sdxl"].base, PARTS) for file in files]
    kinds = set()
    for part, name, layer in read[0]:
        twin = read[1].layers[part][name]
        assert (layer.rank, layer.alpha) == (twin.rank, twin.alpha) == expected_pair(part, name), name
        assert torch.equal(layer.delta(), twin.delta()) and layer.delta().any()
        short = name.removeprefix("text_model.")
        for updates in in_pipeline:
            assert torch.allclose(updates[part, short], layer.delta(), atol=1e-6), name
        kinds.add(layer.down.shape[2:])
        assert not name.startswith("down_blocks.1.attentions.0.")  # its rate is 0
    assert kinds == {(), (3, 3)} and all(len(list(read[0])) == len(updates) for updates in in_pipeline)
    unet = lora.load_lora(components_of(load_script("train_lora_sdxl.py")).denoiser(), files[0])
    for name, layer in lora.lora_layers(unet).items():
        assert torch.allclose(
            layer.get_delta_weight("default"), read[0].layers["unet"][name].delta(), atol=1e-6
        )
    raw = load_file(files[1])
    key = "lora_unet_input_blocks_1_0_in_layers_2"
    assert raw[f"{key}.lora_down.weight"].shape[2:] == (3, 3) and raw[f"{key}.lora_up.weight"].dim() == 4
    metadata = read[1].metadata
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1.5"}
    assert "rank 2 to 8, alpha / rank 0.25 to 1" in (trained / "README.md").read_text()


@pytest.mark.resume
@pytest.mark.families("sdxl")
def test_a_run_with_ranks_and_rates_by_layer_resumes_exactly(trained, tmp_path, capsys):
    """And no checkpoint is resumed with other ranks or rates, which it has no room for."""
    family, output = FAMILIES["sdxl"], tmp_path / "mine"
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    flags = ("-d", SAMPLE, "--train_text_encoder", "--learning_rate", 1e-2, "--upcast_before_saving")
    flags += ("--max_train_steps", 4, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    rates = ("--lr_pattern", "up_blocks=0.5 text_encoder=0.1 down_blocks.1.attentions.0=0")
    for other, name in (
        (PATTERNS[:4], "conv_rank"),
        ((*PATTERNS, "--lr_pattern", "up_blocks=2"), "lr_pattern"),
    ):
        more = rates if name == "conv_rank" else ()
        assert run_here(family, output, *flags, *other, *more) == 2
        assert name in capsys.readouterr().err
    assert run_here(family, output, *flags, *PATTERNS, *rates) == 0
    before, after = (load_file(folder / LORA) for folder in (trained, output))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.run
@pytest.mark.families("sdxl")
def test_a_run_starts_from_uneven_ranks_as_they_are(trained, tmp_path, capsys):
    """From kohya's file too; nothing is padded, so the file that comes out is as large."""
    family = FAMILIES["sdxl"]
    before = read_lora(trained, "sdxl", family.base)
    flags = ("-d", SAMPLE, "--learning_rate", 1e-12, "--max_train_steps", 1, "--upcast_before_saving")
    start = ("--train_text_encoder", "--init_lora", trained / "mine.safetensors")
    assert run_here(family, tmp_path / "x", *flags, *start) == 0
    assert "starting from" in (said := capsys.readouterr().out) and "rank 2 to 8" in said
    after = read_lora(tmp_path / "x", "sdxl", family.base)
    for part, name, layer in before:
        twin = after.layers[part][name]
        assert (layer.rank, layer.alpha) == (twin.rank, twin.alpha)
        assert torch.allclose(layer.delta(), twin.delta(), atol=1e-6)
    for left_out in ("mid_block=0", "text_encoder_2=0"):
        assert run_here(family, tmp_path / "y", *flags, *start, "--lr_pattern", left_out) == 2
        assert "leaves out layers that --init_lora has" in capsys.readouterr().err
    assert inspect_lora.main([str(trained)]) == 0
    assert "8 (" in (said := capsys.readouterr().out) and "3 (" in said
    small = tmp_path / "small.safetensors"
    assert resize_lora.main([str(trained), str(small), "--rank", "2"]) == 0
    assert {layer.rank for _, _, layer in read_lora(small, "sdxl", family.base)} == {2}


@pytest.mark.unit
@pytest.mark.parametrize(
    "flags",
    [
        ("--use_rslora",),
        ("--use_dora",),
        ("--lora_type", "loha"),
        ("--lora_type", "lokr", "--lokr_factor", "2", "--use_rslora"),
        ("--init_lora_weights", "orthogonal"),
    ],
    ids=" ".join,
)
def test_each_kind_takes_ranks_by_layer(flags):
    """peft's own scale of each layer is alpha / rank, or by its root."""
    script = load_script("train_lora_sd15.py")
    args = arguments(script, "--rank", 4, "--lora_alpha", 6, "--rank_pattern", "to_k=2", *flags)
    unet = components_of(script).denoiser()
    targets = [name for name, _ in unet.named_modules() if name.endswith(("attn1.to_k", "attn1.to_q"))]
    ranks = layer_ranks(unet, "unet", targets, args)
    add_lora(unet, targets, args)
    for name, (rank, alpha) in ranks.items():
        layer = unet.get_submodule(name)
        assert (rank, alpha) == (2 if name.endswith("to_k") else 4, 6.0)
        scale = alpha / (rank**0.5 if args.use_rslora else rank)
        assert layer.scaling["default"] == pytest.approx(scale)
        assert layer.r["default"] == rank


@pytest.mark.run
@pytest.mark.parametrize(
    "flags",
    [
        ("--use_dora", "--use_rslora", "--conv_rank", "3"),
        ("--init_lora_weights", "pissa", "--use_rslora"),
        ("--lora_type", "loha", "--use_rslora", "--conv_rank", "3"),
        ("--lora_type", "lokr", "--lokr_factor", "4", "--alpha_pattern", "attn1=3"),
    ],
    ids=" ".join,
)
def test_both_files_of_each_kind_say_what_is_drawn(flags, tmp_path):
    """diffusers' and kohya's, whose alphas are those of each layer; and the base with it merged in."""
    family, output = FAMILIES["sd15"], tmp_path / "mine"
    more = ("-d", SAMPLE, "--max_train_steps", 2, "--learning_rate", 1e-2, "--upcast_before_saving")
    more += ("--rank", 4, "--lora_alpha", 6, "--rank_pattern", "to_k=2 mid_block=5", *flags)
    assert run_here(family, output, *more) == 0
    files = (output / LORA, output / "mine.safetensors")
    layers, twins = (read_lora(file, "sd15", family.base).layers["unet"] for file in files)
    assert layers.keys() == twins.keys()
    updates = updates_in_pipeline(files[0], family.base, ("unet",))
    for name, layer in layers.items():
        assert torch.allclose(layer.delta(), twins[name].delta(), atol=1e-6), name
        assert torch.allclose(updates["unet", name], layer.delta(), atol=1e-5), name
        if layer.magnitude is not None:
            assert torch.equal(layer.magnitude, twins[name].magnitude)
    assert max(layer.delta().abs().max() for layer in layers.values()) > 1e-3


@pytest.mark.unit
def test_projections_of_several_ranks_and_scales_are_fused_exactly():
    """FLUX.1's q, k and v, one layer in the original, of ranks 2, 4 and 3 and scales 1, 0.5 and 2."""
    pairs = {"attn.to_q": (2, 2.0), "attn.to_k": (4, 2.0), "attn.to_v": (3, 6.0)}
    state, updates = {}, []
    for name, (rank, alpha) in pairs.items():
        down, up = torch.randn(rank, 8), torch.randn(8, rank)
        state |= {f"transformer_blocks.0.{name}.lora_A.weight": down}
        state |= {f"transformer_blocks.0.{name}.lora_B.weight": up}
        updates.append(up @ down * alpha / rank)
    config = {"num_attention_heads": 2, "attention_head_dim": 4}
    others = {f"transformer_blocks.0.{name}": (alpha, alpha / rank) for name, (rank, alpha) in pairs.items()}
    out = kohya_state(FLUX, {"transformer": state}, 9.0, config, differing={"transformer": others})
    start = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up, alpha = (out[f"{start}.{kind}"] for kind in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape[0] == 9
    assert torch.allclose(up @ down * alpha / 9, torch.cat(updates), atol=1e-5)


@pytest.mark.unit
def test_a_pattern_means_blocks_names_and_regular_expressions():
    patterns = LayerPatterns("rank_pattern", ["^mid_block=1 to_[kv]=2", "ff=3 text_encoder=4"])
    ff = "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    names = {
        ("unet", "mid_block.attentions.0.to_k"): 1,
        ("unet", "down_blocks.0.to_v"): 2,
        ("unet", ff): 3,
        ("transformer", "transformer_blocks.0.ff_context.net.2"): 9,
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"): 4,
        ("text_encoder_2", "encoder.layers.0.self_attn.q_proj"): 9,
    }
    for (part, name), value in names.items():
        assert patterns.value(part, name, 9) == value, name
    patterns.check_matched([])


@pytest.mark.unit
def test_a_pattern_that_matches_nothing_names_the_nearest(recipe):
    for flag, wrong in (
        ("--rank_pattern", "too_q=8"),
        ("--alpha_pattern", "to_k=2 atn=1"),
        ("--lr_pattern", "x=0"),
    ):
        args = arguments(recipe, flag, wrong)
        denoiser = components_of(recipe).denoiser()
        with pytest.raises(UserError, match=f"{flag} .*matches no layer trained; near it are ") as caught:
            add_denoiser_lora(denoiser, args, recipe.LORA_TARGETS, (), None)
        assert flag != "--rank_pattern" or "to_q" in str(caught.value).split("near it are")[1]


@pytest.mark.unit
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_layer_that_is_left_out_has_no_lora(name):
    script = load_script(FAMILIES[name].script)
    args = arguments(script, "--lr_pattern", "to_q=0")
    denoiser = components_of(script).denoiser()
    add_denoiser_lora(denoiser, args, script.LORA_TARGETS, (), None)
    layers = {key.split(".lora_")[0] for key in lora_state(denoiser)}
    assert any(layer.endswith("to_k") for layer in layers)
    assert not any(layer.endswith("to_q") for layer in layers)
    with pytest.raises(UserError, match="leaves out every layer"):
        args = arguments(script, "--lr_pattern", ".*=0")
        add_denoiser_lora(components_of(script).denoiser(), args, script.LORA_TARGETS, (), None)


REFUSED = {
    ("--rank_pattern", "to_q"): "is not PATTERN=VALUE",
    ("--rank_pattern", "to_q=0"): "0 is below 1",
    ("--rank_pattern", "to_q=2.5"): "'2.5' is no count",
    ("--rank_pattern", "to_(q=2"): "is no regular expression",
    ("--alpha_pattern", "to_q=0"): "0 is not a number from 1e-9",
    ("--lr_pattern", "to_q=-1"): "-1 is not a number from 0",
    ("--lr_pattern", "to_q=2", "--optimizer", "prodigy"): "takes one rate for all",
    ("--conv_alpha", "2"): "--conv_alpha has no effect without --conv_rank",
    ("--conv_rank", "2", "--conv_alpha", "0"): "--conv_alpha 0 scales the update to nothing",
    ("--conv_rank", "2", "--init_lora_weights", "pissa"): "it is for linear layers",
    ("--rank_pattern", "to_q=2", "--init_lora", "assets"): "no effect with --init_lora",
}


@pytest.mark.unit
@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_what_makes_no_sense_is_refused_in_a_line(flags, capsys):
    script = load_script("train_lora_sd15.py")
    argv = ["-m", str(ROOT / "assets/toy_sd15"), "-d", str(SAMPLE), *flags]
    try:
        script.parse_args(argv)
    except UserError as error:
        assert REFUSED[flags] in str(error)
    except SystemExit:
        assert REFUSED[flags] in capsys.readouterr().err
    else:
        pytest.fail("taken")


@pytest.mark.unit
def test_transformers_have_no_convolutions_to_rank():
    script = load_script(FAMILIES["flux"].script)
    assert arguments(script, "--conv_rank", "0").rank == 4
    with pytest.raises(UserError, match="--conv_rank: a transformer has no 3 x 3 convolutions"):
        arguments(script, "--conv_rank", "4")


@pytest.mark.unit
def test_a_start_from_rslora_keeps_its_scale():
    """alpha / sqrt(rank) in its training; where all layers have one rank, alpha was taken as it is."""
    state = {"x.lora_A.weight": torch.zeros(4, 8), "x.lora_B.weight": torch.zeros(8, 4)}
    stated = {"unet.use_rslora": True, "unet.lora_alpha": 6, "unet.r": 4}
    assert rank_and_alpha(state, "unet", "x", stated) == (4, 12)
    patterns = {
        "unet.rank_pattern": {"a|.*x": 3},
        "unet.alpha_pattern": {"x": 5},
        "unet.r": 4,
        "unet.alpha": 6,
    }
    for name, pair in (("x", (3, 5)), ("y", (4, 6))):
        assert rank_and_alpha({f"{name}.hada_w1_a": state["x.lora_A.weight"]}, "unet", name, patterns) == pair


@pytest.mark.unit
def test_a_checkpoint_of_before_these_flags_goes_on_without_them_and_names_one():
    """It has none of them in its settings, and fits a run whose layers are all alike."""
    flags = {"rank": 4, "rank_pattern": None, "lr_pattern": None, "conv_rank": None}
    assert changed_settings({"rank": 4}, flags) == {}
    changes = changed_settings({"rank": 4}, flags | {"rank_pattern": ["to_k=2"]})
    assert changes == {"rank_pattern": "rank_pattern None, now ['to_k=2']"}
