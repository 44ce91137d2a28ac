"""Models that describe pictures for prepare_dataset.py: image-to-text models of transformers, and WD14 taggers (ONNX)."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

CAPTION_MODELS = {"blip2": "Salesforce/blip2-opt-2.7b", "florence2": "florence-community/Florence-2-large"}
OWN_CODE_FLORENCE = "microsoft/Florence-2-large"  # the same weights; the default with trust_remote_code
SNAPSHOT = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors"]
FLORENCE_TASKS = {
    "caption": "<CAPTION>",
    "detailed_caption": "<DETAILED_CAPTION>",
    "more_detailed_caption": "<MORE_DETAILED_CAPTION>",
}
GENERAL, CHARACTER = 0, 4  # categories in selected_tags.csv; others, such as ratings, are no tags


class ModelError(Exception):
    """A model that can't be had or used; the message is one line and says what to do."""


def local_folder(name: str, what: str, patterns: list[str] | None = None) -> Path:
    """The folder of a model: as given, or downloaded from the hub."""
    path = Path(name)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{what}: no such folder: {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen kinds; all mean that the model is not to be had
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{what}: {name} is neither a local folder nor to be had from the hub ({reason})") from None


def own_code(folder: Path) -> dict[str, str]:
    """The Python classes that a model wants to be run with, for lack of a layout that transformers knows; {} without."""
    from transformers import CONFIG_MAPPING

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    parts = [config, *(v for v in config.values() if isinstance(v, dict) and "model_type" in v)]
    known = all(part.get("model_type") in CONFIG_MAPPING for part in parts)
    return {} if known else config.get("auto_map", {})


class Captioner:
    """An image-to-text model of transformers: BLIP-2, Florence-2, or any that AutoModelForImageTextToText knows."""

    def __init__(self, step) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        what = f"auto_caption: model_name {step.model_name}"
        if step.device == "cuda" and not torch.cuda.is_available():
            raise ModelError("auto_caption: device cuda: there is no CUDA GPU; use device=cpu or auto")
        self.step, self.batch_size = step, step.batch_size
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if step.device == "auto" else step.device
        half = torch.bfloat16 if self.device == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
        self.dtype = half if self.device == "cuda" else torch.float32
        kind = {
            "blip2": transformers.Blip2ForConditionalGeneration,
            "florence2": transformers.Florence2ForConditionalGeneration,
            "auto": transformers.AutoModelForImageTextToText,
        }[step.model_type]
        own = own_code(local_folder(step.model_name, "auto_caption: model_name", ["*.json"]))
        if own and not step.trust_remote_code:
            raise ModelError(
                f"{what} comes with code of its own: trust_remote_code=true runs that, or take a copy in the layout of"
                " transformers, such as florence-community/Florence-2-large"
            )
        if own:
            kinds = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")
            kind = getattr(transformers, next((k for k in kinds if k in own), "AutoModel"))
        options = {"trust_remote_code": step.trust_remote_code}
        folder = local_folder(step.model_name, "auto_caption: model_name", SNAPSHOT)
        if not any(folder.glob("*.safetensors")):
            folder = local_folder(step.model_name, "auto_caption: model_name", [*SNAPSHOT, "*.bin"])
        try:
            self.model, info = kind.from_pretrained(folder, dtype=self.dtype, output_loading_info=True, **options)
            self.processor = self.load_processor(folder, options)
        except Exception as error:  # of a dozen kinds, by what it is that doesn't fit
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{what} can't be loaded as {step.model_type}: {reason}") from None
        missing = [k for k in info["missing_keys"] if not k.endswith("position_ids")]
        if missing:
            raise ModelError(
                f"{what} is no {step.model_type} model: it has no weights for {len(missing)} tensors, such as {missing[0]}"
            )
        self.model.to(self.device).eval()

    @staticmethod
    def load_processor(folder: Path, options: dict):
        """The processor; for models that have none, image processor and tokenizer by themselves."""
        import transformers

        processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil", **options)
        if isinstance(processor, transformers.ProcessorMixin):
            return processor
        pixels = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)

        class Pair:
            """Image processor and tokenizer, called as a processor is."""

            chat_template = None
            batch_decode = staticmethod(tokenizer.batch_decode)

            def __call__(self, images, text=None, **options):
                words = tokenizer(text, **options) if text else {}
                return {**pixels(images, return_tensors="pt"), **words}

        return Pair()

    def texts(self, count: int) -> list[str] | None:
        """What the model is asked, once per image; None for a model that describes without being asked."""
        step = self.step
        if step.model_type == "florence2":
            return [step.prompt or FLORENCE_TASKS[step.task]] * count
        if getattr(self.processor, "chat_template", None):
            question = step.prompt or "Describe this picture in one sentence."
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            return [self.processor.apply_chat_template([turn], add_generation_prompt=True)] * count
        return [step.prompt] * count if step.prompt else None

    def __call__(self, images: list) -> list[str]:
        """RGB images -> captions. A batch that the GPU's memory doesn't hold is halved."""
        import torch

        try:
            return self.describe(images)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise ModelError(
                    "auto_caption: the GPU's memory does not suffice for one image; use device=cpu"
                ) from None
        torch.cuda.empty_cache()
        middle = len(images) // 2
        return self(images[:middle]) + self(images[middle:])

    def describe(self, images: list) -> list[str]:
        """One batch."""
        import torch

        texts = self.texts(len(images))
        if texts is None:
            inputs = self.processor(images=images, return_tensors="pt")
        elif getattr(self.processor, "chat_template", None):
            inputs = self.processor(images=[[i] for i in images], text=texts, padding=True, return_tensors="pt")
        else:
            inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs = {
            k: v.to(self.device, self.dtype if torch.is_floating_point(v) else None) for k, v in dict(inputs).items()
        }
        beams = {"num_beams": 3} if self.step.model_type == "florence2" else {}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=self.step.max_new_tokens, do_sample=False, **beams)
        asked = inputs.get("input_ids")
        if asked is not None and ids.shape[1] >= asked.shape[1] and torch.equal(ids[:, : asked.shape[1]], asked):
            ids = ids[:, asked.shape[1] :]  # decoder-only models repeat what they were asked
        captions = self.processor.batch_decode(ids, skip_special_tokens=True)
        prompt = self.step.prompt or ""
        return [c.strip().removeprefix(prompt).strip() for c in captions]


