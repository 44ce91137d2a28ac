"""Olive's workflows (JSON) and one-line command, as flags of the training scripts and prepare_dataset.py.

The sections of a workflow that say where it runs are left out, with a note. `olive_tables` has what each
parameter is here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_training.errors import UserError
from lora_training.files import read_config_file
from lora_training.launch.arguments import has_flag, take_flags, to_argv
from lora_training.launch.olive_parameters import (
    check_names,
    component_parameters,
    ineffective_names,
    section,
    translate_parameters,
)
from lora_training.launch.olive_tables import (
    BASE_RESOLUTION,
    FLAGS_OF_SOME_FAMILIES,
    IGNORED_SECTIONS,
    ONE_LINE_DEFAULTS,
    PASS_PARAMETERS,
    PREPROCESSING_PARAMETERS,
    PRIOR_DEFAULTS,
    PRIOR_FLAGS,
    SOURCE_FLAGS,
    SOURCES,
    STEP_SIZES,
    STEPS,
    TRAINING_ARGUMENTS,
    VARIANTS,
)

# values as prepare_dataset.py spells them, by the parameter's name there; others are the same
SPELLINGS = {
    "captions": lambda overwrite: "replace" if overwrite else "missing",
    "device": lambda device: "auto" if str(device).startswith("cuda") else device,
    "fill": lambda color: "#" + "".join(f"{c:02x}" for c in color) if isinstance(color, list) else color,
    "custom_buckets": lambda sizes: ";".join(f"{height},{width}" for width, height in sizes),
    "exclude_tags": ",".join,
}


@dataclass
class Workflow:
    """A workflow as flags: what is trained, what prepare_dataset.py does before, and notes to print."""

    family: str | None
    model: str
    training_flags: dict[str, object]
    preparation_argv: list[str]
    notes: list[str]


def is_workflow(values: dict) -> bool:
    """Whether the content of a --config file is a workflow of Olive."""
    return "input_model" in values or "passes" in values


def preparation_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """(arguments of prepare_dataset.py, notes to print); a workflow that --config names is translated.

    Errors: UserError for a workflow that has nothing to prepare.
    """
    (file,), other_arguments = take_flags(argv, "--config")
    values = read_config_file(file) if file else {}
    if not is_workflow(values):
        return argv, []
    workflow = translate_workflow(values, file)
    if not workflow.preparation_argv:
        raise UserError(f"{file} has no pre_process_data_config with steps: there is nothing to prepare")
    return [*workflow.preparation_argv, *other_arguments], workflow.notes


def family_of_variant(variant: object, where: str) -> str | None:
    """The family of a model_variant; None for auto. Errors: UserError that lists them."""
    if variant not in VARIANTS:
        raise UserError(f"{where} {variant!r}: one of auto, sd15, sdxl, sd3, flux")
    return VARIANTS[variant]


def one_line_defaults(argv: list[str]) -> dict[str, object]:
    """The defaults of `olive diffusion-lora` for the flags that its command line, `argv`, doesn't have."""
    has_prior = has_flag(argv, "--dreambooth --with_prior_preservation")
    defaults = ONE_LINE_DEFAULTS | (PRIOR_DEFAULTS if has_prior else {})
    return {names.split()[0]: v for names, v in defaults.items() if not has_flag(argv, f"--{names}")}


def flags_for_family(flags: dict[str, object], family: str) -> tuple[dict[str, object], list[str]]:
    """(the flags that a family has, notes on those that it lacks)."""
    lacking = [
        name
        for name, families in FLAGS_OF_SOME_FAMILIES.items()
        if flags.get(name) and family not in families
    ]
    notes = [
        f"note: {name} is left out: it is for {' and '.join(FLAGS_OF_SOME_FAMILIES[name])}"
        for name in lacking
    ]
    return {name: value for name, value in flags.items() if name not in lacking}, notes


def translate_workflow(workflow: dict, file: str) -> Workflow:
    """A workflow as flags.

    Errors: UserError that names the place in the file and, for an unknown name, the nearest known one.
    """
    check_names(workflow, ("input_model", "data_configs", "passes", "output_dir", *IGNORED_SECTIONS), file)
    model, passes = section(workflow, "input_model", file), section(workflow, "passes", file)
    if str(model.get("type")).lower() != "diffusersmodel" or not isinstance(model.get("model_path"), str):
        raise UserError(f"{file}: input_model: expected type DiffusersModel and a model_path")
    lora_pass, other_passes = training_pass(passes, file)
    data = data_config(workflow.get("data_configs"), lora_pass.get("train_data_config"), file)
    output_dir = workflow.get("output_dir")
    flags = (
        {"output_dir": output_dir, "copy_to_adapter": True}
        | source_flags(data, file)
        | pass_flags(lora_pass, file)
    )
    if not trains_prior(lora_pass):  # Olive writes these down all the same
        flags = {name: value for name, value in flags.items() if name not in PRIOR_FLAGS}
    elif "num_class_images" not in lora_pass:
        flags |= PRIOR_DEFAULTS
    preprocessing = preprocessing_of(data, file)
    steps = preprocessing.get("steps") or {}
    preparation_argv = []
    if steps:
        prepared = preprocessing.get("output_dir") or f"{output_dir or 'output/olive'}_prepared"
        source = {name: flags.pop(name) for name in SOURCE_FLAGS if name in flags}
        preparation_argv = [*to_argv(source | {"output_dir": prepared}), *steps_to_argv(preprocessing, file)]
        flags["train_data_dir"] = prepared
    else:
        flags["aspect_ratio_buckets"] = "auto"
    if "aspect_ratio_bucketing" not in steps:  # which writes the size to buckets.json
        flags["resolution"] = preprocessing.get("base_resolution", BASE_RESOLUTION)
    family = family_of_variant(lora_pass.get("model_variant", "auto"), f"{file}: model_variant")
    notes = notes_on_ignored(workflow, other_passes, data, steps, file)
    return Workflow(family, model["model_path"], flags, preparation_argv, notes)


