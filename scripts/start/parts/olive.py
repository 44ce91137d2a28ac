"""Olive's workflows (JSON) and its one-line command, as flags of the training scripts and of prepare_dataset.py.

What Olive documents of its SDLoRA pass is in the tables below, one row for each of its parameters: (its name, our flag, its
default). Olive's defaults hold, also where ours differ. The parts of a workflow that say where it runs are left out, with a note.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from scripts.start.parts.words import StartError, as_words, is_given

FAMILIES = {"auto": None, "sd": "sd15", "sd15": "sd15", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux"}
LEFT_OUT = None  # our flag for what has no meaning here

PASS = (
    ("r", "rank", 16),
    ("alpha", "lora_alpha", None),
    ("lora_dropout", "lora_dropout", None),
    ("target_modules", "lora_layers", None),
    ("merge_lora", "merge_lora", None),
    ("dreambooth", "dreambooth", None),
    ("instance_prompt", "instance_prompt", None),
    ("with_prior_preservation", "with_prior_preservation", None),
    ("class_prompt", "class_prompt", None),
    ("class_data_dir", "class_data_dir", None),
    ("num_class_images", "num_class_images", None),
    ("prior_loss_weight", "prior_loss_weight", None),
)
TRAINING = (
    ("learning_rate", "learning_rate", 1e-4),
    ("max_train_steps", "max_train_steps", 1000),
    ("train_batch_size", "train_batch_size", 1),
    ("gradient_accumulation_steps", "gradient_accumulation_steps", 4),
    ("gradient_checkpointing", "gradient_checkpointing", True),
    ("mixed_precision", "mixed_precision", "bf16"),
    ("lr_scheduler", "lr_scheduler", "constant"),
    ("lr_warmup_steps", "lr_warmup_steps", 0),
    ("max_grad_norm", "max_grad_norm", 1.0),
    ("snr_gamma", "snr_gamma", None),
    ("checkpointing_steps", "checkpointing_steps", 500),
    ("logging_steps", "logging_steps", 10),
    ("seed", "seed", None),
    ("guidance_scale", "guidance_scale", None),
    ("use_prodigy", "use_prodigy", None),
    ("prodigy_beta3", "prodigy_beta3", None),
)
FOLDER = (
    ("data_dir", "train_data_dir", None),
    ("default_caption", "default_caption", None),
    ("shuffle_tags", "shuffle_tags", None),
    ("tag_separator", "tag_separator", None),
    ("max_samples", "max_train_samples", None),
    ("instance_prompt", "instance_prompt", None),
    ("class_data_dir", "class_data_dir", None),
    ("class_prompt", "class_prompt", None),
    ("recursive", LEFT_OUT, None),
)
HUB = (
    ("data_name", "dataset_name", None),
    ("subset", "dataset_config_name", None),
    ("split", "dataset_split", None),
    ("image_column", "image_column", None),
    ("caption_column", "caption_column", None),
    ("max_samples", "max_train_samples", None),
)
PREPARED = ("train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "image_column", "caption_column")
SOURCES = {"image_folder_dataset": FOLDER, "huggingface_dataset": HUB}
PREPROCESSING = ("base_resolution", "output_dir", "steps", "device", "overwrite")
BASE_RESOLUTION = 512
ONE_FAMILY = {"guidance_scale": ("flux",), "snr_gamma": ("sd15", "sdxl")}  # flags that the other families lack
NOTED = ("systems", "host", "target")  # where a workflow runs: here it runs where it's started
NOTED += (
    "engine",
    "evaluators",
    "evaluator",
    "cache_dir",
    "cache_config",
    "clean_cache",
    "no_artifacts",
    "log_severity_level",
)
NOTED += ("log_to_file", "workflow_id", "azureml_client", "search_strategy", "evaluate_input_model", "packaging_config")

# preprocessing: (its parameter, that of prepare_dataset.py, its default)
STEPS = {
    "image_filtering": (
        ("min_size", "min_size", None),
        ("min_aspect_ratio", "min_aspect_ratio", None),
        ("max_aspect_ratio", "max_aspect_ratio", None),
        ("remove_duplicates", "remove_duplicates", None),
        ("blur_threshold", "blur_threshold", None),
    ),
    "auto_caption": (
        *((name, name, None) for name in ("model_type", "model_name", "trigger_word", "trust_remote_code")),
        *((name, name, None) for name in ("overwrite", "batch_size", "max_new_tokens", "prompt", "task")),
        ("device", "device", None),
    ),
    "auto_tagging": (
        *((name, name, None) for name in ("model_name", "threshold", "general_threshold", "character_threshold")),
        *(
            (name, name, None)
            for name in ("batch_size", "trigger_word", "exclude_tags", "replace_underscore", "max_tags")
        ),
        ("overwrite", "captions", False),
        ("device", "device", None),
        ("include_rating", LEFT_OUT, None),
    ),
    "image_resizing": (
        ("target_resolution", "target_resolution", None),
        ("resize_mode", "mode", None),
        ("resample_mode", "interpolation", None),
        ("fill_color", "fill", None),
        ("crop_position", "crop_position", None),
        ("overwrite", LEFT_OUT, None),
        ("output_dir", LEFT_OUT, None),
    ),
    "aspect_ratio_bucketing": (
        ("base_resolution", "base_resolution", None),
        ("custom_buckets", "custom_buckets", None),
        ("resize_images", "resize_images", True),
        ("resample_mode", "interpolation", None),
        ("crop_position", "crop_position", None),
        ("resize_mode", LEFT_OUT, None),
        ("fill_color", LEFT_OUT, None),
        ("overwrite", LEFT_OUT, None),
        ("output_dir", LEFT_OUT, None),
    ),
}
SIZE_OF_STEP = {"image_resizing": "target_resolution", "aspect_ratio_bucketing": "base_resolution"}
SPELLINGS = {  # values of ours for values of theirs; what isn't here is the same
    "captions": lambda overwrite: "replace" if overwrite else "missing",
    "device": lambda device: "auto" if str(device).startswith("cuda") else device,
    "fill": lambda colour: "#%02x%02x%02x" % tuple(colour) if isinstance(colour, list) else colour,  # noqa: UP031
    "custom_buckets": lambda sizes: ";".join(f"{h},{w}" for w, h in sizes),
    "exclude_tags": ",".join,
}
# the flags that `olive diffusion-lora` has, with the defaults that hold where they aren't given
ONE_LINER = {
    "rank --lora_r -r": 16,
    "max_train_steps --num_train_epochs": 1000,
    "gradient_accumulation_steps": 4,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "aspect_ratio_buckets": "auto",
    "logging_steps": 10,
}
PRIOR = ("class_prompt", "class_data_dir", "num_class_images", "prior_loss_weight")
ONE_LINER_PRIOR = {"num_class_images": 200}


@dataclass
class Workflow:
    """A workflow in our flags: what is trained, what prepare_dataset.py does first, and what has to be said."""

    family: str | None
    model: str
    train: dict[str, object]
    prepare: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_workflow(values: object) -> bool:
    return isinstance(values, dict) and ("input_model" in values or "passes" in values)


def family_named(variant: object, where: str) -> str | None:
    """The family of a model_variant; None for auto. Errors: StartError that lists them."""
    if variant not in FAMILIES:
        raise StartError(f"{where} {variant!r}: one of auto, sd15, sdxl, sd3, flux")
    return FAMILIES[variant]


def one_liner(words: list[str]) -> dict[str, object]:
    """The defaults of `olive diffusion-lora` for what its command line, `words`, doesn't say."""
    prior = ONE_LINER_PRIOR if is_given(words, "--dreambooth --with_prior_preservation") else {}
    given = {**ONE_LINER, **prior}
    return {names.split()[0]: value for names, value in given.items() if not is_given(words, f"--{names}")}


