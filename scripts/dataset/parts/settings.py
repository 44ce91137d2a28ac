"""The settings of prepare_dataset.py: steps with their parameters, from the command line on top of a YAML or JSON file."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Annotated, Literal

from scripts.dataset.parts.looks import SAME_LOOK
from scripts.parts.training_scripts import SCRIPTS

RESOLUTIONS = {"sd15": 512, "sdxl": 1024, "sd3": 1024, "flux": 1024}
LARGEST = 2**14  # pixels of a side
STATE = ".prepare"  # folder in the output with what is known from earlier runs
INTERPOLATIONS = Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"]
POSITION_NAMES = Literal["center", "top", "bottom", "left", "right"]


def build_schema():
    """The pydantic models of the whole configuration and of its steps."""
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

    def off_is_none(value):
        return None if value is False or value == "off" else value

    def as_number(value):
        return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value

    def as_size(value):
        parts = str(value).lower().replace("x", " ").replace(",", " ").strip("[]()").split()
        sides = [int(p) for p in parts] if all(p.isascii() and p.isdigit() and int(p) for p in parts) else []
        if len(sides) not in (1, 2) or max(sides) > LARGEST:
            raise ValueError(f"should be one number, or width x height such as 768x512, up to {LARGEST}")
        return (sides * 2)[:2]

    def as_buckets(value):
        pairs = [p.split(",") for p in value.split(";")] if isinstance(value, str) else value
        try:
            sizes = [(int(w), int(h)) for h, w in pairs]
        except (TypeError, ValueError):
            sizes = []
        if not sizes or any(not 1 <= side <= LARGEST or side % 8 for size in sizes for side in size):
            raise ValueError('should be "height,width;height,width;..." of multiples of 8, as --aspect_ratio_buckets')
        return sizes

    def as_list(value):
        return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value

    def as_place(value):
        if isinstance(value, str) and "\0" in value:
            raise ValueError("no file has such a name")
        return value or None

    Optional = BeforeValidator(off_is_none)
    Place = Annotated[str | None, BeforeValidator(as_place)]
    Share = Annotated[float, Field(ge=0, le=1)]
    Quality = Annotated[int, Field(ge=1, le=100)]

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", protected_namespaces=())

    class ImageFiltering(Strict):
        """leaves out what is too small, too long, blurred, a copy, or broken"""

        min_size: int = Field(256, ge=1, description="pixels that the shorter side must have")
        min_aspect_ratio: float = Field(0.5, gt=0, description="width / height, at least")
        max_aspect_ratio: float = Field(2.0, gt=0, description="width / height, at most")
        remove_duplicates: bool = Field(False, description="keep one of pictures that look the same, the largest")
        duplicate_distance: int = Field(
            SAME_LOOK, ge=0, le=32, description="bits of 64 in which their perceptual hashes may differ"
        )
        blur_threshold: Annotated[float | None, Optional] = Field(
            None, description="least variance of the Laplacian; 100 is usual, the report shows each picture's (off)"
        )

    class AutoCaption(Strict):
        """describes what has no caption, with an image-to-text model of transformers"""

        model_type: Literal["blip2", "florence2", "auto"] = Field("blip2", description="auto: any image-to-text model")
        model_name: str | None = Field(None, description="hub id or local folder (by model_type)")
        prompt: str | None = Field(None, description="what the model is asked, or how its sentence begins (none)")
        task: Literal["caption", "detailed_caption", "more_detailed_caption"] = Field(
            "detailed_caption", description="of florence2; the last is longer than the 77 tokens of CLIP"
        )
        max_new_tokens: PositiveInt = Field(60, description="length at most")
        trigger_word: str | None = Field(None, description="put before every caption, once (none)")
        overwrite: bool = Field(False, description="describe also what has a caption")
        batch_size: PositiveInt = Field(8, description="images at a time")
        device: Literal["auto", "cuda", "cpu"] = "auto"
        trust_remote_code: bool = Field(False, description="run Python code that the model brings along")

        @model_validator(mode="after")
        def name_the_model(self):
            from scripts.dataset.parts.caption_models import CAPTION_MODELS, OWN_CODE_FLORENCE

            if self.model_name is None and self.model_type == "auto":
                raise ValueError("model_type auto needs model_name")
            if self.model_type == "florence2" and self.trust_remote_code:
                self.model_name = self.model_name or OWN_CODE_FLORENCE
            self.model_name = self.model_name or CAPTION_MODELS[self.model_type]
            return self

    class AutoTagging(Strict):
        """adds the tags of a WD14 tagger"""

        model_name: str = Field("SmilingWolf/wd-swinv2-tagger-v3", description="hub id or local folder")
        threshold: Share = Field(0.35, description="least probability of a tag")
        general_threshold: Annotated[Share | None, Optional] = Field(None, description="of general tags (threshold)")
        character_threshold: Annotated[Share | None, Optional] = Field(None, description="of characters (threshold)")
        exclude_tags: Annotated[list[str], BeforeValidator(as_list)] = Field([], description="with commas (none)")
        replace_underscore: bool = Field(True, description="spaces in tags; emoticons stay")
        max_tags: Annotated[PositiveInt | None, Optional] = Field(None, description="the most probable so many (all)")
        trigger_word: str | None = Field(None, description="put before every caption, once (none)")
        captions: Literal["append", "missing", "replace"] = Field(
            "append", description="tags after the caption, only where there is none, or instead of it"
        )
        batch_size: PositiveInt = Field(8, description="images at a time")
        device: Literal["auto", "cuda", "cpu"] = "auto"

    class ImageResizing(Strict):
        """writes every image at one size, or within one"""

        target_resolution: Annotated[tuple[int, int] | None, BeforeValidator(as_size)] = Field(
            None, description="one side, or WIDTHxHEIGHT (512; SDXL, SD3, FLUX.1: 1024)"
        )
        mode: Literal["cover", "contain"] = Field("cover", description="fill the size and crop, or fit into it and pad")
        interpolation: INTERPOLATIONS = "lanczos"
        crop_position: Literal["center", "top", "bottom", "left", "right", "none"] | None = Field(
            None, description="what cover keeps; none: no crop (center; none where bucketing follows)"
        )
        fill: str = Field("white", description="colour around contain, a name or #rrggbb; none: no padding")
        quality: Quality = Field(95, description="of JPEG files")
        format: Literal["jpg", "png"] = "jpg"

    class AspectRatioBucketing(Strict):
        """assigns each image the size of nearest shape and about equal area that it's trained at"""

        base_resolution: Annotated[int | None, Field(ge=64, le=LARGEST)] = Field(
            None, description="side of the square one (target_resolution's, else 512; SDXL, SD3, FLUX.1: 1024)"
        )
        custom_buckets: Annotated[list[tuple[int, int]] | None, BeforeValidator(as_buckets)] = Field(
            None, description='"height,width;height,width;..." instead'
        )
        divisibility: Annotated[Literal[8, 16, 32, 64], BeforeValidator(as_number)] = Field(
            16, description="sides are multiples of this"
        )
        max_aspect_ratio: float = Field(2.0, ge=1, le=4, description="of the longest buckets, both ways")
        resize_images: bool = Field(False, description="also scale and crop the images to their buckets")
        interpolation: INTERPOLATIONS | None = Field(None, description="(as image_resizing, else lanczos)")
        crop_position: POSITION_NAMES = Field("center", description="what the crop keeps")
        quality: Quality | None = Field(None, description="of JPEG files (as image_resizing, else 95)")
        format: Literal["jpg", "png"] | None = Field(None, description="(as image_resizing, else jpg)")

    class Steps(Strict):
        image_filtering: ImageFiltering | None = None
        auto_caption: AutoCaption | None = None
        auto_tagging: AutoTagging | None = None
        image_resizing: ImageResizing | None = None
        aspect_ratio_bucketing: AspectRatioBucketing | None = None

    class Settings(Strict):
        data_dir: Place = None
        dataset_name: Place = None
        dataset_config_name: str | None = None
        dataset_split: str = "train"
        image_column: str = "image"
        caption_column: str | None = None
        cache_dir: str | None = None
        output_dir: Place = None
        family: Literal["sd15", "sdxl", "sd3", "flux"] = "sd15"
        trigger_word: str | None = None
        masked_loss: Place = None
        num_workers: PositiveInt | None = None
        steps: Steps = Field(default_factory=Steps)

    return Settings, Steps


