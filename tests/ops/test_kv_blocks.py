"""Keys and values gathered into one message and scattered back: against a loop of slices, in any dtype and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuse.ops import describe, kv_blocks
from fuse.ops.kv_blocks import gather, gather_reference, scatter, scatter_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8]
LAYOUTS = ["contiguous", "tokens_first", "width_strided", "heads_expanded"]


def bits(tensor: Tensor) -> Tensor:
    """What no NaN and no missing comparison of a dtype hides."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def buffer(
    rows: int, heads: int, capacity: int, width: int, dtype: torch.dtype, layout: str, seed: int, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = {
        "contiguous": (rows, heads, capacity, width),
        "tokens_first": (rows, capacity, heads, width),
        "width_strided": (rows, heads, capacity, 2 * width),
        "heads_expanded": (rows, 1, capacity, width),
    }[layout]
    size = torch.Size(shape).numel() * dtype.itemsize
    values = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).to(device).view(dtype).view(shape)
    match layout:
        case "tokens_first":
            return values.transpose(1, 2)
        case "width_strided":
            return values[..., ::2]
        case "heads_expanded":
            return values.expand(rows, heads, capacity, width)
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 9])
def test_gathers_what_a_loop_of_slices_gathers(dtype: torch.dtype, layout: str, num_tokens: int) -> None:
    buffers = [buffer(4, 3, 9, 6, dtype, layout, seed) for seed in range(4)]
    for row in (0, 3):
        ours, expected = gather(buffers, row, num_tokens), gather_reference(buffers, row, num_tokens)
        for one, other in zip(ours, expected, strict=True):
            assert one.shape == other.shape == (3, num_tokens, 6)
            assert one.dtype == dtype
            assert one.is_contiguous()
            assert torch.equal(bits(one), bits(other))


def test_the_message_is_one_piece_of_memory() -> None:
    buffers = [buffer(2, 2, 8, 4, torch.bfloat16, "contiguous", seed) for seed in range(6)]
    blocks = gather(buffers, 1, 5)
    assert len({block.untyped_storage().data_ptr() for block in blocks}) == 1
    starts = [block.storage_offset() for block in blocks]
    assert starts == [index * 2 * 5 * 4 for index in range(6)]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_the_message_goes_to_the_memory_it_is_given(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_tokens: int, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(kv_blocks, "choose", lambda device, has_cuda: (None, "torch reference"))
    buffers = [buffer(4, 3, 9, 6, dtype, layout, seed) for seed, layout in enumerate(LAYOUTS)]
    memory = torch.zeros(4 * 3 * num_tokens * 6 * dtype.itemsize + 16, dtype=torch.uint8)
    ours = gather(buffers, 2, num_tokens, lambda num_bytes: memory[:num_bytes])
    expected = gather_reference(buffers, 2, num_tokens)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(bits(one), bits(other))
    assert torch.equal(memory[:-16], torch.cat([bits(one).flatten() for one in expected]))
    assert not memory[-16:].any()


def test_layers_of_different_shapes() -> None:
    buffers = [
        buffer(2, 1, 8, 4, torch.float32, "contiguous", 0),
        buffer(2, 3, 9, 2, torch.float32, "tokens_first", 1),
        buffer(5, 2, 16, 8, torch.float32, "contiguous", 2),
    ]
    for one, other in zip(gather(buffers, 1, 7), gather_reference(buffers, 1, 7), strict=True):
        assert torch.equal(bits(one), bits(other))


def test_no_layers() -> None:
    assert gather([], 0, 0) == ()
    scatter([], [], 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 9])
def test_scatters_into_one_row_and_nowhere_else(dtype: torch.dtype, layout: str, num_tokens: int) -> None:
    source = [buffer(2, 3, 9, 6, dtype, "contiguous", seed) for seed in range(4)]
    blocks = gather(source, 1, num_tokens)
    ours, expected = ([buffer(4, 3, 12, 6, dtype, layout, 10 + seed) for seed in range(4)] for _ in range(2))
    scatter(blocks, ours, 2)
    scatter_reference(blocks, expected, 2)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_scatters_blocks_of_any_layout() -> None:
    blocks = [buffer(1, 3, 5, 6, torch.float32, layout, 1)[0] for layout in LAYOUTS]
    ours, expected = ([torch.zeros(2, 3, 8, 6) for _ in LAYOUTS] for _ in range(2))
    scatter(blocks, ours, 1)
    scatter_reference(blocks, expected, 1)
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(ours, expected, strict=True))


def test_scatter_converts_to_the_dtype_of_the_buffers() -> None:
    buffers = [torch.zeros(2, 3, 8, 6, dtype=torch.bfloat16) for _ in range(2)]
    blocks = torch.randn(2, 3, 5, 6).unbind(0)
    scatter(blocks, buffers, 1)
    assert all(torch.equal(one[1, :, :5], block.bfloat16()) for one, block in zip(buffers, blocks, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 9])
def test_gpus_gather_and_scatter_what_loops_do(dtype: torch.dtype, layout: str, num_tokens: int) -> None:
    source = [buffer(4, 3, 9, 6, dtype, layout, seed, "cuda") for seed in range(4)]
    blocks = gather(source, 3, num_tokens)
    for one, other in zip(blocks, gather_reference(source, 3, num_tokens), strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(bits(one), bits(other))
    for one, other in zip(
        gather(source, 3, num_tokens, lambda size: torch.empty(size, dtype=torch.uint8, device="cuda")),
        blocks,
        strict=True,
    ):
        assert one.device.type == "cuda"
        assert torch.equal(bits(one.cpu()), bits(other))
    for place in ("cpu", "cuda"):
        ours, expected = (
            [buffer(4, 3, 12, 6, dtype, layout, 10 + seed, "cuda") for seed in range(4)] for _ in range(2)
        )
        scatter([block.to(place) for block in blocks], ours, 2)
        scatter_reference(blocks, expected, 2)
        for one, other in zip(ours, expected, strict=True):
            assert torch.equal(bits(one.cpu()), bits(other.cpu()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_take_layers_of_different_shapes() -> None:
    buffers = [
        buffer(2, 1, 8, 4, torch.float32, "contiguous", 0, "cuda"),
        buffer(2, 3, 9, 2, torch.float32, "tokens_first", 1, "cuda"),
        buffer(5, 2, 16, 8, torch.float32, "contiguous", 2, "cuda"),
    ]
    blocks = gather(buffers, 1, 7)
    for one, other in zip(blocks, gather_reference(buffers, 1, 7), strict=True):
        assert torch.equal(bits(one), bits(other))
    copies = [torch.zeros_like(one) for one in buffers]
    scatter(blocks, copies, 0)
    for one, block in zip(copies, blocks, strict=True):
        assert torch.equal(one[0, :, :7].cpu(), block)


def test_native_code_serves() -> None:
    assert describe()["kv_blocks"].startswith("native C++ on CPU")
