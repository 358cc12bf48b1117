"""The kernels that `fuse bench kernels` measures, and what it measures them against."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fuse.algorithms.batch import Segments
from fuse.benchmarks.kernels.adapters import lora_cases
from fuse.benchmarks.kernels.rows import Case
from fuse.benchmarks.kernels.schedules import schedule_cases
from fuse.ops import (
    decode_attention,
    gae,
    kv_blocks,
    linear_logprob,
    quantized_linear,
    rms_norm,
    rotary,
    sampling,
    shaped_gae,
    skinny_linear,
    suffix_index,
    swiglu,
)

TEMPERATURE = 0.7
CHECKPOINTED_TOKENS = 256


def gae_cases(num_samples: int = 512, max_tokens: int = 2048) -> Iterator[Case]:
    """GAE over `num_samples` responses of 1 to `max_tokens` tokens, uniformly drawn."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, max_tokens + 1, (num_samples,), generator=generator)
    offsets = Segments.from_lengths(lengths.tolist(), max_tokens).token_offsets
    rewards, values = torch.randn(2, int(offsets[-1]), generator=generator)
    yield Case(
        kernel="gae",
        shape=[num_samples, max_tokens],
        bytes_moved=4 * rewards.nbytes,
        result_bytes=2 * rewards.nbytes,
        **_sides(gae, "gae", rewards, values, offsets, 0.99, 0.95, reference="torch loop"),
    )


def shaped_gae_cases(num_samples: int = 512, max_tokens: int = 2048) -> Iterator[Case]:
    """KL penalty, scores, GAE and whitening; a response has a value after its last token unless it is the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, max_tokens + 1, (num_samples,), generator=generator)
    segments = Segments.from_lengths(lengths.tolist(), max_tokens)
    logprobs, reference = torch.randn(2, int(segments.token_offsets[-1]), generator=generator)
    scores = torch.randn(num_samples, generator=generator)
    values = torch.randn(int(segments.value_offsets[-1]), generator=generator)
    tensors = (logprobs, reference, scores, values, segments.token_offsets, segments.value_offsets)
    options: dict[str, Any] = {"kl_coef": 0.05, "estimator": "k1", "whiten_rewards": False, "gamma": 0.99, "lam": 0.95}
    yield Case(
        kernel="shaped_gae",
        shape=[num_samples, max_tokens],
        # The advantages are written, and read and written again once their mean is known.
        bytes_moved=6 * logprobs.nbytes + 2 * values.nbytes,
        result_bytes=2 * logprobs.nbytes + values.nbytes,
        **_sides(shaped_gae, "shaped_gae", *tensors, reference="torch loop", **options),
    )


def sample_cases(rows: int = 64, vocab_size: int = 32_000) -> Iterator[Case]:
    """One token of each of `rows` samples."""
    logits = 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(rows)
    yield Case(
        kernel="sample_tokens",
        shape=[rows, vocab_size],
        bytes_moved=logits.nbytes,
        result_bytes=12 * rows,
        **_sides(sampling, "sample_tokens", logits, torch.ones(rows), ids, ids, ids),
    )


def decode_attention_cases(rows: int = 64, kv_heads: int = 4, context: int = 512, head_dim: int = 64) -> Iterator[Case]:
    """A layer's decode step over `rows` samples of 1 to `context` tokens, uniformly drawn."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, kv_heads, head_dim, generator=generator)
    keys, values = torch.randn(2, rows, kv_heads, context, head_dim, generator=generator)
    lengths = torch.randint(1, context + 1, (rows,), generator=generator)
    yield Case(
        kernel="decode_attention",
        shape=[rows, kv_heads, context, head_dim],
        bytes_moved=2 * int(lengths.sum()) * kv_heads * head_dim * 4 + 2 * query.nbytes,
        result_bytes=query.nbytes,
        **_sides(decode_attention, "decode_attention", query, keys, values, lengths, 0.125),
    )


