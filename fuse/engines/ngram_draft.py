"""A draft without a model: what followed the same few tokens before, in the prompt or in any response to it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from fuse.engines.rows import Row, Rows

_LONGEST = 3
_SHORTEST = 2
"""Tokens that must be the same for their continuation to be proposed."""
_MOST_PROMPTS = 512


class _Text:
    """What was written of one prompt, by all of its samples: the latest token to follow each few."""

    def __init__(self, prompt_ids: tuple[int, ...]) -> None:
        self._prompt_ids = prompt_ids
        self._next: dict[tuple[int, ...], int] = {}
        self._num_read: dict[int, int] = {}  # tokens of each live sample's response
        self._read(prompt_ids, 0)

    def update(self, row: Row) -> None:
        """Read what the row's response has got since."""
        num_read = self._num_read.get(row.request.sample_id, 0)
        if num_read == len(row.response_ids):
            return
        before = row.response_ids[max(0, num_read - _LONGEST) : num_read]
        if len(before) < _LONGEST:
            before = [*self._prompt_ids[len(before) - _LONGEST :], *before]
        self._read((*before, *row.response_ids[num_read:]), len(before))
        self._num_read[row.request.sample_id] = len(row.response_ids)

    def release(self, sample_id: int) -> None:
        self._num_read.pop(sample_id, None)

    def continued(self, token_ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that followed the like of these, and of themselves."""
        written = list(token_ids[-_LONGEST:])
        start = len(written)
        while len(written) < start + count:
            for length in range(min(_LONGEST, len(written)), _SHORTEST - 1, -1):
                following = self._next.get(tuple(written[-length:]))
                if following is not None:
                    written.append(following)
                    break
            else:
                break
        return written[start:]

    def _read(self, token_ids: Sequence[int], first: int) -> None:
        """Remember what each token from `first` on follows."""
        for end in range(max(first, _SHORTEST), len(token_ids)):
            for length in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._next[tuple(token_ids[end - length : end])] = token_ids[end]


class NgramDraft:
    """Proposes what followed the last two or three tokens: latest, in a sample's text or that of its siblings.

    It remembers responses to the latest prompts, those of earlier weights included.
    """

    def __init__(self) -> None:
        self._texts: OrderedDict[tuple[int, ...], _Text] = OrderedDict()

    def prepare(self) -> None:
        """Nothing: texts are read as they come."""

    def propose(self, rows: Rows, counts: Sequence[int]) -> list[list[int]]:
        texts = [self._updated(row) for row in rows]
        return [
            text.continued((*row.request.prompt_ids[-_LONGEST:], *row.response_ids[-_LONGEST:]), count)
            for text, row, count in zip(texts, rows, counts, strict=True)
        ]

    def release(self, row: Row) -> None:
        if row.response_ids:
            self._updated(row).release(row.request.sample_id)

    def forget(self) -> None:
        """Texts stay: they are no weights."""

    def _updated(self, row: Row) -> _Text:
        prompt_ids = row.request.prompt_ids
        text = self._texts.get(prompt_ids)
        if text is None:
            text = self._texts[prompt_ids] = _Text(prompt_ids)
            if len(self._texts) > _MOST_PROMPTS:
                self._texts.popitem(last=False)
        else:
            self._texts.move_to_end(prompt_ids)
        text.update(row)
        return text
