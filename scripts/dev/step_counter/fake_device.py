"""A CUDA device that doesn't exist: what of torch has to be told that it is there.

fake_cuda.cpp tells torch's C++ half, and has to be preloaded; `pretend_cuda` tells the Python half.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sysconfig
import threading
import types
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from scripts.dev.step_counter.meter import Meter

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
MEMORY = 80 << 30  # bytes
ANSWERS = {  # of torch.cuda's functions, as of an idle device
    **dict.fromkeys(("is_available", "is_bf16_supported", "_is_compiled"), True),
    "device_count": 1,
    **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), 0),
    "get_device_name": "fake",
    "get_arch_list": ["sm_90"],
    "get_device_capability": (9, 0),
    "mem_get_info": (MEMORY, MEMORY),
    "get_rng_state_all": [],
    **{f"{most}memory_{kind}": 0 for most in ("", "max_") for kind in ("allocated", "reserved")},
    **dict.fromkeys(("_lazy_init", "init", "set_device", "manual_seed", "manual_seed_all", "ipc_collect")),
    **dict.fromkeys(("get_rng_state", "set_rng_state", "set_rng_state_all", "reset_peak_memory_stats")),
}


class Stream:
    """A stream of the device. What runs on it is counted like everything else."""

    def __init__(self, *_, **__) -> None:
        pass

    def wait_stream(self, *_) -> None:
        """Orders work on the device; the host doesn't wait."""


def shared_library() -> Path:
    """fake_cuda.cpp, compiled against this interpreter's torch, once for each of them.

    Errors: subprocess.CalledProcessError or OSError without a C++ compiler.
    """
    from torch.utils.cpp_extension import include_paths

    key = f"{torch.__version__} {torch.__file__}".encode() + SOURCE.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora_training"
    target = cache / f"fake_cuda_{hashlib.sha256(key).hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished, libraries = target.with_suffix(f".{os.getpid()}"), Path(torch.__file__).parent / "lib"
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++20"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    command += [str(SOURCE), "-o", str(unfinished), f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, f"-Wl,-rpath,{libraries}"], check=True)
    os.replace(unfinished, target)
    return target


def pretend_cuda(meter: Meter) -> None:
    """Gives torch.cuda the answers of an idle device, for the rest of this process."""
    import torch.cuda.amp.common

    properties = types.SimpleNamespace(
        name="fake", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132
    )
    for name, answer in (ANSWERS | {"get_device_properties": properties}).items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("synchronize", "empty_cache"):  # both wait for all that the GPU was given
        setattr(torch.cuda, name, lambda *_, name=name, **__: meter.record_wait(name))
    torch.cuda.Stream, torch.cuda.current_stream = Stream, lambda *_: Stream()
    torch.cuda.stream = lambda *_: contextlib.nullcontext()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # asks an allocator of pinned memory that isn't there
    torch._C._accelerator_emptyHostCache = torch._C._host_emptyCache = lambda *_: None
    accept_fake_tensors(meter)
    save_without_content()
    enter_threads(meter)
    leave_memory_unpinned()


def accept_fake_tensors(meter: Meter) -> None:
    """Makes torch take FakeTensors where it asks for plain ones."""
    from torch._subclasses import FakeTensor
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    # torch.tensor(..., device="cuda") is made on the CPU, then copied
    torch._C._set_only_lift_cpu_tensors(True)
    # clip_grad_norm_ and torch's optimizers take lists of known types alone
    for known_types in (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types):
        known_types.append(FakeTensor)
    # one copy, as on a GPU; its own would read number by number
    FakeTensor.tolist = lambda self: self.cpu().tolist()
    # Module.to() keeps the parameter objects, as with a real GPU: an optimizer may know them already
    torch.__future__.set_swap_module_params_on_conversion(True)
    swap, converter = torch.utils.swap_tensors, meter.fakes.fake_tensor_converter.meta_converter

    def swap_tensors(first, second):
        """Module.to() swaps FakeTensors; a parameter that stays on a real GPU gets its .data set."""
        if isinstance(first, FakeTensor) and isinstance(second, FakeTensor):
            first.data = second.data
        else:  # tensors with weak references can't be swapped
            converter.tensor_memo.clear()
            converter.describer.lookup_tensor.clear()
            swap(first, second)

    torch.utils.swap_tensors = swap_tensors


def save_without_content() -> None:
    """torch.save writes zeros for tensors on the device: what is read again belongs to the CPU."""
    from torch._subclasses import FakeTensor
    from torch.utils._pytree import tree_map_only

    save = torch.save

    def save_zeros(content, *args, **kwargs):
        zeros = tree_map_only(FakeTensor, lambda fake: torch.zeros(fake.shape, dtype=fake.dtype), content)
        return save(zeros, *args, **kwargs)

    torch.save = save_zeros


def enter_threads(meter: Meter) -> None:
    """A dispatch mode holds in one thread alone: threads of the program enter it, too."""
    run = threading.Thread.run

    def run_under_meter(thread) -> None:
        with meter:
            run(thread)

    threading.Thread.run = run_under_meter


def leave_memory_unpinned() -> None:
    """Pinning needs a driver; that a copy is non_blocking tells enough."""
    init = torch.utils.data.DataLoader.__init__

    def init_unpinned(self, *args, **kwargs):
        init(self, *args, **kwargs)
        object.__setattr__(self, "pin_memory", False)

    torch.utils.data.DataLoader.__init__ = init_unpinned
    torch.Tensor.pin_memory = lambda self, *_: self
