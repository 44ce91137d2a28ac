"""Sees every operation of a program on the fake device, and counts those of one training step.

Tensors on the CPU are real. Those on "cuda" are FakeTensors, which have a shape, a type and a device, and
no content; what reads a value from them is counted as a wait, and gets a dummy.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.flop_counter import flop_registry

WARM_UP = 2  # steps before the one counted: the first ones make optimizer states, and may check more
# Operations that start no kernel, beside views
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "alias", "lift_fresh", "set_", "resize_", "_unsafe_view", "_reshape_alias"),
    *("is_same_size", "is_pinned", "record_stream"),
}
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of multi-tensor kernels, by number of lists
BLOCK, BLOCKS_PER_LAUNCH = 65_536, 320  # elements of a block, and blocks, in one of those launches
UNTOUCHED = 1 << 22  # elements from which copies within the CPU's memory are left out: a base's weights
# What is counted: {phase, or what its name says: number}
COUNTED = ("kernels", "traffic", "flop", "casts", "cast_traffic", "copies", "waits", "operations", "places")
# torch's formulas, which lack the products that add to what is there
FLOP_FORMULAS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
THIS_FOLDER = str(Path(__file__).parent)


class StepCounted(BaseException):
    """Ends the program once its step is counted; no `except Exception` holds it up."""


class DeviceFakes(FakeTensorMode):
    """Makes FakeTensors without asking the device's driver."""

    avoid_device_init = True


