"""A draft that is the policy itself with smaller weights: it agrees nearly always, and a step of it takes less time.

It reads the target's own keys and values, and adds those of its drafts where the target's verification will write: so
it needs no cache, no prefill and no catching up, and samples that come or go are no concern of its.

Where the keys and values of a batch are more than the weights, it reads those in a window only: a step of it takes at
most twice what it takes to read the weights, or little more with hundreds of samples, but is right less often.
SmolLM2-135M on word problems after 1,700 to 3,300 tokens of solved ones, 640 tokens at temperature 1: 97.5 % right if
it reads all, 90 % with the first 64 and the last 256, 88 % with 16 of the first, 86 % with 4, 47 % with none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuse.engines.decoder import Decoder
from fuse.engines.inputs import Inputs
from fuse.engines.native_llama import NativeLlama
from fuse.engines.quantized_model import Precision, quantized
from fuse.engines.rows import Row, Rows
from fuse.engines.slot_cache import round_up
from fuse.engines.window import Window

WINDOW = Window(first=64, last=256)


class QuantizedSelf:
    """The target with matrices of fewer bits, made anew when its weights have changed, at the first draft.

    target: over the cache that it decodes from. precision: of the matrices.
    """

    def __init__(self, target: Decoder, precision: Precision) -> None:
        self._target, self._precision = target, precision
        self._decoder: Decoder | NativeLlama | None = None
        self.reads_window = False
        self._weights_bytes = sum(one.numel() for one in target.model.parameters())

    def prepare(self) -> None:
        if self._decoder is None:
            self._decoder = quantized(self._target, self._precision)

    def propose(self, rows: Rows, counts: Sequence[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in rows]
        if self._target.cache.is_empty:  # the model has not run yet
            return drafts
        live = [slot for slot, count in enumerate(counts) if count > 0]
        window = self._window([rows[slot].num_cached for slot in live])
        self.reads_window = window is not None
        last = rows.inputs
        token_ids = last.token_ids
        for ahead in range(max(counts)):
            live = [slot for slot in live if ahead < counts[slot] and not _has_stopped(rows[slot], drafts[slot])]
            if not live:
                break
            slots = torch.tensor(live, device=token_ids.device)
            if ahead:
                token_ids = torch.tensor([drafts[slot][-1] for slot in live], device=slots.device)
            else:
                token_ids = token_ids[slots]
            context = max(rows[slot].num_cached for slot in live) + ahead + 1
            inputs = Inputs(token_ids, last.positions[slots] + ahead, slots)
            seen = torch.tensor([drafts[slot] for slot in live], dtype=torch.int64, device=slots.device)
            logits = self.logits(inputs, context, len(rows), window)
            drawn, _ = rows.draw(logits, slots, torch.full_like(slots, ahead), seen)
            for slot, token_id in zip(live, drawn.tolist(), strict=True):
                drafts[slot].append(token_id)
        return drafts

    def logits(self, inputs: Inputs, context: int, num_rows: int, window: Window | None) -> Tensor:
        """As those of a `Decoder`, from where the target's verification will write, for any context."""
        assert self._decoder is not None, "not prepared"
        return self._decoder.logits(inputs, round_up(context), num_rows, window)

    def _window(self, contexts: Sequence[int]) -> Window | None:
        """What rows with so much context read; None for all."""
        return WINDOW if sum(contexts) * self._target.cache.bytes_per_token > self._weights_bytes else None

    def release(self, row: Row) -> None:
        pass

    def forget(self) -> None:
        self._decoder = None


def _has_stopped(row: Row, draft: Sequence[int]) -> bool:
    return bool(draft) and draft[-1] in row.request.params.stop_token_ids
