"""Times the training scripts' own steps on a GPU, at the released models' sizes, beside a plain loop and diffusers' examples.

    python scripts/measuring/measure_gpu.py --json gpu.json                          every case, as many as fit into --minutes
    python scripts/measuring/measure_gpu.py --json gpu.json                          the same again: goes on where it stopped
    python scripts/measuring/measure_gpu.py --cases sdxl flux:512 --examples diffusers/examples
    python scripts/measuring/measure_gpu.py --cases flux:1024:1:quantize_base=nf4,gradient_checkpointing --profile traces
    python scripts/measuring/measure_gpu.py --json gpu.json --table docs/gpu.md      measures nothing, writes the table
    python scripts/measuring/measure_gpu.py --tiny                                   all of it on toy sizes, also on a CPU

A case is family:size:batch[:flag[=value],...] with the training script's own flags, or channels_last, cudnn_attention and
kept_attention, which are tried here alone; a beginning of listed cases stands for all of them. Weights are random: what a step
costs depends on sizes alone, and nothing is downloaded. In each case the programs take turns (ours, plain, example, example,
plain, ours), each from its first line until so many steps are timed, with one wait for the GPU before and one after them. What
is compared with what, and what the columns mean: docs/gpu.md.

Needs diffusers and peft beside torch, transformers and accelerate; prodigyopt and bitsandbytes only for the cases with them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.training_scripts import SCRIPTS

FLUX = "flux:1024:1:gradient_checkpointing"
CASES = [
    *("sd15:512:1", "sd15:512:1:compile", "sd15:512:1:cuda_graphs"),
    *("sd15:512:4", "sd15:512:4:compile", "sd15:512:4:cuda_graphs", "sd15:512:4:channels_last"),
    *("sdxl:1024:1", "sdxl:1024:1:gradient_checkpointing", "sdxl:1024:1:optimizer=adamw8bit"),
    *("sdxl:1024:1:optimizer=prodigy", "sdxl:1024:1:compile", "sdxl:1024:1:cuda_graphs"),
    *("sdxl:1024:1:channels_last", "sdxl:1024:1:cudnn_attention"),
    *("sd3:1024:1", "sd3:1024:1:gradient_checkpointing"),
    *(FLUX, f"{FLUX},quantize_base=fp8", f"{FLUX},quantize_base=nf4", f"{FLUX},quantize_base=int8"),
    *(f"{FLUX},compile", f"{FLUX},cudnn_attention", f"{FLUX},kept_attention", "flux:512:1:gradient_checkpointing"),
    *("flux:1024:1", "sd3:1024:1:gradient_checkpointing,kept_attention"),
]
TINY_CASES = [
    "sd15:64:2:optimizer=prodigy",
    "sdxl:64:1:gradient_checkpointing",
    "sd3:64:1",
    "flux:64:1:quantize_base=int8",
]
# Of one picture's forward and backward pass at rank 4, without what checkpointing computes twice: by the count in docs/step.md
TFLOP = {"sd15:512": 1.75, "sdxl:1024": 14.0, "sd3:1024": 26.3, "flux:1024": 161.1, "flux:512": 42.2}
PEAK_TFLOPS = {  # dense bf16, by the makers' data sheets
    **{"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "B200": 2250, "L40S": 362, "RTX 5090": 209},
    **{"RTX 4090": 165, "RTX 3090": 71, "RTX 4080": 97},
}
EXPECTED = {  # milliseconds on an H100, thought out from the counts before anything was measured
    "sd15:512:1": 12,
    "sd15:512:4": 25,
    "sdxl:1024:1": 60,
    "sdxl:1024:1:gradient_checkpointing": 85,
    "sd3:1024:1": 75,
    "flux:1024:1": 400,
    FLUX: 560,
    f"{FLUX},quantize_base=fp8": 400,
}
# Flags that change nothing but rounding
SAME_RESULT = ("compile", "cuda_graphs", "gradient_checkpointing", "blocks_to_swap", "quantize_base")
SAME_RESULT += ("channels_last", "cudnn_attention", "kept_attention")
PACKAGES = {"optimizer=prodigy": "prodigyopt", "optimizer=schedulefree": "schedulefree"}
PACKAGES |= dict.fromkeys(("optimizer=adamw8bit", "quantize_base=nf4"), "bitsandbytes")
# Flags that diffusers' examples know too
EXAMPLE_FLAGS = ("gradient_checkpointing", "optimizer=adamw8bit", "optimizer=prodigy", "rank")
SECONDS = {"sd15": 10, "sdxl": 20, "sd3": 20, "flux": 35}  # of one run of one program, until one has been timed
MARKS = "<!-- measured -->\n", "<!-- end of what was measured -->\n"


def chosen_cases(words: list[str] | None, tiny: bool) -> list[str]:
    """The cases that --cases means. Errors: SystemExit for a word that means none."""
    listed = TINY_CASES if tiny else CASES
    chosen: list[str] = []
    for word in words or [""]:
        family, size, batch, *_ = (word + ":::").split(":")
        if family in SCRIPTS and size.isdigit() and batch.isdigit():
            chosen.append(word)
        elif found := [case for case in listed if case.startswith(word)]:
            chosen += found
        else:
            known = "neither FAMILY:SIZE:BATCH[:FLAG,...] nor the beginning of a case of --list"
            raise SystemExit(f"measure_gpu.py: error: --cases {word}: {known}")
    return list(dict.fromkeys(chosen))


def parsed(case: str) -> tuple[str, int, int, list[str]]:
    """A case's family, size, batch and flags."""
    family, size, batch, *flags = case.split(":", 3)
    return family, int(size), int(batch), [flag for flag in (flags or [""])[0].split(",") if flag]


