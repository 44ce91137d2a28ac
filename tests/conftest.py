"""What the tests share: the training scripts loaded by path, runs inside this process, pictures, scores."""

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["photo_folders"]  # fixtures of folders with photos
SAMPLE = ROOT / "assets" / "sample_data" / "smiley"


@dataclass(frozen=True)
class Family:
    """A training script and what its tests need to know."""

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
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
)
DIT_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
FLUX_LAYERS = (*DIT_LAYERS, "proj_mlp", "proj_out")
FAMILIES = {
    "sd15": Family("sd15", "train_lora_sd15.py", "StableDiffusionPipeline", UNET_LAYERS, 3.0, 8, 4e-3, 200),
    "sdxl": Family("sdxl", "train_lora_sdxl.py", "StableDiffusionXLPipeline", UNET_LAYERS, 3.0, 8, 1e-3, 150),
    "sd3": Family(
        "sd3",
        "train_lora_sd3.py",
        "StableDiffusion3Pipeline",
        DIT_LAYERS,
        3.0,
        8,
        8e-4,
        120,
        (("max_sequence_length", 77),),
        text_rates=(2e-3, 2e-3, 350),
        token_rate=1e-2,  # two CLIPs learn at once; at 2e-2 rows that keep their size turn too far each step
    ),
    "flux": Family(
        "flux",
        "train_dreambooth_lora_flux_advanced.py",
        "FluxPipeline",
        FLUX_LAYERS,
        3.5,
        8,
        5e-4,
        200,
        (("max_sequence_length", 77),),
        ("--max_sequence_length", 77),
        token_caption="purple TOK",  # CLIP's pooled vector tells Flux the shape, hardly the colour
    ),
}


def load_script(name: str):
    """A script as a module, loaded by its path, with its libraries."""
    key = Path(name).stem + "_under_test"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
        if hasattr(module, "FAMILY"):
            from script_view import ScriptView

            from lora_training.console import progress
            from lora_training.libraries import import_training_libraries

            import_training_libraries()
            progress.appears_after = 60.0  # a busy machine's bars are no lines that tests wait for
            sys.modules[key] = ScriptView(module)
    return sys.modules[key]


KINDS = (
    "flux",
    "sdxl",
)  # one transformer and one UNet: enough for what the four scripts share, line for line


def pytest_generate_tests(metafunc):
    """A test with a family runs for each, or for those of its `families` mark; test_learning.py groups them for workers."""
    given = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not given and metafunc.module.__name__ != "test_learning":
        mark = metafunc.definition.get_closest_marker("families")
        names = mark.args if mark else sorted(FAMILIES)
        metafunc.parametrize("family", [FAMILIES[n] for n in names], ids=names)


def family_and(name: str, cases, own, alone=()):
    """Parametrises a test with a family and a case: the cases in `own` use a family's own code and run for every family,
    the others, which test what the scripts share, for one of each kind, or for one `alone` where the model has no part in it.
    """
    assert {*own, *alone} <= set(cases)
    pairs = [
        (f, c) for c in cases for f in sorted(FAMILIES) if c in own or f in KINDS[: 1 if c in alone else None]
    ]
    return pytest.mark.parametrize(
        ("family", name), [pytest.param(FAMILIES[f], c, id=f"{f}-{c}") for f, c in pairs]
    )


@pytest.fixture
def script(family):
    return load_script(family.script)


@pytest.fixture(autouse=True)
def signals_restored():
    """Training scripts answer signals; pytest wants its own answers back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def quick_flags(family: Family, output: Path, *flags: object) -> list[str]:
    """Flags of a small run without pictures; later ones win. One with pictures validates once, at its end, unless it says
    when: what a validation measures takes longer than the steps before it.
    """
    words = [str(f) for f in flags]
    drawn = "--num_validation_images" in words and words[words.index("--num_validation_images") + 1] != "0"
    once = drawn and not {"--validation_steps", "--validation_epochs"} & set(words)
    return [
        *("-m", family.base, "--resolution", "64", "--seed", "3", "--report_to", "none"),
        *("--num_validation_images", "0", "--max_train_steps", "3", "-o", str(output)),
        *(("--validation_steps", "1000") if once else ()),
        *(str(f) for f in family.flags),
        *words,
    ]


def run_here(family: Family, output: Path, *flags: object) -> int:
    """Runs a training script inside this process; returns its exit code."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    code = load_script(family.script).main(quick_flags(family, output, *flags))
    spare_the_libraries(family.script)
    return code


@functools.cache
def spare_the_libraries(script: str) -> None:
    """After a script's first run: what the libraries hold is no garbage. Runs collect garbage several times, and looking
    through the libraries each time took half of a short run.
    """
    gc.collect()
    gc.freeze()


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
        f"{'emb' if '_emb' in f.name else 'lora'}.{k}": v
        for f in files
        if f.exists()
        for k, v in load_file(f).items()
    }


