"""Preferences: a prompt and two responses to it, of which people chose one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from fuse.trainers.response_tokens import Text

COLUMNS = ("prompt", "chosen", "rejected")
_NAMED_ROWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two responses to a prompt, all three of them text, or all three chat messages; row: in its file, from 0."""

    row: int
    prompt: Text
    chosen: Text
    rejected: Text

    @property
    def prompt_key(self) -> str:
        """Equal where prompts are."""
        return _key(self.prompt)

    def as_row(self) -> dict[str, Any]:
        """As a JSON object, which `preferences_of` reads again."""
        return {name: value for name, value in asdict(self).items() if name in COLUMNS}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that nothing can be learned from, and why."""

    row: int
    reason: str


def preferences_of(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Preference], list[BadRow]]:
    """Rows with the columns `COLUMNS`, and those that lack a side or have two equal ones.

    Where a prompt is a list of messages, a response may be a string: it is the assistant's.
    """
    good, bad = [], []
    for index, row in enumerate(rows):
        try:
            good.append(_preference(index, row))
        except ValueError as error:
            bad.append(BadRow(index, str(error)))
    return good, bad


def check_bad_rows(
    bad: Sequence[BadRow], num_rows: int, *, skips: bool, tell: Callable[[str], None], what: str = "preferences"
) -> None:
    """Say how many rows are left out, and which. what: they are not.

    Raises: ValueError for any, unless `skips`.
    """
    if not bad:
        return
    by_reason: dict[str, list[str]] = {}
    for row in bad:
        by_reason.setdefault(row.reason, []).append(str(row.row))
    listed = "; ".join(
        f"{reason}: {', '.join(numbers[:_NAMED_ROWS])}"
        + (f" and {len(numbers) - _NAMED_ROWS} more" if len(numbers) > _NAMED_ROWS else "")
        for reason, numbers in by_reason.items()
    )
    text = f"{len(bad)} of {num_rows} rows are no {what} (rows by number, {listed})"
    if not skips:
        raise ValueError(f"{text}: mend them, or leave them out with --skip-bad-rows")
    tell(f"data: {text}, left out")


def split(preferences: Sequence[Preference], shares: Sequence[float], seed: int) -> list[list[Preference]]:
    """Parts in the ratio of `shares`, every preference in one; all of a prompt are in the same part.

    The order of prompts is drawn from the seed.

    Raises: ValueError where a part with a share gets none.
    """
    by_prompt: dict[str, list[Preference]] = {}
    for preference in preferences:
        by_prompt.setdefault(preference.prompt_key, []).append(preference)
    groups = list(by_prompt.values())
    ends = np.cumsum(shares) / np.sum(shares) * len(preferences)
    parts: list[list[Preference]] = [[] for _ in shares]
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(groups)):
        group = groups[index]
        parts[int(np.searchsorted(ends, taken + len(group) / 2, side="right").clip(max=len(shares) - 1))] += group
        taken += len(group)
    for part, share in zip(parts, shares, strict=True):
        if share and not part:
            raise ValueError(
                f"{len(preferences)} preferences on {len(groups)} prompts cannot be split "
                f"{','.join(f'{one:g}' for one in shares)}: a part would be empty; give more, or other shares"
            )
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Consistent:
    """Preferences that do not contradict each other, and how many others were dropped: ties, of which both orders were
    preferred, and those in longer circles."""

    kept: list[Preference]
    num_tied: int
    num_cyclic: int


def without_contradictions(preferences: Sequence[Preference]) -> Consistent:
    """Drop what no score can satisfy: of each prompt, the preferences between responses of one circle.

    A circle is a strongly connected component of the graph from chosen to rejected. In a circle of more than two
    responses, pairs that were preferred both ways count as ties too.
    """
    from networkx import DiGraph, strongly_connected_components  # torch requires it

    kept, num_tied, num_cyclic = [], 0, 0
    for _, group in groupby(sorted(preferences, key=lambda one: one.prompt_key), key=lambda one: one.prompt_key):
        pairs = [(_key(one.chosen), _key(one.rejected), one) for one in group]
        edges = {(chosen, rejected) for chosen, rejected, _ in pairs}
        circle = {
            response: index
            for index, responses in enumerate(strongly_connected_components(DiGraph(edges)))
            for response in responses
        }
        for chosen, rejected, preference in pairs:
            if circle[chosen] != circle[rejected]:
                kept.append(preference)
            elif (rejected, chosen) in edges:
                num_tied += 1
            else:
                num_cyclic += 1
    return Consistent(kept=sorted(kept, key=lambda one: one.row), num_tied=num_tied, num_cyclic=num_cyclic)


def _key(text: Text) -> str:
    return json.dumps(text, sort_keys=True)


def _preference(index: int, row: Mapping[str, Any]) -> Preference:
    """Raises: ValueError with what is wrong with the row."""
    prompt, chosen, rejected = texts_of(row, "chosen", "rejected")
    if chosen == rejected:
        raise ValueError("chosen equals rejected")
    return Preference(row=index, prompt=prompt, chosen=chosen, rejected=rejected)


def texts_of(row: Mapping[str, Any], *responses: str) -> list[Text]:
    """The prompt of a row, and the responses in these columns.

    Raises: ValueError with what is wrong with the row.
    """
    for name in ("prompt", *responses):
        if not row.get(name):
            raise ValueError(f"no {name}")
    prompt = _text(row["prompt"], "prompt")
    return [prompt, *(_response(row[name], name, prompt) for name in responses)]


def _response(value: Any, name: str, prompt: Text) -> Text:
    if isinstance(prompt, list) and isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    text = _text(value, name)
    if isinstance(text, list) != isinstance(prompt, list):
        raise ValueError(f"{name} is messages but prompt is text")
    return text


def _text(value: Any, name: str) -> Text:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"no {name}")
        return value
    if isinstance(value, list) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    ):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise ValueError(f"{name} is neither text nor chat messages")
