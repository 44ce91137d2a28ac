"""A single file becomes the diffusers folder that it was made from, and nothing of it is run."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from conftest import FAMILIES, ROOT, SAMPLE, losses, run_here
from safetensors.torch import load_file, save_file
from single_files import Payload, checkpoint_of

import infer_lora
from lora_training.base_model import released_models
from lora_training.base_model.clip_tokenizer import clip_tokenizer
from lora_training.base_model.released_layout import write_layout
from lora_training.base_model.unpacking import checkpoint_dtype
from lora_training.lora.single_file import single_file
from scripts.bases import unpack_checkpoint

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
    lines = [
        " ".join(pair) for pair in itertools.islice(pairs, 60000)
    ]  # the file has more lines than CLIP uses
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


def same_parts(first: Path, second: Path, parts: tuple[str, ...]) -> bool:
    """Whether two diffusers folders have the same weights; keys of text encoders have lost a level in one of
    them.
    """

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
    write_layout(name, tmp_path / "x", clip_tokenizer())
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
    """With the toy's sizes in the released models' place: the folder has the weights that the file was made
    from.
    """
    family = FAMILIES[name]

    def own(part: str) -> dict:
        config = json.loads((ROOT / family.base / part / "config.json").read_text())
        return {
            k: v for k, v in config.items() if not k.startswith("_") and k not in ("architectures", "dtype")
        }

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
    assert not list(tmp_path.glob(".*out*"))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_an_unpacked_folder_trains_as_its_base(name, tmp_path):
    """With --layout, from which the parts come that the file lacks."""
    family, text = (
        FAMILIES[name],
        name != "sd3",
    )  # both CLIPs of SD3's toy are of one width, which the reader goes by
    lacking = ("unet", "transformer", "vae", *(("text_encoder", "text_encoder_2") if text else ()))
    layout = layout_without_weights(family, tmp_path / "layout", lacking)
    file = checkpoint_of(family, tmp_path / "model.safetensors", text)
    assert unpack(file, tmp_path / "base", "--layout", layout) == 0
    flags = ("-d", SAMPLE, "--max_train_steps", 2)
    assert run_here(family, tmp_path / "x", *flags, "-m", tmp_path / "base") == 0
    assert run_here(family, tmp_path / "y", *flags) == 0
    assert losses(tmp_path / "x") == pytest.approx(losses(tmp_path / "y"), abs=1e-5)


@pytest.mark.parametrize(
    ("dtypes", "expected"), [((torch.float16,), "float16"), ((torch.bfloat16,), "bfloat16")]
)
def test_half_precision_stays(dtypes, expected, tmp_path):
    tensors = {"a": torch.zeros(2, 2, dtype=dtypes[0]), "schedule": torch.zeros(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert checkpoint_dtype(tmp_path / "x.safetensors") == getattr(torch, expected)
    save_file(tensors | {"b": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    assert checkpoint_dtype(tmp_path / "x.safetensors") == torch.float32


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


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("sd15", ".ckpt"), ("sd15", ".safetensors"), ("sdxl", ".safetensors"), ("sd3", ".safetensors")],
)
def test_single_file_base_trains_and_draws(name, suffix, tmp_path, monkeypatch):
    """A checkpoint in a folder of configurations: the run equals that on the diffusers folder, and pictures
    are drawn.
    """
    family = FAMILIES[name]
    folder = tmp_path / "base"
    text = (
        "text_encoder*" if name != "sd3" else ""
    )  # both CLIPs of SD3's toy are of one width, which the reader goes by
    shutil.copytree(family.base, folder)
    for pattern in ("unet", "transformer", "vae", text):
        for part in folder.glob(pattern) if pattern else []:
            for weights in part.glob("*.safetensors"):
                weights.unlink()
    tensors = {
        k: v for k, v in single_file(name, ROOT / family.base).items() if text or not k.startswith("text_enc")
    }
    file = folder / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ("-d", SAMPLE, "--max_train_steps", 2, "--cache_dir", tmp_path / "cache")
    assert run_here(family, tmp_path / "x", *flags, "-m", file) == 0
    assert run_here(family, tmp_path / "y", *flags) == 0
    assert losses(tmp_path / "x") == pytest.approx(losses(tmp_path / "y"), abs=1e-5)
    if suffix == ".safetensors":
        words = ["--paths.base_model_path", str(file), "--paths.lora_weights_path", str(tmp_path / "x")]
        words += [
            "--paths.infer_path",
            str(tmp_path / "pictures"),
            "--prompt",
            "a red circle",
            "--num_inference_steps",
            "2",
        ]
        words += [
            "--num_generations",
            "1",
            "--adapter_scale",
            "1",
            "--resolution.width",
            "64",
            "--resolution.height",
            "64",
        ]
        assert infer_lora.main(words) == 0
        assert list((tmp_path / "pictures").rglob("*.png"))
