"""Forward and backward pass as one CUDA graph for each shape of batch."""

from __future__ import annotations

import torch


class CudaGraphs:
    """CUDA graphs of forward and backward pass, one for each shape of batch: hundreds of launches become one.

    By torch's rules, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: inputs and gradients
    stay where they are, the first passes run on a stream of their own, and the graphs share their memory. Not
    yet tried on a GPU.
    """

    def __init__(self, parts: list) -> None:
        """parts: the TrainedParts whose gradients a pass adds to."""
        self.parts, self.recorded, self.pool = parts, {}, None

    def run(self, work, batch: dict):
        """What work(batch) returns, a tensor; its launches are recorded at the first batch of this shape."""
        batch = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        shapes = tuple((name, value.shape) for name, value in batch.items())
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record(work, {name: value.clone() for name, value in batch.items()})
        graph, inputs, result = self.recorded[shapes]
        for name, value in batch.items():
            inputs[name].copy_(value)
        graph.replay()
        return result.clone()

    def record(self, work, inputs: dict) -> tuple:
        """(the graph, its inputs, its result)."""
        stream, saved = torch.cuda.Stream(), [part.gradients.clone() for part in self.parts]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for part, gradients in zip(self.parts, saved, strict=True):
            part.gradients.copy_(gradients)  # without what the first passes have added
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = work(inputs)
        self.pool = graph.pool()
        return graph, inputs, result