def steps_help(schema) -> str:
    """The steps and their parameters, as --help shows them."""
    lines = ["steps, in their order; parameters are given as NAME=VALUE:"]
    for name, field in schema.model_fields.items():
        model = field.annotation.__args__[0]
        lines.append(f"\n  --{name}: {' '.join(model.__doc__.split())}")
        for key, parameter in model.model_fields.items():
            about = parameter.description or "|".join(getattr(parameter.annotation, "__args__", ()))
            default = str(parameter.default).lower() if isinstance(parameter.default, bool) else parameter.default
            shown = f" ({default})" if default not in (None, []) else ""
            lines.append(f"    {key:<20} {about}{shown}")
    return "\n".join(lines)


def make_parser(script, step_names: list[str], epilog: str):
    """The command line. Flags are those of the training scripts where one exists."""
    parser = script.OneLineParser(
        description="Turns a folder of pictures into a training set, or says what is wrong with one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=epilog,
    )
    # fmt: off
    add = parser.add_argument_group("input and output").add_argument
    add("--config", metavar="FILE", help="YAML or JSON with these flags and steps as keys; the command line wins")
    add("--data_dir", "--train_data_dir", "-d", metavar="DIR", help="folder of pictures; folders inside it are read too")
    add("--dataset_name", "--data_name", metavar="NAME", help="or a datasets data set: hub id, local folder, Python file")
    add("--dataset_config_name", help="its configuration")
    add("--dataset_split", "--data_split", help="its split (train)")
    add("--image_column", help="its image column (image)")
    add("--caption_column", help="caption column, also of metadata files (the one of text, caption, prompt that exists)")
    add("--cache_dir", help="folder for downloads (the hub's own)")
    add("--output_dir", "--output_path", "-o", metavar="DIR", help="a folder of its own, outside the input")
    add("--family", choices=sorted(SCRIPTS), help="what will be trained; sets the size: 512 for sd15, else 1024 (sd15)")
    add("--trigger_word", help="put before every caption, once (none)")
    add("--masked_loss", metavar="WHERE", help="as in training: masks are kept, each as NAME-mask.png beside its picture (none)")
    add("--num_workers", type=script.count, help="threads that read and write pictures (the number of cores)")
    add = parser.add_argument_group("steps").add_argument
    for name in step_names:
        add(f"--{name}", nargs="*", metavar="NAME=VALUE", help="switch it on; its parameters are below")
    add = parser.add_argument_group("doctor").add_argument
    add("--doctor", action="store_true", help="change nothing, say what is wrong; exit status 1 if something will hurt")
    add("--resolution", type=script.count, nargs="+", help="as in training (buckets.json of the folder, else the family's)")
    add("--aspect_ratio_buckets", help="as in training")
    add("--train_batch_size", type=script.count, help="as in training (1)")
    add("--validation_split", type=script.share, help="as in training: do held-out images leak? (0)")
    add("--seed", type=int, help="as in training: which ones are held out")
    add("--instance_prompt", help="as in training: no captions are wanted")
    add("--pretrained_model_name_or_path", "-m", metavar="BASE", help="the base whose tokenizers count the captions' tokens")
    # fmt: on
    return parser


