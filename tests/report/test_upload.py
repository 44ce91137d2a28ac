"""--push_to_hub uploads what others need, and nothing private."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from toy_parts import arguments

from lora_training.report.results import push_to_hub

pytestmark = pytest.mark.faults

PUBLIC = (
    *("pytorch_lora_weights.safetensors", "x.safetensors", "x_emb.safetensors"),
    *("README.md", "comparison.png", "samples/step-000002/00_00_a.png"),
)
PRIVATE = (
    *("wandb/run/files/config.yaml", "config.yaml", "crash.log", "data.json", "metrics.jsonl", ".lock"),
    *("report.html", "cache/latents/a.safetensors", "checkpoint-2/x.safetensors", "logs/events"),
    *("merged/unet/a.safetensors", "class_images/class_00000.png", "training_pictures/00.png"),
    "checkpoint-2/training_state.pt",
)


def test_only_what_others_need_is_uploaded(recipe, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    upload = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: SimpleNamespace(repo_id="me/x"))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: upload.update(options))
    push_to_hub(arguments(recipe, "-o", tmp_path / "x", "--push_to_hub"))
    patterns = {name: upload[name] for name in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects([*PUBLIC, *PRIVATE], **patterns)) == set(PUBLIC)
    assert upload["folder_path"] == str(tmp_path / "x")
