"""Attacks the project with random configurations, damaged files and kills, and says what stood and what fell.

    python scripts/measuring/attack.py                                    # 1,000 + 1,000 + 4 x 100; about an hour on two cores
    python scripts/measuring/attack.py --kinds files --count 100 --seed 7
    python scripts/measuring/attack.py --only files-123 --keep            # one case alone, with what it was and what it left
    python scripts/measuring/attack.py --table docs/reliability.md        # puts the results into a document

Each case is drawn by the seed, its kind and its number alone:

    configurations   flags and --config files, good, borderline and hostile, of all flags of a family's script
    files            one or two damaged files among those that a command reads: the training scripts, infer_lora.py, scripts/lora/*,
                     scripts/reports/* and scripts/dataset/prepare_dataset.py
    kills            SIGKILL, SIGTERM and SIGINT at random moments, one or two to a run, then going on to the end, also with two
                     processes (gloo): the weights are compared with those of an unbroken run, bit for bit

A case falls if a program ends with an undocumented code, a traceback or more than one line of error, calls it a fault of its own,
hangs, or leaves a weight that is not finite or a file that is not whole. --compile and W&B are left out: minutes each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import types
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.measuring.parts.damage import damage, linked_copy
from scripts.measuring.parts.forked_runs import MEMORY, Case, Ended, Job, preload, run_cases
from scripts.measuring.parts.hostile_values import BUNDLES, PROMPTS, SETS, as_config, draw_flags, fill
from scripts.parts.training_scripts import ROOT, SCRIPTS, bare_script

DATA = ROOT / "assets" / "sample_data" / "smiley"
MARKS = ("<!-- attacks: begin -->", "<!-- attacks: end -->")
QUICK = (
    "--resolution",
    "64",
    "--report_to",
    "none",
    "--num_validation_images",
    "0",
    "--validation_inference_steps",
    "1",
)
DRAWN = ("--num_validation_images", "1", "--validation_prompt", "a circle", "--validation_inference_steps", "1")
TOKENS = ("--train_text_encoder_ti", "--token_abstraction", "circle")
PRIOR = (
    "--with_prior_preservation",
    "--class_prompt",
    "a circle",
    "--num_class_images",
    "3",
    "--sample_batch_size",
    "1",
)
KILLED = {  # what is killed: its flags, processes
    "average": (("--cache_latents", "--use_ema", "--ema_decay", "0.5", "--random_flip", "--train_batch_size", "2"), 1),
    "pictures": ((*DRAWN, "--validation_steps", "4", "--aspect_ratio_buckets", "auto", "--lora_dropout", "0.1"), 1),
    "tokens": ((*TOKENS, "--gradient_accumulation_steps", "2"), 1),
    "prior": ((*PRIOR, "--train_text_encoder", "--cache_latents"), 1),
    "two processes": (("--train_batch_size", "2", "--use_ema", "--ema_decay", "0.5"), 2),
}
KILLED_LENGTH = ("--max_train_steps", "12", "--checkpointing_steps", "3", "--checkpoints_total_limit", "2")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
BAR = re.compile(r"\d+%\||^\s*[\w ()./-]+:? \d\d:\d\d|^\s*$")  # progress, and nothing


def base_of(family: str) -> Path:
    return ROOT / "assets" / f"toy_{family}"


def train_words(family: str, output: Path | str, *flags: object) -> list[str]:
    """A small run of a family's script; later flags win."""
    own = ("--max_sequence_length", "77") if family == "flux" else ()
    return [*map(str, ("-m", base_of(family), *QUICK, *own, "--seed", "3", "-o", output, *flags))]


# ---- a program in a forked process ---------------------------------------------------------------------------------


@functools.cache
def compiled(program: str):
    """A program's code; four training scripts are compiled thousands of times otherwise."""
    return compile((ROOT / program).read_text(encoding="utf-8"), str(ROOT / program), "exec")


