"""Attention that is causal within each of several sequences that follow one another in one row.

Three ways, of which `way_of` chooses: sequence by sequence on a CPU core, where a loop over them costs next to nothing;
torch's kernels for variable lengths where a GPU has them; else `flex_attention` with a mask, compiled, for any type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED_ATTENTION = "fuse_packed"
LEAST_HEAD_DIM = 16
"""Of compiled flex attention, whose products are of tiles."""
_MOST_HEAD_DIM = 192
"""Of flash attention: gradients of larger ones need more shared memory than all of its GPUs have."""
_FLASH_CAPABILITY = (8, 0)
_BLOCK = 128
"""Tokens of a block of `flex_attention`'s masks."""

Way = Literal["each", "varlen", "flex"]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Of a packed row, on its device but for `lengths`, which the host knows: nothing has to be waited for.

    ends: [sequences + 1] int32, of tokens before each sequence, and of all. rows: [packed], which sequence each token
    is of.
    """

    lengths: Sequence[int]
    ends: Tensor
    rows: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Sequences:
        on_host = torch.tensor([0, *lengths], dtype=torch.int32, pin_memory=device.type == "cuda")
        on_device = on_host.to(device, non_blocking=True)
        rows = torch.repeat_interleave(on_device[1:], output_size=sum(lengths))
        return cls(lengths, on_device.cumsum(0, dtype=torch.int32), rows)

    @cached_property
    def starts(self) -> Tensor:
        """[packed], of tokens before each one's sequence."""
        return self.ends[self.rows]

    @cached_property
    def positions(self) -> Tensor:
        """[packed], of each token in its sequence."""
        return torch.arange(len(self.rows), device=self.rows.device) - self.starts

    @cached_property
    def block_mask(self) -> BlockMask:
        """What a token sees, the same in all layers: those of its sequence up to itself.

        Made without looking at pairs of tokens: a block of queries sees every block from that in which the sequence of
        its first token starts up to itself.
        """
        return _block_mask(self.rows, self.starts)


def way_of(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    capability: tuple[int, int] = (0, 0),
    has_varlen: bool = True,
) -> Way:
    """The way that suits. capability: of a CUDA device. has_varlen: whether this torch has what `varlen` needs."""
    if device_type == "cpu":
        return "each"
    suits = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= _MOST_HEAD_DIM
    return "varlen" if has_varlen and suits and capability >= _FLASH_CAPABILITY else "flex"


def way_of_device(device: torch.device, dtype: torch.dtype, head_dim: int) -> Way:
    """The way that suits this very device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return way_of(device.type, dtype, head_dim, capability=capability, has_varlen=_has_varlen())


@cache
def _has_varlen() -> bool:
    """Whether torch's function takes a scale and grouped heads, as that of 2.12 does."""
    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: Sequences | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function in the sense of transformers: causal within each sequence, without dropout or window.

    Shapes: query [1, heads, tokens, head_dim], key and value [1, key-value heads, tokens, head_dim]; the result is
    [1, tokens, heads, head_dim]. Without sequences it is transformers' own for sdpa, and so are shapes.
    """
    if sequences is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    assert not options.get("dropout"), "stages are in evaluation mode"
    device = query.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query.dtype
    way = way_of_device(device, dtype, query.shape[-1])
    if way != "each":  # sdpa casts by itself
        query, key, value = (one.to(dtype) for one in (query, key, value))
    return WAYS[way](module, query, key, value, sequences, options), None


def each(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, options: Mapping[str, Any]
) -> Tensor:
    """Sequence by sequence."""
    lengths = list(sequences.lengths)
    outputs = [
        sdpa_attention_forward(module, *states, attention_mask=None, **options)[0]
        for states in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, dim=1)


def by_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, options: Mapping[str, Any]
) -> Tensor:
    """In one call that is told where sequences end."""
    longest = max(sequences.lengths)
    attend: Any = varlen.varlen_attn  # whose signature has changed
    output = attend(
        *(one[0].transpose(0, 1) for one in (query, key, value)),  # [tokens, heads, head_dim]
        *(sequences.ends, sequences.ends, longest, longest),
        scale=options.get("scaling"),
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    made: Tensor = output.unsqueeze(0)
    return made


def by_flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, options: Mapping[str, Any]
) -> Tensor:
    """In one call that is told which blocks of keys a block of queries can see."""
    output: Any = _flex(query.device.type)(
        query,
        key,
        value,
        block_mask=sequences.block_mask,
        scale=options.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # short rows pass as long ones do
    )
    made: Tensor = output.transpose(1, 2)
    return made


WAYS: Mapping[Way, Callable[..., Tensor]] = MappingProxyType({"each": each, "varlen": by_varlen, "flex": by_flex})


@cache
def _flex(device_type: str) -> Any:
    """Compiled where it would make all scores otherwise; on CPUs, where tests run, compiling takes longer."""
    return flex_attention if device_type == "cpu" else torch.compile(flex_attention)


def _block_mask(rows: Tensor, starts: Tensor) -> BlockMask:
    """As of `Sequences`."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (rows[query] == rows[key])

    first = starts[::_BLOCK] // _BLOCK
    block = torch.arange(len(first), dtype=torch.int32, device=first.device)
    seen = (first[:, None] + block).clamp(max=len(first) - 1)
    mask: BlockMask = BlockMask.from_kv_blocks(
        (block - first + 1)[None, None],
        seen[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(len(rows), len(rows)),
    )
    return mask
