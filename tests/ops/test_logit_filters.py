"""Filters of sampling against transformers' own processors, the distribution of what is drawn, and independence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fuse.ops.logit_filters import Filters, keep, penalize, sample_filtered_tokens
from fuse.ops.sampling import gumbel_noise, sample_tokens

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, -3.0])
GOLDEN_TOKENS = [1, 4, 1, 0, 5, 1, 0, 0, 0, 0, 0, 4, 5, 4, 5, 0]  # seed 11, samples 0 to 15, position 0, of NUCLEUS
EDGE = 1e-6
"""Probabilities nearer to a limit than this may fall on either side of it, by rounding."""


def filters(
    num_rows: int,
    vocab_size: int,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalty: float = 1.0,
    seen_ids: Sequence[int] = (),
) -> Filters:
    """The same for each row."""
    seen = torch.zeros(num_rows, vocab_size, dtype=torch.bool)
    seen[:, list(seen_ids)] = True
    return Filters(
        active=torch.full((num_rows,), top_k > 0 or top_p < 1 or min_p > 0 or penalty != 1),
        penalties=torch.full((num_rows,), penalty),
        seen=seen,
        top_ks=torch.full((num_rows,), top_k or vocab_size),
        top_ps=torch.full((num_rows,), top_p, dtype=torch.float64),
        min_ps=torch.full((num_rows,), min_p),
    )


NUCLEUS = {"top_k": 5, "top_p": 0.9, "min_p": 0.05}
"""Of LOGITS at temperature 1 it leaves tokens 0, 1, 4 and 5."""


def processed(logits: Tensor, temperature: float, seen_ids: Sequence[int], **options: float) -> Tensor:
    """What transformers makes of logits, [rows, vocab], in doubles: left out is -inf."""
    steps = LogitsProcessorList()
    if seen_ids:
        steps.append(RepetitionPenaltyLogitsProcessor(options["penalty"]))
    steps.append(TemperatureLogitsWarper(temperature))
    if options["top_k"]:
        steps.append(TopKLogitsWarper(int(options["top_k"])))
    if options["top_p"] < 1:
        steps.append(TopPLogitsWarper(options["top_p"]))
    steps.append(MinPLogitsWarper(options["min_p"]))
    input_ids = torch.tensor([list(seen_ids)]).expand(len(logits), -1)
    scores: Tensor = steps(input_ids, logits.double())
    return scores


def at_an_edge(logits: Tensor, temperature: float, seen_ids: Sequence[int], **options: float) -> bool:
    """Whether rounding decides what is kept."""
    before_p = processed(logits, temperature, seen_ids, **(options | {"top_p": 1.0, "min_p": 0.0}))
    below = before_p.sort(dim=1).values.softmax(dim=1).cumsum(dim=1)
    odds = (before_p - before_p.amax(dim=1, keepdim=True)).exp()
    near_top_p = options["top_p"] < 1 and bool(((below - (1 - options["top_p"])).abs() < EDGE).any())
    near_min_p = 0 < options["min_p"] < 1 and bool(((odds - options["min_p"]).abs() < EDGE).any())
    return near_top_p or near_min_p


def kept_of(logits: Tensor, temperature: float, seen_ids: Sequence[int], **options: float) -> Tensor:
    made = filters(*logits.shape, seen_ids=seen_ids, **options)  # type: ignore[arg-type]
    return keep(penalize(logits, made) / temperature, made)


def assert_same_choice(kept: Tensor, scaled: Tensor, expected: Tensor) -> None:
    """Of one row: the same tokens; of equal ones at the edge as many, and those of the highest ids."""
    assert kept.any()
    theirs = expected[expected.isfinite()]
    torch.testing.assert_close(scaled[kept].double().sort().values, theirs.sort().values)
    edge = scaled == scaled[kept].min()
    assert torch.equal(kept | edge, expected.isfinite() | edge)
    assert kept[edge].tolist() == sorted(kept[edge].tolist())


STEPS = st.integers(-12, 12).map(lambda quarter: quarter / 4)  # many ties
ROWS = st.integers(1, 40).flatmap(
    lambda size: st.lists(
        st.lists(st.one_of(STEPS, st.floats(-20, 20, width=32)), min_size=size, max_size=size), min_size=1, max_size=3
    )
)


@given(
    rows=ROWS,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)),
    penalty=st.sampled_from([0.5, 2.0, 4.0]),
    seen_ids=st.lists(st.integers(0, 39), max_size=6),
)
def test_what_is_kept_is_what_transformers_keeps(
    rows: list[list[float]],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seen_ids: list[int],
) -> None:
    logits = torch.tensor(rows)
    seen_ids = [token for token in seen_ids if token < logits.shape[1]]
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "penalty": penalty}
    assume(not at_an_edge(logits, temperature, seen_ids, **options))
    expected = processed(logits, temperature, seen_ids, **options)
    kept = kept_of(logits, temperature, seen_ids, **options)
    made = filters(*logits.shape, seen_ids=seen_ids, **options)  # type: ignore[arg-type]
    for row, scaled, theirs in zip(kept, penalize(logits, made) / temperature, expected, strict=True):
        assert_same_choice(row, scaled, theirs)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75, 0.76, 0.01])
def test_of_equal_logits_the_same_are_kept_as_by_transformers(top_p: float) -> None:
    """Powers of two, which are added without rounding: the edge itself is hit."""
    options = {"top_k": 0, "top_p": top_p, "min_p": 0.0, "penalty": 1.0}
    for logits in (torch.zeros(2, 4), torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]])):
        assert torch.equal(kept_of(logits, 1.0, (), **options), processed(logits, 1.0, (), **options).isfinite())
    assert kept_of(torch.zeros(1, 4), 1.0, (), **(options | {"top_p": 0.5})).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 3.0, 10.0])
def test_large_vocabularies(top_p: float, spread: float) -> None:
    """In bfloat16, which leaves ties everywhere."""
    logits = spread * torch.randn(5, 20_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    options = {"top_k": 0, "top_p": top_p, "min_p": 0.0, "penalty": 1.0}
    for kept, scaled, expected in zip(
        kept_of(logits, 1.0, (), **options), logits, processed(logits, 1.0, (), **options), strict=True
    ):
        assert_same_choice(kept, scaled, expected)
        assert kept.sum() < 20_000


def test_another_order_of_filters_would_keep_others() -> None:
    """A control: the reference tells top-p of what top-k leaves from top-k of what top-p leaves."""
    logits = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]])
    options = {"top_k": 4, "top_p": 0.5, "min_p": 0.0, "penalty": 1.0}
    kept = kept_of(logits, 1.0, (), **options)
    assert torch.equal(kept, processed(logits, 1.0, (), **options).isfinite())
    only_p, only_k = (kept_of(logits, 1.0, (), **(options | off)) for off in ({"top_k": 0}, {"top_p": 1.0}))
    assert not torch.equal(kept, only_p & only_k)


def draw(num: int, *, temperature: float = 1.0, **options: float) -> tuple[Tensor, Tensor]:
    """`num` tokens of LOGITS, each of another (sample, position), and their log-probabilities."""
    rows = torch.arange(num)
    made = filters(num, len(LOGITS), **options)  # type: ignore[arg-type]
    where = torch.full((num,), temperature), torch.full((num,), 11), rows % 97, rows // 97
    return sample_filtered_tokens(LOGITS.expand(num, -1), *where, made)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_tokens_follow_the_softmax_of_what_is_kept(temperature: float) -> None:
    tokens, _ = draw(50_000, temperature=temperature, top_k=5)
    kept = torch.tensor([0, 1, 2, 4, 5])
    counts = torch.bincount(tokens, minlength=len(LOGITS))
    assert counts[kept].sum() == 50_000
    expected = (LOGITS[kept] / temperature).softmax(0)
    # 4 degrees of freedom: above 23.5 with probability 1e-4.
    assert chi_square(counts[kept], expected) < 23.5
    everything, _ = draw(50_000, temperature=temperature)
    counts = torch.bincount(everything, minlength=len(LOGITS))
    assert counts[[3, 6]].sum() > 0, "a control: without filters others are drawn, too"
    # And penalized logits have another softmax.
    other, _ = draw(50_000, temperature=temperature, top_k=5, penalty=1.5, seen_ids=(0,))
    counts = torch.bincount(other, minlength=len(LOGITS))
    assert chi_square(counts[kept], expected) > 23.5
    logits = LOGITS.clone()
    logits[0] /= 1.5
    assert chi_square(counts[kept], (logits[kept] / temperature).softmax(0)) < 23.5


def test_golden_tokens() -> None:
    """Pinned: a change here changes every filtered run that anybody made."""
    assert draw(16, **NUCLEUS)[0].tolist() == GOLDEN_TOKENS


def test_the_noise_is_that_of_the_whole_vocabulary() -> None:
    tokens, _ = draw(500, **NUCLEUS)
    rows = torch.arange(500)
    noise = gumbel_noise(torch.full((500,), 11), rows % 97, rows // 97, len(LOGITS))
    left = LOGITS.clone()
    left[[2, 3, 6]] = -torch.inf
    assert torch.equal(tokens, (left + noise).argmax(dim=1))


def test_log_probabilities_are_those_without_filters() -> None:
    for options in (NUCLEUS, {"penalty": 2.0, "seen_ids": (0, 3)}):
        tokens, logprobs = draw(200, temperature=0.7, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(logprobs, (LOGITS / 0.7).log_softmax(0)[tokens], rtol=0, atol=2e-6)


def test_greedy_rows_feel_the_penalty_alone() -> None:
    tokens, logprobs = draw(3, temperature=0.0, penalty=4.0, seen_ids=(0,))
    assert tokens.tolist() == [1, 1, 1]
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(0)[tokens], rtol=0, atol=2e-6)


def mixed(num_rows: int, vocab_size: int, generator: torch.Generator) -> Filters:
    """Each row its own; every third has none."""

    def spread(low: float, high: float, off: float) -> Tensor:
        values = low + (high - low) * torch.rand(num_rows, generator=generator, dtype=torch.float64)
        return values.where(torch.arange(num_rows) % 3 > 0, off)

    return Filters(
        active=torch.arange(num_rows) % 3 > 0,
        penalties=spread(0.5, 2.0, 1.0).float(),
        seen=torch.rand(num_rows, vocab_size, generator=generator) < 0.1,
        top_ks=spread(1, vocab_size, vocab_size).long(),
        top_ps=spread(0.01, 1.0, 1.0),
        min_ps=spread(0.0, 0.1, 0.0).float(),
    )


def rows_of(made: Filters, rows: slice) -> Filters:
    return Filters(**{field.name: getattr(made, field.name)[rows] for field in fields(Filters)})


@pytest.mark.parametrize("vocab_size", [7, 1001])
def test_neither_batch_nor_neighbours_change_a_row(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 4 * torch.randn(30, vocab_size, generator=generator)
    made = mixed(30, vocab_size, generator)
    ids = torch.arange(30)
    where = (0.5 + ids / 20, ids - 3, 5 * ids, ids % 4)
    tokens, logprobs = sample_filtered_tokens(logits, *where, made)
    unfiltered = sample_tokens(logits, *where)
    for first, last in [(0, 4), (4, 5), (5, 30), *((row, row + 1) for row in range(30))]:
        some = slice(first, last)
        few, few_logprobs = sample_filtered_tokens(logits[some], *(one[some] for one in where), rows_of(made, some))
        assert torch.equal(few, tokens[some])
        torch.testing.assert_close(few_logprobs, logprobs[some], rtol=0, atol=1e-6)
    assert torch.equal(tokens[::3], unfiltered[0][::3])
    assert torch.equal(logprobs[::3], unfiltered[1][::3]), "to the bit what they are among rows without filters"
    assert not torch.equal(tokens, unfiltered[0])


def test_nan_logits_show_in_the_logprob() -> None:
    logits = LOGITS.clone()
    logits[2] = torch.nan
    one = torch.zeros(1, dtype=torch.int64)
    made = filters(1, len(LOGITS), **NUCLEUS, penalty=2.0, seen_ids=(1,))  # type: ignore[arg-type]
    assert sample_filtered_tokens(logits[None], torch.ones(1), one, one, one, made)[1].isnan().all()
