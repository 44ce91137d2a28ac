"""Models that describe pictures: BLIP-2, Florence-2, and other image-to-text models of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers

from lora_training.errors import UserError
from lora_training.prepare.model_folders import model_folder, remote_code_classes, weights_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL.Image import Image

    from lora_training.prepare.settings import AutoCaption

SETTING = "auto_caption: model_name"
MODEL_CLASSES = {
    "blip2": "Blip2ForConditionalGeneration",
    "florence2": "Florence2ForConditionalGeneration",
    "auto": "AutoModelForImageTextToText",
}
# of models with code of their own: the first that they have
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")
FLORENCE_TASKS = {
    "caption": "<CAPTION>",
    "detailed_caption": "<DETAILED_CAPTION>",
    "more_detailed_caption": "<MORE_DETAILED_CAPTION>",
}
QUESTION = "Describe this picture in one sentence."  # for chat models


class Captioner:
    """An image-to-text model of transformers, called with images."""

    def __init__(self, settings: AutoCaption) -> None:
        """Loads the model. Errors: UserError if it can't be had, or is of another kind."""
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.settings, self.batch_size = settings, settings.batch_size
        self.device, self.dtype = device_and_dtype(settings.device, "auto_caption")
        model_class = self.find_class()
        folder = weights_folder(settings.model_name, SETTING)
        options = {"trust_remote_code": settings.trust_remote_code}
        what = f"{SETTING} {settings.model_name}"
        self.model = load_model(model_class, folder, what, settings.model_type, dtype=self.dtype, **options)
        try:
            self.processor = load_processor(folder, options)
        except Exception as error:  # of a dozen kinds, by what it is that doesn't fit
            raise cannot_load(what, settings.model_type, error) from None
        self.model.to(self.device).eval()

    def find_class(self):
        """The class of the model. Errors: UserError if it needs code of its own, which isn't allowed."""
        settings = self.settings
        code_classes = remote_code_classes(model_folder(settings.model_name, SETTING, ["*.json"]))
        if not code_classes:
            return getattr(transformers, MODEL_CLASSES[settings.model_type])
        if not settings.trust_remote_code:
            raise UserError(
                f"{SETTING} {settings.model_name} comes with code of its own: trust_remote_code=true runs"
                " that, or take a copy in the layout of transformers, such as"
                " florence-community/Florence-2-large"
            )
        name = next((name for name in AUTO_CLASSES if name in code_classes), "AutoModel")
        return getattr(transformers, name)

    @property
    def is_chat_model(self) -> bool:
        """Whether the model expects its question as a turn of a conversation."""
        return bool(getattr(self.processor, "chat_template", None))

    def questions(self, count: int) -> list[str] | None:
        """What the model is asked, once per image; None for a model that describes without being asked."""
        settings = self.settings
        if settings.model_type == "florence2":
            return [settings.prompt or FLORENCE_TASKS[settings.task]] * count
        if self.is_chat_model:
            text = {"type": "text", "text": settings.prompt or QUESTION}
            turn = {"role": "user", "content": [{"type": "image"}, text]}
            return [self.processor.apply_chat_template([turn], add_generation_prompt=True)] * count
        return [settings.prompt] * count if settings.prompt else None

    def __call__(self, images: list[Image]) -> list[str]:
        """RGB images -> captions. A batch that the GPU's memory doesn't hold is halved."""
        return run_in_halves(self.describe, images, "auto_caption")

    def describe(self, images: list[Image]) -> list[str]:
        """RGB images -> captions, in one batch."""
        inputs = self.model_inputs(images)
        beams = {"num_beams": 3} if self.settings.model_type == "florence2" else {}
        length = self.settings.max_new_tokens
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=length, do_sample=False, **beams)
        prompt_ids = inputs.get("input_ids")
        if prompt_ids is not None and starts_with(ids, prompt_ids):  # decoder-only models repeat the prompt
            ids = ids[:, prompt_ids.shape[1] :]
        captions = self.processor.batch_decode(ids, skip_special_tokens=True)
        prompt = self.settings.prompt or ""
        return [caption.strip().removeprefix(prompt).strip() for caption in captions]

    def model_inputs(self, images: list[Image]) -> dict[str, torch.Tensor]:
        """Pixels, and the tokens of the questions, on the model's device."""
        questions = self.questions(len(images))
        text = {} if questions is None else {"text": questions, "padding": True}
        if questions is not None and self.is_chat_model:
            images = [[image] for image in images]
        inputs = dict(self.processor(images=images, **text, return_tensors="pt"))
        dtypes = {name: self.dtype if torch.is_floating_point(x) else None for name, x in inputs.items()}
        return {name: x.to(self.device, dtypes[name]) for name, x in inputs.items()}


def run_in_halves(run: Callable, images: list[Image], step: str) -> list:
    """What run(images) gives, or its halves where the GPU's memory doesn't hold the batch."""
    try:
        return run(images)
    except torch.OutOfMemoryError:
        if len(images) == 1:
            message = "the GPU's memory does not suffice for one image; use device=cpu"
            raise UserError(f"{step}: {message}") from None
    torch.cuda.empty_cache()
    middle = len(images) // 2
    return run_in_halves(run, images[:middle], step) + run_in_halves(run, images[middle:], step)


def load_model(model_class, folder: Path, what: str, kind: str, **options):
    """A model with all of its weights. Errors: UserError if it is another kind of model, or some are missing.

    what, kind: of the model, for errors.
    """
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # of a dozen kinds, by what it is that doesn't fit
        raise cannot_load(what, kind, error) from None
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        count = f"{len(missing)} tensors, such as {missing[0]}"
        raise UserError(f"{what} is no {kind} model: it has no weights for {count}")
    return model


def cannot_load(what: str, kind: str, error: Exception) -> UserError:
    """The error of a model that can't be loaded."""
    return UserError(f"{what} can't be loaded as {kind}: {' '.join(str(error).split())[:300]}")


class ProcessorPair:
    """An image processor and a tokenizer, called as the processor of a model is."""

    chat_template = None

    def __init__(self, folder: Path, options: dict) -> None:
        options_of_images = {"backend": "pil", **options}
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(folder, **options_of_images)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        self.batch_decode = self.tokenizer.batch_decode

    def __call__(self, images: list[Image], text: list[str] | None = None, **options) -> dict:
        tokens = self.tokenizer(text, **options) if text else {}
        return {**self.image_processor(images, return_tensors="pt"), **tokens}


def load_processor(folder: Path, options: dict):
    """A model's processor; for models that have none, its image processor and its tokenizer."""
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil", **options)
    is_complete = isinstance(processor, transformers.ProcessorMixin)
    return processor if is_complete else ProcessorPair(folder, options)


def device_and_dtype(device: str, step: str) -> tuple[str, torch.dtype]:
    """The device of "auto", "cuda" or "cpu", and the precision there. Errors: UserError without a GPU."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError(f"{step}: device cuda: there is no CUDA GPU; use device=cpu or auto")
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if device != "cuda":
        return device, torch.float32
    return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def starts_with(ids: torch.Tensor, prompt_ids: torch.Tensor) -> bool:
    """Whether all rows of token ids (B, N) begin with those of the prompts (B, M)."""
    length = prompt_ids.shape[1]
    return ids.shape[1] >= length and torch.equal(ids[:, :length], prompt_ids)