class Meter(TorchDispatchMode):
    """Counts the step after WARM_UP steps. While it is entered, the program runs under it.

    A step lasts from one call of the denoiser with gradients to the next. denoisers: names of its class;
    root: the folder of the program, whose functions are named as places.
    """

    def __init__(self, denoisers: tuple[str, ...], root: Path) -> None:
        super().__init__()
        self.fakes = DeviceFakes(allow_non_fake_inputs=True)
        self.denoisers, self.root = denoisers, f"{root}{os.sep}"
        self.denoiser: torch.nn.Module | None = None
        self.sizes: dict[int, int] = {}  # bytes of the storages in use, by their address
        self.in_use = self.steps = self.depth = 0
        self.reset("before")
        self.plain_backward, torch.autograd.backward = torch.autograd.backward, self.backward
        register_module_forward_pre_hook(self.before_forward)
        self.trained: list[torch.Tensor] = []
        self.counted: dict = {}
        register_optimizer_step_pre_hook(self.before_optimizer)
        register_optimizer_step_post_hook(lambda *_: setattr(self, "phase", "other"))

    def reset(self, phase: str) -> None:
        """Begins to count anew."""
        self.phase, self.peak, self.resident = phase, self.in_use, self.in_use
        for name in COUNTED:
            setattr(self, name, Counter())

    def before_forward(self, module: torch.nn.Module, *_) -> None:
        """Where the denoiser is called: the beginning of a step, and the end of the one before."""
        if type(module).__name__ not in self.denoisers:
            return
        if not torch.is_grad_enabled():
            return
        self.denoiser, self.steps = module, self.steps + 1
        if self.steps == WARM_UP + 1:
            self.reset("forward")
        elif self.steps == WARM_UP + 2:  # what the program does when it is ended is none of the step
            self.counted = self.results()
            raise StepCounted

    def before_optimizer(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """Where clipping ends; what the optimizer has is what is trained."""
        self.phase = "optimizer"
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def backward(self, *args, **kwargs):
        """torch.autograd.backward; reentrant checkpointing calls it inside itself."""
        self.depth, self.phase = self.depth + 1, "backward"
        try:
            return self.plain_backward(*args, **kwargs)
        finally:
            self.depth -= 1
            self.phase = "backward" if self.depth else "clip"

    # ---- operations ----------------------------------------------------------------------------------------

    def __torch_dispatch__(self, op, _, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op._schema.name.split("::")[1]
        tensors, device = tensors_in((args, kwargs)), kwargs.get("device")
        is_on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not is_on_device and not (device and torch.device(device).type == "cuda"):
            return args[0] if name == "copy_" and args[0].numel() > UNTOUCHED else op(*args, **kwargs)
        if op.namespace == "prim":  # questions about a tensor
            return op(*args, **kwargs)
        if name in ("_local_scalar_dense", "equal"):
            return self.read_value(name, tensors[0].dtype)
        if name in ("copy_", "_to_copy") and is_transfer(name, args, kwargs):
            return self.transfer(name, op, args, kwargs)
        args, kwargs = self.replace_masks(name, args, kwargs)
        with self.fakes:
            if name == "nonzero":  # how many there are only the device knows: go on as if there were one
                self.record_wait(name)
                results = torch.zeros(1, tensors[0].dim(), dtype=torch.int64, device="cuda")
            else:
                results = op(*args, **kwargs)
        self.track(results)
        if name not in FREE and not op.is_view:
            self.count(name, op, args, kwargs, tensors, results)
        return results

    def read_value(self, name: str, dtype: torch.dtype) -> bool | float | int:
        """A dummy for a value that the host reads: "true", "one", "all is well"."""
        self.record_wait("item" if name == "_local_scalar_dense" else name)
        if name == "equal" or dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else 1

    def transfer(self, name: str, op, args: tuple, kwargs: dict) -> torch.Tensor:
        """A copy between CPU and device. Those that block wait for the device, in both directions."""
        device = target_device(name, args, kwargs).type
        is_blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        self.copies[f"to {device}{'' if is_blocking else ', not blocking'}"] += 1
        if is_blocking:
            self.record_wait(f"copy to {device}")
        if name == "copy_":
            return args[0]
        if device in ("cpu", "meta"):  # weights get memory that nothing touches
            make = torch.zeros if args[0].numel() < UNTOUCHED and device == "cpu" else torch.empty
            return make(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=device)
        with self.fakes:
            result = op(*args, **kwargs)
        self.track(result)
        return result

    def replace_masks(self, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of indexing, with one hit for a mask.

        A mask on the device has to be read, an index on the CPU has to be sent: both wait.
        """
        if name not in ("index", "index_put_", "index_put", "masked_select"):
            return args, kwargs
        flat, spec = tree_flatten((args, kwargs))
        for i, value in enumerate(flat[1:], 1):
            if isinstance(value, FakeTensor) and value.dtype in (torch.bool, torch.uint8):
                self.record_wait("mask as index")
                with self.fakes:
                    flat[i] = torch.zeros(1, dtype=torch.int64, device="cuda")
            elif isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.dim():
                self.record_wait("index on the CPU")
        return tree_unflatten(flat, spec)

    # ---- memory --------------------------------------------------------------------------------------------

    def track(self, results) -> None:
        """Adds the memory of new tensors to what is in use, until their storages go."""
        for tensor in tensors_in(results):
            storage = tensor.untyped_storage()
            if isinstance(tensor, FakeTensor) and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.in_use += storage.nbytes()
                self.peak = max(self.peak, self.in_use)
                weakref.finalize(storage, self.release, storage._cdata)

    def release(self, address: int) -> None:
        """Takes the memory of a storage that is gone from what is in use."""
        self.in_use -= self.sizes.pop(address, 0)

    # ---- counts --------------------------------------------------------------------------------------------

    def record_wait(self, kind: str) -> None:
        """The host waits here until the device has done all that it was given; notes where."""
        place, library = self.find_place(with_line=True)
        self.waits[f"{kind} at {place or self.phase}{f', in {library}' if library else ''}"] += 1

    def find_place(self, with_line: bool = False) -> tuple[str, str]:
        """(the program's innermost function on the stack, the library's function that it called)."""
        frame, library = sys._getframe(1), ""
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if not file.startswith(THIS_FOLDER):
                line = f":{frame.f_lineno}" if with_line else ""
                if file.startswith(self.root) and "site-packages" not in file:
                    return f"{file.removeprefix(self.root)}{line} {function}", library
                if not library and f"{os.sep}torch{os.sep}" not in file and file[0] != "<":
                    library = f"{Path(file).name}{line} {function}"
            frame = frame.f_back
        return "", library

    def count(self, name: str, op, args: tuple, kwargs: dict, tensors: list, results) -> None:
        """Kernels, bytes, floating-point operations and casts of one operation."""
        outputs, kernels = tensors_in(results), count_launches(name, args, results)
        self.kernels[self.phase] += kernels
        self.operations[name] += kernels
        place, library = self.find_place()
        where = f"{place}, in {library}" if place and library else place or library or name
        self.places[f"{self.phase}: {where}"] += kernels
        moved = bytes_moved(name, op, args, tensors, outputs)
        self.traffic[self.phase] += moved
        if name == "_to_copy" and tensors[0].dtype != outputs[0].dtype:
            kind = f"{tensors[0].dtype}->{outputs[0].dtype}".replace("torch.", "")
            self.casts[kind] += 1
            self.cast_traffic[kind] += moved
        if op._overloadpacket in FLOP_FORMULAS:
            flop = FLOP_FORMULAS[op._overloadpacket](*args, **kwargs, out_val=results)
            self.flop["float32" if tensors[0].dtype == torch.float32 else "half"] += flop

    def results(self) -> dict:
        """All counts of the step, as JSON takes them; bytes, floating-point operations, numbers."""
        trained = self.trained
        counts = {name: dict(getattr(self, name).most_common()) for name in COUNTED}
        return counts | {
            "peak": self.peak,
            "resident": self.resident,
            "trained": sum(parameter.numel() for parameter in trained),
            "trained_dtypes": sorted({str(parameter.dtype) for parameter in trained}),
        }


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def fake_bytes(tensors: list[torch.Tensor]) -> int:
    """What a kernel touches of tensors on the device: an expanded one is read once."""
    fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in fakes)


def target_device(name: str, args: tuple, kwargs: dict) -> torch.device:
    """Where a copy goes."""
    return args[0].device if name == "copy_" else torch.device(kwargs.get("device") or args[0].device)


def is_transfer(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a copy goes from the CPU to the device or back."""
    source = args[1] if name == "copy_" else args[0]
    return target_device(name, args, kwargs).type != source.device.type


def count_launches(name: str, args: tuple, results) -> int:
    """The kernels of one operation: one, but of multi-tensor ones as many as CUDA's launcher makes."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and torch.is_tensor(arg[0])]
    if not name.startswith(("_foreach_", "_fused_")) or not lists:
        return 1
    kinds = sum(len(tensors) == len(lists[0]) for tensors in lists)
    kinds += bool(tensors_in(results)) and not name.endswith("_")
    kinds -= name.startswith("_fused_")  # whose list of step counters is none of the kernel's
    blocks = sum(-(-tensor.numel() // BLOCK) for tensor in lists[0])
    return max(-(-len(lists[0]) // TENSORS_PER_LAUNCH[min(kinds, 5)]), -(-blocks // BLOCKS_PER_LAUNCH))


def bytes_moved(name: str, op, args: tuple, tensors: list, outputs: list) -> int:
    """The bytes that one operation reads and writes on the device."""
    returned = {id(tensor) for tensor in outputs}
    arguments = zip(op._schema.arguments, args, strict=False)
    changed = [value for arg, value in arguments if arg.alias_info is not None and arg.alias_info.is_write]
    written = outputs + [tensor for tensor in tensors_in(changed) if id(tensor) not in returned]
    if name in ("zero_", "fill_"):
        return fake_bytes(written)
    if name in ("embedding", "index", "index_select", "gather"):  # read what they return, not the table
        tensors = tensors[1:] + outputs
    return fake_bytes(written) + fake_bytes(tensors)
