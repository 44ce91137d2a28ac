"""What the tests share: the families, their recipes as modules, short runs inside this process, pictures."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from studio import Studio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["photo_folders"]  # its fixtures: folders of photos, small models that describe them
SAMPLE = ROOT / "assets" / "sample_data" / "smiley"


# ---- the families and their recipes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A training script and what its tests need beyond the facts of lora_training.families."""

    name: str
    script: str
    pipeline: str
    lora_layers: tuple[str, ...]
    guidance: float
    inference_steps: int
    learning_rate: float
    steps: int
    extra: tuple[tuple[str, object], ...] = ()  # arguments that the pipeline needs to draw as was trained
    flags: tuple[object, ...] = ()  # flags that every run of the family gets
    text_rates: tuple[float, float, int] = (5e-3, 4e-3, 250)  # with text encoder: learning rates and steps
    token_rate: float = 2e-2
    token_caption: str = "TOK"  # what stands for a purple star where new tokens are learned alone

    @property
    def base(self) -> str:
        return str(ROOT / "assets" / f"toy_{self.name}")


UNET_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("proj_in", "proj_out", "conv1", "conv2"),
)
DIT_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
SD15 = Family(
    name="sd15",
    script="train_lora_sd15.py",
    pipeline="StableDiffusionPipeline",
    lora_layers=UNET_LAYERS,
    guidance=3.0,
    inference_steps=8,
    learning_rate=4e-3,
    steps=200,
)
SDXL = Family(
    name="sdxl",
    script="train_lora_sdxl.py",
    pipeline="StableDiffusionXLPipeline",
    lora_layers=UNET_LAYERS,
    guidance=3.0,
    inference_steps=8,
    learning_rate=1e-3,
    steps=150,
)
SD3 = Family(
    name="sd3",
    script="train_lora_sd3.py",
    pipeline="StableDiffusion3Pipeline",
    lora_layers=DIT_LAYERS,
    guidance=3.0,
    inference_steps=8,
    learning_rate=8e-4,
    steps=120,
    extra=(("max_sequence_length", 77),),
    text_rates=(2e-3, 2e-3, 350),
    token_rate=1e-2,  # two CLIPs learn at once; at 2e-2 rows that keep their size turn too far each step
)
FLUX = Family(
    name="flux",
    script="train_dreambooth_lora_flux_advanced.py",
    pipeline="FluxPipeline",
    lora_layers=(*DIT_LAYERS, "proj_mlp", "proj_out"),
    guidance=3.5,
    inference_steps=8,
    learning_rate=5e-4,
    steps=200,
    extra=(("max_sequence_length", 77),),
    flags=("--max_sequence_length", 77),
    token_caption="purple TOK",  # CLIP's pooled vector tells Flux the shape, hardly the colour
)
FAMILIES = {family.name: family for family in (SD15, SDXL, SD3, FLUX)}
QUICKEST = FLUX  # its runs take the least time: for runs in which the family plays no part
KINDS = ("flux", "sdxl")  # one transformer and one UNet, where these two take different paths