def translate(workflow: dict, file: str) -> Workflow:
    """A workflow as flags. Errors: StartError that names the place in the file and, for a name, the nearest known one."""
    check_names(workflow, ("input_model", "data_configs", "passes", "output_dir", *NOTED), file)
    model, passes = section(workflow, "input_model", file), section(workflow, "passes", file)
    if str(model.get("type")).lower() != "diffusersmodel" or not isinstance(model.get("model_path"), str):
        raise StartError(f"{file}: input_model: expected type DiffusersModel and a model_path")
    noted = ", ".join(name for name in NOTED if name in workflow)
    notes = [f"note: {file}: {noted}: left out; the training runs here, as it was started"] if noted else []
    lora, others = training_pass(passes, file)
    notes += [f"note: {file}: {name}: left out; only the SDLoRA pass trains" for name in others]
    training = section(lora, "training_args", file) if lora.get("training_args") else {}
    data = data_config(workflow.get("data_configs"), lora.get("train_data_config"), file)
    flags = {"output_dir": workflow.get("output_dir")} | source_flags(data, file)
    flags |= translated(PASS, lora, f"{file}: SDLoRA", ("type", "model_variant", "train_data_config", "training_args"))
    flags |= translated(TRAINING, training, f"{file}: training_args")
    if not (lora.get("dreambooth") or lora.get("with_prior_preservation")):  # Olive writes them down all the same
        flags = {name: value for name, value in flags.items() if name not in PRIOR}
    elif "num_class_images" not in lora:
        flags |= ONE_LINER_PRIOR
    chosen = parameters(section(data, "pre_process_data_config", file)) if data.get("pre_process_data_config") else {}
    check_names(chosen, PREPROCESSING, f"{file}: image_lora_preprocess")
    source = section(data, "load_dataset_config", file)
    idle = left_out(SOURCES[source["type"]], parameters(source))
    prepare: list[str] = []
    if chosen.get("steps"):
        folder = chosen.get("output_dir") or f"{workflow.get('output_dir') or 'output/olive'}_prepared"
        moved = {name: flags.pop(name) for name in PREPARED if name in flags}
        prepare = [*as_words(moved | {"output_dir": folder}), *step_words(chosen, file)]
        idle += [f"{step}.{n}" for step, given in chosen["steps"].items() for n in left_out(STEPS[step], given or {})]
        flags["train_data_dir"] = folder
    if not chosen.get("steps"):
        flags["aspect_ratio_buckets"] = "auto"
    if "aspect_ratio_bucketing" not in (chosen.get("steps") or {}):  # where it's prepared, buckets.json has the size
        flags["resolution"] = chosen.get("base_resolution", BASE_RESOLUTION)
    notes += [f"note: {file}: {name}: left out; there is no such choice here" for name in idle]
    family = family_named(lora.get("model_variant", "auto"), f"{file}: model_variant")
    return Workflow(family, model["model_path"], flags, prepare, notes)


