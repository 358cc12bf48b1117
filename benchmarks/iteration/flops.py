"""Floating-point operations that training needs, whoever trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from fuse.benchmarks.iteration.turn import Response
from fuse.benchmarks.iteration.workload import Workload
from fuse.head_dim import head_dim

_PASSES = 3
"""Forward, and a backward pass of twice its work."""


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """Of one model's forward pass. token, pair, output: per token; per token and one it attends to; per token of a
    response, of which the head computes an output."""

    token: int
    pair: int
    output: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ForwardFlops:
        """A multiplication and an addition for each weight of a matrix; what is no matrix product is not counted."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings() or getattr(model, "score", None)
        layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        return cls(
            token=2 * sum(layer.weight.numel() for layer in layers),
            # A product with a key, and one with a value.
            pair=4 * config.num_hidden_layers * config.num_attention_heads * head_dim(config),
            output=2 * head.weight.numel() if isinstance(head, nn.Linear) else 0,
        )

    def __call__(self, responses: Iterable[Response]) -> int:
        """Of these samples without padding; a token attends to itself and to those before it."""
        total = 0
        for one in responses:
            tokens = len(one.prompt_ids) + len(one.response_ids)
            total += tokens * self.token + tokens * (tokens + 1) // 2 * self.pair + len(one.response_ids) * self.output
        return total


class TrainingFlops:
    """Of an iteration's training, all models and epochs; activations that are computed twice count once.

    Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B (model FLOPs), with causal attention counted as it is.
    """

    def __init__(self, workload: Workload) -> None:
        models = workload.models
        trained = [models.policy, *([models.critic] if workload.algorithm == "ppo" else [])]
        self._forward = [ForwardFlops.of(model) for model in trained]
        self._times = _PASSES * workload.epochs

    def __call__(self, responses: Iterable[Response]) -> int:
        responses = list(responses)
        return self._times * sum(forward(responses) for forward in self._forward)
