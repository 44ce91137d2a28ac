"""Damaged bases, LoRAs and embeddings are named in one line; nothing wrong is drawn in silence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ROOT, copy_of
from drawing import plain_arguments
from safetensors.torch import load_file, save_file

import infer_lora

pytestmark = pytest.mark.run

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def without(file: Path, part: str) -> None:
    save_file({k: v for k, v in load_file(file).items() if part not in k}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: cut(base / UNET), "can't be loaded"),
        (lambda base: cut(base / TEXT), "can't be loaded"),
        (lambda base: without(base / UNET, "mid_block"), "some weights of unet are missing"),
        (lambda base: without(base / TEXT, "layers.0"), "some weights of CLIPTextModel are missing"),
        (
            lambda base: (base / "vae" / "config.json").write_text('{"a": '),
            "vae/config.json: missing or damaged",
        ),
        (lambda base: (base / "model_index.json").write_text("[]"), "model_index.json: damaged"),
        (lambda base: (base / "model_index.json").unlink(), "model_index.json: missing"),
        (lambda base: shutil.rmtree(base / "tokenizer"), "its part tokenizer is missing"),
        (lambda base: shutil.rmtree(base / "scheduler"), "its part scheduler is missing"),
        (lambda base: (base / "tokenizer" / "tokenizer.json").unlink(), "tokenizer has no vocabulary"),
        (lambda base: (base / "tokenizer" / "tokenizer_config.json").unlink(), "tokenizer has no vocabulary"),
    ],
)
def test_damaged_bases_are_named(damage, message, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(FAMILIES["sd15"].base, base)
    damage(base)
    (tmp_path / "c.yaml").write_text(
        f"paths: {{base_model_path: {base}, infer_path: {tmp_path / 'o'}}}\nprompt: a\n"
    )
    assert infer_lora.main(["--config", str(tmp_path / "c.yaml")]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and str(base) in lines[0]


def down(rows: int, columns: int) -> dict:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    return {f"{name}.down.weight": torch.zeros(rows, columns), f"{name}.up.weight": torch.zeros(48, rows)}


def pairs(count: int) -> dict:
    """A LoRA of several layers."""
    start = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    names = [f"{start}.attn1.to_q", f"{start}.attn1.to_k", f"{start}.attn1.to_v", f"{start}.attn1.to_out.0"][
        :count
    ]
    return {
        f"{n}.lora_{x}.weight": torch.zeros(*s) for n in names for x, s in (("A", (4, 48)), ("B", (48, 4)))
    }


def lacking(tensors: dict, place: str) -> dict:
    """The tensors but one: of which layer, and which matrix."""
    number, matrix = place.split(".")
    layer = sorted({k.split(".lora_")[0] for k in tensors})[int(number)]
    return {k: v for k, v in tensors.items() if not k.startswith(f"{layer}.{matrix}")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"<html>404</html>", "not a safetensors file"),
        (down(4, 48), "damaged"),  # and cut
        ({"a": torch.full((2, 2), torch.nan)}, "holds NaN"),
        ({"foo.weight": torch.zeros(2, 2)}, "does not fit"),
        (down(4, 51), "does not fit"),
        ({k: v for k, v in down(4, 48).items() if "up" not in k}, "does not fit"),
        (
            {"lora_unet_joint_blocks_0_x.lora_down.weight": torch.zeros(1, 1)},
            "was trained for Stable Diffusion 3",
        ),
        (lacking(pairs(3), "1.lora_B"), "is missing in it"),
        (lacking(pairs(3), "2.lora_A"), "is missing in it"),
        (lacking(lacking(pairs(4), "0.lora_A"), "3.lora_B"), "is missing in it"),
    ],
)
def test_damaged_loras_are_named(content, message, tmp_path, capfd):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
    if message == "damaged":
        file.write_bytes(file.read_bytes()[:-8])
    flags = ["--paths.base_model_path", FAMILIES["sd15"].base, "--prompt", "a"]
    flags += ["--paths.infer_path", str(tmp_path / "o")]
    assert infer_lora.main([str(file), *flags]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and str(file) in lines[0]


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("clip_l", torch.zeros(2, 99), "does not fit a text encoder"),
        ("clip_g", torch.zeros(2, 48), "does not fit a text encoder"),
        ("emb_params", torch.zeros(2, 48), "does not fit a text encoder"),
        ("clip_l", torch.full((2, 48), torch.inf), "holds NaN or infinity"),
        ("clip_l", torch.zeros(48), "expected tables"),
        ("clip_l", torch.zeros(0, 48), "expected tables"),
    ],
)
def test_damaged_embeddings_are_named(name, table, message, tmp_path, capfd):
    save_file({name: table}, tmp_path / "x_emb.safetensors")
    flags = ["--paths.base_model_path", FAMILIES["sd15"].base, "--prompt", "a"]
    flags += ["--paths.infer_path", str(tmp_path / "o")]
    assert infer_lora.main([str(tmp_path), *flags]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and "x_emb.safetensors" in lines[0]


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer/tokenizer_config.json", "model_max_length", "many"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("unet/config.json", "norm_eps", "small"),
    ],
)
def test_a_base_that_shows_its_damage_while_it_draws_is_named(file, key, value, tmp_path, capfd):
    base = copy_of(ROOT / FAMILIES["sd15"].base, tmp_path / "base")
    settings = json.loads((base / file).read_text()) | {key: value}
    (base / file).unlink()
    (base / file).write_text(json.dumps(settings))
    argv = plain_arguments(tmp_path, "--paths.base_model_path", str(base))
    assert infer_lora.main(argv) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and str(base) in lines[0]