def card() -> dict:
    """The GPU's name, what it reaches in a large product of bf16 matrices, and the libraries' versions."""
    from importlib.metadata import version

    import torch

    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    found = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    if not torch.cuda.is_available():
        return {"name": "CPU"} | found
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the second time counts
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    total = torch.cuda.get_device_properties(0).total_memory
    return {
        "name": torch.cuda.get_device_name(),
        "GiB": round(total / 2**30, 1),
        "matmul_TFLOPs": round(20 * 2 * 8192**3 / seconds / 1e12),
    } | found


def peak_tflops(machine: dict) -> float | None:
    """The card's bf16 peak by its data sheet, else what its large product reached."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in machine["name"]), machine.get("matmul_TFLOPs"))


class Bench:
    """Runs the programs of one call and keeps what they share: the device, a work folder, reference gradients."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.references: dict[str, dict] = {}  # by case without the flags of SAME_RESULT: gradients by step

    def measure(self, case: str) -> dict:
        """All programs of a case in turn. Returns its row."""
        kinds = ["ours"] + ["plain"] * (not self.args.no_plain) + ["example"] * self.knows_example(case)
        row: dict = {"case": case} | {kind: {} for kind in kinds}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            inputs = self.make_inputs(case, Path(work))
            for turn in range(self.args.repeats):
                for kind in kinds[:: 1 if turn % 2 == 0 else -1]:
                    if "error" in row[kind] or "error" in row["ours"]:
                        continue
                    found = self.run(kind, case, Path(work), inputs, traced=self.args.profile and turn == 0)
                    times[kind] += [found["ms"]] if "ms" in found else []
                    row[kind] = found | {k: v for k, v in row[kind].items() if k in ("gradients",)}
        if "error" not in row["ours"]:
            row["ours"]["cosine"] = self.compared(case, row["ours"]["gradients"])
        theirs = row.get("plain", {}).pop("gradients", None)
        ours = row["ours"].pop("gradients", {})
        if theirs is not None and 0 in ours:
            row["ours"]["cosine_to_plain"] = cosine(ours[0], theirs)
        for kind in kinds:
            if times[kind]:
                row[kind] |= {
                    "ms": round(statistics.median(times[kind]), 3),
                    "all_ms": [round(t, 3) for t in times[kind]],
                }
        return row | {"seconds": round(time.perf_counter() - began, 1)}

    def make_inputs(self, case: str, work: Path) -> dict[str, Path]:
        """Bases without weights for the project's script (text encoders are cut short) and for the example, and pictures."""
        import numpy as np
        from PIL import Image

        from scripts.measuring.parts.random_bases import write_base

        family, size, batch, _ = parsed(case)
        (work / "pictures").mkdir()
        for i in range(batch):
            pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(work / "pictures" / f"{i}.png")
        bases = {"ours": work / "base", "example": work / "whole_base"}
        for kind, folder in bases.items():
            if kind == "ours" or self.args.examples:
                write_base(family, folder, self.args.tiny, shallow=kind == "ours")
        return bases

    def knows_example(self, case: str) -> bool:
        """Whether diffusers' example is at hand and has all of the case's flags."""
        flags = parsed(case)[3]
        return bool(self.args.examples) and all(flag in EXAMPLE_FLAGS or flag.startswith("rank=") for flag in flags)

    def run(self, kind: str, case: str, work: Path, bases: dict, traced: bool = False) -> dict:
        """One run of one program: what its clock found, and the gradients; or {"error": a line}."""
        from scripts.measuring.parts import programs
        from scripts.measuring.parts.step_clock import Clock, Measured, watching

        family, _, _, flags = parsed(case)
        trace = None
        if traced:
            self.args.profile.mkdir(parents=True, exist_ok=True)
            trace = self.args.profile / f"{case.replace(':', '_')}_{kind}.json.gz"
        clock = Clock(self.device, self.args.warm_up, self.args.steps, self.args.phases, trace)
        words = self.words(case, work, kind, bases["example" if kind == "example" else "ours"])
        said = io.StringIO()
        try:
            with self.surroundings(said), watching(clock), programs.tried(family, flags, kind):
                if kind == "example":
                    programs.run_example(self.args.examples / programs.EXAMPLES[family], words, flags, "__main__")
                settings = programs.arguments(family, words, flags)
                if kind == "plain":
                    programs.run_plain(family, settings, bases["ours"], clock, self.seen)
                self.seen = programs.Seen()
                programs.run_project(family, settings, clock, self.seen)
            problem = "the program ended before its steps were timed"
        except Measured:
            problem = None
        except (Exception, SystemExit) as error:
            problem = self.told(error, said.getvalue())
        programs.free_memory()
        if kind == "ours":
            clock.found["gradients"] = self.seen.gradients
        return clock.found if problem is None else {"error": problem}

    def gradients(self, case: str) -> dict[int, object]:
        """The gradients of the first steps of the project's script, by step. Errors: whatever the script ends with."""
        from scripts.measuring.parts import programs
        from scripts.measuring.parts.step_clock import Clock

        family, _, _, flags = parsed(case)
        seen, clock = programs.Seen(), Clock(self.device, programs.SEEN_STEPS + 1, 1)
        try:
            with tempfile.TemporaryDirectory() as work, self.surroundings(io.StringIO()):
                words = self.words(case, Path(work), "ours", self.make_inputs(case, Path(work))["ours"])
                with programs.tried(family, flags, "ours"):
                    settings = programs.arguments(family, words, flags)
                    programs.run_project(family, settings, clock, seen, only_gradients=True)
        except programs.Enough:
            return seen.gradients
        finally:
            programs.free_memory()
        raise RuntimeError(f"{case}: the program ended early")

    def words(self, case: str, work: Path, kind: str, base: Path) -> list[str]:
        """The words of a program's command line that don't depend on the case's flags."""
        from scripts.measuring.parts import programs

        _, size, batch, _ = parsed(case)
        return programs.common_words(work / kind, base, work / "pictures", size, batch)

    @contextlib.contextmanager
    def surroundings(self, said):
        """What every program runs in: random weights; its lines are kept; with --tiny no machine code is compiled."""
        from unittest.mock import patch

        import torch

        from scripts.measuring.parts.random_bases import random_weights

        compile_module = torch.nn.Module.compile

        def traced(module, *rest, **named):
            return compile_module(module, *rest, **named | {"backend": "aot_eager"})

        quick = patch.object(torch.nn.Module, "compile", traced) if self.args.tiny else contextlib.nullcontext()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), random_weights(self.device), quick:
            yield

    def told(self, error: BaseException, said: str) -> str:
        """An error as one line; the traceback of one that isn't a person's goes to stderr."""
        if type(error).__name__ == "OutOfMemoryError":
            return "out of memory"
        if isinstance(error, SystemExit):
            return said.strip().splitlines()[-1] if said.strip() else f"exit code {error.code}"
        if type(error).__name__ != "UserError":
            traceback.print_exception(error)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def compared(self, case: str, gradients: dict) -> float | None:
        """The cosine of the case's gradients to those in bf16 with none of the flags of SAME_RESULT; None if it has none."""
        head, flags = case.split(":")[:3], parsed(case)[3]
        rest = [flag for flag in flags if flag.split("=")[0] not in SAME_RESULT]
        key = ":".join([*head, ",".join(rest)])
        if rest == flags:
            self.references[key] = gradients
            return None
        for extra in ([], ["gradient_checkpointing"]):  # where there is no room without
            if key not in self.references:
                try:
                    self.references[key] = self.gradients(":".join([*head, ",".join(rest + extra)]))
                except (Exception, SystemExit) as error:
                    print(f"note: no reference for {case}: {self.told(error, '')}", file=sys.stderr)
        reference = self.references.get(key, {})
        step = max(gradients.keys() & reference.keys(), default=None)
        return None if step is None else cosine(gradients[step], reference[step])


