"""Precisions and kernels on machines that the tests don't have: devices that are chosen, but not used."""

from __future__ import annotations

import argparse

import pytest
import torch
import yaml
from conftest import FAMILIES, KINDS, SAMPLE, quick_flags, run_here
from torch.utils._python_dispatch import TorchDispatchMode

from lora_training import families
from lora_training.errors import UserError
from lora_training.optim.guard import NonFiniteGuard
from lora_training.optim.parts import TrainedPart
from lora_training.training.capabilities import choose_precision
from lora_training.training.machine import start_accelerator
from lora_training.training.metrics import MetricsLogger

pytestmark = pytest.mark.run

NVIDIA, OLD, AMD, INTEL = "cuda", "cuda before Ampere", "cuda by ROCm", "xpu"
OLD_MAC = "mps before macOS 14"
CASES = {  # (machine, precision, on the command line) -> (of noise prediction, of flow); None: refused
    ("cpu", None, False): ("no", "no"),
    ("cpu", "fp16", False): ("no", "bf16"),  # flow overflows in fp16, wherever
    ("cpu", "bf16", True): ("bf16", "bf16"),
    ("cpu", "auto", False): ("no", "no"),
    ("cpu", "auto", True): ("no", "no"),
    (NVIDIA, "auto", False): ("bf16", "bf16"),
    (OLD, "auto", False): ("fp16", "bf16"),
    ("mps", "auto", False): ("bf16", "bf16"),
    (OLD_MAC, "auto", True): ("fp16", "no"),
    ("cpu", "fp16", True): (None, "bf16"),
    (NVIDIA, None, False): ("no", "no"),
    (NVIDIA, "fp16", False): ("fp16", "bf16"),
    (OLD, "bf16", False): ("fp16", "bf16"),
    (OLD, "bf16", True): ("bf16", "bf16"),
    (AMD, "bf16", False): ("bf16", "bf16"),
    (INTEL, "fp16", True): ("fp16", "bf16"),
    ("mps", None, False): ("bf16", "bf16"),
    ("mps", "fp16", False): ("bf16", "bf16"),
    ("mps", "fp16", True): ("fp16", "bf16"),
    (OLD_MAC, None, False): ("fp16", "no"),
    (OLD_MAC, "bf16", True): (None, None),
}


def pretend(machine: str, monkeypatch) -> torch.device:
    """Makes torch answer as it does on a machine; returns its device."""
    kind = machine.split()[0]
    has_bf16 = "before" not in machine
    for library in (torch.cuda, torch.xpu):
        monkeypatch.setattr(
            library, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
        )
        monkeypatch.setattr(library, "get_device_name", lambda device=None: "Card 9000")
    monkeypatch.setattr(torch.version, "hip", "7.1" if "ROCm" in machine else None)
    mps = torch.backends.mps
    monkeypatch.setattr(mps, "is_macos_or_newer", lambda major, minor: "before" not in machine, raising=False)
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(mps, name, lambda: kind == "mps")
    return torch.device(kind)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("machine", "precision", "is_explicit"), CASES)
def test_a_wish_becomes_what_the_machine_can_and_an_order_is_kept_or_refused(
    name, machine, precision, is_explicit, monkeypatch, capsys
):
    device, facts = pretend(machine, monkeypatch), families.FAMILIES[name]
    flags = {"mixed_precision"} if is_explicit else set()
    args = argparse.Namespace(mixed_precision=precision, command_line_flags=flags, family=facts)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    expected = CASES[machine, precision, is_explicit][facts.predicts_flow]
    if expected is None:
        with pytest.raises(UserError, match=f"--mixed_precision {precision} can't be done here"):
            choose_precision(args, device)
        return
    assert choose_precision(args, device) == expected
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("machine: "))
    assert {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[expected] in line
    assert {"cpu": "CPU, ", "mps": "Apple GPU"}.get(device.type, "Card 9000") in line
    assert ("ROCm 7.1" in line) == (machine == AMD)


def test_a_mac_gets_its_gpu_and_what_it_has_no_kernels_for_is_told(recipe, monkeypatch, tmp_path, capsys):
    """Chosen, and not used: this torch has no MPS, so that every kernel is missing."""
    import accelerate

    pretend("mps", monkeypatch)
    argv = quick_flags(FAMILIES["sdxl"], tmp_path / "x", "-d", SAMPLE)
    preset = tmp_path / "preset.yaml"
    preset.write_text("mixed_precision: fp16\noptimizer: adamw8bit\n")
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        args = recipe.parse_args([*argv, "--config", str(preset)])
        accelerator = start_accelerator(args)
        chosen = (accelerator.device.type, accelerator.mixed_precision, args.optimizer)
        assert chosen == ("mps", "bf16", "adamw")
        printed = capsys.readouterr().out
        assert "for fp16 is not this machine's" in printed
        assert "--optimizer adamw8bit is not possible" in printed
        for flags in (["--optimizer", "adamw8bit"], ["--use_8bit_adam"], ["--quantize_base", "nf4"]):
            with pytest.raises(UserError, match=r"is not possible on this machine \(mps: "):
                start_accelerator(recipe.parse_args([*argv, *flags]))
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def test_a_recipes_fp16_trains_on_the_cpu_and_a_flags_is_refused(tmp_path, capsys):
    """A preset's fp16 is a default, that of the command line an order; of a family that predicts noise."""
    family, preset = FAMILIES["sd15"], tmp_path / "preset.yaml"
    settings = {"mixed_precision": "fp16", "use_8bit_adam": True, "max_train_steps": 1}
    preset.write_text(yaml.safe_dump(settings))
    flags = ("-d", SAMPLE, "--config", preset, "--max_train_steps", 1)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert "the frozen base in float32, for fp16 is not this machine's" in capsys.readouterr().out
    assert run_here(family, tmp_path / "y", *flags, "--mixed_precision", "fp16") == 2
    assert "--mixed_precision fp16 can't be done here (CPU" in capsys.readouterr().err


class Float64Recorder(TorchDispatchMode):
    """Notes operations that give float64, which MPS doesn't have."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        tensors = [value for value in results if torch.is_tensor(value)]
        self.operations += [str(operation) for tensor in tensors if tensor.dtype == torch.float64]
        return result


@pytest.mark.families("flux", "sdxl")
def test_a_step_has_no_float64(family, script, tmp_path, monkeypatch):
    from diffusers.models.transformers import transformer_flux

    recorder, rotary = Float64Recorder(), transformer_flux.get_1d_rotary_pos_embed

    def watched(original):
        def call(*arguments):
            with recorder:
                return original(*arguments)

        return call

    def on_mps(*arguments, **options):  # where diffusers has this in float32 itself
        return rotary(*arguments, **options | {"freqs_dtype": torch.float32})

    monkeypatch.setattr(transformer_flux, "get_1d_rotary_pos_embed", on_mps)
    parts_of_a_step = ((script, "backward"), (NonFiniteGuard, "apply"), (TrainedPart, "step"))
    for owner, name in (*parts_of_a_step, (MetricsLogger, "log")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    flags = ("-d", SAMPLE, "--max_train_steps", 2, "--mixed_precision", "bf16")
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert not recorder.operations
