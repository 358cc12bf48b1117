"""Decode steps as CUDA graphs: one launch in place of a thousand, where the host takes longer than the GPU.

This has not run on a GPU yet: tests replay steps on a CPU and check that all memory is where it was at the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Step = Callable[[], Tensor]
"""A decode step: logits, which the next step of any kind may overwrite."""

_EAGER_STEPS = 4
"""Of a kind, before it is captured: a capture takes as long as a few steps, and what kernels set up once is set up."""
_MOST_GRAPHS = 8


class CapturedSteps:
    """Runs steps; those of a kind that comes again and again are captured once, and replayed from then on.

    Steps of a kind launch the same kernels on the same memory, of which only the contents differ.

    capture: makes of a step what repeats it; it need not run it.
    """

    def __init__(self, capture: Callable[[Step], Step] | None = None) -> None:
        self._capture = capture or _cuda_graph
        self._graphs: dict[Hashable, Step] = {}
        self._last: Hashable = None
        self._count = 0  # of the last kind, without a break

    def run(self, kind: Hashable, step: Step) -> Tensor:
        """What `step` returns, a step of this kind."""
        if kind not in self._graphs:
            self._count = self._count + 1 if kind == self._last else 1
            self._last = kind
            if self._count <= _EAGER_STEPS:
                return step()
            if len(self._graphs) == _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]  # the oldest
            self._graphs[kind] = self._capture(step)
        return self._graphs[kind]()

    def clear(self) -> None:
        """Forget all graphs: memory that they use has moved, or is going to."""
        self._graphs.clear()
        self._last = None


def _cuda_graph(step: Step) -> Step:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
