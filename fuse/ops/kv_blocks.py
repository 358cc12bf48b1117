"""A sample's keys and values of all layers, gathered into one message and scattered back."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fuse.ops.native import choose, current, described, log_choice, queue


def gather(
    buffers: Sequence[Tensor], row: int, num_tokens: int, allocate: Callable[[int], Tensor] | None = None
) -> tuple[Tensor, ...]:
    """The first `num_tokens` tokens of a row of each buffer, [heads, num_tokens, width], on the host.

    buffers: [rows, heads, capacity, width] each, of one dtype and device, any strides; heads, capacity and width may
        differ between them.
    allocate: number of bytes -> memory for the message, uint8 [bytes], on the buffers' device, where it then stays.

    The results are contiguous and lie one after the other in one block of memory, the message.
    """
    if not buffers:
        return ()
    device = buffers[0].device
    native, choice = choose(device, has_cuda=True)
    log_choice("kv_blocks", choice)
    if native is None and allocate is None:
        return gather_reference(buffers, row, num_tokens)
    sources, shapes = _rows(buffers, row, num_tokens)
    num_values, dtype = sum(map(math.prod, shapes)), buffers[0].dtype
    if allocate is None:
        message = torch.empty(num_values, dtype=dtype, device=device)
    else:
        message = allocate(num_values * dtype.itemsize).view(dtype)
    if native is None:
        for part, buffer in zip(_parts(message, shapes), buffers, strict=True):
            part.copy_(buffer[row, :, :num_tokens])
    else:
        _copy(native, sources, _message_table(message, shapes), message)
    return _parts(message.cpu() if allocate is None else message, shapes)


def scatter(blocks: Sequence[Tensor], buffers: Sequence[Tensor], row: int) -> None:
    """Write what `gather` returned, here or elsewhere, into a row of each buffer.

    blocks: [heads, tokens, width] each, of any dtype, device and strides. buffers: as `gather` has them, with the
        same heads and width, and capacity for the tokens.
    """
    assert len(blocks) == len(buffers), f"{len(blocks)} blocks do not fill {len(buffers)} buffers"
    if not buffers:
        return
    device = buffers[0].device
    native, choice = choose(device, has_cuda=True)
    log_choice("kv_blocks", choice)
    places = {block.device for block in blocks}
    if (
        native is None
        or any(block.dtype != buffer.dtype for block, buffer in zip(blocks, buffers, strict=True))
        or (places != {device} and (device.type == "cpu" or len(places) > 1))
    ):
        scatter_reference(blocks, buffers, row)
        return
    num_tokens = blocks[0].shape[1]
    for block, buffer in zip(blocks, buffers, strict=True):
        assert block.shape == (buffer.shape[1], num_tokens, buffer.shape[3]), f"{block.shape} in {buffer.shape}"
    if places != {device}:
        message = torch.cat([block.reshape(-1) for block in blocks]).to(device)
        blocks = _parts(message, [block.shape for block in blocks])
    _copy(native, _table(blocks), _rows(buffers, row, num_tokens)[0], buffers[0])


def gather_reference(buffers: Sequence[Tensor], row: int, num_tokens: int) -> tuple[Tensor, ...]:
    """`gather` as a loop over the layers, each a copy of its own."""
    return tuple(buffer[row, :, :num_tokens].to("cpu", copy=True).contiguous() for buffer in buffers)


def scatter_reference(blocks: Sequence[Tensor], buffers: Sequence[Tensor], row: int) -> None:
    """`scatter` as a loop over the layers."""
    for block, buffer in zip(blocks, buffers, strict=True):
        buffer[row, :, : block.shape[1]] = block


def describe() -> str:
    """Which implementation serves which input, and why."""
    return described(
        "native C++ on CPU", "a torch copy per layer, not one for all, where the dtype changes", on_gpus="CUDA on GPUs"
    )


def implementation(example: Tensor) -> str:
    """Which implementation serves buffers on the device of `example`."""
    return choose(example.device, has_cuda=True)[1]


def _rows(buffers: Sequence[Tensor], row: int, num_tokens: int) -> tuple[array[int], list[tuple[int, int, int]]]:
    """A row's first tokens in each buffer, as the native code takes blocks, and their shapes."""
    table, shapes = array("q"), []
    dtype, device, element_bytes = buffers[0].dtype, buffers[0].device, buffers[0].element_size()
    for buffer in buffers:
        rows, heads, capacity, width = buffer.shape
        assert buffer.dtype == dtype, f"{buffer.dtype} beside {dtype}"
        assert buffer.device == device, f"{buffer.device} beside {device}"
        assert 0 <= row < rows, f"no row {row} in {list(buffer.shape)}"
        assert 0 <= num_tokens <= capacity, f"{num_tokens} tokens do not fit {list(buffer.shape)}"
        assert heads * num_tokens * width < 1 << 32, f"{list(buffer.shape)} is more than the native code counts"
        first, *strides = (element_bytes * stride for stride in buffer.stride())
        table.extend((buffer.data_ptr() + row * first, heads, num_tokens, width, *strides))
        shapes.append((heads, num_tokens, width))
    return table, shapes


def _table(blocks: Sequence[Tensor]) -> array[int]:
    """Blocks [heads, tokens, width], as the native code takes them."""
    table = array("q")
    for block in blocks:
        strides = (block.element_size() * stride for stride in block.stride())
        table.extend((block.data_ptr(), *block.shape, *strides))
    return table


def _message_table(message: Tensor, shapes: Sequence[tuple[int, ...]]) -> array[int]:
    """The parts of a message, as the native code takes blocks."""
    table, address, element_bytes = array("q"), message.data_ptr(), message.element_size()
    for heads, num_tokens, width in shapes:
        strides = (num_tokens * width * element_bytes, width * element_bytes, element_bytes)
        table.extend((address, heads, num_tokens, width, *strides))
        address += heads * strides[0]
    return table


def _parts(message: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Blocks of these shapes, one after the other in a message."""
    if len(set(shapes)) == 1:
        return message.view(len(shapes), *shapes[0]).unbind(0)
    parts = message.split([math.prod(shape) for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _copy(native: ModuleType, sources: array[int], targets: array[int], example: Tensor) -> None:
    """Copy blocks of the dtype and device of `example`."""
    device = example.device
    if device.type == "cpu":
        native.copy_blocks(sources, targets, example.element_size())
        return
    tables = torch.frombuffer(sources + targets, dtype=torch.int64).to(device).chunk(2)
    with current(device):
        native.copy_blocks(*tables, example.element_size(), *queue(device))