def skinny_linear_cases(outs: int = 32_000, width: int = 1024) -> Iterator[Case]:
    """A matrix that no cache holds, for the tokens of a small batch or of a verification."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outs, width, generator=generator)
    for rows in (1, 4, 9):
        inputs = torch.randn(rows, width, generator=generator)
        yield Case(
            kernel="skinny_linear",
            shape=[rows, outs, width],
            bytes_moved=weight.nbytes + inputs.nbytes,
            result_bytes=4 * rows * outs,
            flops=2 * rows * outs * width,
            **_sides(skinny_linear, "skinny_linear", inputs, weight),
        )


def quantized_linear_cases(outs: int = 32_000, width: int = 1024) -> Iterator[Case]:
    """The same for one sample's draft and for those of four; the matrix in 8 and in 4 bits."""
    weight = torch.randn(outs, width, generator=torch.Generator().manual_seed(0))
    for name, quantize in (
        ("int8_linear", quantized_linear.quantize_int8),
        ("int4_linear", quantized_linear.quantize_int4),
    ):
        parts = quantize(weight)
        for rows in (1, 4):
            inputs = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
            yield Case(
                kernel=name,
                shape=[rows, outs, width],
                bytes_moved=sum(part.nbytes for part in parts) + inputs.nbytes,
                result_bytes=4 * rows * outs,
                flops=2 * rows * outs * width,
                **_sides(quantized_linear, name, inputs, *parts),
            )