def become(job: Job, log: Path, told: dict[str, str]) -> None:
    """In a forked process: runs the program as the main one of this process, and ends it."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(log.with_suffix(f".{ending}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(told)
    path = str(ROOT / job.program)
    os.chdir(log.parent)
    if job.torchrun:
        words = ["--nproc_per_node", str(job.processes), "--master_port", told["MASTER_PORT"], path, *job.words]
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])
    sys.argv, sys.path[0] = [path, *job.words], str(Path(path).parent)
    sys.stdout = os.fdopen(os.dup(1), "w")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = path
    status = 0
    try:
        exec(compiled(job.program), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    for end in (sys.stdout.flush, sys.stderr.flush, functools.partial(os._exit, status)):
        with contextlib.suppress(Exception):
            end()


# ---- what is prepared: trained folders of each family, and unbroken runs --------------------------------------------


def prepare(stage: Path, kinds: list[str], at_once: int) -> None:
    """Runs, once, what cases start from."""
    wanted = {}
    for family in SCRIPTS:
        data = ("-d", DATA, "--max_train_steps", "4", "--checkpointing_steps", "2", *DRAWN)
        wanted[family, "trained"] = ((*data, "--cache_latents", "--cache_folder", stage / family / "cache"), 1)
        wanted[family, "tokens"] = ((*data, *TOKENS), 1)
        if "kills" in kinds:
            wanted |= {(family, f"unbroken {n}"): (("-d", DATA, *f, *KILLED_LENGTH), p) for n, (f, p) in KILLED.items()}
    wanted = {place: job for place, job in wanted.items() if not (stage / "/".join(place) / "done").exists()}
    print(f"preparing {len(wanted)} runs", flush=True)

    def run(family: str, name: str, flags: tuple, processes: int, folder: Path) -> Case:
        shutil.rmtree(stage / family / name, ignore_errors=True)
        words = train_words(family, stage / family / name, *flags)
        ended = yield Job(SCRIPTS[family], words, processes=processes)
        if any(ended.codes):
            raise SystemExit(f"{family}, {name}: {ended.err}")
        (stage / family / name / "done").write_text(str(ended.seconds))

    run_cases([functools.partial(run, *place, *job) for place, job in wanted.items()], at_once, lambda *_: None, become)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def fault(ended: Ended, allowed: tuple[int, ...] = (0, 2)) -> str | None:
    """What was wrong with how a job ended, in a few words; None for nothing."""
    if ended.hung:
        return "it hangs"
    for code, out, err in zip(ended.codes, ended.out, ended.err, strict=True):
        lines = [line for line in re.split(r"[\r\n]", err) if not BAR.search(line)]
        if "Traceback (most recent call last)" in out + err:
            return f"traceback: {' / '.join(lines[-9:])}"
        if ours := re.search("a fault of th[^;]*", err):
            return ours[0]
        if code not in allowed and not (code == 1 and re.search("out of memory|Is a directory", err)):
            return f"exit code {code}: {lines[-1] if lines else ''}"
        if code == 2 and not any(": error:" in line for line in lines):
            return f"exit code {code} without a line that says why"
        if code in (1, 2) and len(lines) > 1:
            return f"{len(lines)} lines: {lines[0]}"
        if code == 2 and not re.search(r"--\w|/|\.\w\w|'|learned|finite|NaN", lines[0].split("error:", 1)[1]):
            return f"it names nothing: {lines[0]}"
    return None


def damaged_results(folder: Path, files: list[Path] | None = None) -> str | None:
    """Which published file is not whole or has a weight that is not finite."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    for file in files or sorted(folder.rglob("*")):
        if "cache" in file.parts or not file.is_file() or file.name.startswith(".") or ".part" in str(file):
            continue
        try:
            if file.suffix == ".safetensors":
                bad = [
                    k
                    for k, v in load_file(file).items()
                    if v.is_floating_point() and not torch.isfinite(v.float()).all()
                ]
                if bad:
                    return f"not finite: {bad[0]} of {file.name}"
            elif file.suffix == ".png":
                Image.open(file).load()
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
        except Exception as error:
            return f"not whole: {file.name}: {error}"
    return None


def last_line(ended: Ended) -> str:
    """What a program said last of an error."""
    lines = [line for err in ended.err for line in re.split(r"[\r\n]", err) if not BAR.search(line)]
    return lines[-1][:300] if lines else ""


# ---- the cases ------------------------------------------------------------------------------------------------------


@functools.cache
def actions_of(family: str) -> list[argparse.Action]:
    """All flags of a training script."""
    script = bare_script(family)
    parser = script.OneLineParser(allow_abbrev=False)
    script.add_shared_args(parser)
    script.add_family_args(parser.add_argument)
    for name in script.FOREIGN_FLAGS:
        parser.add_argument(f"--{name}", nargs="?", const="true")
    return parser._actions


