"""The settings of a preparation: each key with its type, default and help, in the sections of --help; steps.

Flags and files of them are read by `lora_training.settings`; whether they fit together, `checks` says.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from lora_training.families import FAMILIES
from lora_training.prepare.duplicates import HASH_DISTANCE
from lora_training.settings import Flag, SettingsModel

STATE_FOLDER = ".prepare"  # in the output folder, with what is known from earlier runs
LARGEST_SIDE = 2**14  # pixels
CAPTION_MODELS = {"blip2": "Salesforce/blip2-opt-2.7b", "florence2": "florence-community/Florence-2-large"}
FLORENCE_WITH_CODE = "microsoft/Florence-2-large"  # the same weights; the default with trust_remote_code

MASK_MODELS = {
    "subject": "onnx-community/BiRefNet_lite-ONNX",
    "person": "openmmlab/upernet-swin-tiny",
    "text": "CIDAS/clipseg-rd64-refined",
}


def off_is_none(value):
    """None for what turns a parameter off."""
    return None if value is False or value == "off" else value


def as_number(value):
    """A number that is text."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def as_size(value):
    """One side, or "width x height" -> (width, height)."""
    parts = str(value).lower().replace("x", " ").replace(",", " ").strip("[]()").split()
    are_numbers = all(part.isascii() and part.isdigit() and int(part) for part in parts)
    sides = [int(part) for part in parts] if are_numbers else []
    if len(sides) not in (1, 2) or max(sides) > LARGEST_SIDE:
        raise ValueError(f"should be one number, or width x height such as 768x512, up to {LARGEST_SIDE}")
    return (sides * 2)[:2]


def as_buckets(value):
    """Text such as "height,width;height,width" -> [(width, height), ...]."""
    pairs = [pair.split(",") for pair in value.split(";")] if isinstance(value, str) else value
    try:
        sizes = [(int(width), int(height)) for height, width in pairs]
    except (TypeError, ValueError):
        sizes = []
    sides = [side for size in sizes for side in size]
    if not sides or any(not 1 <= side <= LARGEST_SIDE or side % 8 for side in sides):
        form = '"height,width;height,width;..." of multiples of 8'
        raise ValueError(f"should be {form}, as --aspect_ratio_buckets")
    return sizes


