"""Data sets by their names on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^:/]+))??(:(?P<split>[^:/]+))?")
_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zip|zst|bz2|xz)$", re.IGNORECASE)
SOURCES = (
    "a JSONL file, a JSON array of objects, a CSV or parquet file, a directory made by Dataset.save_to_disk, or a data "
    "set's name on the Hub"
)
"""What prompts may come from, for errors."""
FORM = "a data set's name on the Hub, NAME[:CONFIG]:SPLIT"


def is_hub_name(text: str) -> bool:
    """Whether this can be a data set's name, and is not a file's that does not exist."""
    return _NAME.fullmatch(text) is not None and _FILE.search(text) is None


def hub_rows(text: str) -> Sequence[Mapping[str, Any]]:
    """Rows of the data set `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`.

    Raises:
        ValueError: there is none, it cannot be reached, or it has several configurations or splits.
    """
    import datasets  # takes a second, and files do not need it

    match = _NAME.fullmatch(text)
    assert match is not None
    name, config, split = match["name"], match["config"], match["split"]
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"dataset {text} is no file here, and the Hub gives no such data set ({reason}): give {FORM}, or a file"
        ) from error
    if isinstance(dataset, Mapping):
        names = " or ".join(f"{text}:{one}" for one in dataset)
        raise ValueError(f"dataset {text} has several splits: give {names}")
    rows: Sequence[Mapping[str, Any]] = dataset
    return rows