def same_weights(a: Path, b: Path) -> bool:
    import torch

    first, second = weights(a), weights(b)
    return (
        bool(first) and first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    )


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with seven captioned pictures of different sizes."""
    from scripts.dev.toys.parts.toy_world import describe, draw, random_scene

    folder, rng = tmp_path / "pictures", random.Random(1)
    folder.mkdir()
    for i in range(7):
        scene = random_scene(rng)
        image = draw(*scene, rng, 96)
        image = (
            image.crop((0, 0, 96, 64)) if i % 3 == 1 else image.crop((0, 0, 60, 96)) if i % 3 == 2 else image
        )
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(describe(*scene))
    return folder


class Studio:
    """Draws with a base and what a run has trained, through the plain diffusers pipeline, and asks the judge."""

    base_scores: dict = {}  # of untrained bases, for the whole session

    def __init__(self, family: Family) -> None:
        import diffusers

        from scripts.dev.toys.parts.toy_judge import load_judge

        self.family, self.judge = family, load_judge()
        self.kind = getattr(diffusers, family.pipeline)

    def pipeline(self, output: Path | None, quick: bool = False):
        """The plain pipeline with the files of a run's output folder; quick: a solver that needs 8 steps."""
        from diffusers import DPMSolverMultistepScheduler
        from safetensors.torch import load_file

        pipeline = self.kind.from_pretrained(self.family.base)
        pipeline.set_progress_bar_config(disable=True)
        if quick and hasattr(pipeline, "unet"):
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        if output is None:
            pipeline.scores_of_base = self.base_scores  # several tests ask for the same ones
            return pipeline
        if (output / "pytorch_lora_weights.safetensors").exists():
            pipeline.load_lora_weights(str(output), weight_name="pytorch_lora_weights.safetensors")
        places = load_script(self.family.script).TEXT_ENCODERS
        for file in output.glob("*_emb.safetensors"):
            for key, table in load_file(file).items():
                tokenizer, encoder = (getattr(pipeline, name) for name in places[key])
                tokens = [f"<s{i}>" for i in range(len(table))]
                if hasattr(pipeline, "load_textual_inversion"):
                    pipeline.load_textual_inversion(
                        table, token=tokens, tokenizer=tokenizer, text_encoder=encoder
                    )
                else:  # SD3's pipeline has no loader for embeddings
                    tokenizer.add_tokens(tokens)
                    encoder.resize_token_embeddings(
                        max(len(tokenizer), encoder.get_input_embeddings().num_embeddings)
                    )
                    encoder.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(tokens)] = (
                        table
                    )
        return pipeline

    def draw(self, pipeline, prompts: list[str], seed: int = 0) -> list:
        """One image per prompt."""
        import torch

        images = []
        for begin in range(0, len(prompts), 32):
            part = prompts[begin : begin + 32]
            images += pipeline(
                part,
                width=64,
                height=64,
                num_inference_steps=self.family.inference_steps,
                guidance_scale=self.family.guidance,
                **dict(self.family.extra),
                generator=[torch.Generator().manual_seed(seed + begin + i) for i in range(len(part))],
            ).images
        return images

    def score(self, pipeline, prompts: list[str], wanted: list[tuple]) -> float:
        """The share of images that show (class, colour, background); None in `wanted` matches anything."""
        from scripts.dev.toys.parts.toy_judge import verdicts

        known, key = getattr(pipeline, "scores_of_base", {}), (self.family.name, *prompts, *wanted)
        if key in known:
            return known[key]
        found = verdicts(self.judge, self.draw(pipeline, prompts))
        rights = [
            all(w in (None, f) for f, w in zip(f3, w3, strict=True))
            for f3, w3 in zip(found, wanted, strict=True)
        ]
        known[key] = sum(rights) / len(rights)
        return known[key]

    def concept_score(
        self, pipeline, thing: str, wanted: tuple, avoid: tuple[str, ...], count: int = 64
    ) -> float:
        """So many images of "a {thing} on a … background"."""
        from scripts.dev.toys.parts.toy_world import COLOR_NAMES

        backgrounds = [c for c in COLOR_NAMES if c not in avoid]
        chosen = [backgrounds[i % len(backgrounds)] for i in range(count)]
        return self.score(
            pipeline, [f"a {thing} on a {b} background" for b in chosen], [(*wanted, b) for b in chosen]
        )

    def world_score(self, pipeline, shape: str | None = None) -> float:
        """64 images of the world's own prompts, of one shape or of any."""
        from scripts.dev.toys.parts.toy_world import describe, random_scene

        rng = random.Random(11)
        scenes = [random_scene(rng) for _ in range(64)]
        scenes = [(shape or s, c, b) for s, c, b in scenes]
        return self.score(pipeline, [describe(*s) for s in scenes], scenes)


@pytest.fixture
def studio(family) -> Studio:
    return Studio(family)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    """A folder that outlives a test, for runs that several tests look at."""
    return tmp_path_factory.mktemp("shelf")


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


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


def to_pixels(image):
    """RGB image -> (3, H, W), uint8."""
    import numpy
    import torch

    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


@pytest.fixture
def recipe():
    """A training script for tests in which its family plays no part."""
    return load_script(FAMILIES["sdxl"].script)