def suffix_index_cases(batches: Sequence[int] = (1, 16, 64), context: int = 512, group: int = 8) -> Iterator[Case]:
    """A step of n-gram drafts: a token for each sample of groups, and eight of each asked for.

    Before it, texts of `context` tokens: each one's successor is of eight, the most frequent of which every other time.
    """
    generator = np.random.default_rng(0)
    successors = generator.integers(0, 2000, (2000, 8))
    kinds = np.minimum(generator.geometric(0.5, (max(batches), context + 64)), 8) - 1
    for batch in batches:
        texts = np.zeros_like(kinds[:batch])
        for place in range(1, texts.shape[1]):
            texts[:, place] = successors[texts[:, place - 1], kinds[:batch, place]]
        sides = []
        for make in (suffix_index.suffix_index, suffix_index.suffix_index_reference):
            index = make(texts.size)
            responses = [index.open((sample // group, 0)) for sample in range(batch)]
            index.extend(responses, texts[:, :context].tolist(), [0] * batch)
            added = cycle(texts[:, context:, None].swapaxes(0, 1).tolist())
            sides.append(partial(_drafted, index, responses, added))
        yield Case(
            kernel="suffix_index",
            shape=[batch, context],
            dtype=torch.int64,
            bytes_moved=0,  # unknown: as many places as tokens are alike
            result_bytes=0,
            implementation=suffix_index.implementation(torch.empty(0)),
            function=sides[0],
            references={"Python": sides[1]},
        )


def _drafted(index: suffix_index.SuffixIndex, responses: list[int], added: Iterator[list[list[int]]]) -> object:
    return index.extend(responses, next(added), [8] * len(responses))


def layer_steps_cases(samples: int = 8, tokens: int = 128, width: int = 1024, head_dim: int = 64) -> Iterator[Case]:
    """What a layer computes between its products, for a micro-batch: forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, samples, tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(width, generator=generator).requires_grad_()
    heads = hidden.view(samples, tokens, -1, head_dim).transpose(1, 2)
    angles = torch.randn(2, 1, tokens, head_dim, generator=generator)
    calls: dict[str, tuple[Any, tuple[Any, ...], int]] = {  # and tensors of that size that are read or written
        "rms_norm": (rms_norm, (hidden, weight, 1e-5), 5),
        "rotary": (rotary, (heads, *angles), 4),
        "swiglu": (swiglu, (hidden, other), 8),
    }
    for name, (module, arguments, num_passes) in calls.items():
        sides = _sides(module, name, *arguments)
        learned = [one for one in arguments if isinstance(one, Tensor) and one.requires_grad]
        yield Case(
            kernel=name,
            pass_name="forward_backward",
            shape=list(hidden.shape),
            bytes_moved=num_passes * hidden.nbytes,
            result_bytes=sum(one.nbytes for one in learned),
            implementation=sides["implementation"],
            function=_learning(sides["function"], learned),
            references={told: _learning(function, learned) for told, function in sides["references"].items()},
        )


def _learning(function: Callable[[], Tensor], learned: Sequence[Tensor]) -> Callable[[], object]:
    """The gradients of what a function gives, summed up, in these."""
    return lambda: torch.autograd.grad(function().sum(), learned)


def kv_blocks_cases(
    num_layers: int = 24, kv_heads: int = 2, num_tokens: int = 300, head_dim: int = 64
) -> Iterator[Case]:
    """A sample's keys and values of all layers out of 16 slots of 1,024 tokens, and back into another slot."""
    generator = torch.Generator().manual_seed(0)
    buffers = [torch.randn(16, kv_heads, 1024, head_dim, generator=generator) for _ in range(2 * num_layers)]
    message_bytes = 2 * num_layers * kv_heads * num_tokens * head_dim * 4
    blocks = kv_blocks.gather(buffers, 3, num_tokens)
    calls = {"gather": (buffers, 3, num_tokens), "scatter": (blocks, buffers, 5)}
    for name, arguments in calls.items():
        yield Case(
            kernel=f"kv_{name}",
            shape=[num_layers, kv_heads, num_tokens, head_dim],
            bytes_moved=2 * message_bytes,
            result_bytes=message_bytes if name == "gather" else 0,
            **_sides(kv_blocks, name, *arguments, reference="torch loop", example=buffers[0]),
        )


def linear_logprob_cases(
    num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float32, hidden_size: int = 1024
) -> Iterator[Case]:
    """Forward alone, as for inference, and with the gradients of hidden states and head, each against two references.

    The references compute no entropies; the kernel does.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) * hidden_size**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)

    def log_softmax(rows: Tensor = hidden, row_targets: Tensor = targets) -> Tensor:
        logprobs = (functional.linear(rows, weight).float() / TEMPERATURE).log_softmax(dim=-1)
        return logprobs.gather(-1, row_targets[:, None]).squeeze(-1)

    def checkpointed() -> Tensor:
        chunks = zip(hidden.split(CHECKPOINTED_TOKENS), targets.split(CHECKPOINTED_TOKENS), strict=True)
        return torch.cat([checkpoint(log_softmax, *chunk, use_reentrant=False) for chunk in chunks])

    def kernel() -> Tensor:
        return linear_logprob.linear_logprob(hidden, weight, None, targets, TEMPERATURE)[0]

    def forward_backward(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function().sum(), (hidden, weight))

    def case(name: str, wrap: Callable[[Callable[[], Tensor]], Callable[[], object]], products: int) -> Case:
        parameter_bytes = hidden.nbytes + weight.nbytes
        is_forward = name == "forward"
        return Case(
            kernel="linear_logprob",
            pass_name=name,
            shape=[num_tokens, hidden_size, vocab_size],
            dtype=dtype,
            bytes_moved=parameter_bytes if is_forward else 3 * parameter_bytes,
            flops=products * 2 * num_tokens * hidden_size * vocab_size,
            result_bytes=8 * num_tokens if is_forward else parameter_bytes,
            implementation=linear_logprob.implementation(hidden),
            function=wrap(kernel),
            references={"log_softmax and gather": wrap(log_softmax), "checkpointed chunks": wrap(checkpointed)},
            is_slow=True,  # seconds to minutes each
        )

    yield case("forward", torch.no_grad(), products=1)
    # A backward multiplies twice, and once more for the logits that the forward did not keep.
    yield case("forward_backward", forward_backward, products=4)


def _sides(
    module: Any, name: str, *arguments: Any, reference: str = "torch", example: Tensor | None = None, **options: Any
) -> dict[str, Any]:
    """A call of a module of `fuse.ops`, and of its reference there. example: of its tensors, by default the first."""
    return {
        "implementation": module.implementation(arguments[0] if example is None else example),
        "function": partial(getattr(module, name), *arguments, **options),
        "references": {reference: partial(getattr(module, f"{name}_reference"), *arguments, **options)},
    }


MakeCases = Callable[[], Iterator[Case]]

CASES: Mapping[str, tuple[MakeCases, ...]] = {
    "gae": (gae_cases, shaped_gae_cases),
    "sample_tokens": (sample_cases,),
    "decode_attention": (decode_attention_cases,),
    "skinny_linear": (skinny_linear_cases,),
    "quantized_linear": (quantized_linear_cases,),
    "suffix_index": (suffix_index_cases,),
    "layer_steps": (layer_steps_cases,),
    "kv_blocks": (kv_blocks_cases,),
    "lora": (lora_cases,),
    "schedules": (schedule_cases,),
    "linear_logprob": tuple(
        partial(linear_logprob_cases, num_tokens=num_tokens, vocab_size=vocab_size)
        for vocab_size, num_tokens in itertools.product((32_000, 151_936), (1024, 4096))
    ),
}
