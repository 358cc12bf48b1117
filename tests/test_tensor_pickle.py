"""What travels between driver and ranks arrives as it was, and may be written."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse.algorithms.batch import Experience, Segments, counted_tokens, made_up_targets
from fuse.algorithms.policy_loss import PolicyTargets
from fuse.algorithms.value_loss import ValueTargets
from fuse.tensor_pickle import arrived, sent
from fuse.training.rounds import RankRound, Share


def over_there(value: Any) -> Any:
    """As Ray has it: arrays apart, in memory that nobody may write."""
    buffers: list[Any] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(one.raw()) for one in buffers])  # noqa: S301


def tensors_of(value: Any) -> dict[str, Tensor]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def test_an_experience_arrives_as_it_was() -> None:
    responses, lengths = ((5, 6, 7), (8,), ()), (2, 1, 0)
    segments = Segments.from_lengths(lengths, 3)
    tokens = counted_tokens(responses, lengths)
    targets = {
        "actor": made_up_targets(PolicyTargets, tokens, segments),
        "critic": made_up_targets(ValueTargets, tokens, segments),
    }
    sent_one = Experience(
        prompts=((1, 2), (3,), (4,)), responses=responses, lengths=lengths, width=3, segments=segments, targets=targets
    )
    found = over_there(sent_one)
    assert (found.prompts, found.responses, found.lengths, found.width) == (((1, 2), (3,), (4,)), responses, lengths, 3)
    torch.testing.assert_close(tensors_of(found.segments), tensors_of(segments), rtol=0, atol=0)
    for role, own in targets.items():
        assert type(found.targets[role]) is type(own)
        torch.testing.assert_close(tensors_of(found.targets[role]), tensors_of(own), rtol=0, atol=0)
        for tensor in tensors_of(found.targets[role]).values():
            tensor.zero_()  # as scores within training write


def test_what_heads_said_arrives_as_it_was() -> None:
    said = [torch.randn(3, 2), torch.randn(1, 2), torch.randn(0, 2)]
    found = over_there(RankRound(metrics={}, gradient_norms={"actor": 1.5}, said={"actor": said}))
    assert found.gradient_norms == {"actor": 1.5}
    torch.testing.assert_close(found.said["actor"], said, rtol=0, atol=0)
    share = Share(weight=0.5, num_samples=2, num_positions=9, place=3)
    assert over_there(share) == share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_of_any_type_arrives(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.5, 0.0], [2.0, 3.0]]).to(dtype)
    travelled = over_there(sent(tensor))
    found = arrived(travelled)
    assert found.dtype is dtype
    assert isinstance(travelled, torch.Tensor) or found.data_ptr() != travelled.ctypes.data, "memory is of others"
    torch.testing.assert_close(found, tensor, rtol=0, atol=0)
