"""What measures: the steps' timing on a GPU tried on toy sizes, gradients in every way of computing them."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.dev import measure_gpu
from scripts.dev.benchmarks import gpu_table, programs
from scripts.dev.benchmarks.bench import Bench
from scripts.dev.benchmarks.cases import TRIALS, choose_cases, parse_case
from scripts.dev.recipes import recipe_parser

pytestmark = pytest.mark.unit

COSINES = {  # of gradients to those in bf16, of the same batch and the same weights
    "sd15:64:2:gradient_checkpointing": 0.999,
    "sd15:64:2:cuda_graphs": 0.999,
    "sd15:64:2:blocks_to_swap=1": 0.999,
    "sdxl:64:1:channels_last": 0.999,
    "flux:64:1:gradient_checkpointing": 0.999,
    "flux:64:1:gradient_checkpointing,kept_attention": 0.999,
    "flux:64:1:compile": 0.999,
    "flux:64:1:blocks_to_swap=2": 0.999,
    "flux:64:1:quantize_base=int8": 0.99,
    "flux:64:1:quantize_base=fp8": 0.99,
    "flux:64:1:quantize_base=nf4": 0.95,
    "flux:64:1:quantize_base=nf4,blocks_to_swap=2,gradient_checkpointing": 0.95,
}


@pytest.fixture(scope="module")
def bench():
    """Every test's reference gradients are computed once."""
    return Bench(argparse.Namespace(tiny=True, examples=None))


def skip_what_cannot_be(case: str) -> None:
    """Skips a case whose flags this checkout lacks, or that needs a GPU."""
    family, _, _, flags = parse_case(case)
    parser = recipe_parser(family)
    for flag in set(flags) - set(TRIALS):
        if f"--{flag.split('=')[0]}" not in parser._option_string_actions:
            pytest.skip(f"--{flag} is not there")
    if "cuda_graphs" in flags and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.mark.xdist_group("measuring")
@pytest.mark.parametrize("case", COSINES)
def test_gradients_are_those_of_bf16(bench, case):
    skip_what_cannot_be(case)
    assert bench.cosine_to_reference(case, bench.gradients(case)) >= COSINES[case]


def test_attention_is_kept_by_our_program_alone(monkeypatch):
    """Checkpointing computes attention twice; kept, once; and the plain loop is left as it is."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.found = getattr(self, "found", 0) + ("attention" in str(op) and "backward" not in str(op))
            return op(*args, **(kwargs or {}))

    def attend(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x).square()

    def computed(*flags: str, program: str = "ours") -> int:
        count = Count()
        with programs.trying(["gradient_checkpointing", *flags], program), count:
            x = torch.randn(1, 2, 8, 16, requires_grad=True)
            torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=False).sum().backward()
        return count.found

    assert computed() == computed("kept_attention", program="plain") == 2 and computed("kept_attention") == 1
    with (
        pytest.raises(ValueError, match="without gradient_checkpointing"),
        programs.trying(["kept_attention"], "ours"),
    ):
        pass


@pytest.mark.xdist_group("measuring")
def test_a_call_measures_keeps_and_goes_on(tmp_path, capsys):
    """Ours and the plain loop, phases, the file of figures, and a second call, which does only the rest."""
    file, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    flags = ["--tiny", "--steps", "1", "--minutes", "60", "--json", str(file)]
    assert measure_gpu.main([*flags, "--phases", "--cases", "flux:64:1:quantize_base=int8"]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["ours"]["ms"] > 0 and row["plain"]["ms"] > 0
    assert list(row["ours"]["phases_ms"]) == ["prepare", "forward", "backward", "clip", "optimizer", "rest"]
    assert row["ours"]["cosine"] > 0.99 and row["ours"]["cosine_to_plain"] > 0.99
    capsys.readouterr()
    cases = ["--cases", "flux:64:1", "sd15:64:1:no_such_flag"]
    assert measure_gpu.main([*flags, "--no_plain", *cases]) == 1
    said = capsys.readouterr().out
    assert "sd15:64:1:no_such_flag | ours" in said and "unknown flag --no_such_flag" in said
    assert [row["case"] for row in json.loads(file.read_text())["rows"]][0] == "flux:64:1:quantize_base=int8"
    assert measure_gpu.main([*flags, "--cases", "sd3:64:1", "--minutes", "0"]) == 0
    assert "stopped before sd3:64:1" in capsys.readouterr().out
    page.write_text(f"before\n{''.join(gpu_table.MARKS)}after\n")
    for _ in range(2):  # the second time replaces the first
        assert measure_gpu.main(["--json", str(file), "--table", str(page)]) == 0
    text = page.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and text.count("flux:64:1:quantize_base=int8") == 1
    )
    assert measure_gpu.main(["--json", str(file), "--table", __file__]) == 2
    assert "has no" in capsys.readouterr().err


def test_the_table_of_a_gpu():
    machine = dict.fromkeys(("python", "torch", "diffusers", "peft", "accelerate"), "1")
    machine |= {"name": "NVIDIA H100 80GB HBM3", "GiB": 79.1, "matmul_TFLOPs": 700}
    ours = {"ms": 100.0, "GiB": 24.64, "cosine": 0.99991, "cosine_to_plain": None}
    rows = [
        {
            "case": "flux:1024:1:gradient_checkpointing,compile",
            "ours": ours,
            "plain": {"ms": 250.0, "GiB": 30.0},
        },
        {"case": "sdxl:1024:1", "ours": {"ms": 14.0, "GiB": 10.0}, "plain": {"error": "out of memory"}},
        {"case": "flux:1024:1", "ours": {"error": "out of memory"}},
    ]
    text = gpu_table.results_table(
        {"machine": machine, "settings": {"steps": 10, "warm_up": 5, "repeats": 2}, "rows": rows}
    )
    flux, sdxl, failed = text.splitlines()[-3:]
    assert "| 100.0 / 250.0 / – | 2.50 | 1710 | 173% | 24.6 / 30.0 / – | 0.9999 | – |" in flux
    assert "| 14.0 / out of memory / – | – | 1035 | 105% |" in sdxl
    assert "| out of memory |" in failed and {line.count("|") for line in text.splitlines()[2:]} == {10}


@pytest.mark.parametrize(
    "argv", [["--cases", "sdx1"], ["--cases", "flux:big"], ["--examples", "."], ["--table"]]
)
def test_arguments_that_mean_no_case(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert measure_gpu.main([*argv, "--tiny"]) == 2
    assert f"error: {argv[0]}" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_gone_on_with(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("[]")
    assert measure_gpu.main(["--tiny", "--json", str(tmp_path / "broken.json")]) == 2
    assert "not a file that this program has written" in capsys.readouterr().err


def test_cases_are_chosen_by_how_they_begin():
    assert len(choose_cases(["flux", "flux:512:1:gradient_checkpointing"], False)) == 9
    assert choose_cases(["sdxl:1024:2:compile"], False) == ["sdxl:1024:2:compile"]