def as_list(value):
    """Text with commas, or one number -> a list."""
    value = str(value) if type(value) is int else value
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def as_path(value):
    """A path; None for an empty one."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError("no file has such a name")
    return os.path.expanduser(value) if isinstance(value, str) and value else value or None


Off = BeforeValidator(off_is_none)
PathText = Annotated[str | None, BeforeValidator(as_path)]
Share = Annotated[float, Field(ge=0, le=1)]
Quality = Annotated[int, Field(ge=1, le=100)]
FileFormat = Literal["jpg", "png"]
Interpolation = Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"]
Device = Literal["auto", "cuda", "cpu"]
CropPosition = Literal["center", "top", "bottom", "left", "right"]


class ImageFiltering(SettingsModel):
    """leaves out what is too small, too long, blurred, a copy, or broken"""

    min_size: int = Field(256, description="pixels that the shorter side must have", ge=1)
    min_aspect_ratio: float = Field(0.5, description="width / height, at least", gt=0)
    max_aspect_ratio: float = Field(2.0, description="width / height, at most", gt=0)
    remove_duplicates: bool = Field(False, description="keep one of pictures that look the same, the largest")
    duplicate_distance: int = Field(
        HASH_DISTANCE, description="bits of 64 in which their perceptual hashes may differ", ge=0, le=32
    )
    blur_threshold: Annotated[float | None, Off] = Field(
        None,
        description="least variance of the Laplacian; 100 is usual, the report shows each picture's (off)",
    )


class AutoCaption(SettingsModel):
    """describes what has no caption, with an image-to-text model of transformers"""

    model_type: Literal["blip2", "florence2", "auto"] = Field(
        "blip2", description="auto: any image-to-text model"
    )
    model_name: str | None = Field(None, description="hub id or local folder (by model_type)")
    prompt: str | None = Field(None, description="what the model is asked, or how its sentence begins (none)")
    task: Literal["caption", "detailed_caption", "more_detailed_caption"] = Field(
        "detailed_caption", description="of florence2; the last is longer than the 77 tokens of CLIP"
    )
    max_new_tokens: PositiveInt = Field(60, description="length at most")
    trigger_word: str | None = Field(None, description="put before every caption, once (none)")
    overwrite: bool = Field(False, description="describe also what has a caption")
    batch_size: PositiveInt = Field(8, description="images at a time")
    device: Device = "auto"
    trust_remote_code: bool = Field(False, description="run Python code that the model brings along")

    @model_validator(mode="after")
    def name_the_model(self):
        """The usual model of a type where none is named."""
        if self.model_name is None and self.model_type == "auto":
            raise ValueError("model_type auto needs model_name")
        if self.model_type == "florence2" and self.trust_remote_code:
            self.model_name = self.model_name or FLORENCE_WITH_CODE
        self.model_name = self.model_name or CAPTION_MODELS[self.model_type]
        return self


class AutoTagging(SettingsModel):
    """adds the tags of a WD14 tagger"""

    model_name: str = Field("SmilingWolf/wd-swinv2-tagger-v3", description="hub id or local folder")
    threshold: Share = Field(0.35, description="least probability of a tag")
    general_threshold: Annotated[Share | None, Off] = Field(None, description="of general tags (threshold)")
    character_threshold: Annotated[Share | None, Off] = Field(None, description="of characters (threshold)")
    exclude_tags: Annotated[list[str], BeforeValidator(as_list)] = Field([], description="with commas (none)")
    replace_underscore: bool = Field(True, description="spaces in tags; emoticons stay")
    max_tags: Annotated[PositiveInt | None, Off] = Field(None, description="the most probable so many (all)")
    trigger_word: str | None = Field(None, description="put before every caption, once (none)")
    captions: Literal["append", "missing", "replace"] = Field(
        "append", description="tags after the caption, only where there is none, or instead of it"
    )
    batch_size: PositiveInt = Field(8, description="images at a time")
    device: Device = "auto"


class Masks(SettingsModel):
    """makes masks for --masked_loss where there is none: of the subject, persons, or what a text says"""

    model_type: Literal["subject", "person", "text"] = Field(
        "subject", description="what counts: the foremost thing, all persons, or what prompt says"
    )
    prompt: str | None = Field(None, description='of text, such as "a dog" (none)')
    model_name: str | None = Field(None, description="hub id or local folder (by model_type)")
    threshold: Annotated[Share | None, Off] = Field(
        None, description="least probability that counts; off: as it is (0.5, text: 0.3)"
    )
    soft_edge: Annotated[float, Field(ge=0, le=0.2)] = Field(
        0.01, description="blur of the edge, as a share of the shorter side; 0: none"
    )
    batch_size: PositiveInt = Field(8, description="images at a time")
    device: Device = "auto"

    @model_validator(mode="after")
    def name_the_model(self):
        """The usual model and threshold of a type where none is named."""
        if (self.model_type == "text") != bool(self.prompt):
            raise ValueError("model_type text and prompt go together")
        if "threshold" not in self.model_fields_set:
            self.threshold = 0.3 if self.model_type == "text" else 0.5
        self.model_name = self.model_name or MASK_MODELS[self.model_type]
        return self


class ImageResizing(SettingsModel):
    """writes every image at one size, or within one"""

    target_resolution: Annotated[tuple[int, int] | None, BeforeValidator(as_size)] = Field(
        None, description="one side, or WIDTHxHEIGHT (512; SDXL, SD3, FLUX.1: 1024)"
    )
    mode: Literal["cover", "contain"] = Field(
        "cover", description="fill the size and crop, or fit into it and pad"
    )
    interpolation: Interpolation = "lanczos"
    crop_position: Literal["center", "top", "bottom", "left", "right", "none"] | None = Field(
        None, description="what cover keeps; none: no crop (center; none where bucketing follows)"
    )
    fill: str = Field("white", description="colour around contain, a name or #rrggbb; none: no padding")
    quality: Quality = Field(95, description="of JPEG files")
    format: FileFormat = "jpg"


class AspectRatioBucketing(SettingsModel):
    """assigns each image the size of nearest shape and about equal area that it's trained at"""

    base_resolution: int | None = Field(
        None,
        description="side of the square one (target_resolution's, else 512; SDXL, SD3, FLUX.1: 1024)",
        ge=64,
        le=LARGEST_SIDE,
    )
    custom_buckets: Annotated[list[tuple[int, int]] | None, BeforeValidator(as_buckets)] = Field(
        None, description='"height,width;height,width;..." instead'
    )
    divisibility: Annotated[Literal[8, 16, 32, 64], BeforeValidator(as_number)] = Field(
        16, description="sides are multiples of this"
    )
    max_aspect_ratio: float = Field(2.0, description="of the longest buckets, both ways", ge=1, le=4)
    resize_images: bool = Field(False, description="also scale and crop the images to their buckets")
    interpolation: Interpolation | None = Field(None, description="(as image_resizing, else lanczos)")
    crop_position: CropPosition = Field("center", description="what the crop keeps")
    quality: Quality | None = Field(None, description="of JPEG files (as image_resizing, else 95)")
    format: FileFormat | None = Field(None, description="(as image_resizing, else jpg)")


