"""Sampling noise: pinned values, the softmax distribution, and dependence on (seed, sample, position) alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fuse.ops import describe
from fuse.ops.sampling import gumbel_noise, sample_tokens, sample_tokens_reference

GOLDEN_NOISE = [0.9999578, -1.0603911, -0.6108896, -0.2144664, -0.0279313]  # seed 7, sample 3, position 5
GOLDEN_TOKENS = [1, 4, 1, 0, 5, 1, 0, 0, 0, 0, 2, 4, 5, 4, 5, 0]  # seed 11, samples 0 to 15, position 0
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, -3.0])


def column(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def noise_of(seed: int, sample_id: int, position: int, vocab_size: int) -> Tensor:
    return gumbel_noise(column(seed), column(sample_id), column(position), vocab_size)[0]


def draw(num: int, temperature: float = 1.0, logits: Tensor = LOGITS, *, first_sample: int = 0) -> Tensor:
    """`num` tokens, each of another (sample, position)."""
    rows = torch.arange(num)
    return sample_tokens(
        logits.expand(num, -1),
        torch.full((num,), temperature),
        torch.full((num,), 11),
        first_sample + rows % 97,
        rows // 97,
    )[0]


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def splitmix64_gumbel(seed: int, sample_id: int, position: int, token: int) -> float:
    """The docstring's derivation in Python integers, which never wrap by themselves."""
    wrap, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x &= wrap
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
        return x ^ (x >> 31)

    key = 0
    for part in (seed, sample_id, position):
        key = mix((key ^ (part & wrap)) + gamma)
    word = mix(key + (token // 2 + 1) * gamma)
    bits = (word >> (32 * (token % 2))) & 0x7FFFFFFF
    return -math.log(-math.log1p(-(bits + 0.5) / 2**31))


@pytest.mark.parametrize(("seed", "sample_id", "position"), [(0, 0, 0), (7, 3, 5), (-1, 2**40, 1023)])
def test_the_noise_is_the_documented_one(seed: int, sample_id: int, position: int) -> None:
    noise = noise_of(seed, sample_id, position, 1001)
    expected = torch.tensor([splitmix64_gumbel(seed, sample_id, position, token) for token in range(1001)])
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-5)


def test_golden_values() -> None:
    """Pinned: a change here changes every run that anybody made."""
    torch.testing.assert_close(noise_of(7, 3, 5, 5), torch.tensor(GOLDEN_NOISE), rtol=0, atol=1e-6)
    assert draw(16).tolist() == GOLDEN_TOKENS


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    counts = torch.bincount(draw(50_000, temperature), minlength=len(LOGITS))
    # 6 degrees of freedom: above 27.9 with probability 1e-4.
    assert chi_square(counts, (LOGITS / temperature).softmax(0)) < 27.9


def test_positions_and_samples_are_independent() -> None:
    """Neighbouring positions, and neighbouring samples, hit all 16 pairs of a uniform 4-token vocabulary."""
    logits = torch.zeros(4)
    tokens = draw(97 * 400, logits=logits).view(400, 97)  # [position, sample]
    for first, second in ((tokens[:-1], tokens[1:]), (tokens[:, :-1], tokens[:, 1:])):
        counts = torch.bincount((4 * first + second).flatten(), minlength=16)
        # 15 degrees of freedom: above 44.3 with probability 1e-4.
        assert chi_square(counts, torch.full((16,), 1 / 16)) < 44.3


def test_noise_has_the_moments_of_a_gumbel() -> None:
    noise = gumbel_noise(column(1, 2), column(0, 0), column(0, 0), 200_001).double()
    assert noise.shape == (2, 200_001)
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.01


def test_seed_sample_and_position_each_change_the_noise() -> None:
    base = noise_of(1, 2, 3, 64)
    # Exchanged arguments too: the key is not a sum.
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (1, 3, 2)):
        assert not torch.equal(base, noise_of(*other, 64))


def test_neither_batch_nor_vocabulary_width_changes_a_row() -> None:
    seeds, sample_ids, positions = torch.full((300,), 5), torch.arange(300), torch.arange(300) % 7
    noise = gumbel_noise(seeds, sample_ids, positions, 4099)  # several blocks
    torch.testing.assert_close(noise[200], noise_of(5, 200, 200 % 7, 4099), rtol=0, atol=1e-6)
    torch.testing.assert_close(noise[200, :11], noise_of(5, 200, 200 % 7, 11), rtol=0, atol=1e-6)


def test_logprob_is_the_log_softmax_at_the_temperature() -> None:
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * 4
    temperatures = torch.tensor([0.3, 0.7, 1.0, 1.5, 3.0])
    rows = torch.arange(5)
    tokens, logprobs = sample_tokens(logits.bfloat16(), temperatures, rows, rows, rows)
    expected = (logits.bfloat16().float() / temperatures[:, None]).log_softmax(1)[rows, tokens]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-6)


def test_temperature_zero_is_greedy_row_by_row() -> None:
    tokens, logprobs = sample_tokens(
        LOGITS.expand(400, -1), torch.tensor([0.0, 1.0]).repeat(200), torch.zeros(400, dtype=torch.int64),
        torch.arange(400), torch.zeros(400, dtype=torch.int64),
    )  # fmt: skip
    assert set(tokens[::2].tolist()) == {0}
    assert len(set(tokens[1::2].tolist())) > 3
    torch.testing.assert_close(logprobs[0], LOGITS.log_softmax(0)[0])


def test_masked_tokens_are_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[[0, 3]] = float("-inf")
    tokens = draw(5_000, logits=logits)
    assert not set(tokens.tolist()) & {0, 3}


def test_a_small_temperature_takes_the_best_token() -> None:
    assert set(draw(200, temperature=1e-3).tolist()) == {0}


def test_native_code_serves() -> None:
    assert describe()["sample_tokens"].startswith("native C++")


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 255, 257, 1000, 4099])
def test_native_code_draws_what_the_reference_draws(rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 4 * torch.randn(rows, vocab_size, generator=generator)
    temperatures = torch.tensor([0.0, 0.1, 0.7, 1.0, 1.3, 3.0, 50.0])[:rows]
    ids = torch.arange(rows)
    for position in range(20):
        arguments = (temperatures, ids - 3, 5 * ids, torch.full((rows,), position))
        tokens, logprobs = sample_tokens(logits, *arguments)
        expected_tokens, expected_logprobs = sample_tokens_reference(logits, *arguments)
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("layout", ["bfloat16", "row_slice", "transposed"])
def test_layouts_and_dtypes(layout: str) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    match layout:
        case "bfloat16":
            logits = logits.bfloat16()
        case "row_slice":
            logits = logits.repeat(1, 2)[:, 20:60]
        case "transposed":
            logits = logits.T.contiguous().T
    ids = torch.arange(6)
    arguments = (torch.ones(6), ids, ids, ids)
    assert torch.equal(sample_tokens(logits, *arguments)[0], sample_tokens_reference(logits, *arguments)[0])


def test_nan_logits_show_in_the_logprob() -> None:
    logits = LOGITS.clone()
    logits[2] = math.nan
    for sample in (sample_tokens, sample_tokens_reference):
        assert sample(logits[None], torch.ones(1), column(0), column(0), column(0))[1].isnan().all()