class Tagger:
    """A WD14 tagger: model.onnx (NHWC, BGR, 0 to 255) with probabilities for the rows of selected_tags.csv."""

    def __init__(self, step) -> None:
        import onnxruntime

        self.step = step
        folder = local_folder(step.model_name, "auto_tagging: model_name", ["model.onnx", "selected_tags.csv"])
        for name in ("model.onnx", "selected_tags.csv"):
            if not (folder / name).is_file():
                raise ModelError(f"auto_tagging: model_name {step.model_name}: no {name} in {folder}")
        there = onnxruntime.get_available_providers()
        if step.device == "cuda" and "CUDAExecutionProvider" not in there:
            raise ModelError(
                "auto_tagging: device cuda: this onnxruntime has no CUDA; install onnxruntime-gpu, or device=cpu"
            )
        wanted = ["CPUExecutionProvider"] if step.device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(
                folder / "model.onnx", providers=[p for p in wanted if p in there]
            )
        except Exception as error:  # onnxruntime's own kinds have no common base
            raise ModelError(f"auto_tagging: {folder / 'model.onnx'}: {' '.join(str(error).split())[:200]}") from None
        (self.input,) = self.session.get_inputs()
        fixed = [n if isinstance(n, int) else None for n in self.input.shape]
        self.batch_size, self.side = fixed[0] or step.batch_size, fixed[1] or 448
        with open(folder / "selected_tags.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"name", "category"} <= set(rows[0]):
            raise ModelError(f"auto_tagging: {folder / 'selected_tags.csv'}: no columns name and category")
        self.tags = [(row["name"], int(row["category"])) for row in rows]
        self.excluded = {plain(t) for t in step.exclude_tags}

    def prepare(self, image):
        """RGB image -> (448, 448, 3) float32, BGR, 0 to 255, on a white square."""
        side = max(image.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        square = square.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.asarray(square, dtype=np.float32)[:, :, ::-1]

    def __call__(self, images: list) -> list[str]:
        """RGB images -> tags with commas: characters first, then by probability."""
        batch = np.ascontiguousarray(np.stack([self.prepare(i) for i in images]))
        missing = self.batch_size - len(batch)
        if missing > 0 and isinstance(self.input.shape[0], int):
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, 0)])
        (scores,) = self.session.run(None, {self.input.name: batch})
        if scores.shape[1] != len(self.tags):
            raise ModelError(
                f"auto_tagging: {self.step.model_name}: {scores.shape[1]} probabilities for {len(self.tags)} tags; model.onnx and"
                " selected_tags.csv belong to different models"
            )
        return [self.choose(row) for row in scores[: len(images)]]

    def choose(self, scores) -> str:
        """The tags above their thresholds. scores: (number of tags,)."""
        step = self.step
        limits = {
            GENERAL: step.threshold if step.general_threshold is None else step.general_threshold,
            CHARACTER: step.threshold if step.character_threshold is None else step.character_threshold,
        }
        found = [
            (category != CHARACTER, -float(score), name)
            for (name, category), score in zip(self.tags, scores, strict=True)
            if score > limits.get(category, np.inf) and plain(name) not in self.excluded
        ]
        if step.max_tags is not None:
            found = sorted(found, key=lambda f: f[1])[: step.max_tags]
        names = [name for _, _, name in sorted(found)]
        return ", ".join(spaced(n) if step.replace_underscore else n for n in names)


def plain(tag: str) -> str:
    """A tag for comparison: lower case, spaces for underscores."""
    return tag.strip().lower().replace("_", " ")


def spaced(tag: str) -> str:
    """Underscores as spaces, but for emoticons such as >_< and o_o."""
    return tag.replace("_", " ") if re.search(r"[^\W\d_]{2}", tag) else tag