def load_script(name: str):
    """A training script as a module, loaded by its path, with the libraries that it trains with."""
    key = Path(name).stem + "_under_test"
    if key not in sys.modules:
        from lora_training.console import progress
        from lora_training.libraries import import_training_libraries

        spec = importlib.util.spec_from_file_location(key, ROOT / name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
        import_training_libraries()
        progress.appears_after = 60.0  # a busy machine's bars are no lines that tests wait for
    return sys.modules[key]


def pytest_generate_tests(metafunc):
    """A test with a family runs for each, or for those of its `families` mark.

    test_learning.py chooses its own, and groups them for workers.
    """
    marks = metafunc.definition.iter_markers("parametrize")
    is_parametrized = any("family" in mark.args[0] for mark in marks)
    if (
        "family" in metafunc.fixturenames
        and not is_parametrized
        and metafunc.module.__name__ != "test_learning"
    ):
        mark = metafunc.definition.get_closest_marker("families")
        names = mark.args if mark else sorted(FAMILIES)
        metafunc.parametrize("family", [FAMILIES[name] for name in names], ids=names)


def family_and(name: str, cases, every_family, once=()):
    """Parametrises a test with a family and a case.

    The cases in `every_family` use a family's own code and run for all; of the others, those in `once` run
    for one family, because no model plays a part in them, and the rest for a transformer and a UNet.
    """
    assert {*every_family, *once} <= set(cases)
    pairs = []
    for case in cases:
        kinds = KINDS[:1] if case in once else KINDS
        pairs += [(family, case) for family in (sorted(FAMILIES) if case in every_family else kinds)]
    values = [pytest.param(FAMILIES[family], case, id=f"{family}-{case}") for family, case in pairs]
    return pytest.mark.parametrize(("family", name), values)


@pytest.fixture
def script(family):
    """The training script of the test's family, as a module."""
    return load_script(family.script)


@pytest.fixture
def recipe():
    """A training script, as a module, for tests in which its family plays no part."""
    return load_script(SDXL.script)


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def signals_restored():
    """Training scripts answer signals; pytest wants its own answers back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def quick_flags(family: Family, output: Path, *flags: object) -> list[str]:
    """The arguments of a small run without pictures; later flags win.

    One with pictures validates once, at its end, unless it says when: what a validation measures takes longer
    than the steps before it.
    """
    argv = [str(flag) for flag in flags]
    draws = "--num_validation_images" in argv and argv[argv.index("--num_validation_images") + 1] != "0"
    validates_once = draws and not {"--validation_steps", "--validation_epochs"} & set(argv)
    return [
        *("-m", family.base, "--resolution", "64", "--seed", "3", "--report_to", "none"),
        *("--num_validation_images", "0", "--max_train_steps", "3", "-o", str(output)),
        *(("--validation_steps", "1000") if validates_once else ()),
        *(str(flag) for flag in family.flags),
        *argv,
    ]


def without_flag(argv: list[str], flag: str) -> list[str]:
    """A command line without a flag and its value, such as one that quick_flags sets."""
    index = argv.index(flag)
    return argv[:index] + argv[index + 2 :]


def run_here(family: Family, output: Path, *flags: object) -> int:
    """Runs a training script inside this process; returns its exit code."""
    return run_argv_here(family, quick_flags(family, output, *flags))


def run_argv_here(family: Family, argv: list[str]) -> int:
    """Runs a training script inside this process with these arguments alone; returns its exit code."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    code = load_script(family.script).main(argv)
    freeze_libraries(family.script)
    return code


@functools.cache
def freeze_libraries(script: str) -> None:
    """After a script's first run: what the libraries hold is no garbage.

    Runs collect garbage several times, and looking through the libraries each time took half of a short run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    """A folder that outlives a test, for runs that several tests look at."""
    return tmp_path_factory.mktemp("shelf")


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


# ---- what runs leave ---------------------------------------------------------------------------------------


def metrics(output: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in metrics(output) if "loss" in row]


def weights(output: Path) -> dict:
    """Every trained tensor that a run has left: LoRA and embeddings."""
    from safetensors.torch import load_file

    files = [output / "pytorch_lora_weights.safetensors", *output.glob("*_emb.safetensors")]
    return {
        f"{'emb' if '_emb' in file.name else 'lora'}.{key}": value
        for file in files
        if file.exists()
        for key, value in load_file(file).items()
    }


def same_weights(a: Path, b: Path) -> bool:
    import torch

    first, second = weights(a), weights(b)
    same_keys = bool(first) and first.keys() == second.keys()
    return same_keys and all(torch.equal(first[key], second[key]) for key in first)


# ---- pictures ----------------------------------------------------------------------------------------------


def write_pictures(folder: Path) -> Path:
    """Makes a folder with seven captioned pictures of different sizes."""
    from scripts.dev.toys.parts.toy_world import describe, draw, random_scene

    boxes, rng = {1: (0, 0, 96, 64), 2: (0, 0, 60, 96)}, random.Random(1)
    folder.mkdir()
    for number in range(7):
        scene = random_scene(rng)
        image = draw(*scene, rng, 96)
        if number % 3 in boxes:
            image = image.crop(boxes[number % 3])
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(describe(*scene))
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with seven captioned pictures of different sizes."""
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def studio(family) -> Studio:
    return Studio(family)


def to_pixels(image):
    """RGB image -> (3, H, W), uint8."""
    import numpy
    import torch

    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


# ---- the library's classes with a recipe's functions -------------------------------------------------------


def training_data(recipe, *arguments):
    """The library's TrainingData with a recipe's noise and captions."""
    from lora_training.data.samples import TrainingData

    return TrainingData(*arguments, recipe.draw_noise, recipe.draw_caption)


def prompts_of(recipe, *arguments):
    """The library's Prompts with a recipe's embeddings."""
    from lora_training.text.prompts import Prompts

    return Prompts(*arguments, recipe.encode_prompts, recipe.join_embeds, recipe.negative_embeds)


def target_layers(recipe, denoiser, args) -> list[str]:
    """The layers of a denoiser that get a LoRA, as a recipe's own lists and its flags say."""
    from lora_training.lora.adapters import find_target_layers

    idle = recipe.idle_layers(args.family.denoiser, denoiser.config, args)
    return find_target_layers(denoiser, args, recipe.LORA_TARGETS, idle)
