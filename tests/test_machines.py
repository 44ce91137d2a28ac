"""Machines that the tests don't have: a simulated Windows, devices that are chosen but not used."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import (
    FAMILIES,
    KINDS,
    ROOT,
    SAMPLE,
    load_script,
    losses,
    metrics,
    quick_flags,
    run_here,
    same_weights,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> tuple[Path, str]:
    """A folder in which the simulated Windows has prepared pictures, trained, been stopped, gone on and drawn; and what it said."""
    from ready_process import start

    folder = tmp_path_factory.mktemp("windows")
    photos = folder / "mes photos"
    photos.mkdir()
    for i, caption in enumerate(("日本の猫, un été", "a cat → left", "a ☃ in the snow", "plain")):
        Image.radial_gradient("L").convert("RGB").rotate(30 * i).resize((96, 80 + 16 * i)).save(
            photos / f"猫 {i}.png"
        )
        (photos / f"猫 {i}.txt").write_text(caption, encoding="utf-8")
    steps = ("--max_train_steps", 24, "--checkpointing_steps", 24)

    def training(name: str, *words, **options):
        flags = quick_flags(FAMILIES["sd15"], folder / name, "-d", folder / "prepared", *steps, *words)
        return str(ROOT / "train_lora_sd15.py"), flags, options

    pictures = (
        "--num_validation_images",
        1,
        "--validation_inference_steps",
        2,
        "--validation_prompt",
        "日本の猫",
    )
    resumed = ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", 1, "--report")
    plan = [
        (
            str(ROOT / "scripts/dataset/prepare_dataset.py"),
            ["-d", str(photos), "-o", str(folder / "prepared"), "--image_resizing", "target_resolution=64"]
            + ["--image_filtering", "min_size=64"],
            {},
        ),
        training("whole"),
        training("stopped", stop_at=3),
        training("stopped", *pictures, *resumed, open=[str(folder / "stopped" / "stopped.safetensors")]),
        (
            str(ROOT / "infer_lora.py"),
            [str(folder / "stopped"), "--prompt", "日本の猫", "--paths.infer_path", str(folder / "drawn")]
            + ["--num_inference_steps", "2"],
            {},
        ),
    ]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    process = start(ROOT / "tests" / "windows.py", [folder / "plan.json"], {}, folder / "said.log", folder)
    process.join(400)
    said = (folder / "said.log").read_bytes().decode("cp1252")
    codes = [line for line in said.splitlines() if line.startswith("[")]
    assert codes and json.loads(codes[-1]) == [0, 0, 128 + 21, 0, 0], said[-4000:]
    return folder, said


@pytest.mark.xdist_group("processes")
def test_windows_trains_stops_at_ctrl_break_resumes_bit_for_bit_and_draws(windows):
    folder, said = windows
    assert re.search(r"stopped by signal 21 \(\w+\) after step \d+; checkpoint-\d+ is written", said)
    assert "stopped.safetensors is open in another program" in said
    assert "going on from checkpoint-" in said
    assert losses(folder / "stopped") == losses(folder / "whole")
    assert [row["step"] for row in metrics(folder / "stopped") if "loss" in row] == list(range(1, 25))
    (spare,) = (folder / "stopped").glob("stopped-*.safetensors")
    spare.replace(folder / "stopped" / "stopped.safetensors")
    assert same_weights(folder / "whole", folder / "stopped")
    assert len(list((folder / "drawn").rglob("0*.png"))) == 1


NVIDIA, OLD, AMD, INTEL = "cuda", "cuda before Ampere", "cuda by ROCm", "xpu"
CASES = {  # (machine, wanted, by the command line) -> (of a family that predicts noise, of one that predicts flow)
    ("cpu", None, False): ("no", "no"),
    ("cpu", "fp16", False): ("no", "bf16"),  # flow overflows in fp16, wherever
    ("cpu", "bf16", True): ("bf16", "bf16"),
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
    ("mps before macOS 14", None, False): ("fp16", "no"),
    ("mps before macOS 14", "bf16", True): (None, None),
}


def pretend(machine: str, monkeypatch) -> torch.device:
    """Makes torch answer as it does on a machine; returns its device."""
    kind = machine.split()[0]
    native = "before" not in machine
    for library in (torch.cuda, torch.xpu):
        monkeypatch.setattr(
            library, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
        )
        monkeypatch.setattr(library, "get_device_name", lambda device=None: "Card 9000")
    monkeypatch.setattr(torch.version, "hip", "7.1" if "ROCm" in machine else None)
    mps = torch.backends.mps
    monkeypatch.setattr(mps, "is_macos_or_newer", lambda major, minor: "before" not in machine, raising=False)
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(mps, name, lambda: kind == "mps")
    return torch.device(kind)


@pytest.mark.families(*KINDS)
@pytest.mark.parametrize(("machine", "wanted", "ordered"), CASES)
def test_a_wish_becomes_what_the_machine_can_and_an_order_is_kept_or_refused(
    family, script, machine, wanted, ordered, monkeypatch, capsys
):
    device = pretend(machine, monkeypatch)
    explicit = {"mixed_precision"} if ordered else set()
    args = argparse.Namespace(mixed_precision=wanted, command_line_flags=explicit, family=script.FAMILY)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    expected = CASES[machine, wanted, ordered][family.name == "flux"]
    if expected is None:
        with pytest.raises(script.UserError, match=f"--mixed_precision {'bf16|fp16'} can't be done here"):
            script.choose_precision(args, device)
        return
    assert script.choose_precision(args, device) == expected
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("machine: "))
    assert {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[expected] in line
    assert {"cpu": "CPU, ", "mps": "Apple GPU"}.get(device.type, "Card 9000") in line
    assert ("ROCm 7.1" in line) == (machine == AMD)


def test_a_mac_gets_its_gpu_and_what_it_has_no_kernels_for_is_told(monkeypatch, tmp_path, capsys):
    """Chosen, and not used: this torch has no MPS, so that every kernel is missing."""
    import accelerate

    script = load_script("train_lora_sd15.py")
    pretend("mps", monkeypatch)
    flags = quick_flags(FAMILIES["sd15"], tmp_path / "x", "-d", SAMPLE)
    preset = tmp_path / "preset.yaml"
    preset.write_text("mixed_precision: fp16\noptimizer: adamw8bit\n")
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        args = script.parse_args([*flags, "--config", str(preset)])
        accelerator = script.start_accelerator(args)
        assert (accelerator.device.type, accelerator.mixed_precision, args.optimizer) == (
            "mps",
            "bf16",
            "adamw",
        )
        said = capsys.readouterr().out
        assert "for fp16 is not this machine's" in said and "--optimizer adamw8bit is not possible" in said
        for wish in (["--optimizer", "adamw8bit"], ["--use_8bit_adam"], ["--quantize_base", "nf4"]):
            with pytest.raises(script.UserError, match=r"is not possible on this machine \(mps: "):
                script.start_accelerator(script.parse_args([*flags, *wish]))
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.families("sd15")
def test_a_recipes_fp16_trains_on_the_cpu_and_a_flags_is_refused(family, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"mixed_precision": "fp16", "use_8bit_adam": True, "max_train_steps": 1})
    )
    flags = ("-d", SAMPLE, "--config", recipe, "--max_train_steps", 1)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert "the frozen base in float32, for fp16 is not this machine's" in capsys.readouterr().out
    assert run_here(family, tmp_path / "y", *flags, "--mixed_precision", "fp16") == 2
    assert "--mixed_precision fp16 can't be done here (CPU" in capsys.readouterr().err


class Doubles(TorchDispatchMode):
    """Notes operations that give float64, which MPS doesn't have."""

    found: list[str]

    def __torch_dispatch__(self, op, types, given=(), options=None):
        result = op(*given, **(options or {}))
        many = result if isinstance(result, (tuple, list)) else [result]
        self.found += [str(op) for value in many if torch.is_tensor(value) and value.dtype == torch.float64]
        return result


