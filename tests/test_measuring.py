"""What measures: the steps' timing on a GPU tried on toy sizes, gradients in every way of computing them, memory by formula."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
from conftest import ROOT

from scripts.measuring import measure_gpu
from scripts.measuring.parts import programs

pytestmark = pytest.mark.unit

COSINES = {  # of gradients to those in bf16, of the same batch and the same weights
    "sd15:64:2:gradient_checkpointing": 0.999,
    "sd15:64:2:cuda_graphs": 0.999,
    "sd15:64:2:blocks_to_swap=1": 0.999,
    "sd15:64:2:quantize_base=nf4": 0.95,
    "flux:64:1:gradient_checkpointing": 0.999,
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
    return measure_gpu.Bench(argparse.Namespace(tiny=True, examples=None))


def skip_what_cannot_be(case: str) -> None:
    """Skips a case whose flags this checkout lacks, or that needs a GPU."""
    family, _, _, flags = measure_gpu.parsed(case)
    parser = argparse.ArgumentParser()
    programs.script_of(family).add_shared_args(parser)
    for flag in flags:
        if f"--{flag.split('=')[0]}" not in parser._option_string_actions:
            pytest.skip(f"--{flag} is not there")
    if "cuda_graphs" in flags and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.mark.xdist_group("measuring")
@pytest.mark.parametrize("case", COSINES)
def test_gradients_are_those_of_bf16(bench, case):
    skip_what_cannot_be(case)
    assert bench.compared(case, bench.gradients(case)) >= COSINES[case]
