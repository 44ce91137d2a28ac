"""Bases of the released models' sizes without a file of weights: configurations, tokenizers, random weights.

What a step costs depends on sizes alone. Each weight is drawn on the device by its name, so that every
program, and every way of loading, gets the same ones.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from pathlib import Path
from unittest.mock import patch

import torch

from lora_training.base_model.released_models import DENOISERS, OTHER_PARTS
from lora_training.families import FAMILIES
from scripts.dev import ROOT


def write_base(family: str, folder: Path, tiny: bool, shallow: bool) -> None:
    """Writes a diffusers folder without weights; tokenizers and scheduler are the toy base's.

    tiny: of the toy base's sizes; shallow: text encoders of two layers.
    """
    toy = ROOT / "assets" / f"toy_{family}"
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    if tiny:
        return
    parts = {FAMILIES[family].denoiser: ("diffusers", *DENOISERS[family])} | OTHER_PARTS[family]
    for name, (library, class_name, config) in parts.items():
        if name == "scheduler":
            continue
        if library == "diffusers":
            write_diffusers_config(folder / name, class_name, config)
        else:
            write_text_encoder_config(folder / name, class_name, config, shallow)


def write_diffusers_config(folder: Path, class_name: str, config: dict) -> None:
    """Writes config.json of a denoiser or VAE, with the class's own values for what `config` doesn't say."""
    import diffusers

    model_class = getattr(diffusers, class_name)  # its modules may compute with tensors as they are imported
    with torch.device("meta"):
        model_class(**config).save_config(folder)


def write_text_encoder_config(folder: Path, class_name: str, config: dict, shallow: bool) -> None:
    """Writes config.json of a text encoder, with two layers if it's to be shallow."""
    import transformers

    is_t5 = "d_model" in config
    depth = {"num_layers" if is_t5 else "num_hidden_layers": 2} if shallow else {}
    config_class = transformers.T5Config if is_t5 else transformers.CLIPTextConfig
    config_class(**config | depth, architectures=[class_name]).save_pretrained(folder)


def draw_tensor(name: str, shape, dtype: torch.dtype, device) -> torch.Tensor:
    """The tensor of this name: matrices as torch's layers begin, biases 0, scales of norms 1."""
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
    bound = shape[1:].numel() ** -0.5
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).uniform_(-bound, bound, generator=generator)


def empty_model(model_class, folder: Path) -> torch.nn.Module:
    """A model of diffusers or transformers by its configuration: empty parameters, real buffers."""
    import accelerate
    import diffusers
    import transformers

    with accelerate.init_empty_weights(include_buffers=False):
        if issubclass(model_class, diffusers.ModelMixin):
            return model_class.from_config(model_class.load_config(folder))
        return model_class(transformers.AutoConfig.from_pretrained(folder))


def random_model(model_class, folder: Path, dtype: torch.dtype, device) -> torch.nn.Module:
    """The same with random weights, on the device."""
    import transformers

    model = empty_model(model_class, folder)
    names = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                value = draw_tensor(f"{names[id(module)]}.{leaf}", parameter.shape, dtype, device)
                module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
        for leaf, buffer in module._buffers.items():
            is_stored = leaf not in module._non_persistent_buffers_set
            if buffer is not None and buffer.is_floating_point() and is_stored:
                module._buffers[leaf] = buffer.to(dtype)
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()
    return model.to(device).eval()


class RandomFile:
    """What `safetensors.safe_open` gives, for a file that isn't there: a model's tensors.

    The model is that of the configuration in the file's folder.
    """

    def __init__(self, file: Path, device) -> None:
        import diffusers

        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        model = empty_model(getattr(diffusers, config["_class_name"]), file.parent)
        self.tensors, self.device = model.state_dict(), device

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.tensors = {}

    def keys(self):
        return self.tensors.keys()

    def get_slice(self, name: str):
        shape = self.tensors[name].shape
        return type("Slice", (), {"get_shape": lambda _: list(shape)})()

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return draw_tensor(name, tensor.shape, torch.bfloat16, self.device) if tensor.is_meta else tensor


@contextlib.contextmanager
def random_weights(device):
    """While inside, models come with random weights on the device, whatever folder they are read from."""
    import diffusers
    import safetensors
    import transformers

    real_open = safetensors.safe_open

    def from_pretrained(cls, folder, *_, subfolder=None, dtype=None, torch_dtype=None, **options):
        dtype = dtype or torch_dtype
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
        model = random_model(cls, Path(folder) / (subfolder or ""), dtype, device)
        return (model, {"missing_keys": []}) if options.get("output_loading_info") else model

    def safe_open(file, *rest, **options):
        return real_open(file, *rest, **options) if Path(file).exists() else RandomFile(Path(file), device)

    with (
        patch.object(diffusers.ModelMixin, "from_pretrained", classmethod(from_pretrained)),
        patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
        patch.object(safetensors, "safe_open", safe_open),
    ):
        yield
