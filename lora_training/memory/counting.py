"""Memory counted without a GPU and without weights: what autograd saves, and what exists at one time.

For modules on the `meta` device. Every tensor is counted once, by its storage. Attention is counted as flash
attention.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class FlashAttention(torch.autograd.Function):
    """Saves what flash attention saves: queries, keys, values, output and one number per query and head."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("only the forward pass is estimated")


@contextlib.contextmanager
def counted_attention():
    """While inside, torch's attention is replaced by one that can be counted on the meta device."""
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, *rest, **options):
        return FlashAttention.apply(query, key, value)

    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


class SavedTensors:
    """Bytes of tensors, each storage once. Holds the tensors, so that no address is used twice."""

    def __init__(self, *excluded: int) -> None:
        """excluded: addresses of storages that don't count, such as those of weights."""
        self.seen, self.tensors, self.bytes = set(excluded), [], 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor, and returns it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.tensors.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

    def hooks(self):
        """A context in which what autograd saves is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


def saved_bytes(denoiser: torch.nn.Module, inputs: dict, checkpointing: bool) -> tuple[int, int]:
    """(bytes that autograd saves of a forward pass, the most that one checkpointed function saves inside)."""
    weights = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    saved, largest = SavedTensors(*weights), 0

    def checkpointed(function, *args, **named):
        nonlocal largest
        for tensor in tree_iter((args, named)):
            if torch.is_tensor(tensor):
                saved.add(tensor)
        inside = SavedTensors(*saved.seen)
        with inside.hooks():
            result = function(*args, **named)
        largest = max(largest, inside.bytes)
        return result

    if checkpointing:
        denoiser.enable_gradient_checkpointing(checkpointed)
    else:
        denoiser.disable_gradient_checkpointing()
    with saved.hooks(), counted_attention():
        denoiser(**inputs)
    return saved.bytes, largest


class PeakMemory(TorchDispatchMode):
    """A context that counts the most bytes that tensors made inside take at one time (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # {address of a storage: its bytes}
        self.current, self.peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self.release, storage._cdata)
        return out

    def release(self, address: int) -> None:
        """Counts a storage that is no more."""
        self.current -= self.sizes.pop(address, 0)