def training_pass(passes: dict, file: str) -> tuple[dict, list[str]]:
    """(the one pass of type SDLoRA, the names of the others)."""
    names = [name for name, each in passes.items() if str(each.get("type")).lower() == "sdlora"]
    if len(names) != 1:
        raise UserError(f"{file}: passes: expected one of type SDLoRA, found {len(names)}")
    return passes[names[0]], [name for name in passes if name != names[0]]


def data_config(configs: object, train_data_config: object, file: str) -> dict:
    """The entry of data_configs that train_data_config names, or the section that stands there itself."""
    if isinstance(train_data_config, dict):
        return train_data_config
    by_name = {each.get("name"): each for each in configs} if isinstance(configs, list) else configs or {}
    if train_data_config not in by_name:
        names = ", ".join(map(str, by_name))
        raise UserError(f"{file}: train_data_config {train_data_config!r} is none of data_configs ({names})")
    return by_name[train_data_config]


def source_flags(data: dict, file: str) -> dict[str, object]:
    """Where the pictures come from."""
    source = section(data, "load_dataset_config", file)
    kind = source.get("type")
    if kind not in SOURCES:
        raise UserError(f"{file}: load_dataset_config: type {kind!r} is none of {', '.join(SOURCES)}")
    return translate_parameters(SOURCES[kind], component_parameters(source), f"{file}: {kind}")


def pass_flags(lora_pass: dict, file: str) -> dict[str, object]:
    """The flags of the SDLoRA pass and of its training_args."""
    read_elsewhere = ("type", "model_variant", "train_data_config", "training_args")
    arguments = section(lora_pass, "training_args", file) if lora_pass.get("training_args") else {}
    flags = translate_parameters(PASS_PARAMETERS, lora_pass, f"{file}: SDLoRA", read_elsewhere)
    return flags | translate_parameters(TRAINING_ARGUMENTS, arguments, f"{file}: training_args")


def trains_prior(lora_pass: dict) -> bool:
    """Whether the pass trains on class images, too."""
    return bool(lora_pass.get("dreambooth") or lora_pass.get("with_prior_preservation"))


def preprocessing_of(data: dict, file: str) -> dict:
    """The parameters of image_lora_preprocess; empty where nothing is preprocessed."""
    if not data.get("pre_process_data_config"):
        return {}
    parameters = component_parameters(section(data, "pre_process_data_config", file))
    check_names(parameters, PREPROCESSING_PARAMETERS, f"{file}: image_lora_preprocess")
    return parameters


def steps_to_argv(preprocessing: dict, file: str) -> list[str]:
    """The steps of image_lora_preprocess as arguments of prepare_dataset.py: --STEP name=value …"""
    steps = preprocessing["steps"]
    check_names(steps, STEPS, f"{file}: steps")
    bucketing = steps.get("aspect_ratio_bucketing") or {}
    resizes_to_buckets = bucketing.get("custom_buckets") and bucketing.get("resize_images", True)
    argv = []
    for step, parameters in steps.items():
        values = step_parameters(step, parameters or {}, preprocessing, file)
        if resizes_to_buckets:
            values.pop("target_resolution", None)
        texts = {k: str(v).lower() if isinstance(v, bool) else v for k, v in values.items()}
        argv += [f"--{step}", *(f"{name}={text}" for name, text in texts.items())]
    return argv


def step_parameters(step: str, parameters: dict, preprocessing: dict, file: str) -> dict[str, object]:
    """{parameter of prepare_dataset.py: value} of a step.

    device, overwrite and the size may stand beside the steps, for all of them.
    """
    names = [name for name, _, _ in STEPS[step]]
    for_all = {name: preprocessing[name] for name in ("device", "overwrite") if name in preprocessing}
    for_all = {name: value for name, value in for_all.items() if name in names}
    if step in STEP_SIZES:
        for_all[STEP_SIZES[step]] = preprocessing.get("base_resolution", BASE_RESOLUTION)
    values = translate_parameters(STEPS[step], for_all | parameters, f"{file}: {step}")
    return {k: SPELLINGS[k](v) if k in SPELLINGS else v for k, v in values.items()}


def notes_on_ignored(
    workflow: dict, other_passes: list[str], data: dict, steps: dict, file: str
) -> list[str]:
    """A note on each part of a workflow that has no effect here."""
    notes = []
    sections = ", ".join(name for name in IGNORED_SECTIONS if name in workflow)
    if sections:
        notes.append(f"{sections}: left out; the training runs here, as it was started")
    notes += [f"{name}: left out; only the SDLoRA pass trains" for name in other_passes]
    source = section(data, "load_dataset_config", file)
    names = ineffective_names(SOURCES[source["type"]], component_parameters(source))
    for step, parameters in steps.items():
        names += [f"{step}.{name}" for name in ineffective_names(STEPS[step], parameters or {})]
    notes += [f"{name}: left out; there is no such choice here" for name in names]
    return [f"note: {file}: {note}" for note in notes]