def configuration(stage: Path, family: str, rng: random.Random, folder: Path) -> Case:
    """A training script with random flags, in half of the cases partly in a --config file."""
    trained = stage / family / "trained"
    places = {"folder": folder, "data": DATA, "base": base_of(family), "trained": trained}
    places |= {"lora": trained / "pytorch_lora_weights.safetensors", "kohya": trained / "trained.safetensors"}
    places |= {
        "emb": stage / family / "tokens" / "tokens_emb.safetensors",
        "prompts": folder / "p.txt",
        "sets": folder / "s.yaml",
    }
    (folder / "p.txt").write_text(rng.choice(PROMPTS), encoding="utf-8")
    (folder / "s.yaml").write_text(fill(rng.choice(SETS), places), encoding="utf-8")
    words = [fill(word, places) for word in draw_flags(actions_of(family), rng)]
    begin = train_words(family, folder / "x")
    if not {"--dataset_config", "--dataset_name", "--data_name", "--instance_data_dir"} & set(words):
        begin += ["-d", str(DATA)]
    if rng.random() < 0.5:
        (folder / "c.yaml").write_text(json.dumps(as_config(words, rng)), encoding="utf-8")
        words = ["--config", str(folder / "c.yaml")]
        if rng.random() < 0.5:  # else the values of `begin` win
            words += draw_flags(actions_of(family), rng)[:2]
        words = [fill(word, places) for word in words]
    length = rng.choice(
        (["--dry_run"], ["--max_train_steps", "1"], *[["--max_train_steps", "2"]] * 3, ["--max_train_steps", "3"])
    )
    command = [*begin, *words, *length, *(["--max_train_steps", "2"] if length == ["--dry_run"] else [])]
    ended = yield Job(SCRIPTS[family], command)
    wrong = fault(ended) or damaged_results(folder)
    return {
        "command": command,
        "code": ended.codes[0],
        "said": last_line(ended),
        "wrong": wrong,
        "seconds": ended.seconds,
    }


def pictures(folder: Path, rng: random.Random) -> list[Path]:
    """A folder with five pictures of several formats; returns them."""
    from PIL import Image

    folder.mkdir()
    files = []
    for number, source in enumerate(rng.sample(sorted(DATA.glob("*.png")), 5)):
        ending, mode = rng.choice(
            (
                ("png", "RGBA"),
                ("png", "P"),
                ("png", "I;16"),
                ("jpg", "CMYK"),
                ("jpg", "L"),
                ("webp", "RGB"),
                ("gif", "P"),
                ("bmp", "RGB"),
                ("tiff", "RGB"),
                ("png", "RGB"),
                ("jpg", "RGB"),
            )
        )
        image = Image.open(source).convert("RGB").convert("L" if mode == "I;16" else mode)
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 3, 6, 8))
        options = {"exif": exif} if ending in ("jpg", "webp") else {}
        files.append(folder / f"{number}.{ending}")
        (image.convert("I;16") if mode == "I;16" else image).save(files[-1], **options)
    return files


def captioned(folder: Path, files: list[Path], rng: random.Random) -> list[Path]:
    """Captions for pictures, in one of four ways; returns their files."""
    how, texts = rng.randrange(4), [f"a circle, number {n}, é" for n in range(len(files))]
    if how == 0:
        for file, text in zip(files, texts):
            file.with_suffix(".txt").write_text(text, encoding="utf-8")
        return [file.with_suffix(".txt") for file in files]
    if how == 1:
        rows = [
            json.dumps({"file_name": f.name, "text": [t, "b"] if rng.random() < 0.3 else t})
            for f, t in zip(files, texts)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
        return [folder / "metadata.jsonl"]
    if how == 2:
        rows = "\n".join(["file_name,text", *(f'{f.name},"{t}"' for f, t in zip(files, texts))])
        (folder / "metadata.csv").write_text(rows, encoding="utf-8")
        return [folder / "metadata.csv"]
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f.name, "text": t}) for f, t in zip(files, texts))
    )
    table = {"resolution": 64, "aspect_ratio_buckets": "64,64;64,96"}
    (folder / "buckets.json").write_text(json.dumps(table))
    return [folder / "buckets.json", folder / "metadata.jsonl"]


