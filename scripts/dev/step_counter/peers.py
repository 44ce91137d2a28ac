"""Other people's trainers on the counter: what each needs to reach the step that is counted.

Nothing of theirs is part of this project. Their programs run unchanged, from their own checkout and with
their own packages: those of the interpreter that runs this. What is replaced here acts before the first step.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import torch

from scripts.dev.benchmarks.cases import Case
from scripts.dev.benchmarks.example_script import to_pixels
from scripts.dev.step_counter.empty_bases import load_without_content, write_sparse_file
from scripts.dev.step_counter.programs import STEPS, Program


class Peer(NamedTuple):
    """A trainer: its program for each family, and what the counter has to know of it."""

    scripts: dict[str, str]
    denoisers: tuple[str, ...]  # names of the classes whose call begins a step
    write_settings: Callable[[Case, Path], list]  # writes its files into the work folder; gives its arguments
    prepare: Callable[[Case, Path], None] = lambda *_: None  # in its process, before it starts
    stand_ins: tuple[str, ...] = ()  # packages and modules that it imports and doesn't use in a step


def peer_program(name: str, case: Case, work: Path, folder: Path) -> Program:
    """The program of a trainer in PEERS. folder: its checkout."""
    peer = PEERS[name]

    def prepare() -> None:
        sys.path = [str(folder), *sys.path]
        load_without_content()
        put_in_stand_ins(peer.stand_ins)
        peer.prepare(case, work)

    write_older_tokenizers(work / "base")
    argv = [str(argument) for argument in peer.write_settings(case, work)]
    return Program(folder / peer.scripts[case.family], argv, folder, peer.denoisers, prepare)


def write_older_tokenizers(base: Path) -> None:
    """transformers 4 reads CLIP's tokenizer from two more files, and knows no list of extra tokens."""
    for file in base.glob("tokenizer*/tokenizer.json"):
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        if model["type"] == "BPE":
            file.with_name("vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            file.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    for file in base.glob("tokenizer*/tokenizer_config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("extra_special_tokens", None)
        file.write_text(json.dumps(settings), encoding="utf-8")


# ---- kohya's sd-scripts ------------------------------------------------------------------------------------

KOHYA_TOKENIZERS = {"CLIP-L": "openai_clip-vit-large-patch14", "T5": "google_t5-v1_1-xxl"}
KOHYA_TOKENIZERS |= {"CLIP-G": "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"}


def write_kohya_settings(case: Case, work: Path) -> list:
    """SD 1.5 and SDXL from a folder in diffusers' format, FLUX.1 from files as it was released.

    An epoch has ten steps, so that no end of an epoch is counted. SD 1.5's text encoder runs in each step:
    its outputs can't be cached. UNets get a LoRA on all linear layers and 1 x 1 convolutions of transformers;
    a choice of layers there is only for FLUX.1, whose single blocks have one layer for attention and MLP.
    """
    pictures = work / "pictures" / "10_picture"  # ten times each
    pictures.mkdir()
    for file in list((work / "pictures").glob("*.png")):
        file.rename(pictures / file.name)
    second = "T5" if case.family == "flux" else "CLIP-G"
    (work / "tokenizers").mkdir()
    for part, tokenizer in {"tokenizer": "CLIP-L", "tokenizer_2": second}.items():
        if (work / "base" / part).exists():
            (work / "tokenizers" / KOHYA_TOKENIZERS[tokenizer]).symlink_to(work / "base" / part)
    argv = ["--train_data_dir", work / "pictures", "--tokenizer_cache_dir", work / "tokenizers"]
    argv += ["--output_dir", work / "output", "--resolution", f"{case.size},{case.size}"]
    argv += ["--train_batch_size", case.batch, "--max_train_steps", STEPS, "--max_data_loader_n_workers", 0]
    argv += ["--mixed_precision", "bf16", "--sdpa", "--cache_latents", "--optimizer_type", "AdamW"]
    argv += ["--network_train_unet_only", "--network_dim", 4, "--network_alpha", 4, "--learning_rate", 1e-4]
    argv += ["--seed", 0, *(f"--{flag}" for flag in case.flags)]
    argv += ["--cache_text_encoder_outputs"] if case.family != "sd15" else []
    if case.family != "flux":
        return [*argv, "--pretrained_model_name_or_path", work / "base", "--network_module", "networks.lora"]
    argv += ["--pretrained_model_name_or_path", work / "flux.safetensors", "--ae", work / "ae.safetensors"]
    argv += ["--clip_l", work / "text_encoder.safetensors", "--t5xxl", work / "text_encoder_2.safetensors"]
    argv += ["--guidance_scale", 1, "--timestep_sampling", "flux_shift", "--model_prediction_type", "raw"]
    without = ("img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_mod_dim")
    argv += ["--network_module", "networks.lora_flux", "--network_args", *(f"{word}=0" for word in without)]
    return argv


def prepare_kohya(case: Case, work: Path) -> None:
    """FLUX.1-dev's files, with the names that kohya's own classes have for its weights."""
    if case.family != "flux":
        return
    import transformers

    flux_models = importlib.import_module("library.flux_models")
    dev = flux_models.configs["dev"]
    write_sparse_model(work / "flux.safetensors", flux_models.Flux, dev.params)
    write_sparse_model(work / "ae.safetensors", flux_models.AutoEncoder, dev.ae_params)
    encoders = {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.T5EncoderModel}
    for name, kind in encoders.items():
        config = transformers.AutoConfig.from_pretrained(work / "base" / name)
        write_sparse_model(work / f"{name}.safetensors", kind, config)


def write_sparse_model(file: Path, make_model: Callable, config) -> None:
    """Writes a file of zeros for the weights of a model."""
    with torch.device("meta"):
        model = make_model(config)
    write_sparse_file(file, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


# ---- ai-toolkit --------------------------------------------------------------------------------------------

UNET_LAYERS = ["attn1", "attn2"]  # parts of names
TRANSFORMER_LAYERS = {"sd3": [".attn."], "flux": [".attn.", ".ff.net", ".ff_context.net"]}


def write_ai_toolkit_settings(case: Case, work: Path) -> list:
    """A job file; captions lie beside the pictures. The layers are those of this project's scripts."""
    for file in (work / "pictures").glob("*.png"):
        file.with_suffix(".txt").write_text("a picture", encoding="utf-8")
    layers = TRANSFORMER_LAYERS.get(case.family, UNET_LAYERS)
    network = {"type": "lora", "linear": 4, "linear_alpha": 4}
    pictures = {"folder_path": str(work / "pictures"), "caption_ext": "txt", "resolution": case.size}
    train = {"batch_size": case.batch, "steps": STEPS, "lr": 1e-4, "optimizer": "adamw", "dtype": "bf16"}
    train |= {"train_unet": True, "train_text_encoder": False, "cache_text_embeddings": True}
    train |= {"disable_sampling": True, "skip_first_sample": True}
    train["gradient_checkpointing"] = "gradient_checkpointing" in case.flags
    train["noise_scheduler"] = "flowmatch" if case.family in TRANSFORMER_LAYERS else "ddpm"
    architecture = "sd1" if case.family == "sd15" else case.family
    process = {
        "type": "sd_trainer",
        "training_folder": str(work / "output"),
        "device": "cuda:0",
        "network": network | {"network_kwargs": {"only_if_contains": layers}},
        "model": {"name_or_path": str(work / "base"), "arch": architecture, "dtype": "bf16"},
        "datasets": [pictures | {"cache_latents": True, "num_workers": 0}],
        "train": train,
        "save": {"save_every": 10 * STEPS},
    }
    job = {"job": "extension", "config": {"name": "counted", "process": [process]}, "meta": {}}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return [work / "job.json"]


# ---- SimpleTuner -------------------------------------------------------------------------------------------


def write_simpletuner_settings(case: Case, work: Path) -> list:
    """A file about the pictures; everything else are arguments. Its defaults choose the attention layers."""
    pictures = {"id": "pictures", "type": "local", "instance_data_dir": str(work / "pictures")}
    pictures |= {"resolution": case.size, "resolution_type": "pixel", "minimum_image_size": 0}
    pictures |= {"crop": True, "crop_aspect": "square", "repeats": 20 * case.batch}  # no epoch ends
    pictures |= {"caption_strategy": "instanceprompt", "instance_prompt": "a picture"}
    pictures |= {"cache_dir_vae": str(work / "latents"), "metadata_backend": "discovery"}
    texts = {"id": "texts", "dataset_type": "text_embeds", "default": True, "type": "local"}
    texts["cache_dir"] = str(work / "texts")
    (work / "data.json").write_text(json.dumps([pictures, texts]), encoding="utf-8")
    settings = {
        "model_family": "sd1x" if case.family == "sd15" else case.family,
        **{"model_type": "lora", "lora_type": "standard", "lora_rank": 4, "lora_alpha": 4, "lora_dropout": 0},
        "pretrained_model_name_or_path": work / "base",
        "pretrained_vae_model_name_or_path": work / "base",
        **{"data_backend_config": work / "data.json", "cache_dir": work / "cache"},
        **{"output_dir": work / "output", "report_to": "none", "validation_disable": "true"},
        **{"train_batch_size": case.batch, "max_train_steps": STEPS, "num_train_epochs": 0, "seed": 0},
        **{"mixed_precision": "bf16", "base_model_precision": "no_change", "optimizer": "torch-adamw"},
        **{"learning_rate": 1e-4, "lr_scheduler": "constant", "checkpoint_step_interval": 10 * STEPS},
        **{"resolution": case.size, "resolution_type": "pixel"},
        "gradient_checkpointing": "false",
        **({"flux_lora_target": "all"} if case.family == "flux" else {}),
        **dict.fromkeys(case.flags, "true"),
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def prepare_simpletuner(case: Case, work: Path) -> None:
    """Its settings come from the command line alone."""
    os.environ["SIMPLETUNER_CONFIG_BACKEND"] = "cmd"
    if case.family == "sd15":  # to encode texts it makes its pipeline without two parts that have no default
        module = importlib.import_module("simpletuner.helpers.models.sd1x.pipeline")
        module.StableDiffusionPipeline.__init__.__defaults__ = (None, None, None, True)


AI_TOOLKIT_UNUSED = (
    "torchaudio", "torchcodec", "av", "librosa", "mutagen", "kornia", "lpips", "pytorch_fid", "gradio",
    "timm", "controlnet_aux", "pytorch_wavelets", "open_clip", "imwatermark", "lycoris", "matplotlib",
)  # fmt: skip
SIMPLETUNER_UNUSED = (
    "torchaudio", "torchcodec", "av", "librosa", "kernels", "open_clip", "lycoris", "skrample", "spacy",
    "sdnq", "singlora", "sse_starlette", "pypinyin", "py3langid", "vector_quantize_pytorch", "imageio", "bs4",
    "wandb", "webshart", "hangul_romanize", "uvicorn",
)  # fmt: skip
PEERS = {
    "kohya": Peer(
        {"sd15": "train_network.py", "sdxl": "sdxl_train_network.py", "flux": "flux_train_network.py"},
        ("UNet2DConditionModel", "SdxlUNet2DConditionModel", "Flux"),
        write_kohya_settings,
        prepare_kohya,
    ),
    "ai-toolkit": Peer(
        dict.fromkeys(("sd15", "sdxl", "sd3", "flux"), "run.py"),
        ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"),
        write_ai_toolkit_settings,
        stand_ins=(
            *AI_TOOLKIT_UNUSED,
            # models of other families, which it imports all at once
            *(f"extensions_built_in.{name}" for name in ("diffusion_models", "audio_models", "captioner")),
        ),
    ),
    "simpletuner": Peer(
        dict.fromkeys(("sd15", "sdxl", "sd3", "flux"), "simpletuner/train.py"),
        ("FlowMapUNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"),
        write_simpletuner_settings,
        prepare_simpletuner,
        stand_ins=SIMPLETUNER_UNUSED,
    ),
}


# ---- stand-ins ---------------------------------------------------------------------------------------------


class Anything(MagicMock):
    """Answers anything; as a base of a class it counts for nothing."""

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()


class StandIns:
    """Finds modules of packages that aren't installed: it is asked last."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path=None, target=None):
        """A spec of a stand-in, or None."""
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] in self.packages else None

    def create_module(self, spec) -> Anything:
        """An empty package."""
        module = Anything(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module) -> None:
        """There is nothing to run."""


def put_in_stand_ins(names: tuple[str, ...]) -> None:
    """Makes modules of these names, and torchvision, importable, for the rest of this process.

    torchvision's transforms make tensors of pictures, and neither scale nor cut them: they have their size.
    """
    import diffusers  # noqa: F401  (has looked for torchvision, and must not find this one)
    import transformers

    transformers.utils.is_torchvision_available()
    sys.meta_path.append(StandIns(("torchvision", *names)))
    sys.modules.update({name: Anything() for name in names if "." in name})
    transforms = importlib.import_module("torchvision.transforms")
    if isinstance(transforms, MagicMock):
        transforms.Compose = lambda *_: to_pixels
