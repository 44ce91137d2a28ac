"""Captions of image-to-text models, and models that are of another kind, incomplete, or bring code along."""

from __future__ import annotations

import json

import pytest
import tiny_models
from photo_folders import photo, prepare, read_captions
from tiny_models import COLOURS

from lora_training.errors import UserError
from lora_training.prepare.captioner import Captioner
from lora_training.prepare.settings import AutoCaption

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


def test_captions_of_each_model_and_what_is_kept(models, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("red", "blue"):
        tiny_models.colour_pictures(name)[0].resize((300, 300)).save(folder / f"{name}.png")
    (folder / "red.txt").write_text("my own words")

    def captions(number: int, *arguments: str) -> list[object]:
        out = tmp_path / f"out{number}"
        assert prepare("-d", folder, "-o", out, "--auto_caption", "max_new_tokens=8", *arguments) == 0
        return [read_captions(out)["red.png"], read_captions(out)["blue.png"]]

    florence = ("model_type=florence2", f"model_name={models['florence2']}")
    assert captions(1, *florence) == ["my own words", "a blue picture in detail"]
    assert captions(2, *florence, "overwrite=true", "trigger_word=sks") == [
        "sks, a red picture in detail",
        "sks, a blue picture in detail",
    ]
    assert captions(3, "model_type=auto", f"model_name={models['git']}") == ["my own words", "a blue picture"]
    assert captions(5, "model_type=auto", f"model_name={models['vit']}") == ["my own words", "a blue picture"]
    assert captions(4, f"model_name={models['blip2']}", "prompt=a", "overwrite=true") == [
        "red picture",
        "blue picture",
    ]


def caption_step(models, **changes):
    return AutoCaption(model_name=str(models["blip2"]), max_new_tokens=8, **changes)


def test_a_batch_that_does_not_fit_is_halved(models, monkeypatch):
    import torch

    captioner, sizes = Captioner(caption_step(models)), []
    original = captioner.describe

    def tight(images):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError
        return original(images)

    monkeypatch.setattr(captioner, "describe", tight)
    assert captioner(tiny_models.colour_pictures()) == [f"a {c} picture" for c in COLOURS]
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_a_model_of_another_kind_is_refused(models, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    photo(300, 300).save(folder / "a.png")

    def error(*arguments: str) -> str:
        assert prepare("-d", folder, "-o", tmp_path / "out", *arguments) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in printed)
        return printed[-1]

    printed = error("--auto_caption", "model_type=florence2", f"model_name={models['git']}")
    assert "can't be loaded as florence2" in printed or "is no florence2 model" in printed
    assert "no such folder: /no/where" in error("--auto_caption", "model_name=/no/where")
    assert "neither a local folder nor to be had from the hub" in error(
        "--auto_caption", "model_name=nobody/nothing"
    )
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(
        '{"model_type": "florence2_old", "auto_map": {"AutoModel": "code.Model"}}'
    )
    assert "trust_remote_code=true" in error("--auto_caption", "model_type=auto", f"model_name={strange}")
    assert "no model.onnx" in error("--auto_tagging", f"model_name={strange}")
    (strange / "model.onnx").write_bytes(b"no graph")
    (strange / "selected_tags.csv").write_text("tag_id,name,category,count\n0,x,0,1\n")
    assert "model.onnx" in error("--auto_tagging", f"model_name={strange}")
    (strange / "model.onnx").write_bytes((models["tagger"] / "model.onnx").read_bytes())
    assert "8 probabilities for 1 tags" in error("--auto_tagging", f"model_name={strange}")


def test_code_that_a_model_brings_runs_only_when_asked_for(models, tmp_path, capsys):
    model, folder = tmp_path / "model", tmp_path / "in"
    for place in (model, folder):
        place.mkdir()
    for file in models["git"].iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(
        "from transformers import GitConfig, GitForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "class Config(GitConfig):\n    model_type = 'mine'\n"
        "class Model(GitForCausalLM):\n    config_class = Config\n"
    )
    tiny_models.colour_pictures("blue")[0].resize((300, 300)).save(folder / "a.png")
    arguments = [
        "-d",
        folder,
        "-o",
        tmp_path / "out",
        "--auto_caption",
        "model_type=auto",
        f"model_name={model}",
    ]
    assert prepare(*arguments) == 2
    assert "comes with code of its own: trust_remote_code=true runs that" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert prepare(*arguments, "trust_remote_code=true", "max_new_tokens=8") == 0
    assert (tmp_path / "ran").exists() and read_captions(tmp_path / "out") == {"a.png": "a blue picture"}


def test_weights_that_are_missing_are_not_made_up(models, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in models["git"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    state = load_file(copy / "model.safetensors")
    state.pop(next(k for k in state if "visual_projection" in k))
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    step = AutoCaption(model_type="auto", model_name=str(copy))
    with pytest.raises(UserError, match="no weights for 1 tensors"):
        Captioner(step)