def damaged_data(stage: Path, family: str, rng: random.Random, folder: Path):
    """Pictures, captions, what prepare_dataset.py has left."""
    data, out = folder / "data", folder / "x"
    files = pictures(data, rng)
    captions = captioned(data, files, rng)
    prepare_words = [
        "-d",
        str(data),
        "-o",
        str(folder / "prepared"),
        "--image_filtering",
        "min_size=8",
        "--image_resizing",
        "target_resolution=64",
    ]
    prepare_words += ["--aspect_ratio_bucketing"] * rng.randrange(2) + ["--num_workers", "1", "--trigger_word", "sks"]
    preparing = Job("scripts/dataset/prepare_dataset.py", prepare_words)
    readers = [
        Job(
            SCRIPTS[family],
            train_words(
                family,
                out,
                "-d",
                data,
                "--max_train_steps",
                "1",
                "--default_caption",
                "a",
                *rng.choice(((), ("--cache_latents",), ("--masked_loss", "alpha"))),
            ),
        ),
        Job(SCRIPTS[family], train_words(family, out, "--dataset_name", data, "--max_train_steps", "1")),
        preparing,
        Job("scripts/dataset/prepare_dataset.py", ["--doctor", "-d", str(data), "--resolution", "64"]),
    ]
    if rng.random() < 0.2:  # its own journal and results
        yield preparing
        victims, job = [f for f in sorted((folder / "prepared").rglob("*")) if f.is_file()], preparing
        if rng.random() < 0.3:
            job = Job(SCRIPTS[family], train_words(family, out, "-d", folder / "prepared", "--max_train_steps", "1"))
    else:
        victims, job = rng.choice((files, captions)), rng.choice(readers)
    victims = rng.sample(victims, min(len(victims), rng.choice((1, 1, 2))))
    return [f"{v.name}: {damage(v, rng)}" for v in victims], job


def damaged_settings(stage: Path, family: str, rng: random.Random, folder: Path):
    """YAML files that say what to do."""
    import yaml

    out, file = folder / "x", folder / "c.yaml"
    trained = stage / family / "trained"
    which = rng.randrange(5)
    if which == 0:
        bundle = [
            fill(w, {"folder": folder, "lora": trained / "pytorch_lora_weights.safetensors"})
            for w in rng.choice(BUNDLES)
        ]
        values = {
            "rank": 4,
            "learning_rate": 1e-4,
            "resolution": [64, 64],
            "train_data_dir": str(DATA),
            "validation_prompt": ["a", "b"],
        }
        text, job = (
            yaml.safe_dump(values | as_config(bundle, rng)),
            Job(SCRIPTS[family], train_words(family, out, "--max_train_steps", "1", "--config", file)),
        )
    elif which == 1:
        sets = [
            {"train_data_dir": str(DATA), "repeats": 2, "trigger_word": "sks", "weight": 0.5, "resolutions": [32, 64]},
            {"train_data_dir": str(DATA), "class_prompt": "a circle"},
        ]
        text, job = (
            yaml.safe_dump(sets),
            Job(SCRIPTS[family], train_words(family, out, "--max_train_steps", "1", "--dataset_config", file)),
        )
    elif which == 2:
        file = folder / rng.choice(("p.yaml", "p.txt", "p.json"))
        entries = [
            {
                "prompt": "a circle",
                "width": 64,
                "height": 64,
                "seed": 1,
                "steps": 1,
                "guidance": 2.0,
                "lora_scale": 0.5,
            },
            "b",
        ]
        text = "a circle --w 64 --h 64 --d 1 --s 1\nb\n" if file.suffix == ".txt" else json.dumps(entries)
        more = ("--max_train_steps", "1", "-d", DATA, "--num_validation_images", "1", "--validation_prompts_file", file)
        job = Job(SCRIPTS[family], train_words(family, out, *more))
    elif which == 3:
        values = yaml.safe_load((ROOT / "config" / "lora_infer.yaml").read_text(encoding="utf-8"))
        values |= {"num_generations": 1, "num_inference_steps": 1, "prompt": ["a", "b"], "adapter_scale": [1.0]}
        values["paths"] |= {
            "base_model_path": str(base_of(family)),
            "lora_weights_path": [{"path": str(trained), "weight": 0.5}],
            "infer_path": str(out),
        }
        text, job = yaml.safe_dump(values), Job("infer_lora.py", ["--config", str(file)])
    else:
        values = yaml.safe_load((ROOT / "config" / "prepare_dataset.yaml").read_text(encoding="utf-8"))
        values = {k: v for k, v in values.items() if k not in ("auto_caption", "auto_tagging")}
        text, job = (
            yaml.safe_dump(values | {"data_dir": str(DATA), "output_dir": str(out)}),
            Job("scripts/dataset/prepare_dataset.py", ["--config", str(file), "-d", str(DATA), "-o", str(out)]),
        )
    file.write_text(text, encoding="utf-8")
    return [f"{file.name}: {damage(file, rng)}"], job
    yield


