"""Runs the programs of a case in turn, each from its first line until its steps are timed."""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from scripts.dev.benchmarks import example_script, plain_loop, programs, project_script
from scripts.dev.benchmarks.cases import (
    SAME_RESULT,
    common_argv,
    has_example,
    parse_case,
    without_same_result_flags,
)
from scripts.dev.benchmarks.random_bases import random_weights, write_base
from scripts.dev.benchmarks.step_clock import STEPS, Clock, StepsTimed, watching


class Bench:
    """The programs of one call, and what they share: the device, a work folder, reference gradients.

    args: those of measure_gpu.py.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.references: dict[str, dict] = {}  # gradients by step, by case without the flags of SAME_RESULT
        self.record = project_script.FirstSteps()  # of the last run of the project's script

    def programs_of(self, case: str) -> list[str]:
        """The programs that are measured for a case, in their order."""
        names = ["ours"] + ["plain"] * (not self.args.no_plain)
        return names + ["example"] * (bool(self.args.examples) and has_example(case))

    def measure(self, case: str) -> dict:
        """All programs of a case in turn. Returns its row."""
        names, began = self.programs_of(case), time.perf_counter()
        row: dict = {"case": case} | {name: {} for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        with tempfile.TemporaryDirectory() as work:
            bases = self.make_inputs(case, Path(work))
            for repeat in range(self.args.repeats):
                for name in names if repeat % 2 == 0 else names[::-1]:
                    if "error" in row[name] or "error" in row["ours"]:
                        continue
                    is_traced = bool(self.args.profile) and repeat == 0
                    results = self.run(name, case, Path(work), bases, is_traced)
                    times[name] += [results["ms"]] if "ms" in results else []
                    row[name] = results | {k: v for k, v in row[name].items() if k == "gradients"}
        self.compare_gradients(row)
        for name in names:
            if times[name]:
                row[name]["ms"] = round(statistics.median(times[name]), 3)
                row[name]["all_ms"] = [round(t, 3) for t in times[name]]
        return row | {"seconds": round(time.perf_counter() - began, 1)}

    def compare_gradients(self, row: dict) -> None:
        """Replaces the gradients of a row by their cosines."""
        if "error" not in row["ours"]:
            row["ours"]["cosine"] = self.cosine_to_reference(row["case"], row["ours"]["gradients"])
        plain_gradients = row.get("plain", {}).pop("gradients", None)
        gradients = row["ours"].pop("gradients", {})
        if plain_gradients is not None and 0 in gradients:
            row["ours"]["cosine_to_plain"] = cosine(gradients[0], plain_gradients)

    def make_inputs(self, case: str, work: Path) -> dict[str, Path]:
        """Writes pictures and bases without weights: {program: its base}.

        The text encoders of the project's base are cut short; the example's are whole.
        """
        family, size, batch, _ = parse_case(case)
        (work / "pictures").mkdir()
        for i in range(batch):
            pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(work / "pictures" / f"{i}.png")
        write_base(family, work / "base", self.args.tiny, shallow=True)
        if self.args.examples:
            write_base(family, work / "whole_base", self.args.tiny, shallow=False)
        return {"ours": work / "base", "plain": work / "base", "example": work / "whole_base"}

    def run(self, program: str, case: str, work: Path, bases: dict[str, Path], is_traced: bool) -> dict:
        """One run of one program: its clock's results, with the gradients; or {"error": a line}."""
        trace = None
        if is_traced:
            self.args.profile.mkdir(parents=True, exist_ok=True)
            trace = self.args.profile / f"{case.replace(':', '_')}_{program}.json.gz"
        clock = Clock(self.device, self.args.warm_up, self.args.steps, self.args.phases, trace)
        output = io.StringIO()
        try:
            with (
                self.surroundings(output),
                watching(clock),
                programs.trying(parse_case(case).flags, program),
            ):
                self.start(program, case, work, bases[program], clock)
            problem = "the program ended before its steps were timed"
        except StepsTimed:
            problem = None
        except (Exception, SystemExit) as error:
            problem = describe_error(error, output.getvalue())
        programs.free_memory()
        if program == "ours":
            clock.results["gradients"] = self.record.gradients
        return clock.results if problem is None else {"error": problem}

    def start(self, program: str, case: str, work: Path, base: Path, clock: Clock) -> None:
        """Runs a program until the clock ends it."""
        family, _, _, flags = parse_case(case)
        argv = common_argv(parse_case(case), work / program, base, work / "pictures", STEPS)
        if program == "example":
            script = self.args.examples / example_script.EXAMPLES[family]
            example_script.run_example(script, argv, flags)
            return
        settings = project_script.parse_arguments(family, argv, flags)
        if program == "plain":
            plain_loop.run_plain_loop(settings, base, clock, self.record)
        else:
            self.record = project_script.FirstSteps()
            project_script.run_project_script(settings, clock, self.record)

    @contextlib.contextmanager
    def surroundings(self, output: io.StringIO):
        """What a program runs in: random weights; its lines go to `output`; --tiny compiles nothing."""
        compile_module = torch.nn.Module.compile

        def trace_only(module, *rest, **options):
            return compile_module(module, *rest, **options | {"backend": "aot_eager"})

        quick = contextlib.nullcontext()
        if self.args.tiny:
            quick = patch.object(torch.nn.Module, "compile", trace_only)
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            random_weights(self.device),
            quick,
        ):
            yield

    def gradients(self, case: str) -> dict[int, torch.Tensor]:
        """The gradients of the first steps of the project's script, by step.

        Errors: whatever the script ends with.
        """
        family, _, _, flags = parse_case(case)
        record = project_script.FirstSteps()
        clock = Clock(self.device, project_script.RECORDED_STEPS + 1, 1)
        try:
            with tempfile.TemporaryDirectory() as work, self.surroundings(io.StringIO()):
                base = self.make_inputs(case, Path(work))["ours"]
                argv = common_argv(
                    parse_case(case), Path(work) / "ours", base, Path(work) / "pictures", STEPS
                )
                with programs.trying(flags, "ours"):
                    settings = project_script.parse_arguments(family, argv, flags)
                    project_script.run_project_script(settings, clock, record, only_gradients=True)
        except project_script.GradientsRecorded:
            return record.gradients
        finally:
            programs.free_memory()
        raise RuntimeError(f"{case}: the program ended early")

    def cosine_to_reference(self, case: str, gradients: dict[int, torch.Tensor]) -> float | None:
        """The cosine of the case's gradients to those in bf16 with none of the flags of SAME_RESULT.

        None if the case has none of these flags, or its reference can't be had.
        """
        reference_case = without_same_result_flags(case, [])
        if not any(flag.split("=")[0] in SAME_RESULT for flag in parse_case(case).flags):
            self.references[reference_case] = gradients
            return None
        for extra in ([], ["gradient_checkpointing"]):  # where there is no room without
            if reference_case not in self.references:
                try:
                    alternative = without_same_result_flags(case, extra)
                    self.references[reference_case] = self.gradients(alternative)
                except (Exception, SystemExit) as error:
                    print(f"note: no reference for {case}: {describe_error(error, '')}", file=sys.stderr)
        reference = self.references.get(reference_case, {})
        step = max(gradients.keys() & reference.keys(), default=None)
        return None if step is None else cosine(gradients[step], reference[step])


def describe_error(error: BaseException, output: str) -> str:
    """An error as one line; the traceback of one that a person can't mend goes to stderr.

    output: what the program has printed.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    if isinstance(error, SystemExit):
        return output.strip().splitlines()[-1] if output.strip() else f"exit code {error.code}"
    if type(error).__name__ != "UserError":
        traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Of two flat tensors; None where they differ in length."""
    if a.shape != b.shape:
        return None
    return round(float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)), 6)