def cosine(a, b) -> float | None:
    """Of two flat tensors; None where they differ in length."""
    import torch

    if a.shape != b.shape:
        return None
    return round(float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)), 6)


def missing_package(case: str) -> str | None:
    """The package that a case needs and that isn't there."""
    wanted = [PACKAGES[flag] for flag in parsed(case)[3] if flag in PACKAGES]
    return next((name for name in wanted if importlib.util.find_spec(name) is None), None)


def measure_all(args: argparse.Namespace, state: dict) -> bool:
    """Measures the cases that have no row yet, while there is time; writes each row as it comes. True if a case failed."""
    bench, began = Bench(args), time.perf_counter()
    state.setdefault("machine", card())
    state.setdefault("settings", {"steps": args.steps, "warm_up": args.warm_up, "repeats": args.repeats})
    speed, failed = 1.0, False
    for number, case in enumerate(cases := chosen_cases(args.cases, args.tiny)):
        if any(row["case"] == case for row in state["rows"]):
            continue
        if package := missing_package(case):
            print(f"{case}: left out: {package} is not installed", flush=True)
            continue
        guess = SECONDS[parsed(case)[0]] * args.repeats * (1 + (not args.no_plain) + bench.knows_example(case)) * speed
        guess *= 3 if "compile" in parsed(case)[3] else 1
        if time.perf_counter() - began + guess > args.minutes * 60:
            left = " ".join(cases[number:])
            print(f"stopped before {case}, which would take about {guess:.0f} s more than --minutes has; left: {left}")
            break
        row = bench.measure(case)
        speed = max(0.1, row["seconds"] / guess * speed) if "error" not in row["ours"] else speed
        failed = failed or "error" in row["ours"]
        state["rows"].append(row)
        print(line(row), flush=True)
        if args.json:
            args.json.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        if "error" in row["ours"] and not usable():
            print("after this error the GPU answers no more" + (": starting anew" if args.json else ""), flush=True)
            if not args.json:  # what there is would be lost, and the case be tried for ever
                return True
            minutes = args.minutes - (time.perf_counter() - began) / 60
            os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", str(minutes)])
    return failed