def for_family(flags: dict[str, object], family: str) -> tuple[dict[str, object], list[str]]:
    """The flags that the family has, and notes on those that it lacks."""
    lost = [name for name, families in ONE_FAMILY.items() if flags.get(name) and family not in families]
    notes = [f"note: {name} is left out: it is for {' and '.join(ONE_FAMILY[name])}" for name in lost]
    return {name: value for name, value in flags.items() if name not in lost}, notes


def training_pass(passes: dict, file: str) -> tuple[dict, list[str]]:
    """The one pass of type SDLoRA, and the names of the others."""
    ours = [name for name, one in passes.items() if str(one.get("type")).lower() == "sdlora"]
    if len(ours) != 1:
        raise StartError(f"{file}: passes: expected one of type SDLoRA, found {len(ours)}")
    return passes[ours[0]], [name for name in passes if name != ours[0]]


def data_config(configs: object, wanted: object, file: str) -> dict:
    """The data_configs entry that train_data_config names, or the section that stands there itself."""
    if isinstance(wanted, dict):
        return wanted
    named = {one.get("name"): one for one in configs} if isinstance(configs, list) else configs or {}
    if wanted not in named:
        raise StartError(f"{file}: train_data_config {wanted!r} is none of data_configs ({', '.join(map(str, named))})")
    return named[wanted]


def source_flags(data: dict, file: str) -> dict[str, object]:
    """Where the pictures come from."""
    source = section(data, "load_dataset_config", file)
    if source.get("type") not in SOURCES:
        raise StartError(f"{file}: load_dataset_config: type {source.get('type')!r} is none of {', '.join(SOURCES)}")
    return translated(SOURCES[source["type"]], parameters(source), f"{file}: {source['type']}")


def parameters(component: dict) -> dict:
    """The parameters of a data component, which stand in its params or beside its type."""
    beside = {name: value for name, value in component.items() if name not in ("type", "name", "params")}
    return beside | (component.get("params") or {})


def step_words(chosen: dict, file: str) -> list[str]:
    """The steps of image_lora_preprocess as flags of prepare_dataset.py."""
    check_names(chosen["steps"], STEPS, f"{file}: steps")
    buckets, words = chosen["steps"].get("aspect_ratio_bucketing") or {}, []
    for name, given in chosen["steps"].items():
        known = [theirs for theirs, _, _ in STEPS[name]]
        shared = {k: chosen[k] for k in ("device", "overwrite") if k in chosen and k in known}
        size = {SIZE_OF_STEP[name]: chosen.get("base_resolution", BASE_RESOLUTION)} if name in SIZE_OF_STEP else {}
        values = translated(STEPS[name], shared | size | (given or {}), f"{file}: {name}")
        if buckets.get("custom_buckets") and buckets.get("resize_images", True):
            values.pop("target_resolution", None)  # pictures are written at the buckets' sizes
        values = {
            key: SPELLINGS.get(key, lambda same: same)(value) for key, value in values.items() if value is not None
        }
        parameters = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()]
        words += [f"--{name}", *parameters]
    return words


def translated(table, values: dict, where: str, others: tuple[str, ...] = ()) -> dict[str, object]:
    """Values by their names in a table's first column -> by ours, with the table's defaults for what isn't given."""
    check_names(values, (*(theirs for theirs, _, _ in table), *others), where)
    pairs = {ours: values.get(theirs, default) for theirs, ours, default in table if ours is not LEFT_OUT}
    return {name: value for name, value in pairs.items() if value is not None}


def left_out(table, values: dict) -> list[str]:
    """The names in `values` that have no meaning here; where Olive writes and whether over what is there is ours to say."""
    known = {theirs for theirs, ours, _ in table if ours is LEFT_OUT} - {"output_dir", "overwrite"}
    return [name for name in values if name in known]


def section(values: dict, name: str, file: str) -> dict:
    if not isinstance(values.get(name), dict):
        raise StartError(f"{file}: {name} is missing, or not a section of names and values")
    return values[name]


def check_names(values: dict, known, where: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0)[0]
            raise StartError(f"{where}: unknown name {name!r}; the nearest is {near!r}")
