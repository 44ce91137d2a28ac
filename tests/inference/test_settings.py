"""The settings of a drawing: where they come from, what wins, and mistakes that are one line."""

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ROOT
from drawing import as_trained, plain_arguments
from safetensors.torch import save_file

import infer_lora
from lora_training import inference
from lora_training.errors import UserError

pytestmark = pytest.mark.run


def read_settings(*argv):
    """The settings of a command line, with tokens put in."""
    settings = infer_lora.read_settings([str(argument) for argument in argv])
    infer_lora.insert_tokens(settings, inference.read_trainings(settings))
    return settings


def test_what_wins_and_where_prompts_come_from(tmp_path, shelf, capsys):
    family = FAMILIES["sd15"]
    source = tmp_path / "source"
    source.mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 2)}, source / "pytorch_lora_weights.safetensors")
    save_file({"clip_l": torch.zeros(4, 8)}, source / "source_emb.safetensors")
    asked = {
        "validation_prompt": ["a DOG", "CAT and DOG"],
        "token_abstraction": "DOG, CAT",
        "instance_prompt": "x",
    }
    run = as_trained(family, source, tmp_path / "run", **asked, resolution=[72, 64])
    settings = read_settings(run)
    assert settings.prompt == ["a <s0><s1>", "<s2><s3> and <s0><s1>"]
    assert (settings.resolution.width, settings.resolution.height, settings.num_inference_steps) == (
        72,
        64,
        2,
    )
    (tmp_path / "c.yaml").write_text("num_inference_steps: 7\nseed: null\nresolution: {height: 80}\n")
    flags = ("--config", tmp_path / "c.yaml", "--resolution.width", 88, "--adapter_scale", 0.5, 1)
    settings = read_settings(run, *flags)
    assert (settings.resolution.width, settings.resolution.height, settings.num_inference_steps) == (
        88,
        80,
        7,
    )
    assert settings.seed == 5 and settings.adapter_scale == [0.5, 1.0] and settings.guidance_scale == 3.0
    assert settings.rescale_betas_zero_snr is None
    zeros = as_trained(
        family, source, tmp_path / "zeros", seed=0, validation_guidance_scale=0, instance_prompt="x"
    )
    assert (read_settings(zeros).seed, read_settings(zeros).guidance_scale) == (0, 0.0)
    plain = {"token_abstraction": None, "instance_prompt": "a photo of TOK"}
    assert (
        read_settings(as_trained(family, source, tmp_path / "b", **plain)).prompt
        == "a photo of <s0><s1><s2><s3>"
    )
    assert read_settings(as_trained(family, source, tmp_path / "c", trigger_word="sks")).prompt == "sks"
    two = read_settings(run, tmp_path / "c", "--prompt", "DOG circle sks")  # a second run's tokens count on
    assert two.prompt == "<s0><s1> <s4><s5><s6><s7> sks"
    with pytest.raises(UserError, match="is a LoRA; it comes first"):
        infer_lora.read_settings(["--prompt", "a dog", str(run)])


def test_without_configuration_card_and_metadata_say_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tensors = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(1, 2)}
    metadata = {
        "ss_base_model": "toy_flux",
        "modelspec.resolution": "96x64",
        "modelspec.trigger_phrase": "sks",
    }
    save_file(tensors, "mine.safetensors", metadata=metadata)
    settings = infer_lora.read_settings(["mine.safetensors"])
    assert settings.paths.base_model_path == FAMILIES["flux"].base and settings.prompt == "sks"
    assert (settings.resolution.width, settings.resolution.height) == (96, 64)
    Path("README.md").write_text(
        "---\nbase_model: someone/a-base\ninstance_prompt: a photo of sks\n---\n# mine\n"
    )
    settings = infer_lora.read_settings(["mine.safetensors"])
    assert (settings.paths.base_model_path, settings.prompt) == ("someone/a-base", "a photo of sks")
    save_file(tensors, "other.safetensors")
    Path("README.md").unlink()
    capsys.readouterr()
    settings = infer_lora.read_settings(["other.safetensors", "--prompt", "[a] cat"])
    assert settings.paths.base_model_path == "black-forest-labs/FLUX.1-dev" and settings.prompt == "[a] cat"
    assert "the usual one of FLUX.1" in capsys.readouterr().out