def usable() -> bool:
    """Whether the GPU still answers: after some errors a process can't use it any more."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def line(row: dict) -> str:
    """A row, as it comes."""
    parts = [row["case"]]
    for kind in ("ours", "plain", "example"):
        found = row.get(kind)
        if found:
            memory = f", {found['GiB']} GiB" if "GiB" in found else ""
            parts.append(f"{kind} " + (found["error"] if "error" in found else f"{found['ms']:.1f} ms{memory}"))
            if "phases_ms" in found:
                parts.append("(" + ", ".join(f"{name} {ms:.1f}" for name, ms in found["phases_ms"].items()) + ")")
    for name in ("cosine", "cosine_to_plain"):
        if row["ours"].get(name) is not None:
            parts.append(f"{name.replace('_', ' ')} {row['ours'][name]}")
    return " | ".join(parts)


def table(state: dict) -> str:
    """Everything measured as Markdown: the card, how it was measured, a row for each case."""
    machine, settings = state["machine"], state["settings"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "diffusers", "peft", "accelerate"))
    card = machine["name"]
    if "matmul_TFLOPs" in machine:
        card += (
            f" ({machine['GiB']} GiB; {machine['matmul_TFLOPs']} TFLOP/s in a product of 8192 x 8192 matrices in bf16)"
        )
    lines = [
        f"{card}; {versions}; {settings['repeats']} alternating runs of {settings['steps']} steps after"
        f" {settings['warm_up']}.",
        "",
        "| case | ms: ours / plain loop / example | plain / ours | TFLOP/s | MFU | GiB: ours / plain / example | cosine to bf16 |"
        " cosine to plain | expected ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in state["rows"]:
        ours, kinds = row["ours"], [row.get(kind) for kind in ("ours", "plain", "example")]
        if "error" in ours:
            lines.append(f"| {row['case']} | {ours['error']} |" + " |" * 7)
            continue
        family, size, batch, _ = parsed(row["case"])
        work, peak = TFLOP.get(f"{family}:{size}"), peak_tflops(machine)
        speed = work * batch / ours["ms"] * 1e3 if work else None
        faster = row["plain"]["ms"] / ours["ms"] if "ms" in row.get("plain", {}) else None
        cells = [
            row["case"],
            " / ".join(shown(k, "ms", ".1f") for k in kinds),
            "–" if faster is None else f"{faster:.2f}",
            "–" if speed is None else f"{speed:.0f}",
            "–" if speed is None or peak is None else f"{speed / peak:.0%}",
            " / ".join(shown(k, "GiB", ".1f") for k in kinds),
            shown(ours, "cosine", ".4f"),
            shown(ours, "cosine_to_plain", ".4f"),
            str(EXPECTED.get(row["case"], "–")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(found: dict | None, name: str, form: str) -> str:
    """A number of a program's row for the table, or why it's missing."""
    if found is None or found.get(name) is None:
        return "out of memory" if found and found.get("error") == "out of memory" else "–"
    return format(found[name], form)


def write_table(file: Path, text: str) -> None:
    """Puts the table between the marks of a page. Errors: SystemExit if it has none."""
    page = file.read_text(encoding="utf-8")
    if any(page.count(mark) != 1 for mark in MARKS) or page.index(MARKS[0]) > page.index(MARKS[1]):
        raise SystemExit(
            f"measure_gpu.py: error: --table {file}: has no {MARKS[0].strip()} … {MARKS[1].strip()} for it"
        )
    before, rest = page.split(MARKS[0])
    file.write_text(before + MARKS[0] + "\n" + text + "\n" + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


def read_state(file: Path | None) -> dict:
    """What --json holds from calls before. Errors: SystemExit if it's something else."""
    if file is None or not file.exists():
        return {"rows": []}
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return state if isinstance(state["rows"], list) else {}["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(f"measure_gpu.py: error: --json {file}: not a file that this program has written") from None


def main(argv: list[str] | None = None) -> int:
    """Runs the program. Returns the exit code: 1 if a case of ours failed."""
    parser = argparse.ArgumentParser(
        description="Times the training scripts' steps on a GPU, at the released models' sizes with random weights."
    )
    add = parser.add_argument
    add("--cases", nargs="+", metavar="CASE", help="family:size:batch[:flag,...], or beginnings of listed cases (all)")
    add("--list", action="store_true", help="print the listed cases and end")
    add("--examples", type=Path, metavar="DIR", help="diffusers' examples folder, to time its scripts too")
    add("--no_plain", action="store_true", help="leave out the plain loop")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="keep every figure here; cases that it has already aren't measured again",
    )
    add(
        "--table",
        nargs="?",
        const="-",
        metavar="PAGE",
        help="measure nothing: print --json's table, or put it into PAGE",
    )
    add("--minutes", type=float, default=9.0, help="start no case that wouldn't be done by then (9)")
    add("--steps", type=int, help="timed in each run (10; --tiny: 2)")
    add("--warm_up", type=int, help="steps before them (5; --tiny: 3)")
    add("--repeats", type=int, help="runs of each program, taking turns (2; --tiny: 1)")
    add("--profile", type=Path, metavar="DIR", help="write torch's trace of three more steps of each program here")
    add("--phases", action="store_true", help="also time data, forward, backward, clipping and optimizer apart")
    add("--tiny", action="store_true", help="the toy bases' sizes and few steps, to try all of it on a CPU")
    args = parser.parse_args(argv)
    for name, value in zip(("steps", "warm_up", "repeats"), (2, 3, 1) if args.tiny else (10, 5, 2), strict=True):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.list:
        print("\n".join(TINY_CASES if args.tiny else CASES))
        return 0
    if args.examples and not (args.examples / "dreambooth").is_dir():
        parser.error(f"--examples {args.examples}: has no folder dreambooth: give the examples folder of diffusers")
    if min(args.steps, args.repeats) < 1 or args.warm_up < 3:
        parser.error("--steps and --repeats must be 1 or more, --warm_up 3 or more")
    chosen_cases(args.cases, args.tiny)
    state = read_state(args.json)
    if args.table:
        if not state["rows"]:
            parser.error("--table needs --json FILE with what was measured")
        if args.table == "-":
            print(table(state), end="")
        else:
            write_table(Path(args.table), table(state))
        return 0
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("no GPU here; --tiny tries it on toy sizes")
    failed = measure_all(args, state)
    if state["rows"]:
        print("\n" + table(state), end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
