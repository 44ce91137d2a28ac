"""unpack_checkpoint.py: a single file becomes the diffusers folder that it was made from, and nothing of it is run."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, load_script, losses, run_here
from safetensors.torch import load_file, save_file

from scripts.bases import detect_family, unpack_checkpoint
from scripts.lora import merge_lora
from scripts.lora.parts.original_layout import single_file
from scripts.parts import released_models
from scripts.parts.clip_vocabulary import clip_tokenizer

pytestmark = pytest.mark.run


def unpack(*words: object) -> int:
    return unpack_checkpoint.main([str(w) for w in words])


def mistake(capsys, *words: object) -> str:
    """The one line that a mistake ends with."""
    assert unpack(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("unpack_checkpoint.py: error: ")
    return lines[0]


@pytest.fixture
def vocabulary(tmp_path, monkeypatch) -> None:
    """A package open_clip with a vocabulary of CLIP's size and form, whose code must not be imported."""
    package = tmp_path / "packages" / "open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('only its data file is to be read')\n")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pairs = ((a, b + end) for a in symbols for b in symbols for end in ("</w>", ""))
    lines = [" ".join(pair) for pair in itertools.islice(pairs, 60000)]  # the file has more lines than CLIP uses
    content = "\n".join(["#version", *lines, ""]).encode()
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(content))
    monkeypatch.syspath_prepend(package.parent)


def layout_without_weights(family, folder: Path, parts: tuple[str, ...]) -> Path:
    """The family's toy base, these parts without their weights."""
    shutil.copytree(family.base, folder)
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    return folder


def checkpoint_of(family, file: Path, text: bool = True) -> Path:
    """The family's toy base as a single file."""
    tensors = single_file(family.name, ROOT / family.base)
    tensors = {k: v for k, v in tensors.items() if text or not k.startswith("text_enc")}
    if file.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    return file


def same_parts(first: Path, second: Path, parts: tuple[str, ...]) -> bool:
    """Whether two diffusers folders have the same weights; keys of text encoders have lost a level in one of them."""

    def read(folder: Path) -> dict:
        files = sorted(folder.glob("*.safetensors"))
        return {k.removeprefix("text_model."): v.float() for f in files for k, v in load_file(f).items()}

    for part in parts:
        a, b = read(first / part), read(second / part)
        if a.keys() != b.keys() or not a or not all(torch.equal(a[k], b[k]) for k in a):
            return False
    return True


def test_clip_tokenizer_reads_the_data_file_alone(vocabulary):
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    ids = tokenizer("a a!").input_ids
    assert ids[0] == 49406 and ids[-1] == 49407
    assert ids[1] == ids[2] == tokenizer.get_vocab()["a</w>"] == 256 + 64


def test_without_the_package_there_is_no_tokenizer():
    assert clip_tokenizer() is None


@pytest.mark.parametrize(
    ("name", "sizes"),  # millions of parameters, as the released models have them
    [
        ("sd15", {"unet": 859.5, "vae": 83.7, "text_encoder": 123.1}),
        ("sdxl", {"unet": 2567.5, "vae": 83.7, "text_encoder": 123.1, "text_encoder_2": 694.7}),
    ],
)
def test_released_layout_is_that_of_the_released_models(name, sizes, vocabulary, tmp_path):
    import diffusers
    import transformers

    released_models.write_layout(name, tmp_path / "x", clip_tokenizer())
    index = json.loads((tmp_path / "x" / "model_index.json").read_text())
    assert index["_class_name"] == FAMILIES[name].pipeline
    for part, millions in sizes.items():
        library, kind = index[part]
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        with torch.device("meta"):
            if library == "diffusers":
                model = kind.from_config(kind.load_config(tmp_path / "x" / part))
            else:
                model = kind(transformers.CLIPTextConfig.from_pretrained(tmp_path / "x" / part))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    pads = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    for part in [p for p in index if p.startswith("tokenizer")]:
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "x" / part).pad_token == pads[part]
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(tmp_path / "x" / "scheduler")
    assert scheduler.config.beta_schedule == "scaled_linear" and scheduler.config.steps_offset == 1


