"""LoRAs of the difference of two checkpoints: what they draw, and what is said to be lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from trained_loras import draw

from lora_training.lora import extraction
from lora_training.lora.base_layers import candidate_bases
from lora_training.lora.reading import read_lora
from lora_training.lora.single_file import BaseWeights, denoiser_places, single_file
from scripts.lora import extract_lora, merge_lora

pytestmark = pytest.mark.run

CHANGED = ("attn", "ff.net.2", "conv1", "proj_out")  # in names of layers that were trained
RANK = 3  # of what each has learned


def fine_tuned(base: Path, folder: Path, norms: bool = False) -> Path:
    """A copy of a base in float32 that has learned an update of rank 3 in many layers.

    norms: whether its normalisations have changed, too.
    """
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(0)
    for file in [*folder.glob("*r/*.safetensors"), *folder.glob("unet/*.safetensors")]:
        tensors = {key: value.float() for key, value in load_file(file).items()}
        for key, value in tensors.items():
            is_layer = any(name in key for name in CHANGED) and value.dim() > 1
            if is_layer and key.endswith(".weight") and "vae" not in str(file):
                update = torch.randn(len(value), RANK, generator=generator)
                update = update @ torch.randn(RANK, value[0].numel(), generator=generator)
                tensors[key] = value + (update * (0.3 * value.norm() / update.norm())).reshape(value.shape)
            elif norms and "norm" in key and value.dim() == 1 and key.endswith("weight"):
                tensors[key] = value * 1.05
        save_file(tensors, file)
    return folder


@pytest.fixture
def tuned(family, shelf) -> Path:
    """The family's toy, fine-tuned, made when it is first asked for."""
    folder = shelf / "tuned" / family.name
    return folder if folder.exists() else fine_tuned(Path(family.base), folder)


def extract(*arguments: object) -> int:
    return extract_lora.main([str(argument) for argument in arguments])