def infer_words(lora: Path, base: Path, folder: Path, *more: object) -> list[str]:
    """One picture of one step."""
    words = [
        "--paths.base_model_path",
        base,
        "--paths.infer_path",
        folder / "x",
        "--prompt",
        "a circle",
        "--num_inference_steps",
        "1",
    ]
    size = ["--resolution.width", "64", "--resolution.height", "64", "--num_generations", "1", "--adapter_scale", "1"]
    return [str(w) for w in (lora, *words, *size, *more)]


def damaged_lora(stage: Path, family: str, rng: random.Random, folder: Path):
    """LoRA and embedding files, and folders with them, for everything that reads one."""
    source = stage / family / rng.choice(("trained", "tokens"))
    own = source.name
    (folder / own).mkdir()
    names = [
        "pytorch_lora_weights.safetensors",
        f"{own}.safetensors",
        "config.yaml",
        *[f"{own}_emb.safetensors"] * (own == "tokens"),
    ]
    for name in names:
        shutil.copy(source / name, folder / own / name)
    victim = folder / own / rng.choice([*names[:2], *names])
    lora = rng.choice((victim, folder / own)) if victim.suffix == ".safetensors" else folder / own
    base, target = base_of(family), folder / "x" / "out.safetensors"
    commands = {
        "train": (
            SCRIPTS[family],
            train_words(family, folder / "x", "-d", DATA, "--max_train_steps", "1", "--init_lora", lora),
        ),
        "infer": ("infer_lora.py", infer_words(lora, base, folder, *rng.choice(((), ("--fuse",))))),
        "convert": (
            "scripts/lora/convert_lora.py",
            [lora, target, "--base", base, *rng.choice(((), ("--to", "kohya"), ("--to", "diffusers")))],
        ),
        "inspect": (
            "scripts/lora/inspect_lora.py",
            [lora, *rng.choice(((), ("--base", base), ("--plot", folder / "p.png", "--base", base)))],
        ),
        "merge": ("scripts/lora/merge_lora.py", [base, rng.choice((target, folder / "x")), "--lora", lora]),
        "resize": (
            "scripts/lora/resize_lora.py",
            [lora, target, *rng.choice((("--rank", "2"), ("--keep", "0.9"))), "--base", base],
        ),
    }
    program, words = commands[rng.choice(sorted(commands))]
    return [f"{victim.name}: {damage(victim, rng)}"], Job(program, [str(w) for w in words])
    yield


def damaged_run(stage: Path, family: str, rng: random.Random, folder: Path):
    """A run's folder: checkpoints to go on from, caches, and what reports and pictures are made of."""
    source, out = stage / family / "trained", folder / "trained"
    which = rng.randrange(4)
    shutil.copytree(source, out)
    words = train_words(
        family,
        out,
        "-d",
        DATA,
        "--checkpointing_steps",
        "2",
        *DRAWN,
        "--cache_latents",
        "--cache_folder",
        folder / "cache",
        "--resume_from_checkpoint",
        rng.choice(("latest", "checkpoint-4")),
    )
    job = Job(SCRIPTS[family], [*words, "--max_train_steps", "5"])
    if which == 0:  # the caches
        shutil.copytree(stage / family / "cache", folder / "cache")
        victims = [f for f in (folder / "cache").rglob("*") if f.is_file()]
    else:
        victims = [f for f in out.rglob("*") if f.is_file() and f.suffix != ".png"]
    if which == 1:
        victims = [f for f in victims if "checkpoint" in str(f)]
    if which == 3:
        job = rng.choice((
            Job("infer_lora.py", infer_words(out, base_of(family), folder, *rng.choice(((), ("--checkpoints", "all"))))),
            Job("scripts/reports/report.py", [str(out)]),
            Job("scripts/reports/compare_runs.py", [str(out), str(source), "-o", str(folder / "x")]),
        ))  # fmt: skip
    victims = rng.sample(sorted(victims), min(len(victims), rng.choice((1, 1, 2, 4))))
    return [f"{v.relative_to(folder)}: {damage(v, rng)}" for v in victims], job
    yield