@pytest.mark.parametrize(("name", "suffix"), [("sd15", ".ckpt"), ("sdxl", ".safetensors")])
def test_unpacked_with_the_known_configurations(name, suffix, vocabulary, tmp_path, capsys, monkeypatch):
    """With the toy's sizes in the released models' place: the folder has the weights that the file was made from."""
    family = FAMILIES[name]

    def own(part: str) -> dict:
        config = json.loads((ROOT / family.base / part / "config.json").read_text())
        return {k: v for k, v in config.items() if not k.startswith("_") and k not in ("architectures", "dtype")}

    kind, _ = released_models.DENOISERS[name]
    monkeypatch.setitem(released_models.DENOISERS, name, (kind, own("unet")))
    others = released_models.OTHER_PARTS[name]
    small = {p: (*v[:2], v[2] if p == "scheduler" else own(p)) for p, v in others.items()}
    monkeypatch.setitem(released_models.OTHER_PARTS, name, small)
    file = checkpoint_of(family, tmp_path / f"model{suffix}")
    (tmp_path / "out").mkdir()  # an empty folder is fine
    assert unpack(file, tmp_path / "out") == 0
    assert f"{name}, from {file}" in capsys.readouterr().out
    parts = ("unet", "vae", *(p for p in others if p.startswith("text_encoder")))
    assert same_parts(Path(family.base), tmp_path / "out", parts)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_an_unpacked_folder_trains_as_its_base(name, tmp_path):
    """With --layout, from which the parts come that the file lacks."""
    family, text = FAMILIES[name], name != "sd3"  # both CLIPs of SD3's toy are of one width, which the reader goes by
    lacking = ("unet", "transformer", "vae", *(("text_encoder", "text_encoder_2") if text else ()))
    layout = layout_without_weights(family, tmp_path / "layout", lacking)
    file = checkpoint_of(family, tmp_path / "model.safetensors", text)
    assert unpack(file, tmp_path / "base", "--layout", layout) == 0
    flags = ("-d", SAMPLE, "--max_train_steps", 2)
    assert run_here(family, tmp_path / "x", *flags, "-m", tmp_path / "base") == 0
    assert run_here(family, tmp_path / "y", *flags) == 0
    assert losses(tmp_path / "x") == pytest.approx(losses(tmp_path / "y"), abs=1e-5)


