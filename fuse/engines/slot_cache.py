"""A KV cache of slots: every running sample owns one row of every layer, whatever its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fuse.engines.kv_memory import Allocate
from fuse.engines.window import Window
from fuse.ops import kv_blocks

# Contexts are rounded up to this many tokens, so buffers and attention widths change rarely.
CONTEXT_STEP_TOKENS = 64


def round_up(num_tokens: int) -> int:
    return -(-num_tokens // CONTEXT_STEP_TOKENS) * CONTEXT_STEP_TOKENS


@dataclass(slots=True)
class _Layer:
    """One layer's buffers, each [slots, kv_heads, capacity, head_dim].

    Entries beyond a row's length are stale or zero, always finite: a masked-out NaN would still poison a sum.
    """

    keys: Tensor
    values: Tensor


class SlotCache(Cache):
    """Keys and values of all layers. Live rows are kept at the front, so a step works on views of a prefix.

    The model sees an empty cache (no sequence length of its own): the engine passes positions and masks. Layers
    appear when the model first reaches them, with the heads and dtype that it brings.

    num_allocations: while it stays, so do all buffers.
    """

    def __init__(self, *, max_rows: int, max_context: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self._max_rows = max_rows
        self._max_context = max_context
        self._layers: list[_Layer] = []
        self._num_rows = 0  # allocated, as is _capacity, in tokens per row
        self._capacity = 0
        self.num_allocations = 0
        self._row_indices = torch.arange(max_rows, device=device)
        # The forward to come: a prefill of new rows from _first_row on, or a decode step where _positions is set.
        self._first_row = 0
        self._context = self._num_live = 0
        self._positions: Tensor | None = None
        self._slots = self._row_indices
        self._gathers = False
        self._places: Tensor | None = None  # of the tokens of each entry's row that it attends to, where not to all

    def begin_prefill(self, first_row: int, rows: int, tokens: int) -> None:
        """The next forward writes positions 0..tokens-1 of `rows` rows from `first_row` on."""
        self._reserve(first_row + rows, tokens)
        self._first_row, self._positions = first_row, None

    def begin_decode(
        self,
        positions: Tensor,
        context: int,
        rows: int,
        *,
        slots: Tensor | None = None,
        gathers: bool = False,
        window: Window | None = None,
    ) -> None:
        """The next forward writes at positions int64 [entries]; it attends to the first `context` of `rows` rows.

        slots: the entries' rows, int64 [entries], any number of each; None for one entry of each row, in order.
        gathers: with slots, attention gets each entry's row as one of its own; else it gets the rows as they are.
        window: attention gets of each entry's row, as one of its own, what is in there; it is less than the context.
        """
        self._reserve(rows, context)
        self._positions, self._context, self._num_live = positions, context, rows
        self._slots = self._row_indices[:rows] if slots is None else slots
        self._gathers = gathers and slots is not None
        self._places = None if window is None else window.places(positions + 1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new entries; return what its queries attend to. The model calls this.

        Shapes: key_states, value_states [rows, kv_heads, tokens, head_dim]. Decoding (tokens = 1) returns views
        [rows, kv_heads, context, head_dim], or copies [entries, ...], with the tokens of the window only; a prefill
        returns its own entries, since its rows are new.
        """
        layer = self._layer(layer_idx, key_states, value_states)
        if self._positions is None:
            new, tokens = slice(self._first_row, self._first_row + len(key_states)), key_states.shape[2]
            layer.keys[new, :, :tokens] = key_states
            layer.values[new, :, :tokens] = value_states
            return key_states, value_states
        layer.keys[self._slots, :, self._positions] = key_states[:, :, 0]
        layer.values[self._slots, :, self._positions] = value_states[:, :, 0]
        if self._places is not None:
            heads = torch.arange(key_states.shape[1], device=self._places.device)[:, None]
            read = self._slots[:, None, None], heads, self._places[:, None]
            return layer.keys[read], layer.values[read]
        rows = self._slots if self._gathers else slice(self._num_live)
        return layer.keys[rows, :, : self._context], layer.values[rows, :, : self._context]

    @property
    def is_empty(self) -> bool:
        """Whether no forward has made it layers yet."""
        return not self._layers

    @property
    def bytes_per_token(self) -> int:
        """Of its keys and values in all layers that there are."""
        return sum(2 * layer.keys[0, :, 0].nbytes for layer in self._layers)

    def make_layers(self, count: int, like: Tensor) -> None:
        """Have so many layers, of heads and type as these entries' [1, kv_heads, 1, head_dim]; those there are stay."""
        for index in range(len(self._layers), count):
            self._layer(index, like, like)

    def buffers(self, rows: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer that has some yet, [slots, kv_heads, capacity, head_dim], with so much room."""
        self._reserve(rows, tokens)
        layers = [self._layer(index, old.keys, old.values) for index, old in enumerate(self._layers)]
        return [(layer.keys, layer.values) for layer in layers]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row's first entries over another row."""
        for layer in self._layers:
            layer.keys[target, :, :tokens] = layer.keys[source, :, :tokens]
            layer.values[target, :, :tokens] = layer.values[source, :, :tokens]

    def copy(self, source: int, first_row: int, rows: int, tokens: int) -> None:
        """Fill `rows` new rows, from `first_row` on, with a row's first entries."""
        self._reserve(first_row + rows, tokens)
        for index, old in enumerate(self._layers):
            layer = self._layer(index, old.keys, old.values)
            for entries in (layer.keys, layer.values):
                entries[first_row : first_row + rows, :, :tokens] = entries[source, :, :tokens]

    def read(self, row: int, tokens: int, allocate: Allocate | None = None) -> tuple[Tensor, ...]:
        """A row's keys and values of each layer in turn, [kv_heads, tokens, head_dim].

        They are copied to the host, or into the memory that `allocate` gives.
        """
        return kv_blocks.gather(
            [entries for layer in self._layers for entries in (layer.keys, layer.values)], row, tokens, allocate
        )

    def write(self, row: int, kv: Sequence[Tensor], *, dtype: torch.dtype) -> None:
        """Fill a row from what `read` returned elsewhere, in the dtype that the cache has or will have."""
        tokens = kv[0].shape[1]
        self._reserve(row + 1, tokens)
        buffers: list[Tensor] = []
        for index, (keys, values) in enumerate(zip(kv[::2], kv[1::2], strict=True)):
            like = torch.empty((), dtype=dtype, device=self._row_indices.device)
            layer = self._layer(index, *(like.expand(1, *entries.shape) for entries in (keys, values)))
            buffers += (layer.keys, layer.values)
        kv_blocks.scatter(kv, buffers, row)

    def clear(self) -> None:
        """Free all buffers."""
        self._layers.clear()
        self._num_rows = self._capacity = 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._max_context

    def _reserve(self, rows: int, tokens: int) -> None:
        """Make room, at least doubling what there is: growth costs O(1) per token in the long run."""
        if rows > self._num_rows:
            self._num_rows = min(max(rows, 2 * self._num_rows), self._max_rows)
        if tokens > self._capacity:
            self._capacity = min(round_up(max(tokens, 2 * self._capacity)), round_up(self._max_context))
        assert rows <= self._num_rows, f"{rows} rows do not fit {self._max_rows} slots"
        assert tokens <= self._capacity, f"{tokens} tokens do not fit a context of {self._max_context}"

    def _layer(self, index: int, keys: Tensor, values: Tensor) -> _Layer:
        """The layer's buffers, allocated or grown to what is reserved."""
        if index == len(self._layers):
            self._layers.append(_Layer(self._allocate(keys), self._allocate(values)))
        layer = self._layers[index]
        rows, _, tokens, _ = layer.keys.shape
        if rows < self._num_rows or tokens < self._capacity:
            layer.keys = self._grow(layer.keys)
            layer.values = self._grow(layer.values)
        return layer

    def _grow(self, entries: Tensor) -> Tensor:
        grown = self._allocate(entries)
        grown[: entries.shape[0], :, : entries.shape[2]] = entries
        return grown

    def _allocate(self, like: Tensor) -> Tensor:
        self.num_allocations += 1
        return like.new_zeros(self._num_rows, like.shape[1], self._capacity, like.shape[3])
