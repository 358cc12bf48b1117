"""Attention over packed sequences as GPUs have it, on a CPU: flex in eager mode, and a stand-in for varlen.

That a GPU computes the same is for `fuse bench gpu --checks packing` to show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from fuse.intrastage import packed_attention
from fuse.intrastage.packed_attention import Sequences, by_flex, by_varlen, each, way_of

LENGTHS = (3, 9, 1, 6)

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    query_longest: int,
    key_longest: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's documentation says of `varlen_attn`, whose kernels CPUs do not have."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    lengths = query_ends.diff().tolist()
    assert query_longest == key_longest == max(lengths)
    assert torch.equal(query_ends, key_ends)
    assert int(query_ends[-1]) == len(query)
    assert window_size == (-1, 0), "causal"
    outputs = [
        scaled_dot_product_attention(
            *(one.transpose(0, 1) for one in own), is_causal=True, scale=scale, enable_gqa=enable_gqa
        ).transpose(0, 1)
        for own in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    ]
    return torch.cat(outputs)


def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the ways of GPUs compute here."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_reference)
    # Torch refuses gradients of flex attention on CPUs, for compiled code has none there; eager code does.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


@pytest.mark.parametrize("way", [by_varlen, by_flex])
def test_every_way_computes_the_same(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, with grouped heads and a scale of its own."""
    on_cpus(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.of(LENGTHS, torch.device("cpu"))
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found = []
    states = [torch.randn(1, heads, sum(LENGTHS), 16, generator=generator) for heads in (4, 2, 2)]
    weights = torch.randn(1, sum(LENGTHS), 4, 16, generator=generator)
    for function in (way, each):
        leaves = [one.clone().requires_grad_() for one in states]
        output = function(module, *leaves, sequences, {"scaling": 0.3})
        (output * weights).sum().backward()
        found.append([output, *(one.grad for one in leaves)])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["varlen", "flex"])
def test_under_autocast_all_is_in_its_type(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sdpa has it: normalised queries and keys may be in float32 beside narrower values."""
    on_cpus(monkeypatch)
    monkeypatch.setattr(packed_attention, "way_of_device", lambda *_: way)
    sequences = Sequences.of(LENGTHS, torch.device("cpu"))
    query, key = (torch.randn(1, 2, sum(LENGTHS), 16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention.packed_attention(
            nn.Module(), query, key, query.bfloat16(), None, sequences=sequences, dropout=0.0
        )
    assert output.dtype == torch.bfloat16
    assert output.shape == (1, sum(LENGTHS), 2, 16)


@pytest.mark.parametrize("way", ["varlen", "flex"])
def test_the_host_waits_for_nothing(way: str) -> None:
    """Tensors without values refuse to be looked at: all that the ways of GPUs need is made without that."""
    with FakeTensorMode():
        sequences = Sequences.of(LENGTHS, torch.device("cpu"))
        assert sequences.rows.shape == sequences.positions.shape == (sum(LENGTHS),)
        if way == "flex":
            assert sequences.block_mask.shape == (1, 1, sum(LENGTHS), sum(LENGTHS))
        with pytest.raises(DataDependentOutputException):
            bool(sequences.ends.sum() > 0)


@pytest.mark.parametrize("lengths", [(100, 1, 300, 29, 128), (128, 128), (5,)])
def test_blocks_that_are_skipped_have_nothing_to_see(lengths: tuple[int, ...]) -> None:
    """Against torch's own, which looks at all pairs of tokens."""
    sequences = Sequences.of(lengths, torch.device("cpu"))
    made = sequences.block_mask
    rows = sequences.rows
    assert rows.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    expected = create_block_mask(
        lambda batch, head, query, key: (query >= key) & (rows[query] == rows[key]),
        *(None, None, sum(lengths), sum(lengths)),
        device="cpu",
    )
    assert torch.equal(made.to_dense(), expected.to_dense())
    assert made.shape == expected.shape
    assert sequences.block_mask is made, "all layers have one"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "options", "expected"),
    [
        ("cpu", torch.float32, 64, {}, "each"),
        ("cpu", torch.bfloat16, 64, {}, "each"),
        ("cuda", torch.bfloat16, 128, {"capability": (9, 0)}, "varlen"),
        ("cuda", torch.float16, 64, {"capability": (8, 0)}, "varlen"),
        ("cuda", torch.float32, 64, {"capability": (9, 0)}, "flex"),
        ("cuda", torch.float16, 64, {"capability": (7, 5)}, "flex"),
        ("cuda", torch.bfloat16, 256, {"capability": (9, 0)}, "flex"),
        ("cuda", torch.bfloat16, 20, {"capability": (9, 0)}, "flex"),
        ("cuda", torch.bfloat16, 64, {"capability": (9, 0), "has_varlen": False}, "flex"),
    ],
)
def test_the_way_depends_on_device_type_and_head(
    device: str, dtype: torch.dtype, head_dim: int, options: dict[str, Any], expected: str
) -> None:
    assert way_of(device, dtype, head_dim, **options) == expected
    assert expected in packed_attention.WAYS