def lost_shares(base: Path, tuned: Path, file: Path, family) -> dict[str, float]:
    """By part: the distance of base and LoRA from what was tuned, as a share of the change of all layers."""
    lora = read_lora(file, base=str(base))
    first, second = (BaseWeights(folder, family.name, lora.base.config) for folder in (base, tuned))
    errors: dict[str, list[float]] = {}
    for (part, name), shape in lora.base.shapes.items():
        if name.endswith("DenseReluDense.wi"):  # of a T5 without gates
            continue
        change = (second(part, name).float() - first(part, name).float()).reshape(shape)
        layer = lora.layers.get(part, {}).get(name)
        left = change if layer is None else change - layer.delta()
        sums = errors.setdefault(part, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + left.square().sum().item(), sums[1] + change.square().sum().item()
    shares = {part: (error / change) ** 0.5 for part, (error, change) in errors.items() if change}
    error, change = (sum(sums) for sums in zip(*errors.values(), strict=True))
    return shares | {"in all": (error / change) ** 0.5}


def printed_shares(text: str) -> dict[str, float]:
    lines = re.findall(
        r"^([\w ]+): (?:\d+ layers differ, )?([\d.]+)% of the change is lost", text, re.MULTILINE
    )
    return {part: float(percent) / 100 for part, percent in lines}


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_what_is_lost_is_said_by_part_and_in_all(spelling, family, tuned, tmp_path, capsys):
    if spelling == "diffusers" and family.name in ("sd3", "flux"):  # which have no place for T5's
        shutil.copytree(tuned, tmp_path / "tuned")
        t5 = "text_encoder_3" if family.name == "sd3" else "text_encoder_2"
        shutil.copy(Path(family.base) / t5 / "model.safetensors", tmp_path / "tuned" / t5)
        tuned = tmp_path / "tuned"
    for size in (("--rank", 2), ("--keep", 0.8), ("--rank", 9, "--dtype", "float32")):
        target = tmp_path / f"{size[1]}.safetensors"
        assert extract(family.base, tuned, target, *size, "--to", spelling) == 0
        printed = printed_shares(capsys.readouterr().out)
        shares = lost_shares(Path(family.base), tuned, target, family)
        assert printed == pytest.approx(shares, abs=2e-4)
        assert {part for part, _, _ in read_lora(target, base=family.base)} == printed.keys() - {"in all"}
        assert (
            {2: 0.2, 0.8: 0.01, 9: 0.0}[size[1]] <= shares["in all"] <= {2: 0.7, 0.8: 0.45, 9: 1e-4}[size[1]]
        )


def test_base_and_lora_draw_what_was_tuned(family, studio, tuned, tmp_path):
    """In diffusers by one spelling, merged into the base by the other."""
    own = draw(studio.kind, tuned, family)
    assert np.abs(draw(studio.kind, family.base, family) - own).max() > 0.05
    merged, file = tmp_path / "merged", tmp_path / "learned.safetensors"
    assert extract(family.base, tuned, file, "--rank", 9, "--dtype", "float32") == 0
    assert merge_lora.main([family.base, str(merged), "--lora", str(file), "--dtype", "float32"]) == 0
    assert np.abs(draw(studio.kind, merged, family) - own).max() < 1e-3


@pytest.mark.families("sd15", "flux")
def test_diffusers_draws_with_the_file(family, studio, tmp_path):
    tuned = fine_tuned(Path(family.base), tmp_path / "tuned")
    for encoder in tuned.glob("text_encoder*"):
        shutil.copy(Path(family.base) / encoder.name / "model.safetensors", encoder)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    flags = ("--rank", 3, "--dtype", "float32", "--to", "diffusers")
    assert extract(family.base, tuned, file, *flags) == 0
    own = draw(studio.kind, tuned, family)
    assert np.abs(draw(studio.kind, family.base, family, file) - own).max() < 1e-3


def test_folder_and_single_file_give_the_same_lora(family, tuned, tmp_path, capsys):
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    for folder, file in zip((Path(family.base), tuned), files, strict=True):
        save_file(single_file(family.name, folder), file)
    pairs, shape = ((family.base, tuned), (family.base, files[1]), files), ("--shape", family.base)
    loras = []
    for number, pair in enumerate(pairs):
        target = tmp_path / f"{number}.safetensors"
        assert extract(*pair, target, "--rank", 9, "--dtype", "float32", *shape) == 0
        lora = read_lora(target, base=family.base)
        loras.append({(part, name): layer.delta() for part, name, layer in lora})
    first = loras[0]
    for other in loras[1:]:
        assert other.keys() == first.keys()
        assert all((other[key] - delta).norm() < 1e-4 * delta.norm() for key, delta in first.items())
    printed = capsys.readouterr().out
    assert "of a folder and a file were not compared" in printed
    assert ("text_projection, are not in both" in printed) == (family.name == "sdxl")


def test_what_no_lora_holds_counts_as_lost(tmp_path, capsys):
    """Normalisations and the VAE: the one is part of the printed share, the other is named."""
    base = Path(FAMILIES["sd15"].base)
    tuned = fine_tuned(base, tmp_path / "tuned", norms=True)
    vae = tuned / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.float() * 1.01 for key, value in load_file(vae).items()}, vae)
    assert extract(base, tuned, tmp_path / "a.safetensors", "--rank", 3, "--dtype", "float32") == 0
    printed = capsys.readouterr().out
    assert "tensors of the vae differ, too; no LoRA holds them" in printed
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / file) for folder in (base, tuned))
    squares = {key: (after[key] - before[key].float()).square().sum().item() for key in before}
    norms = sum(square for key, square in squares.items() if before[key].dim() == 1)
    share = (norms / sum(squares.values())) ** 0.5
    assert share > 0.01 and printed_shares(printed)["unet"] == pytest.approx(share, abs=1e-4)
    assert f"{share:.2%} by" in printed


def test_a_weight_in_another_precision_has_not_changed(tmp_path, capsys):
    """A base in half precision, the tuned one in another: rounding is not taken for learning."""
    base, tuned = Path(FAMILIES["sd15"].base), tmp_path / "tuned"
    shutil.copytree(base, tuned)
    for folder in ("unet", "text_encoder"):
        (file,) = (tuned / folder).glob("*.safetensors")
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    assert extract(base, tuned, tmp_path / "a.safetensors", "--rank", 4) == 2
    assert "nothing to extract" in capsys.readouterr().err