@pytest.mark.families(*KINDS)
def test_a_step_has_no_float64(family, script, tmp_path, monkeypatch):
    from diffusers.models.transformers import transformer_flux

    mode, rotary = Doubles(), transformer_flux.get_1d_rotary_pos_embed
    mode.found = []

    def watched(original):
        def call(*given):
            with mode:
                return original(*given)

        return call

    def on_mps(*given, **options):  # where diffusers has this in float32 itself
        return rotary(*given, **options | {"freqs_dtype": torch.float32})

    monkeypatch.setattr(transformer_flux, "get_1d_rotary_pos_embed", on_mps)
    for owner, name in (
        (script, "backward"),
        (script.StepGuard, "apply"),
        (script.Part, "step"),
        (script.Meter, "log"),
    ):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    assert (
        run_here(family, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 2, "--mixed_precision", "bf16")
        == 0
    )
    assert not mode.found


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_peak_memory_in_each_systems_unit(system, monkeypatch):
    """ru_maxrss is KiB on Linux and bytes on macOS; Windows has no such call."""
    import resource

    script = load_script("train_lora_sd15.py")
    monkeypatch.setattr(sys, "platform", system)
    held = (3 << 20) * (1 if system == "linux" else 1024)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=held))
    if system == "win32":
        monkeypatch.setitem(sys.modules, "resource", None)
        monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=3 << 30))
    assert script.peak_memory(torch.device("cpu")) == 3 << 30


def test_commands_are_those_of_the_systems_own_shell(monkeypatch, tmp_path):
    script = load_script("train_lora_sd15.py")
    words = (ROOT, "run_lora_infer", "infer_lora.py", [], Path("output/it's mine"), "--prompt", "a cat")
    monkeypatch.chdir(ROOT)
    assert shlex.split(script.command(*words)) == [
        "bash",
        "run_lora_infer.sh",
        "output/it's mine",
        "--prompt",
        "a cat",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    assert script.command(*words).endswith("""infer_lora.py "output/it's mine" --prompt "a cat\"""")


def test_rows_wait_while_a_spreadsheet_holds_them(monkeypatch, tmp_path):
    """Windows locks a file that is open elsewhere: training goes on, and the rows are written when it is free."""
    script = load_script("train_lora_sd15.py")
    output, opened, held = tmp_path / "x", Path.open, []

    def locked(file, *rest, **options):
        if file.name == "metrics.jsonl" and "a" in rest and len(held) < 3:
            held.append(file)
            raise PermissionError(13, "The process cannot access the file")
        return opened(file, *rest, **options)

    monkeypatch.setattr(script.Path, "open", locked)
    assert run_here(FAMILIES["sd15"], output, "-d", SAMPLE, "--max_train_steps", 5) == 0
    assert len(held) == 3 and [row["step"] for row in metrics(output)] == [1, 2, 3, 4, 5]
