"""Sampling whose randomness is a function of (seed, sample, position, token) and of nothing else.

The same sample draws the same tokens whatever batch, engine, device or moment it is decoded in, so generation can be
batched, migrated and recovered without changing a single token.

Derivation of the noise, in 64-bit integers that wrap:

    mix(x)     = the SplitMix64 finaliser
    key        = absorb(absorb(absorb(0, seed), sample), position)     absorb(k, x) = mix((k ^ x) + GAMMA)
    block[j]   = mix(key + (j + 1) * GAMMA)                            the SplitMix64 stream that starts at `key`
    bits[2j]   = low 32 bits of block[j], bits[2j + 1] = its high 32 bits
    w[t]       = (bits[t] mod 2^31 + 1/2) / 2^31                       uniform in (0, 1)
    gumbel[t]  = -log(-log1p(-w[t]))

and `argmax(logits / temperature + gumbel)` is an exact draw from `softmax(logits / temperature)`. A token wins when
its w is *small*, and small w keep their full relative precision in fp32: that is why the tail is put there. The finite
2^-31 resolution only touches tokens whose probability is below about 1e-9, which are drawn too rarely.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64); Gumbel,
"Statistical theory of extreme values", 1954 (the max trick).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fuse.ops.native import choose, current, described, log_choice, queue

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio; odd, written as the int64 it is
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)

# 2^-31 rounded one step down: (2^31 - 1 + 1/2) rounds to 2^31 in fp32, and w must stay below 1.
_UNIFORM_SCALE = 2.0**-31 * (1.0 - 2.0**-24)

# int64 words hashed at a time: 2 MiB stays in a core's cache, which halves the time of the CPU path.
_BLOCK_WORDS = 1 << 18


def gumbel_noise(seeds: Tensor, sample_ids: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token of every row.

    Shapes: seeds, sample_ids, positions int64 [rows], on one device; the result is float32 [rows, vocab_size] there.
    `positions` are indices into the response, starting at 0. The integers behind the noise are equal on every device;
    the two logarithms differ by rounding only.

    Source: the module's docstring; pinned by golden values in the tests.
    """
    return _exponential_noise(_keys(seeds, sample_ids, positions), vocab_size).log_().neg_()


def sample_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, sample_ids: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature), with its log-probability.

    Shapes: logits floating [rows, vocab]; temperatures float32 [rows]; seeds, sample_ids, positions int64 [rows].
    Returns token ids int64 [rows] and `log_softmax(logits.float() / temperature)[token]` float32 [rows].

    A row of temperature 0 is greedy: the first largest logit, its log-probability taken at temperature 1 (the limit
    would be 0 for every token).
    """
    device = logits.device
    native, choice = choose(device, has_cuda=True)
    log_choice("sample_tokens", choice)
    if native is None:
        return sample_tokens_reference(logits, temperatures, seeds, sample_ids, positions)
    logits = logits.detach()
    if device.type == "cpu" or logits.dtype != torch.bfloat16:  # which the CUDA code reads as it is
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows = [one.contiguous() for one in (temperatures, seeds, sample_ids, positions)]
    tokens = torch.empty(len(logits), dtype=torch.int64, device=device)
    logprobs = torch.empty(len(logits), device=device)
    with current(device):
        native.sample(logits, *rows, tokens, logprobs, *queue(device))
    return tokens, logprobs


def sample_tokens_reference(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, sample_ids: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """`sample_tokens` as the definition has it: add the noise, take the largest."""
    greedy = temperatures == 0
    scaled = logits.detach().float() / torch.where(greedy, 1.0, temperatures).unsqueeze(1)
    noise = gumbel_noise(seeds, sample_ids, positions, logits.shape[1])
    noise.masked_fill_(greedy.unsqueeze(1), 0.0)
    tokens = noise.add_(scaled).argmax(dim=1)
    chosen = scaled.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens, chosen - scaled.logsumexp(dim=1)


def describe() -> str:
    """Which implementation serves which input, and why."""
    return described("native C++ on CPU", "torch reference elsewhere", on_gpus="CUDA on GPUs")


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose(example.device, has_cuda=True)[1]


def _keys(seeds: Tensor, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """One well-mixed int64 [rows] per (seed, sample, position)."""
    key = _mix_(seeds + _GAMMA)
    for part in (sample_ids, positions):
        key = _mix_((key ^ part).add_(_GAMMA))
    return key


def _exponential_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Exp(1) noise, float32 [rows, vocab_size]: -log1p(-w)."""
    words = (vocab_size + 1) // 2  # each hashed word serves two tokens
    offsets = _word_offsets(words, keys.device)
    noise = torch.empty(len(keys), 2 * words, device=keys.device)
    rows_per_block = max(1, _BLOCK_WORDS // words)
    for start in range(0, len(keys), rows_per_block):
        block = _mix_(keys[start : start + rows_per_block, None] + offsets)
        # Little-endian: the low half of each word is the even token.
        noise[start : start + rows_per_block] = block.view(torch.int32).bitwise_and_(0x7FFFFFFF)
    noise.add_(0.5).mul_(-_UNIFORM_SCALE).log1p_().neg_()
    return noise[:, :vocab_size]


@functools.lru_cache(maxsize=8)
def _word_offsets(words: int, device: torch.device) -> Tensor:
    """(j + 1) * GAMMA for j in 0..words-1, int64 [words]."""
    return torch.arange(1, words + 1, dtype=torch.int64, device=device).mul_(_GAMMA)


def _mix_(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. int64 shifts are arithmetic: masks make them logical."""
    x ^= (x >> 30).bitwise_and_((1 << 34) - 1)
    x *= _MULTIPLIER_1
    x ^= (x >> 27).bitwise_and_((1 << 37) - 1)
    x *= _MULTIPLIER_2
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    return x