class Source(SettingsModel):
    """input and output"""

    data_dir: Annotated[PathText, Flag("DIR", ("--train_data_dir", "-d"))] = Field(
        None, description="folder of pictures; folders inside it are read too"
    )
    dataset_name: Annotated[PathText, Flag("NAME", ("--data_name",))] = Field(
        None, description="or a datasets data set: hub id, local folder, Python file"
    )
    dataset_config_name: str | None = Field(None, description="its configuration")
    dataset_split: Annotated[str, Flag("VALUE", ("--data_split",))] = Field("train", description="its split")
    image_column: str = Field("image", description="its image column")
    caption_column: str | None = Field(
        None,
        description="caption column, also of metadata files (the one of text, caption, prompt that exists)",
    )
    cache_dir: PathText = Field(None, description="folder for downloads (the hub's own)")
    output_dir: Annotated[PathText, Flag("DIR", ("--output_path", "-o"))] = Field(
        None, description="a folder of its own, outside the input"
    )
    family: Literal[tuple(FAMILIES)] = Field(
        "sd15", description="what will be trained; sets the size: 512 for sd15, else 1024"
    )
    trigger_word: str | None = Field(None, description="put before every caption, once (none)")
    masked_loss: Annotated[PathText, Flag("WHERE")] = Field(
        None, description="as in training: masks are kept, each as NAME-mask.png beside its picture (none)"
    )
    num_workers: PositiveInt | None = Field(
        None, description="threads that read and write pictures (the number of cores)"
    )


class Steps(SettingsModel):
    """steps, in their order; --help_all has their parameters"""

    image_filtering: ImageFiltering | None = None
    auto_caption: AutoCaption | None = None
    auto_tagging: AutoTagging | None = None
    masks: Masks | None = None
    image_resizing: ImageResizing | None = None
    aspect_ratio_bucketing: AspectRatioBucketing | None = None


class Doctor(SettingsModel):
    """doctor"""

    doctor: bool = Field(
        False, description="change nothing, say what is wrong; exit status 1 if something will hurt"
    )
    resolution: Annotated[list[PositiveInt] | None, BeforeValidator(as_list)] = Field(
        None, description="as in training (buckets.json of the folder, else the family's)"
    )
    aspect_ratio_buckets: str | None = Field(None, description="as in training")
    train_batch_size: PositiveInt | None = Field(None, description="as in training (1)")
    validation_split: Share | None = Field(None, description="as in training: do held-out images leak? (0)")
    seed: int | None = Field(None, description="as in training: which ones are held out")
    instance_prompt: str | None = Field(None, description="as in training: no captions are wanted")
    pretrained_model_name_or_path: Annotated[PathText, Flag("BASE", ("-m",))] = Field(
        None, description="the base whose tokenizers count the captions' tokens"
    )


class Settings(Doctor, Steps, Source):  # of the last one, the fields stand first
    """All settings of prepare_dataset.py."""