DOCTOR_ONLY = (
    "resolution",
    "aspect_ratio_buckets",
    "train_batch_size",
    "validation_split",
    "seed",
    "instance_prompt",
    "pretrained_model_name_or_path",
)


def read_settings(argv: list[str] | None, script):
    """(settings, command line) from the command line on top of the configuration file. Errors: UserError."""
    UserError = script.UserError
    schema, step_schema = build_schema()
    names = list(step_schema.model_fields)
    args = make_parser(script, names, steps_help(step_schema)).parse_args(argv)
    try:
        values = script.read_config(args.config) if args.config else {}
    except UnicodeDecodeError:
        raise UserError(f"--config {args.config}: not UTF-8 text") from None
    steps = values.get("steps") or {}
    if isinstance(steps, list):  # a list of names, or of names with parameters
        steps = {k: v for s in steps for k, v in (s.items() if isinstance(s, dict) else [(s, {})])}
    if not isinstance(steps, dict):
        raise UserError(f"--config {args.config}: steps: expected step names, found {steps!r}")
    steps = {k: {} if v in (None, True) else v for k, v in steps.items() if v is not False}
    for name in names:
        words = getattr(args, name)
        if words is None:
            continue
        given = steps.setdefault(name, {})
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"--{name} {word}: parameters are given as NAME=VALUE")
            given[key] = value
    values["steps"] = steps
    for key in schema.model_fields:
        if key != "steps" and getattr(args, key) is not None:
            values[key] = getattr(args, key)
    settings = validated(schema, values, args.config, script)
    check_settings(settings, args, UserError)
    return settings, args


def validated(schema, values: dict, source: str | None, script):
    """The settings as an object. Errors: UserError that names the step, the parameter and the nearest known one."""
    from pydantic import ValidationError

    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
    place = [str(p) for p in problem["loc"]]
    where = ".".join(p for p in place if p != "steps" and "[" not in p)
    prefix = f"{source}: " if source else "--"
    if problem["type"] == "extra_forbidden":
        model = schema
        for part in place[:-1]:
            annotation = model.model_fields[part].annotation
            model = annotation if hasattr(annotation, "model_fields") else annotation.__args__[0]
        near = difflib.get_close_matches(place[-1], model.model_fields, n=1, cutoff=0.0)[0]
        what = "step" if place[:-1] == ["steps"] else "key" if len(place) == 1 else "parameter"
        raise script.UserError(f"{prefix}{where}: unknown {what}; the nearest is {near}")
    message = problem["msg"].removeprefix("Value error, ").lower()
    raise script.UserError(f"{prefix}{where}: {message}, found {problem['input']!r}"[:300])


