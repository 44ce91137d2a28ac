"""CUDA graphs, with a recorder in their place."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from small_models import (
    Attention,
    with_lora,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_training.memory.cuda_graphs import CudaGraphs

pytestmark = pytest.mark.unit


class Recorder(TorchDispatchMode):
    """A CUDA graph on the CPU: notes what is computed, and computes it again with the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tape = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.tape:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for first, second in zip(tree_leaves(out), tree_leaves(again)):
                if torch.is_tensor(first) and first.data_ptr() != second.data_ptr():
                    first.copy_(second)

    def pool(self):
        return "the graphs' memory"


def test_graphs_give_the_same_gradients(monkeypatch):
    """A graph for each shape, with memory in common; the passes before a recording add nothing.

    Micro-batches add up.
    """
    model, part = with_lora(Attention())
    pools = []
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)

    @contextlib.contextmanager
    def capture(graph, pool):  # only records: what it computes while it does so must not be seen
        pools.append(pool)
        before = part.gradients.clone()
        with graph:
            yield
        part.gradients.copy_(before)

    monkeypatch.setattr(torch.cuda, "graph", capture)

    def work(inputs):
        loss = (model(inputs["x"]) * inputs["weight"]).square().mean()
        loss.backward()
        part.accumulate_gradients()
        return loss.detach()

    batches = [
        {"x": torch.randn(2, n, 16), "weight": torch.rand(1), "captions": ["a"]} for n in (5, 3, 5, 3, 5)
    ]
    plain = [(work(batch), part.gradients.clone()) for batch in batches]
    part.gradients.zero_()
    graphs = CudaGraphs([part])
    for (loss, gradients), batch in zip(plain, batches, strict=True):
        inputs = {name: value.clone() for name, value in batch.items() if torch.is_tensor(value)}
        torch.testing.assert_close(graphs.run(work, batch), loss)
        torch.testing.assert_close(part.gradients, gradients)
        assert all(torch.equal(batch[name], value) for name, value in inputs.items())
    assert pools == [None, "the graphs' memory"]