@pytest.mark.parametrize(("dtypes", "expected"), [((torch.float16,), "float16"), ((torch.bfloat16,), "bfloat16")])
def test_half_precision_stays(dtypes, expected, tmp_path):
    tensors = {"a": torch.zeros(2, 2, dtype=dtypes[0]), "schedule": torch.zeros(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert unpack_checkpoint.precision_of(tmp_path / "x.safetensors") == getattr(torch, expected)
    save_file(tensors | {"b": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    assert unpack_checkpoint.precision_of(tmp_path / "x.safetensors") == torch.float32


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("flags", [(), ("--family", "sd15")])
def test_pickled_code_is_not_run(zipped, flags, vocabulary, tmp_path, capsys):
    file, trace = tmp_path / "x.ckpt", tmp_path / "was_run"
    content = {"state_dict": {"input_blocks.0.0.weight": Payload(trace)}}
    if zipped:
        torch.save(content, file)
        assert zipfile.is_zipfile(file)
    else:
        file.write_bytes(pickle.dumps(content))
    assert "not a checkpoint of tensors alone" in mistake(capsys, file, tmp_path / "out", *flags)
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_mistakes(tmp_path, capsys, vocabulary):
    sd15, flux = FAMILIES["sd15"], FAMILIES["flux"]
    out = tmp_path / "out"
    assert "no such file" in mistake(capsys, tmp_path / "nowhere.safetensors", out)
    (tmp_path / "x.bin").write_bytes(b"x")
    assert "only .safetensors and .ckpt" in mistake(capsys, tmp_path / "x.bin", out)
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    assert "not a checkpoint of tensors alone" in mistake(capsys, tmp_path / "x.safetensors", out)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "not a base of" in mistake(capsys, tmp_path / "other.safetensors", out)
    assert "can't be read as sd15" in mistake(capsys, tmp_path / "other.safetensors", out, "--family", "sd15")
    file = checkpoint_of(flux, tmp_path / "flux.safetensors")
    assert "give --layout" in mistake(capsys, file, out)
    assert "not a diffusers folder of flux" in mistake(capsys, file, out, "--layout", sd15.base)
    assert "no model_index.json" in mistake(capsys, file, out, "--layout", tmp_path)
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "is there already" in mistake(capsys, file, out, "--layout", flux.base)
    assert (out / "mine.txt").read_text() == "precious" and len(list(out.iterdir())) == 1


def test_without_vocabulary_the_way_out_is_named(tmp_path, capsys):
    file = checkpoint_of(FAMILIES["sd15"], tmp_path / "x.safetensors")
    assert "pip install --no-deps open_clip_torch" in mistake(capsys, file, tmp_path / "out")


@pytest.mark.parametrize("other", sorted(FAMILIES))
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_another_familys_base_is_told_in_one_line(name, other, tmp_path, capsys):
    if name == other:
        return
    script = load_script(FAMILIES[name].script)
    assert run_here(FAMILIES[name], tmp_path / "x", "-d", SAMPLE, "-m", FAMILIES[other].base) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"is a {FAMILIES[other].pipeline}, not {script.FAMILY_TITLE}" in line
    # one of the hub is looked at here alone
    args = script.parse_args(["-m", "b", "-d", str(SAMPLE)])
    with pytest.raises(script.UserError, match=f"is a {FAMILIES[other].pipeline}, not "):
        script.check_base(script.Components(Path(FAMILIES[other].base), args, None, None))


OF_SCHEDULE, OF_VAE, OF_UNET = "scheduler/scheduler_config.json", "vae/config.json", "unet/config.json"
UNUSUAL = {
    "EDM's schedule": ("sdxl", OF_SCHEDULE, {"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDM's schedule"),
    "a mean of the latents": ("sdxl", OF_VAE, {"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "a mean of its latents"),
    "a spread of the latents": ("sdxl", OF_VAE, {"latents_std": [5.1, 5.2, 5.3, 5.4]}, "a mean of its latents"),
    "SDXL that predicts pictures": ("sdxl", OF_SCHEDULE, {"prediction_type": "sample"}, "predicts 'sample'"),
    "SD that predicts pictures": ("sd15", OF_SCHEDULE, {"prediction_type": "sample"}, "predicts 'sample'"),
    "SDXL for inpainting": ("sdxl", OF_UNET, {"in_channels": 9}, "9 input channels"),
    "SD for editing": ("sd15", OF_UNET, {"in_channels": 8}, "8 input channels"),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_bases_that_would_be_trained_wrongly_are_refused(case, tmp_path, capsys):
    name, file, change, words = UNUSUAL[case]
    base = tmp_path / "base"
    shutil.copytree(FAMILIES[name].base, base)
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
    assert run_here(FAMILIES[name], tmp_path / "x", "-d", SAMPLE, "-m", base) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "--pretrained_model_name_or_path" in line


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory) -> Path:
    """A LoRA for the toy of SD 1.5 that is not zero."""
    import lora

    model = lora.apply_lora_to_model(lora.load_models(FAMILIES["sd15"].base, apply_to_diffusion=False)["unet"], 2)
    torch.manual_seed(0)
    for parameter in lora.get_lora_parameters(model):
        parameter.data.normal_(0, 0.1)
    return lora.save_lora(model, tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors")


def test_a_ckpt_base_is_merged_as_a_safetensors_one(small_lora, tmp_path):
    """With numbers that are no tensors beside them, and tensors that share memory, as old checkpoints have them."""
    sd15, merged = FAMILIES["sd15"], []
    tensors = single_file("sd15", ROOT / sd15.base)
    save_file(tensors, tmp_path / "a.safetensors")
    shared = torch.zeros(10)
    state = tensors | {"model_ema.x": shared[:5], "model_ema.y": shared[5:]}
    torch.save({"state_dict": state, "global_step": 470000, "epoch": 3}, tmp_path / "a.ckpt")
    torch.save(tensors, tmp_path / "bare.ckpt")
    for name in ("a.safetensors", "a.ckpt", "bare.ckpt"):
        target = tmp_path / f"merged_{name}.safetensors"
        words = [str(tmp_path / name), str(target), "--lora", str(small_lora), "--shape", sd15.base]
        assert merge_lora.main(words) == 0
        merged.append(load_file(target))
    first = merged[0]
    assert any(not torch.equal(first[k], tensors[k]) for k in tensors)
    for other in merged[1:]:
        assert all(torch.equal(first[k], other[k]) for k in tensors)


@pytest.mark.parametrize("family", [(), ("--family", "sd15")])
@pytest.mark.parametrize(
    "name", ["pickle.ckpt", "cut.ckpt", "empty.ckpt", "list.ckpt", "cut.safetensors", "x.bin", "gone.ckpt"]
)
def test_what_is_no_base_is_not_merged(name, family, small_lora, tmp_path, capsys):
    file, trace = tmp_path / name, tmp_path / "was_run"
    tensors = {"input_blocks.0.0.weight": torch.ones(3, 3)}
    if name == "pickle.ckpt":
        file.write_bytes(pickle.dumps({"state_dict": {"input_blocks.0.0.weight": Payload(trace)}}))
    elif name == "list.ckpt":
        torch.save([1, 2], file)
    elif name != "gone.ckpt":
        torch.save(tensors, file) if name.endswith(".ckpt") else save_file(tensors, file)
        file.write_bytes(file.read_bytes()[: 0 if "empty" in name else 100])
    words = [str(file), str(tmp_path / "out.safetensors"), "--lora", str(small_lora), "--shape", FAMILIES["sd15"].base]
    assert merge_lora.main([*words, *family]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"merge_lora.py: error: {file}")
    assert not trace.exists() and [f.name for f in tmp_path.glob("*out*")] == []


def damaged_copy(name: str, tmp_path: Path) -> Path:
    """A checkpoint or a folder of SD 1.5's toy with one damage."""
    if name.startswith("folder"):
        folder = tmp_path / "folder"
        shutil.copytree(FAMILIES["sd15"].base, folder)
        index, weights = folder / "model_index.json", folder / "unet" / "diffusion_pytorch_model.safetensors"
        if "weights" in name:
            weights.write_bytes(b"xx")
        elif "NaN" in name:
            save_file({k: v * float("nan") for k, v in load_file(weights).items()}, weights)
        else:
            texts = {"broken": "{x", "list": "[]", "deep": "[" * 5000, "class": json.dumps({"_class_name": [1]})}
            index.write_bytes(b"\xff\xfe" if "binary" in name else texts[name.split()[1]].encode())
        return folder
    tensors, file = single_file("sd15", ROOT / FAMILIES["sd15"].base), tmp_path / "x.safetensors"
    changes = {
        "NaN": lambda k, v: v * float("nan") if v.is_floating_point() and "attn" in k else v,
        "8 bits": lambda k, v: v.to(torch.int8),
        "narrow": lambda k, v: v[..., :3].contiguous() if v.dim() > 1 else v,
        "half": lambda k, v: v if "output_blocks" not in k else None,
    }
    change = changes.get(name, lambda k, v: v)
    changed = {k: change(k, v) for k, v in tensors.items()}
    save_file({k: v for k, v in changed.items() if v is not None}, file)
    raw = file.read_bytes()
    spoiled = {
        "cut": raw[:5000],
        "cut late": raw[:-100],
        "empty": b"",
        "page": b"<html>" * 99,
        "huge": b"\xff" * 8 + b"{}",
    }
    spoiled |= {"deep": (60000).to_bytes(8, "little") + b"[" * 60000, "list": (2).to_bytes(8, "little") + b"[]"}
    file.write_bytes(spoiled.get(name, raw))
    return file


DAMAGES = ("cut", "cut late", "empty", "page", "huge", "deep", "list", "NaN", "8 bits", "narrow", "half")
OF_FOLDERS = tuple(f"folder {what}" for what in ("broken", "list", "deep", "binary", "class", "weights", "NaN"))


@pytest.mark.parametrize("name", [*DAMAGES, *OF_FOLDERS])
def test_damaged_bases_end_in_one_line(name, small_lora, tmp_path, capsys):
    """In every command that reads one; nothing is left behind."""
    toy, damaged = FAMILIES["sd15"].base, damaged_copy(name, tmp_path)
    out = str(tmp_path / "out")
    if name.startswith("folder"):
        good = str(checkpoint_of(FAMILIES["sd15"], tmp_path / "good.safetensors"))
        commands = [(unpack_checkpoint.main, [good, out, "--layout", str(damaged)])] * (
            "weights" not in name and "NaN" not in name
        )
        commands += [(merge_lora.main, [str(damaged), out, "--lora", str(small_lora)])]
    else:
        commands = [
            (unpack_checkpoint.main, [str(damaged), out, "--layout", toy, *more]) for more in ([], ["--family", "sd15"])
        ]
        lora = ["--lora", str(small_lora), "--shape", toy]
        commands += [
            (merge_lora.main, [str(damaged), f"{out}.safetensors", *lora, *more]) for more in ([], ["--family", "sd15"])
        ]
    if not {"weights", "NaN"} & set(name.split()) and name not in ("cut late", "8 bits", "narrow", "half"):
        commands += [(detect_family.main, [str(damaged)])]
    for main, words in commands:
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in line and len(line) < 700
    assert not [f.name for f in tmp_path.iterdir() if "out" in f.name]


@pytest.mark.parametrize("scale", ["nan", "inf", "1e400", "much"])
def test_a_scale_is_a_number(scale, small_lora, tmp_path, capsys):
    assert merge_lora.main([FAMILIES["sd15"].base, str(tmp_path / "out"), "--lora", str(small_lora), scale]) == 2
    assert "the scale is not" in capsys.readouterr().err
