"""What is downloaded of a base on the hub: the parts that are used, each once, in one variant."""

from __future__ import annotations

import argparse
import shutil
import types

import diffusers.pipelines.pipeline_utils as pipelines
import huggingface_hub
import pytest
import torch
from conftest import ROOT
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from lora_training.base_model.components import Components
from lora_training.base_model.sources import VAE_FILES, resolve_base
from lora_training.errors import UserError
from lora_training.families import FAMILIES

pytestmark = pytest.mark.unit

WEIGHTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def files_of_sdxl() -> list[str]:
    """As the released repository has them: two variants, pickles, other frameworks, a single file."""
    files = ["model_index.json", "README.md", "sd_xl_base_1.0.safetensors", "01.png"]
    files += ["scheduler/scheduler_config.json"]
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        weights = WEIGHTS[part.removesuffix("_2")]
        files += [
            f"{part}/config.json",
            f"{part}/{weights}.fp16.safetensors",
            f"{part}/{weights}.safetensors",
        ]
        files += [f"{part}/{weights}.bin", f"{part}/openvino_model.bin", f"{part}/model.onnx"]
    files += [
        f"{name}/{file}" for name in ("tokenizer", "tokenizer_2") for file in ("vocab.json", "merges.txt")
    ]
    return files


def files_of_sd3() -> list[str]:
    """T5 in shards, in two variants; CLIP and the transformer in one."""
    files = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "sd3_medium_incl_clips_t5xxlfp16.safetensors",
    ]
    for part in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        weights = WEIGHTS.get(part.removesuffix("_2"), "diffusion_pytorch_model")
        files += [f"{part}/config.json", f"{part}/{weights}.safetensors"]
    files += [f"text_encoder/{WEIGHTS['text_encoder']}.fp16.safetensors", "text_encoder_3/config.json"]
    files += [f"text_encoder_3/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files += [f"text_encoder_3/model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files += [
        "text_encoder_3/model.safetensors.index.json",
        "text_encoder_3/model.safetensors.index.fp16.json",
    ]
    for tokenizer, file in (
        ("tokenizer", "vocab.json"),
        ("tokenizer_2", "vocab.json"),
        ("tokenizer_3", "spiece.model"),
    ):
        files.append(f"{tokenizer}/{file}")
    return files


@pytest.fixture
def download_base(tmp_path, monkeypatch):
    """A function of (family, files of the repository, flags) -> the files that are downloaded."""

    def download(family: str, files: list[str], index: str | None = None, **flags) -> set[str]:
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        toy = ROOT / "assets" / f"toy_{index or family}" / "model_index.json"
        (snapshot / "model_index.json").write_text(toy.read_text())
        taken: list[str] = []

        def take(name, allow_patterns=None, ignore_patterns=None, **_):
            taken.extend(
                filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            )
            return str(snapshot)

        info = types.SimpleNamespace(
            siblings=[types.SimpleNamespace(rfilename=file) for file in files], sha="0"
        )
        monkeypatch.setattr(pipelines, "_resolve_revision", lambda *_, **__: "0")
        monkeypatch.setattr(pipelines, "model_info", lambda *_, **__: info)
        monkeypatch.setattr(pipelines, "snapshot_download", take)
        for module in (pipelines, huggingface_hub):
            monkeypatch.setattr(
                module, "hf_hub_download", lambda *_, **__: str(snapshot / "model_index.json")
            )
        args = argparse.Namespace(pretrained_model_name_or_path="some/base", family=FAMILIES[family])
        defaults = dict.fromkeys(("revision", "cache_dir", "variant", "drop_t5"))
        vars(args).update(defaults | flags)
        resolve_base(args)
        return set(taken)

    return download


def weights_of(files: set[str]) -> set[str]:
    return {file for file in files if file.endswith((".safetensors", ".bin", ".onnx", ".ckpt"))}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_each_part_is_downloaded_once(download_base, variant):
    """SDXL's repository has 35 GB of the same weights."""
    taken = download_base("sdxl", files_of_sdxl(), variant=variant)
    ending = ".fp16.safetensors" if variant else ".safetensors"
    parts = ("text_encoder", "text_encoder_2", "unet", "vae")
    assert weights_of(taken) == {f"{part}/{WEIGHTS[part.removesuffix('_2')]}{ending}" for part in parts}
    assert {"tokenizer_2/merges.txt", "scheduler/scheduler_config.json", "unet/config.json"} <= taken


def test_shards_of_one_variant_are_downloaded(download_base):
    taken = download_base("sd3", files_of_sd3(), variant="fp16")
    t5 = {file for file in weights_of(taken) if file.startswith("text_encoder_3")}
    assert t5 == {f"text_encoder_3/model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert "transformer/diffusion_pytorch_model.safetensors" in taken  # there is no other
    assert not any(file.startswith("sd3_medium") for file in taken)


def test_what_a_run_does_without_is_not_downloaded(download_base):
    taken = download_base("sd3", files_of_sd3(), drop_t5=True)
    assert not any(file.startswith(("text_encoder_3", "tokenizer_3")) for file in taken)
    assert "text_encoder/model.safetensors" in taken


def test_of_another_familys_base_nothing_is_downloaded(download_base):
    with pytest.raises(UserError, match="some/base is a StableDiffusionPipeline, not Stable Diffusion XL"):
        download_base("sdxl", files_of_sdxl(), index="sd15")


def test_of_a_vae_one_file_is_downloaded():
    """sdxl-vae-fp16-fix has the same weights in two layouts."""
    files = ["config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
    files += ["sdxl.vae.safetensors", "sdxl_vae.safetensors", "README.md"]
    taken = set(filter_repo_objects(files, allow_patterns=VAE_FILES))
    assert taken == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_second_variant_does_not_hide_missing_weights(tmp_path):
    """The libraries draw what is missing at random; a second file of the part has numbers enough for both."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / "assets" / "toy_sd15", base)
    file = base / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file.with_name("model.fp16.safetensors"), metadata={"format": "pt"})
    lost = next(key for key in tensors if tensors[key].ndim == 2)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    args = argparse.Namespace(family=FAMILIES["sd15"], variant=None, pretrained_vae_model_name_or_path=None)
    components = Components(base, args, torch.float32, torch.device("cpu"))
    with pytest.raises(
        UserError, match="text_encoder can't be loaded: 1 of its weights are missing, such as"
    ):
        components.get("text_encoder")
    args.variant = "fp16"
    assert components.get("text_encoder") is not None