def check_settings(settings, args: argparse.Namespace, UserError) -> None:
    """Refuses what can't work or would be ignored, and fills in defaults that depend on other settings."""
    if (settings.data_dir is None) == (settings.dataset_name is None):
        raise UserError("give --data_dir (a folder of pictures) or --dataset_name, one of them")
    if settings.data_dir is not None and not Path(settings.data_dir).is_dir():
        raise UserError(f"--data_dir {settings.data_dir}: no such folder")
    where = settings.masked_loss
    if where and settings.dataset_name is not None:
        raise UserError("--masked_loss is for --data_dir: a data set has no masks")
    if where and not (where == "alpha" or where[0] in "-_" or Path(where).is_dir()):
        raise UserError(f"--masked_loss {where}: neither alpha, nor a folder, nor an end of names such as -mask")
    steps, base = settings.steps, RESOLUTIONS[settings.family]
    chosen = [name for name in type(steps).model_fields if getattr(steps, name) is not None]
    if args.doctor:
        if args.output_dir or any(getattr(args, name) is not None for name in chosen):
            raise UserError("--doctor changes nothing: leave --output_dir and the steps out")
        return
    for name in DOCTOR_ONLY:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is read by --doctor alone")
    if settings.output_dir is None:
        raise UserError("--output_dir is missing: a folder for the training set")
    if not chosen:
        raise UserError(f"no step is switched on: give --{', --'.join(type(steps).model_fields)}, or --doctor")
    out = Path(settings.output_dir).resolve()
    for source in filter(None, (settings.data_dir, settings.dataset_name)):
        place = Path(source).resolve()
        if place.exists() and (out == place or out.is_relative_to(place) or place.is_relative_to(out)):
            raise UserError(
                f"--output_dir {settings.output_dir} and the input {source} lie in one another: name another folder"
            )
    if out.exists() and not out.is_dir():
        raise UserError(f"--output_dir {settings.output_dir} is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / STATE).is_dir():
        raise UserError(
            f"--output_dir {settings.output_dir} holds files that are not from here: name an empty or another folder"
        )
    words = {
        w
        for w in (settings.trigger_word, *(s.trigger_word for s in (steps.auto_caption, steps.auto_tagging) if s))
        if w
    }
    if len(words) > 1:
        raise UserError(f"trigger_word is given as {' and as '.join(sorted(words))}: name one")
    settings.trigger_word = next(iter(words), None)
    filtering, resizing, bucketing = steps.image_filtering, steps.image_resizing, steps.aspect_ratio_bucketing
    if filtering and filtering.min_aspect_ratio > filtering.max_aspect_ratio:
        raise UserError("image_filtering: min_aspect_ratio is above max_aspect_ratio")
    if resizing and resizing.target_resolution and bucketing and bucketing.resize_images:
        obey_target(resizing.target_resolution, bucketing, UserError)
    if resizing:
        resizing.target_resolution = resizing.target_resolution or (base, base)
        if resizing.crop_position is None:
            resizing.crop_position = "none" if bucketing else "center"
        if resizing.fill != "none":
            from PIL import ImageColor

            try:
                ImageColor.getrgb(resizing.fill)
            except ValueError:
                raise UserError(
                    f"image_resizing: fill {resizing.fill!r} is no colour: a name, #rrggbb, or none"
                ) from None
    if bucketing:
        bucketing.base_resolution = bucketing.base_resolution or base
        for key in ("interpolation", "quality", "format"):
            fallback = {"interpolation": "lanczos", "quality": 95, "format": "jpg"}[key]
            if getattr(bucketing, key) is None:
                setattr(bucketing, key, getattr(resizing, key) if resizing else fallback)


def obey_target(target: tuple[int, int], bucketing, UserError) -> None:
    """With a target_resolution, the buckets that pictures are written at have its area. Errors: UserError if they can't."""
    side = round((target[0] * target[1]) ** 0.5)
    given = "custom_buckets" if bucketing.custom_buckets is not None else f"base_resolution {bucketing.base_resolution}"
    if bucketing.custom_buckets is None and bucketing.base_resolution is None:
        bucketing.base_resolution = max(64, side)
    elif target not in (bucketing.custom_buckets or [(bucketing.base_resolution,) * 2]):
        raise UserError(
            f"image_resizing: target_resolution {target[0]}x{target[1]} has no effect: aspect_ratio_bucketing with resize_images"
            f" writes pictures at its {given}; leave one of the two out"
        )


def source_args(settings) -> argparse.Namespace:
    """What the training scripts' readers want to know of the source."""
    return argparse.Namespace(
        dataset_name=settings.dataset_name,
        dataset_config_name=settings.dataset_config_name,
        dataset_split=settings.dataset_split,
        train_data_dir=settings.data_dir,
        instance_data_dir=None,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        caption_per_line=False,
        masked_loss=settings.masked_loss,
        cache_dir=settings.cache_dir,
    )
