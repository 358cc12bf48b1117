"""Prompts from data sets on the Hub, which is not asked here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from fuse.trainers.data import read_rows

ROWS = [{"q": "1+1=", "a": 2}]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """The arguments with which data sets are loaded; the Hub has one of two splits."""
    calls: list[tuple[Any, ...]] = []
    split_of = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}

    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        calls.append((name, config, split))
        if name == "unreachable":
            raise ConnectionError("Couldn't reach 'unreachable' on the Hub\n(LocalEntryNotFoundError)")
        if split is not None and split not in split_of:
            raise ValueError(f'Unknown split "{split}". Should be one of ["train", "test"].')
        return split_of[split] if split else datasets.DatasetDict(split_of)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
        ("trl-lib/tldr:train", ("trl-lib/tldr", None, "train")),
        ("imdb:train", ("imdb", None, "train")),
    ],
)
def test_names_are_read(asked: list[tuple[Any, ...]], text: str, arguments: tuple[Any, ...]) -> None:
    assert list(read_rows(text)) == ROWS
    assert asked == [arguments]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imdb", "^dataset imdb has several splits: give imdb:train or imdb:test$"),
        ("imdb:validation", "^dataset imdb:validation is no file here, and the Hub gives .*Unknown split"),
        ("unreachable", r"^dataset unreachable is no file here, .*ConnectionError: Couldn't reach .*: give a data s"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(asked: list[tuple[Any, ...]], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "a/b/c", "data/nowhere.csv", "../x"])
def test_the_hub_is_not_asked_for_files(asked: list[tuple[Any, ...]], text: str) -> None:
    with pytest.raises(ValueError, match="does not exist: give a JSONL file"):
        read_rows(text)
    assert asked == []


def test_files_come_first(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "imdb").write_text('{"q": "here"}')
    assert list(read_rows("imdb")) == [{"q": "here"}]
    assert asked == []
