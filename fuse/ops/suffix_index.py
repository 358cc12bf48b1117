"""An index of what was written of prompts: where the like of a text's end came before, and what followed there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from fuse.ops.native import choose, extension, log_choice

_LONGEST, _SHORTEST = 32, 2
"""Tokens that are compared, at most and at least."""
_MOST_PLACES = 64
"""Of all that follow the same two tokens, the latest so many are compared."""


class SuffixIndex(Protocol):
    """Prompts and responses to them. Token ids are 0 to 2^31 - 1."""

    def open(self, prompt: Sequence[int]) -> int:
        """Begin a response to a prompt; returns its number."""
        ...

    def extend(
        self, responses: Sequence[int], added: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[list[int]]:
        """Take what was added to responses, and return at most `counts` tokens that may follow each.

        They are those at the place that follows the most of its last tokens, two at least and 32 at most, in its prompt
        or in any response to it; of equal ones the latest, of the latest 64 that follow its last two. Where the text of
        a place ends, the next place is looked for.
        """
        ...

    def close(self, response: int) -> None:
        """No more tokens come. Those of before stay, until their prompt is dropped."""
        ...


def suffix_index(most_tokens: int) -> SuffixIndex:
    """An empty index, which drops prompts without open responses beyond so many tokens, the longest closed first."""
    native, choice = choose(torch.device("cpu"))
    log_choice("suffix_index", choice)
    index: SuffixIndex = suffix_index_reference(most_tokens) if native is None else native.SuffixIndex(most_tokens)
    return index


def suffix_index_reference(most_tokens: int) -> SuffixIndex:
    """`suffix_index` as the definition has it."""
    return _Reference(most_tokens)


@dataclass(slots=True, eq=False)
class _Prompt:
    """places: by two tokens, the texts in which another follows them, and where, in order of writing."""

    ids: tuple[int, ...]
    places: dict[tuple[int, int], list[tuple[list[int], int]]] = field(default_factory=dict)
    num_tokens: int = 0
    num_open: int = 0

    def __post_init__(self) -> None:
        self.append([], self.ids)

    def append(self, text: list[int], tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(text) >= _SHORTEST:
                self.places.setdefault((text[-2], text[-1]), []).append((text, len(text)))
            text.append(token)
        self.num_tokens += len(tokens)

    def continuation(self, text: list[int], most: int) -> list[int]:
        written = list(text)
        while (num_left := len(text) + most - len(written)) > 0 and len(written) >= _SHORTEST:
            places = self.places.get((written[-2], written[-1]), [])[-_MOST_PLACES:]
            if not places:
                break
            found, index = max(reversed(places), key=lambda place: _agreement(written, *place))
            written += found[index : index + num_left]
        return written[len(text) :]


def _agreement(written: list[int], text: list[int], index: int) -> int:
    """How many tokens before an index are those that were written last."""
    most = min(_LONGEST, len(written), index)
    return next((n for n in range(most) if written[-1 - n] != text[index - 1 - n]), most)


class _Reference:
    """Responses are lists that begin with their prompts."""

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._prompts: dict[tuple[int, ...], _Prompt] = {}
        self._closed: list[_Prompt] = []
        self._responses: dict[int, tuple[_Prompt, list[int]]] = {}
        self._numbers = count()

    def open(self, prompt: Sequence[int]) -> int:
        ids = tuple(prompt)
        own = self._prompts.setdefault(ids, _Prompt(ids))
        if own in self._closed:
            self._closed.remove(own)
        own.num_open += 1
        number = next(self._numbers)
        self._responses[number] = own, list(ids)
        return number

    def extend(
        self, responses: Sequence[int], added: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[list[int]]:
        texts = [self._responses[response] for response in responses]
        for (prompt, text), tokens in zip(texts, added, strict=True):
            prompt.append(text, tokens)
        return [prompt.continuation(text, num) for (prompt, text), num in zip(texts, counts, strict=True)]

    def close(self, response: int) -> None:
        prompt, _ = self._responses.pop(response)
        prompt.num_open -= 1
        if prompt.num_open:
            return
        self._closed.append(prompt)
        while self._closed and sum(one.num_tokens for one in self._prompts.values()) > self._most_tokens:
            del self._prompts[self._closed.pop(0).ids]


def describe() -> str:
    """Which implementation serves, and why."""
    native, reason = extension()
    return "native C++" if native is not None else f"Python reference: {reason}"


def implementation(example: Tensor) -> str:
    """Which implementation serves."""
    return choose(torch.device("cpu"))[1]