def damaged_base(stage: Path, family: str, rng: random.Random, folder: Path):
    """A part of a base, for everything that reads one."""
    base, lora = linked_copy(base_of(family), folder / "base"), stage / family / "trained"
    victim = rng.choice(sorted(f for f in base.rglob("*") if f.is_file() and f.suffix != ".md"))
    flags = (
        "-m",
        base,
        "-d",
        DATA,
        "--max_train_steps",
        "1",
        *rng.choice(((), DRAWN, ("--train_text_encoder",), TOKENS, ("--quantize_base", "int8"))),
    )
    training = Job(SCRIPTS[family], train_words(family, folder / "x", *flags))
    drawing = Job("infer_lora.py", infer_words(lora, base, folder))
    merging = Job("scripts/lora/merge_lora.py", [str(w) for w in (base, folder / "x", "--lora", lora)])
    return [f"{victim.relative_to(folder)}: {damage(victim, rng)}"], rng.choice((training, training, drawing, merging))
    yield


DAMAGES = (damaged_data, damaged_data, damaged_settings, damaged_lora, damaged_lora, damaged_run, damaged_base)


def damaged_files(stage: Path, family: str, rng: random.Random, folder: Path) -> Case:
    """A command, and one or two of the files that it reads are damaged."""
    work = rng.choice(DAMAGES)
    damages, job = yield from work(stage, family, rng, folder)
    ended = yield job
    files = [
        *(folder / "x").glob("*.safetensors"),  # a merged base's folder has copies of what no LoRA touches
        *((folder / "trained").glob("*.safetensors") if job.words[-1] == "5" else ()),
    ]
    verdict = (
        (0, 1, 2) if "inspect" in job.program or "--doctor" in job.words else (0, 2)
    )  # 1: something is wrong with it
    wrong = fault(ended, verdict) or (damaged_results(folder, files) if ended.codes == [0] and files else None)
    said = {
        "command": [job.program, *job.words],
        "code": ended.codes[0],
        "said": last_line(ended),
        "seconds": ended.seconds,
    }
    return said | {"damages": [work.__name__, *damages], "wrong": wrong}


def same_results(first: Path, second: Path) -> str | None:
    """How the weights and losses of two runs differ, bit by bit; None if they don't."""
    import torch
    from safetensors.torch import load_file

    for file in [first / "pytorch_lora_weights.safetensors", *first.glob("*_emb.safetensors")]:
        other = second / file.name
        if not other.exists():
            return f"{other.name} is missing"
        a, b = load_file(file), load_file(other)
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            return f"{other.name} differs"
    rows = []
    for folder in (first, second):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        rows.append([(row["step"], row["loss"]) for row in lines if "loss" in row])
    return None if rows[0] == rows[1] else "the losses differ"


def kills(stage: Path, family: str, rng: random.Random, folder: Path) -> Case:
    """A run that is killed once or twice, at any moment, and goes on to its end."""
    name = rng.choice(sorted(KILLED))
    flags, processes = KILLED[name]
    whole, out = stage / family / f"unbroken {name}", folder / f"unbroken {name}"
    usual, said = float((whole / "done").read_text()), []
    torchrun = processes > 1 and rng.random() < 0.2  # most are forked, and told what torchrun tells its own
    start = functools.partial(
        Job, SCRIPTS[family], processes=processes, torchrun=torchrun, limit=300 if torchrun else 120
    )
    command = train_words(family, out, "-d", DATA, *flags, *KILLED_LENGTH, "--resume_from_checkpoint", "latest")
    wrong = None
    for _ in range(rng.choice((1, 2, 2))):
        number, moment = rng.choice(SIGNALS), rng.uniform(0.1, usual) + 12 * torchrun
        ended = yield start(command, after=moment, signal=number, victim=rng.randrange(processes))
        if not ended.hit:
            break
        said.append(f"{signal.Signals(number).name} after {moment:.2f} s: {ended.codes} {last_line(ended)}")
        if not torchrun:  # which has codes and tracebacks of its own
            wrong = wrong or fault(ended, (0, 128 + number, 143, 137, *[1] * (processes > 1)))
        wrong = wrong or (damaged_results(out) if out.exists() else None)
    ended = yield start(command)
    if any(ended.codes):
        wrong = wrong or f"exit code {ended.codes}: {last_line(ended)}"
    wrong = wrong or (None if torchrun else fault(ended)) or same_results(whole, out)
    return {
        "command": [SCRIPTS[family], *command],
        "kills": said,
        "variant": f"{name}, torchrun" if torchrun else name,
        "code": max(ended.codes),
        "wrong": wrong,
        "said": last_line(ended),
        "seconds": ended.seconds,
    }


