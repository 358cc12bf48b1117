"""Prompts for the trainer: from a JSONL file, a saved dataset or rows in memory to tokenised rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
TOKENS = "input_ids"
SOURCES = "a JSONL file, or a directory made by Dataset.save_to_disk"
REWARD_ARGUMENTS = frozenset({"prompts", "responses"})


def read_rows(path: str | Path) -> Sequence[Mapping[str, Any]]:
    """Rows of a JSONL file (one object per line, blank lines allowed), or of a directory from `Dataset.save_to_disk`.

    Raises:
        ValueError: no such file or directory, a line that is no JSON object, or no rows.
    """
    path = Path(path)
    if path.is_dir():
        return _saved_dataset(path)
    if not path.is_file():
        raise ValueError(f"dataset {path} does not exist: give {SOURCES}")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_json_object(line, f"{path}:{number}"))
    if not rows:
        raise ValueError(f"dataset {path} is empty: it needs one JSON object per line")
    return rows


def prompt_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_column: str | None = None,
    response_length: int,
    context: int | None = None,
) -> list[Row]:
    """Rows with `input_ids` from rows with a prompt: a string, or a list of chat messages for the chat template.

    Without `prompt_column`, rows that already hold `input_ids` keep them. The other columns stay, for reward functions;
    a column that only some rows have is None in the others.

    response_length, context: tokens; a prompt must leave room for a whole response.

    Raises:
        ValueError: a missing column, an empty or too long prompt with its row number from 0, a column named like one of
            a reward function's own arguments, no rows, or a tokenizer without pad token or chat template.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token, e.g. to tokenizer.eos_token")
    rows = list(rows)
    if not rows:
        raise ValueError("the dataset is empty: it needs at least one batch of prompts")
    names = list(dict.fromkeys(name for row in rows for name in row))
    source = prompt_column if prompt_column is not None else TOKENS
    columns = [name for name in names if name not in (source, TOKENS, "attention_mask", "token_type_ids")]
    _check_columns(source, names, columns)
    tokenised = []
    for index, row in enumerate(rows):
        if row.get(source) is None:
            raise ValueError(
                f"dataset row {index} has no column {source!r} (it has: {', '.join(row) or 'none'}): add it"
            )
        prompt = row[source]
        tokens = list(prompt) if source == TOKENS else _tokenise(prompt, tokenizer, index)
        _check_length(len(tokens), index, response_length, context)
        tokenised.append({TOKENS: tokens, **{name: row.get(name) for name in columns}})
    return tokenised


def _tokenise(prompt: object, tokenizer: PreTrainedTokenizerBase, index: int) -> list[int]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"dataset row {index} has an empty prompt: remove it")
        return list(tokenizer(prompt)[TOKENS])
    if not isinstance(prompt, list) or not all(
        isinstance(message, Mapping) and "role" in message for message in prompt
    ):
        raise ValueError(
            f"dataset row {index} has a prompt of type {type(prompt).__name__}: "
            "give a string, or a list of messages such as {'role': 'user', 'content': '...'}"
        )
    if not prompt:
        raise ValueError(f"dataset row {index} has an empty prompt: remove it")
    if not tokenizer.chat_template:
        raise ValueError(
            f"dataset row {index} has chat messages but the tokenizer has no chat template: "
            "give prompts as strings, or set tokenizer.chat_template and save it"
        )
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))


def _check_columns(source: str, names: Sequence[str], columns: Sequence[str]) -> None:
    if source not in names:
        listed = ", ".join(names) or "none"
        remedy = "name the prompt column" if source == TOKENS else "name one of these as the prompt column"
        raise ValueError(f"the dataset has no column {source!r} (it has: {listed}): {remedy}")
    for name in columns:
        if name in REWARD_ARGUMENTS:
            raise ValueError(f"the dataset has a column {name!r}, an argument of every reward function: rename it")


def _check_length(num_tokens: int, index: int, response_length: int, context: int | None) -> None:
    if num_tokens == 0:
        raise ValueError(f"dataset row {index} has an empty prompt: remove it")
    if context is not None and num_tokens > context - response_length:
        raise ValueError(
            f"dataset row {index} has {num_tokens} prompt tokens, more than the model's context of {context} less "
            f"response_length={response_length}: shorten or remove it, or lower response_length"
        )


def _json_object(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        fault = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{place} is not JSON ({fault}): give one object per line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error.reason}): convert the file") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {type(row).__name__}, not a JSON object: give one object per line")
    return row


def _saved_dataset(path: Path) -> Sequence[Mapping[str, Any]]:
    import datasets  # takes a second, and JSONL does not need it

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no dataset: give {SOURCES}") from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(f"{path}/{name}" for name in dataset)
        raise ValueError(f"{path} holds several splits: give one of {splits}")
    rows: Sequence[Mapping[str, Any]] = dataset
    return rows
