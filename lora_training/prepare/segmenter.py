"""Models that find something in pictures: the subject (ONNX), persons, or what a text says (transformers)."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lora_training.errors import UserError
from lora_training.files import read_json_file
from lora_training.prepare.model_folders import model_folder, weights_folder
from lora_training.prepare.tagger import open_session

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lora_training.prepare.settings import Masks

SETTING = "masks: model_name"
ONNX_FILES = ("onnx/model.onnx", "model.onnx")
PROCESSOR_FILE = "preprocessor_config.json"
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
INPUT_SIDE = 1024  # pixels, of an ONNX model that doesn't say
MASK_CLASSES = (
    "CLIPSegForImageSegmentation",
    "Mask2FormerForUniversalSegmentation",
    "MaskFormerForInstanceSegmentation",
)
PERSON = "person"  # as COCO and ADE20K call it


def load_segmenter(settings: Masks) -> SubjectFinder | Segmenter:
    """The model of the settings. Errors: UserError if it can't be had or used."""
    return SubjectFinder(settings) if settings.model_type == "subject" else Segmenter(settings)


class SubjectFinder:
    """An ONNX model of salient objects (BiRefNet, IS-Net, U2-Net), called with images."""

    def __init__(self, settings: Masks) -> None:
        """Loads the model. Errors: UserError if it can't be had or used."""
        self.batch_size = settings.batch_size
        folder = model_folder(settings.model_name, SETTING, [*ONNX_FILES, PROCESSOR_FILE])
        files = [folder / name for name in ONNX_FILES if (folder / name).is_file()]
        if not files:
            raise UserError(f"{SETTING} {settings.model_name}: no {' or '.join(ONNX_FILES)} in {folder}")
        self.session = open_session(files[0], settings.device, "masks")
        self.input = self.session.get_inputs()[0]
        sides = [side for side in self.input.shape[2:] if isinstance(side, int)]
        config = IMAGENET | settings_of(folder / PROCESSOR_FILE)
        size = config.get("size")
        size = size if isinstance(size, dict) else {}
        default = (size.get("height", INPUT_SIDE), size.get("width", INPUT_SIDE))
        self.height, self.width = sides if len(sides) == 2 else default
        self.mean, self.std = (np.array(config[f"image_{kind}"], np.float32) for kind in ("mean", "std"))

    def __call__(self, images: list[Image.Image]) -> list[np.ndarray]:
        """RGB images -> probabilities (H, W), each of the model's own size."""
        return [self.probabilities(image) for image in images]

    def probabilities(self, image: Image.Image) -> np.ndarray:
        """An RGB image -> probabilities. Errors: UserError for a model with another output."""
        image = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        pixels = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        scores = self.session.run(None, {self.input.name: pixels.transpose(2, 0, 1)[None]})[0]
        scores = np.asarray(scores, np.float32)
        if scores.ndim < 2 or scores.size != scores.shape[-1] * scores.shape[-2]:
            raise UserError(
                f"masks: the model's output has the shape {scores.shape}, not (1, 1, height, width)"
            )
        scores = scores.reshape(scores.shape[-2:])
        if scores.min() < 0 or scores.max() > 1:  # BiRefNet gives logits, IS-Net and U2-Net probabilities
            scores = 1 / (1 + np.exp(-scores))
        return scores


class Segmenter:
    """A model of transformers that gives each pixel its class, or how well it fits a text (CLIPSeg)."""

    def __init__(self, settings: Masks) -> None:
        """Loads the model. Errors: UserError if it can't be had, or knows no such class."""
        import transformers

        from lora_training.prepare.captioner import device_and_dtype, load_model

        self.batch_size, self.prompt = settings.batch_size, settings.prompt or PERSON
        self.device, _ = device_and_dtype(settings.device, "masks")
        folder = weights_folder(settings.model_name, SETTING)
        what = f"{SETTING} {settings.model_name}"
        self.model = load_model(segmentation_class(folder, what), folder, what, "segmentation")
        self.model.to(self.device).eval()
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        if getattr(self.processor, "do_center_crop", False):
            self.processor.do_center_crop = False  # a mask is of the whole picture
        self.tokenizer = self.classes = None
        if self.model.config.model_type == "clipseg":
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        else:
            self.classes = find_classes(self.model.config.id2label, self.prompt, what)

    def __call__(self, images: list[Image.Image]) -> list[np.ndarray]:
        """RGB images -> probabilities (H, W), each of a size of its own."""
        from lora_training.prepare.captioner import run_in_halves

        return run_in_halves(self.probabilities, images, "masks")

    def probabilities(self, images: list[Image.Image]) -> list[np.ndarray]:
        """RGB images -> probabilities, in one batch."""
        import torch

        inputs = dict(self.processor(images=images, return_tensors="pt"))
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_mask")
        inputs = {name: value for name, value in inputs.items() if name in ("pixel_values", "pixel_mask")}
        if self.tokenizer is not None:
            inputs |= dict(self.tokenizer([self.prompt] * len(images), padding=True, return_tensors="pt"))
        with torch.inference_mode():
            outputs = self.model(**{name: value.to(self.device) for name, value in inputs.items()})
            scores = self.scores(outputs)[:, None]
        scores = torch.nn.functional.interpolate(scores, pixels.shape[-2:], mode="bilinear").cpu()
        maps = []
        for number, (score,) in enumerate(scores):
            if mask is not None:  # pictures of one batch stand at the upper left, and are filled up
                score = score[: int(mask[number].any(1).sum()), : int(mask[number].any(0).sum())]
            maps.append(score.clamp(0, 1).numpy())
        return maps

    def scores(self, outputs) -> torch.Tensor:
        """What a model gives -> probabilities (B, H, W) of the text, or of the classes together."""
        if self.classes is None:
            return outputs.logits.float().sigmoid()
        if "class_queries_logits" in outputs:  # each query has a class, the last one being none, and a mask
            classes = outputs.class_queries_logits.float().softmax(-1)[..., self.classes].sum(-1)
            masks = outputs.masks_queries_logits.float().sigmoid()
            return (classes[..., None, None] * masks).sum(1)
        return outputs.logits.float().softmax(1)[:, self.classes].sum(1)


def segmentation_class(folder: Path, what: str):
    """The class of a model of transformers. Errors: UserError for what gives no mask of a class or a text."""
    import transformers

    (name,) = settings_of(folder / "config.json").get("architectures") or ["no model"]
    is_known = name in MASK_CLASSES or name.endswith("ForSemanticSegmentation")
    if not is_known or not hasattr(transformers, name):
        kinds = "CLIPSeg, Mask2Former, MaskFormer, or a model for semantic segmentation"
        raise UserError(f"{what}: its config.json names {name}, which is not one of {kinds}")
    return getattr(transformers, name)


def settings_of(file: Path) -> dict:
    """A JSON file's settings; none without a file. Errors: UserError for a damaged one."""
    return read_json_file(file) if file.is_file() else {}


def find_classes(names: dict[int, str], wanted: str, what: str) -> list[int]:
    """The numbers of the classes of a name; "person" also finds "person, individual". Errors: UserError."""
    synonyms = {number: [part.strip().lower() for part in name.split(",")] for number, name in names.items()}
    found = [number for number, parts in synonyms.items() if wanted.strip().lower() in parts]
    if not found:
        near = difflib.get_close_matches(wanted, names.values(), n=3, cutoff=0.0)
        raise UserError(f"{what}: knows no class {wanted!r}; the nearest are {', '.join(near)}")
    return found