def test_pickled_weights_are_refused_unopened(tmp_path, capsys):
    (tmp_path / "bad.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    argv = plain_arguments(tmp_path, "--paths.lora_weights_path", str(tmp_path / "bad.bin"))
    assert infer_lora.main(argv) == 2
    assert "only .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("prompt: caf\xe9".encode("latin-1"), [], "not UTF-8"),
        (b"prompt: a\x00b", [], "not YAML"),
        (b"[" * 5000, [], "not YAML"),
        (b"seed: 2020-13-45", [], "not YAML"),
        (b"- a", [], "expected names and values, found list"),
        (b"paths: x", [], "paths: expected keys and values, found 'x'"),
        (b"1: 2", [], "unknown key 1"),
        (
            b"prompt: {a: 1}\npaths: {base_model_path: x}",
            [],
            "prompt: expected a text or a list of texts, found {'a': 1}",
        ),
        (b"num_inference_steps: [1]", [], "num_inference_steps"),
        (b"num_generations: true", [], "num_generations: input should be a number, found True"),
        (b"seed: 1" + b"0" * 40, [], "seed"),
        (b"adapter_scale: .nan", [], "adapter_scale: expected a finite number"),
        (b"guidance_scale: -1", [], "guidance_scale: input should be greater than or equal to 0, found -1"),
        (b"resolution: {width: 0}", [], "resolution.width"),
        (
            b"{}",
            ["--seed", "{a"],
            "--seed: input should be a valid integer, unable to parse string as an integer, found '{a'",
        ),
        (b"{}", ["--resolution.width", "1000000"], "--resolution.width: input should be less than"),
        (b"{}", ["--checkpoints", "last"], "--checkpoints: expected all, or numbers"),
        (b"{}", ["--checkpoints", "all"], "need paths.lora_weights_path"),
        (b"{}", ["--device", "cuda"], "torch finds no such device"),
        (b"{}", ["--offload", "model"], "there is no GPU in use"),
        (b"{}", ["--quantize", "nf4"], "needs an NVIDIA GPU"),
        (b"{}", ["--scheduler", "FlowMatchEulerDiscreteScheduler"], "is for bases that predict the flow"),
        (b"{}", ["--scheduler", "VQDiffusionScheduler"], "VQDiffusionScheduler can't be used here"),
        (b"{}", ["--scheduler", "RePaintScheduler"], "RePaintScheduler can't draw this"),
        (b"{}", ["--clip_skip", "9"], "the text encoder has 2 layers"),
        (b"{}", ["--max_sequence_length", "77"], "max_sequence_length is for SD3 and FLUX.1"),
        (b"{}", ["--guidance_scale", "1e38"], "has NaN in it"),
        (b"{}", ["--num_inference_steps", "5000"], "can't draw this"),
        (b"{}", ["--paths.base_model_path", "/" + "x" * 5000], "no such file or folder"),
        (b"{}", ["--paths.infer_path", "/dev/null/x"], "paths.infer_path: /dev/null/x can't be written"),
    ],
)
def test_broken_settings_are_one_line(text, flags, message, tmp_path, capfd, monkeypatch):
    if message in ("torch finds no such device", "there is no GPU in use", "needs an NVIDIA GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "c.yaml").write_bytes(text)
    common = ["--paths.base_model_path", FAMILIES["sd15"].base, "--prompt", "a"]
    common += ["--paths.infer_path", str(tmp_path / "o")]
    common += ["--num_inference_steps", "1"] if b"num_inference_steps" not in text else []
    common = [] if text.startswith((b"prompt", b"paths")) else common
    size = [] if b"resolution" in text else ["--resolution.width", "64", "--resolution.height", "64"]
    assert infer_lora.main(["--config", str(tmp_path / "c.yaml"), *common, *size, *flags]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_shipped_configuration_is_valid(monkeypatch, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")  # only looked for, not yet read
    monkeypatch.chdir(ROOT)
    settings = infer_lora.read_settings(["--paths.lora_weights_path", str(tmp_path / "lora")])
    assert settings.compare_base and len(settings.prompt) == 3
