"""What a generation engine is: it decodes many samples side by side, a token or more of each per step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # processes that only speak of samples do without torch
    from torch import Tensor

    from fuse.engines.kv_memory import Allocate
    from fuse.state_dict import Weights

_INT64 = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw a sample's tokens: from softmax(logits / temperature), or from what filters leave of it.

    `temperature` 0 takes the most likely token. Any of `stop_token_ids` ends the response and belongs to it; without
    any it goes on to `max_new_tokens`, which counts the whole response, tokens generated elsewhere included.

    The filters are those of `transformers.GenerationConfig`, applied in this order:
    repetition_penalty: divides the positive logits of tokens of the prompt and the response so far, and multiplies the
        negative ones; 1 is off.
    temperature: the only one of these that log-probabilities know, for it is the only one that trainers know. They are
        those of the whole distribution, without penalty, also of tokens drawn from a part of it.
    top_k: keeps the most likely tokens, and those as likely as the last of them; 0 is off.
    top_p: keeps the fewest of the most likely tokens that have this probability together; 1 is off.
    min_p: keeps tokens of at least this part of the highest probability; None is off.

    At temperature 0 the penalty counts, and the others change nothing.
    """

    seed: int
    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not -_INT64 <= self.seed < _INT64:
            raise ValueError(f"seed is {self.seed}: it keys 64-bit noise, so it must fit a signed 64-bit integer")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}: it must be a finite number >= 0 (0 is greedy)")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: a response has at least one token")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}: it is the probability that is kept, so above 0 and at most 1 (1 keeps all)"
            )
        if not isinstance(self.top_k, int) or not 0 <= self.top_k < _INT64:
            raise ValueError(
                f"top_k is {self.top_k}: it counts the tokens that are kept, so give 1 or more (0 keeps all)"
            )
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(
                f"min_p is {self.min_p}: it is a part of the highest probability, so at least 0 and at most 1 "
                "(None keeps all)"
            )
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: logits are divided by it, so it must be a finite "
                "number above 0 (1 is off)"
            )

    @property
    def is_filtered(self) -> bool:
        """Whether tokens are drawn from anything but the whole distribution."""
        return self.repetition_penalty != 1 or (
            self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or bool(self.min_p))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt to continue; `response_ids` and `logprobs` are what was already generated, here or elsewhere.

    `sample_id` is unique over a run and keys the sampling noise together with the seed.
    """

    sample_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    response_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        name = f"sample {self.sample_id}"
        if not self.prompt_ids:
            raise ValueError(f"{name} has an empty prompt: a causal model needs at least one token to continue")
        if len(self.response_ids) != len(self.logprobs):
            raise ValueError(
                f"{name} has {len(self.response_ids)} response tokens but {len(self.logprobs)} log-probabilities: "
                "pass one per token"
            )
        if len(self.response_ids) >= self.params.max_new_tokens:
            raise ValueError(
                f"{name} already has {len(self.response_ids)} of max_new_tokens={self.params.max_new_tokens}: "
                "it is finished, so do not submit it"
            )
        if self.response_ids and self.response_ids[-1] in self.params.stop_token_ids:
            raise ValueError(f"{name} already ended with stop token {self.response_ids[-1]}: do not submit it")

    @property
    def num_tokens(self) -> int:
        """Prompt and response so far."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A sample's next token; `logprob` is log_softmax(logits.float() / temperature)[token_id], whatever the filters.

    `finished` is set on the sample's last token, in the step that generates it. `shared_tokens`, on the first token
    after the sample has entered an engine, are those of its context that the engine did not compute, because it had
    their keys and values from a sample that begins the same. `drafted_tokens`, on a sample's first token of a step, are
    those that a draft proposed to follow its last one; of the tokens that the step gives the sample, all but the last
    are drafted ones that were right. `draft_s`, on the first token of a step, are the seconds of it that went into
    drafts, preparing for them included, and `drafted_in_window` says whether these read a part of all keys.
    """

    sample_id: int
    token_id: int
    logprob: float
    finished: bool
    shared_tokens: int = 0
    drafted_tokens: int = 0
    draft_s: float = 0.0
    drafted_in_window: bool = False


@dataclass(frozen=True, slots=True)
class Evicted:
    """A sample taken out of an engine, fit to be admitted by another one over the same weights.

    `kv` spares the next engine the prefill, or is None, which makes it recompute. It holds keys and values for all
    tokens but the last, on the host or on the engine's device, in a form that engines of one kind share: the
    transformers engine's are the keys and the values of each layer in turn, [kv_heads, tokens, head_dim]; vLLM's whole
    blocks of each layer.
    """

    request: GenerationRequest
    kv: tuple[Tensor, ...] | None = None


class GenerationEngine(Protocol):
    """Continuous batching: samples enter and leave the batch at every step.

    A sample's tokens are a function of weights, prompt, seed and sample id, whatever else is in the batch and however
    often it moved between engines. Engines are not thread-safe: calls must not overlap.
    """

    @property
    def kv_capacity_tokens(self) -> int | None:
        """Tokens of which the engine holds keys and values at once; None where that is as many as its samples need."""
        ...

    def submit(self, request: GenerationRequest) -> None:
        """Queue a sample; it enters the running batch at a later step, in order of submission.

        Pre: no sample of this id is in the engine; the whole response fits the engine's context.
        Post: the sample is in the engine until it finishes or is evicted.
        Raises: ValueError when a precondition does not hold.
        """
        ...

    def step(self) -> list[GeneratedToken]:
        """Generate one token or more for every running sample, those of a sample in order and next to one another.

        Post: finished samples have left the engine, and their places are free for the next step. [] when idle; not
        idle means at least one token.
        """
        ...

    def evict(self, sample_id: int, *, with_kv: bool = False, allocate: Allocate | None = None) -> Evicted:
        """Take a sample out, with its tokens so far, and its KV when asked for and there is some.

        allocate: memory on the engine's device to write the KV to, as a `Layout` says; called once, or never when the
            KV is not the engine's own but what the sample brought and is given back. By default KV goes to the host.

        Post: the sample is not in the engine. Raises: ValueError when it was not before; what `allocate` raises, and
        then the sample is still there.
        """
        ...

    def admit(self, evicted: Evicted) -> None:
        """Continue a sample evicted elsewhere or here. Conditions as for `submit`.

        Pre: `evicted.kv`, if any, was computed by the same weights. Post: the remaining tokens and log-probabilities
        are those that the sample would have got without moving.
        """
        ...

    def sleep(self) -> None:
        """Free the memory of weights, keys and values, as far as the engine can, until `load_weights` wakes it.

        Pre: no sample is in the engine. Post: it takes none until it is awake. Raises: ValueError when one is.
        """
        ...

    def load_weights(self, weights: Weights) -> None:
        """Take new weights, by their global Hugging Face names; the engine is awake then.

        It may keep those in host memory themselves: nobody writes to them any more. Where their stream breaks off, the
        engine is asleep.

        Pre: no sample is in the engine. Raises: ValueError when one is, or when names or shapes do not match; then
        nothing has changed.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; it takes no further calls but `close`."""
        ...


def already_present(sample_id: int) -> ValueError:
    return ValueError(f"sample {sample_id} is already in the engine: an id is unique until its sample leaves")


def not_present(sample_id: int) -> ValueError:
    return ValueError(f"sample {sample_id} is not in the engine: it finished, was evicted, or was never submitted")


def still_live(num_samples: int) -> ValueError:
    return ValueError(
        f"cannot load weights while {num_samples} samples are in the engine: they would mix two policies; "
        "let them finish or evict them first"
    )


def not_idle(num_samples: int) -> ValueError:
    return ValueError(
        f"cannot sleep while {num_samples} samples are in the engine: it would lose them; let them finish or evict "
        "them first"
    )


def asleep(sample_id: int) -> ValueError:
    return ValueError(f"sample {sample_id} was given to an engine that is asleep: load weights first")
