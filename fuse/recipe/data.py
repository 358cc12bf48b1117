"""The recipe's data: rows of preferences dealt out to the steps, each once, with some of each held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fuse.recipe.preferences import BadRow, Preference, check_bad_rows, preferences_of, split
from fuse.recipe.tokens import tokenised
from schedules.files import write_whole

STEPS = ("sft", "reward", "rl")
DIRECTORY = "data"


def data_file(output_dir: Path, step: str, *, held_out: bool = False) -> Path:
    """Where a step's rows are."""
    return output_dir / DIRECTORY / f"{step}{'_held_out' if held_out else ''}.jsonl"


def deal_out(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    shares: Sequence[float],
    held_out: float,
    seed: int,
    skips_bad_rows: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Write the files of all steps; returns what decides them, and how many rows each has.

    shares: of supervised, reward and reinforcement learning. held_out: the share of each step's rows that it does not
    train on. All rows of a prompt go the same way; reinforcement learning has each prompt once.

    Raises: ValueError for rows that are no preferences, unless they are to be skipped, or too few.
    """
    preferences, bad = preferences_of(rows)
    usable = []
    for preference in preferences:
        try:
            tokenised(preference, tokenizer)
        except ValueError as error:
            bad.append(BadRow(preference.row, str(error)))
        else:
            usable.append(preference)
    check_bad_rows(sorted(bad, key=lambda row: row.row), len(rows), skips=skips_bad_rows, tell=tell)
    if not usable:
        raise ValueError("no row of the data is a preference: give rows with prompt, chosen and rejected")
    digest = hashlib.sha256()
    counts = {}
    for step, share, part in zip(STEPS, shares, split(usable, shares, seed), strict=True):
        kept, apart = split(part, (1 - held_out, held_out), seed) if share else ([], [])
        for of, is_held_out in ((kept, False), (apart, True)):
            text = "".join(json.dumps(row) + "\n" for row in _rows(of, step))
            write_whole(data_file(output_dir, step, held_out=is_held_out), text)
            digest.update(text.encode())
            counts[f"{step}{'_held_out' if is_held_out else ''}"] = text.count("\n")
    return {"sha256": digest.hexdigest(), "rows": counts}


def _rows(preferences: Sequence[Preference], step: str) -> list[dict[str, Any]]:
    if step != "rl":
        return [preference.as_row() for preference in preferences]
    return [{"prompt": one.prompt} for one in {one.prompt_key: one for one in preferences}.values()]
