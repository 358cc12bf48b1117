"""What an engine can serve: the limits of its model, and the requests that keep to them."""

from __future__ import annotations

import math

from transformers import PretrainedConfig, PreTrainedModel

from fuse.engines.engine import GenerationRequest

_LEAST_CONTEXT = 8


def num_positions(config: PretrainedConfig) -> int | None:
    """The most tokens of a sequence, as far as the model says."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def choose_context(model: PreTrainedModel, max_context: int | None) -> int:
    """`max_context`, or without it the model's positions.

    Raises: ValueError where the model has fewer positions, or where neither says how many.
    """
    name = type(model).__name__
    most = num_positions(model.config)
    if max_context is None:
        max_context = most
    if max_context is None:
        raise ValueError(f"{name} declares no max_position_embeddings: pass max_context")
    if max_context < _LEAST_CONTEXT:
        raise ValueError(f"max_context is {max_context}: it must be at least {_LEAST_CONTEXT} tokens")
    if most is not None and max_context > most:
        raise ValueError(f"max_context is {max_context} but {name} has {most} positions: lower max_context")
    return max_context


def check_request(request: GenerationRequest, *, max_context: int, vocab_size: int) -> None:
    """Raises: ValueError when the whole response may exceed the context, or a token is outside the vocabulary."""
    num_tokens = len(request.prompt_ids) + request.params.max_new_tokens
    if num_tokens > max_context:
        raise ValueError(
            f"sample {request.sample_id} needs {num_tokens} tokens ({len(request.prompt_ids)} of prompt, up to "
            f"{request.params.max_new_tokens} of response) but the engine's context is {max_context}: "
            "shorten the prompt, lower max_new_tokens or raise max_context"
        )
    lowest, highest = min(request.prompt_ids + request.response_ids), max(request.prompt_ids + request.response_ids)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"sample {request.sample_id} has token id {lowest if lowest < 0 else highest} but the model knows 0 to "
            f"{vocab_size - 1}: use the model's own tokenizer"
        )


def check_logprob(sample_id: int, position: int, logprob: float) -> None:
    """Raises: ValueError when the log-probability of a token just drawn is not a number."""
    if not math.isfinite(logprob):
        raise ValueError(
            f"sample {sample_id} drew a token of log-probability {logprob} at position {position}: "
            "the model's logits are not finite, so check the weights it was given"
        )