def test_one_layer_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """No more than two tensors of each checkpoint are read before they are let go."""
    import gc
    import weakref

    base, alive, most = Path(FAMILIES["sd15"].base), [], []
    tuned = fine_tuned(base, tmp_path / "tuned")
    original = BaseWeights.tensor

    def tensor(self, *arguments):
        value = original(self, *arguments)
        alive.append(weakref.ref(value))
        most.append(sum(reference() is not None for reference in alive))
        return value

    monkeypatch.setattr(BaseWeights, "tensor", tensor)
    gc.disable()
    try:
        extraction.extract_lora_file(base, tuned, tmp_path / "a.safetensors", 2, None, "kohya", "float16")
    finally:
        gc.enable()
    assert len(most) > 100 and max(most) <= 3


RELEASED = [
    ("sd15", "the released sd15", "-"),
    ("sd15", "the released Stable Diffusion 2.x", "-"),
    ("sdxl", "the released sdxl", "-"),
    ("sd3", "the released sd3", "attn2"),  # 3 medium has no second attention
    ("sd3", "the released SD 3.5 large", "-"),
    ("flux", "the released flux", "guidance_in"),  # which schnell has not
]


@pytest.mark.parametrize(("family", "title", "absent"), RELEASED)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_released_file_is_known_by_the_sizes_of_its_layers(family, title, absent, prefix, monkeypatch):
    base = next(base for base in candidate_bases(family, None) if base.title == title)
    part, types = base.family.denoiser, {}
    for name, place in denoiser_places(family, base.config).items():
        if absent not in place.name:
            types[f"{prefix}{place.name}.weight"] = "F16", (place.height, *base.shapes[part, name][1:])
    monkeypatch.setattr(extraction, "tensor_types", lambda _: types)
    assert extraction.base_of_checkpoint(Path("x.safetensors"), family, None) is base


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("BASE BASE out.safetensors --rank 4", "nothing to extract"),
        ("BASE OTHER out.safetensors --rank 4", "is sd15, "),
        ("BASE nowhere out.safetensors --rank 4", "nowhere: no such file or folder"),
        ("BASE base.ckpt out.safetensors --rank 4", "unpack_checkpoint.py makes a folder of it"),
        ("BASE cut.safetensors out.safetensors --rank 4", "cut.safetensors: no base, or damaged"),
        ("file.safetensors file.safetensors out.safetensors --rank 4", "--shape FOLDER names"),
        ("BASE BASE out.safetensors", "--rank or --keep says how large"),
        ("BASE BASE out.safetensors --rank 0", "--rank 0: must be 1 or more"),
        ("BASE BASE out.safetensors --keep 2", "--keep 2: must be between 0 and 1"),
        ("BASE BASE out --rank 4", "must end with .safetensors"),
        ("BASE BASE file.safetensors --rank 4", "is there already"),
        ("BASE NAN out.safetensors --rank 4", "has weights that are not finite"),
        ("BASE INT out.safetensors --rank 4", "its weights are torch.int8, as of a quantised model"),
    ],
)
def test_one_line_says_why_nothing_is_extracted(arguments, expected, checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    places = {"BASE": FAMILIES["sd15"].base, "OTHER": FAMILIES["sdxl"].base}
    assert extract(*(places.get(word, word) for word in arguments.split())) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line]
    assert len(error) == 1 and expected in error[0]
    assert not list(checkpoints.glob("*out*"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder of checkpoints of SD 1.5's toy: as one file, cut off, with NaN, in whole numbers."""
    folder, base = tmp_path_factory.mktemp("checkpoints"), Path(FAMILIES["sd15"].base)
    save_file(single_file("sd15", base), folder / "file.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "file.safetensors").read_bytes()[:100])
    (folder / "base.ckpt").write_bytes(b"")
    for name, change in (("NAN", lambda x: x * torch.nan), ("INT", lambda x: x.to(torch.int8))):
        shutil.copytree(base, folder / name)
        (file,) = (folder / name / "unet").glob("*.safetensors")
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
        save_file(tensors | {key: change(tensors[key])}, file)
    return folder