KINDS = {"configurations": configuration, "files": damaged_files, "kills": kills}


# ---- all of them ----------------------------------------------------------------------------------------------------


def attack(args: argparse.Namespace) -> list[dict]:
    """Runs what is asked for and not yet in --results; returns all results there."""
    preload()
    for program in SCRIPTS.values():
        compiled(program)  # here, once
    stage = args.results.parent.resolve() / "attack_stage"
    numbers = {kind: range(args.count if kind != "kills" else 4 * args.kills) for kind in args.kinds}
    names = args.only or [f"{kind}-{number}" for kind in args.kinds for number in numbers[kind]]
    prepare(stage, [name.split("-")[0] for name in names], args.at_once)
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    results = {row["name"]: row for row in map(json.loads, lines) if row["seed"] == args.seed}
    todo = args.only or [name for name in names if name not in results]

    def begin(name: str):
        kind, number = name.rsplit("-", 1)
        rng = random.Random(f"{args.seed} {kind} {number}")
        work = functools.partial(KINDS[kind], stage, list(SCRIPTS)[int(number) % 4], rng)
        if not args.keep:
            return work

        def kept(folder: Path) -> Case:
            found = yield from work(folder)
            shutil.copytree(folder, args.results.parent / "kept" / name, symlinks=True, dirs_exist_ok=True)
            return found

        return kept

    def done(place: int, found: dict) -> None:
        name = todo[place]
        row = {"name": name, "seed": args.seed, "family": list(SCRIPTS)[int(name.rsplit("-", 1)[1]) % 4], **found}
        results[name] = row
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["wrong"] or args.only:
            print(f"{name} ({row['family']}): {row['wrong']}; {row['said']}", flush=True)
        if args.only:
            print(json.dumps(row, indent=1, ensure_ascii=True))
        elif place % 100 == 99:
            print(f"{place + 1} of {len(todo)}", flush=True)

    args.results.parent.mkdir(parents=True, exist_ok=True)
    run_cases([begin(name) for name in todo], args.at_once, done, become)
    return list(results.values())


def table(rows: list[dict]) -> str:
    """Markdown: what was run, how it ended, and what fell."""
    lines = ["| what | family | cases | done (0) | refused in a line (2) | stopped in a line (1) | fell |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in KINDS:
        for family in SCRIPTS:
            own = [row for row in rows if row["family"] == family and row["name"].startswith(kind)]
            codes, fell = Counter(row["code"] for row in own), sum(bool(row["wrong"]) for row in own)
            what = kind if kind != "kills" else f"kills ({sum(len(row['kills']) for row in own)})"
            lines += [f"| {what} | {family} | {len(own)} | {codes[0]} | {codes[2]} | {codes[1]} | {fell} |"] * bool(own)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Attacks the project with random configurations, files and kills.")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--count", type=int, default=1000, help="configurations, and damaged files (1000)")
    parser.add_argument("--kills", type=int, default=75, help="runs of each family that are killed once or twice (75)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cases (0)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these cases, such as files-123")
    parser.add_argument("--keep", action="store_true", help="keep each case's folder, beside the results")
    parser.add_argument("--at_once", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "attack.jsonl", metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of all results into this file")
    args = parser.parse_args(argv)
    rows = attack(args)
    print(table(rows))
    if args.table:
        text = args.table.read_text(encoding="utf-8")
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        args.table.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{after}", encoding="utf-8")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
