"""Segmented GAE: by hand, against the torch loop, and on input that breaks its rules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse.ops import describe
from fuse.ops.gae import gae, gae_reference
from fuse.ops.native import extension

GAMMA, LAM = 0.97, 0.9


def ragged(lengths, dtype=torch.float32, seed=0):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, int(offsets[-1]), generator=generator, dtype=torch.float64).to(dtype)
    return rewards, values, offsets


def test_the_native_extension_is_built_and_serves_gae():
    module, reason = extension()
    assert module is not None, reason
    assert describe()["gae"].startswith("native C++")


@pytest.mark.parametrize("implementation", [gae, gae_reference])
def test_two_samples_by_hand(implementation):
    # gamma 1/2, lam 1/2. Sample 0: delta_1 = 4 - 2 = 2, delta_0 = 1 + 2/2 - 4 = -2, advantage_0 = -2 + 2/4 = -1.5.
    # Sample 1 has one row, delta = 3 - 1 = 2, and takes nothing from sample 0.
    rewards, values = torch.tensor([1.0, 4.0, 3.0]), torch.tensor([4.0, 2.0, 1.0])
    advantages, returns = implementation(rewards, values, torch.tensor([0, 2, 3]), 0.5, 0.5)
    assert advantages.tolist() == [-1.5, 2.0, 2.0]
    assert returns.tolist() == [2.5, 4.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [0, 4, 0, 0, 2, 0], [0, 0], [], [0, 129, 64, 1]])
def test_equals_the_reference_to_the_bit(dtype, lengths):
    rewards, values, offsets = ragged(lengths, dtype)
    for ours, reference in zip(
        gae(rewards, values, offsets, GAMMA, LAM), gae_reference(rewards, values, offsets, GAMMA, LAM), strict=True
    ):
        assert ours.dtype == dtype
        assert torch.equal(ours, reference)


@given(
    lengths=st.lists(st.integers(0, 20), max_size=8),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference_on_any_ragged_input(lengths, gamma, lam, seed):
    rewards, values, offsets = ragged(lengths, seed=seed)
    advantages, returns = gae(rewards, values, offsets, gamma, lam)
    expected_advantages, expected_returns = gae_reference(rewards, values, offsets, gamma, lam)
    assert torch.equal(advantages, expected_advantages)
    assert torch.equal(returns, expected_returns)


def test_strided_and_offset_views_give_what_their_copies_give():
    rewards, values, offsets = ragged([6, 3, 8])
    interleaved = torch.stack([rewards, values], dim=1)  # columns are views of stride 2
    spread = torch.stack([offsets, offsets * 0], dim=1)
    views = gae(interleaved[:, 0], interleaved[:, 1], spread[:, 0], GAMMA, LAM)
    copies = gae(rewards, values, offsets, GAMMA, LAM)
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))
    assert torch.equal(interleaved[:, 0], rewards), "the inputs are not written to"


def test_values_that_require_a_gradient_are_taken_as_constants():
    rewards, values, offsets = ragged([4])
    advantages, returns = gae(rewards, values.requires_grad_(), offsets, GAMMA, LAM)
    assert not advantages.requires_grad
    assert not returns.requires_grad


ROWS = torch.zeros(4)
OFFSETS = torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS[None], ROWS, OFFSETS, 1.0, 1.0), r"rewards is \[1, 4\]"),
        ((ROWS, ROWS.long(), OFFSETS, 1.0, 1.0), "values is .*int64"),
        ((ROWS, ROWS[:3], OFFSETS, 1.0, 1.0), r"\[4\] .* values is \[3\]"),
        ((ROWS, ROWS.double(), OFFSETS, 1.0, 1.0), "in one dtype"),
        ((ROWS, ROWS, OFFSETS.int(), 1.0, 1.0), "int32: pass"),
        ((ROWS, ROWS, OFFSETS[:0], 1.0, 1.0), "first 0"),
        ((ROWS, ROWS, torch.tensor([0, 3]), 1.0, 1.0), "0 to 3: .* the 4 rows"),
        ((ROWS, ROWS, torch.tensor([1, 4]), 1.0, 1.0), "from 1 to 4"),
        ((ROWS, ROWS, torch.tensor([0, 3, 2, 4]), 1.0, 1.0), "sample 1, from 3 to 2"),
        ((ROWS, ROWS, OFFSETS, 1.5, 1.0), "gamma is 1.5"),
        ((ROWS, ROWS, OFFSETS, 1.0, float("nan")), "lam is nan"),
    ],
)
def test_says_which_rule_the_input_breaks(arguments, message):
    with pytest.raises(ValueError, match=message):
        gae(*arguments)
