"""Prompts for the trainer: from a file, a saved dataset or rows in memory to tokenised rows."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fuse.trainers.hub import SOURCES, hub_rows, is_hub_name
from fuse.trainers.prompt_checks import check_lengths
from fuse.trainers.prompts import counted_tokens
from fuse.trainers.tables import is_table, table_rows
from schedules.reading import NotReadableError, parse_json

Row = dict[str, Any]
TOKENS = "input_ids"
MESSAGES = "messages"
"""What reward functions get conversational prompts as."""
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
"""What such files begin with, whatever they are called."""
REWARD_ARGUMENTS = frozenset({"prompts", "responses"})


def read_rows(path: str | Path) -> Sequence[Mapping[str, Any]]:
    """Rows of a file, which may be compressed by gzip, of a directory from `Dataset.save_to_disk`, or of a data set on
    the Hub: `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`, where there is no such file.

    Files hold JSON lines (one object per line, blank lines allowed), a JSON array of objects, parquet, or, where their
    names end so, CSV or TSV, with the names in the first line; of these every value is a string.

    Raises:
        ValueError: no such file, directory or data set, a file of another kind or damaged, an item that is no JSON
            object, or no rows.
    """
    name, path = str(path), Path(path)
    if path.is_dir():
        return _saved_dataset(path)
    if not path.is_file():
        if is_hub_name(name):
            return hub_rows(name)
        raise ValueError(f"dataset {path} does not exist: give {SOURCES}")
    content = path.read_bytes()
    if content.startswith(_GZIP):
        content = _decompressed(content, path)
    if content.startswith(_PARQUET):
        rows = _parquet(content, path)
    elif is_table(path):
        rows = list(table_rows(content, path))
    elif content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        rows = _json_array(content, path)
    else:
        rows = [
            _object(_json(line, f"{path}:{number}"), f"{path}:{number}")
            for number, line in enumerate(content.split(b"\n"), start=1)
            if line.removeprefix(b"\xef\xbb\xbf").strip()
        ]
    if not rows:
        raise ValueError(f"dataset {path} is empty: it needs one JSON object per line")
    return rows


def check_dataset(dataset: object, name: str) -> None:
    """Whether the argument `name` holds rows that can be drawn in any order.

    Raises:
        ValueError: it is several splits, or a stream.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        splits = [f"{name}[{split!r}]" for split in dataset]
        raise ValueError(
            f"{name} is a {kind} of several splits: pass one of them, {' or '.join(splits) or 'with rows'}"
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"{name} is a {kind}, of which rows cannot be counted and drawn in any order: pass a list or a Dataset, "
            f"e.g. list({name}.take(1000)) of a stream, or load_dataset(...) without streaming=True"
        )


def prompt_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_column: str | None = None,
    response_length: int,
    context: int | None = None,
    too_long: str = "shorten or remove them, or lower response_length",
    with_messages: bool = False,
    keep_prompt: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Rows with `input_ids` from rows with a prompt: a string, or a list of chat messages for the chat template.

    Without `prompt_column`, rows that already hold `input_ids` keep them. The other columns stay, for reward functions;
    a column that only some rows have is None in the others.

    A string that begins with the tokenizer's beginning of sequence is one that a chat template has rendered: it has all
    special tokens that it needs. Of messages that end with the assistant's, the response continues that one.

    response_length, context: tokens; a prompt must leave room for a whole response. too_long: what to do about others.
    with_messages: where a prompt is a list of chat messages, rows have it in a column `messages` too, for reward
        functions, None where it is a string. A column of that name that the rows have already stays.
    keep_prompt: whether rows keep the prompt as it was. template_options: for the chat template.

    Raises:
        ValueError: a missing column, an empty or too long prompt with its row number from 0, a column named like one of
            a reward function's own arguments, no rows, a tokenizer without pad token or chat template, or messages
            that its template refuses.
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
    are_chats = (
        source != TOKENS
        and with_messages
        and MESSAGES not in columns
        and any(isinstance(row.get(source), list) for row in rows)
    )
    tokenised: list[Row] = []
    for index, row in enumerate(rows):
        if row.get(source) is None:
            raise ValueError(
                f"dataset row {index} has no column {source!r} (it has: {', '.join(row) or 'none'}): add it"
            )
        prompt = row[source]
        tokens = (
            counted_tokens(row, index) if source == TOKENS else _tokenise(prompt, tokenizer, index, template_options)
        )
        if not tokens:
            raise ValueError(f"dataset row {index} has an empty prompt: remove it")
        messages = {MESSAGES: prompt if isinstance(prompt, list) else None} if are_chats else {}
        if keep_prompt:
            messages[source] = prompt
        tokenised.append({TOKENS: tokens, **{name: row.get(name) for name in columns}, **messages})
    if context is not None:
        lengths = [len(row[TOKENS]) for row in tokenised]
        check_lengths(lengths, response_length, context, too_long)
    return tokenised


def _tokenise(
    prompt: object, tokenizer: PreTrainedTokenizerBase, index: int, template_options: Mapping[str, Any] | None
) -> list[int]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"dataset row {index} has an empty prompt: remove it")
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise ValueError(
                f"dataset row {index} has a prompt with half a surrogate pair, which is no text: remove it"
            )
        is_rendered = bool(tokenizer.bos_token) and prompt.lstrip().startswith(str(tokenizer.bos_token))
        return list(tokenizer(prompt, add_special_tokens=not is_rendered)[TOKENS])
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
    return _through_template(prompt, tokenizer, index, template_options or {})


def _through_template(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, index: int, options: Mapping[str, Any]
) -> list[int]:
    continues = messages[-1]["role"] == "assistant"
    try:
        return list(
            tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=False,
                **options,
            )
        )
    except (ValueError, TypeError, KeyError, TemplateError) as error:
        raise ValueError(
            f"dataset row {index} has messages that the tokenizer's chat template refuses "
            f"({' '.join(str(error).split())}): change the row"
        ) from error


def check_source(row: Mapping[str, Any], prompt_column: str | None) -> None:
    """Raises: ValueError where a dataset's first row has no prompt under this name; without one, no tokens."""
    _check_columns(TOKENS if prompt_column is None else prompt_column, list(row), [])


def _check_columns(source: str, names: Sequence[str], columns: Sequence[str]) -> None:
    if source not in names:
        listed = ", ".join(names) or "none"
        remedy = "name the prompt column" if source == TOKENS else "name one of these as the prompt column"
        raise ValueError(f"the dataset has no column {source!r} (it has: {listed}): {remedy}")
    for name in columns:
        if name in REWARD_ARGUMENTS:
            raise ValueError(f"the dataset has a column {name!r}, an argument of every reward function: rename it")


def _decompressed(content: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): compress the file again") from error


def _parquet(content: bytes, path: Path) -> list[Row]:
    import pyarrow  # takes a while, and JSON does not need it
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}): write the file again") from error
    return rows


def _json_array(content: bytes, path: Path) -> list[Row]:
    """Rows of a file that begins with a bracket."""
    return [_object(item, f"{path}: item {index}") for index, item in enumerate(_json(content, str(path)))]


def _json(content: bytes, place: str) -> Any:
    try:
        return parse_json(content.decode("utf-8-sig"), any_number=True)
    except NotReadableError as error:
        raise ValueError(f"{place} {error}: give plain objects") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(
            f"{place} is not JSON ({error.msg} at {where}): give one object per line, or an array of objects"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error.reason}): convert the file") from error


def _object(item: object, place: str) -> Row:
    if not isinstance(item, dict):
        raise ValueError(f"{place} is {type(item).__name__}, not a JSON object: give one object per line")
    return item


def _saved_dataset(path: Path) -> Sequence[Mapping[str, Any]]:
    import datasets  # takes a second, and files do not need it

    try:
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.Dataset):
            dataset.data.validate(full=True)  # or rows of damaged columns end the process
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no dataset: give {SOURCES}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON taken as it is
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path} is damaged ({reason}): save the dataset again") from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(f"{path}/{name}" for name in dataset)
        raise ValueError(f"{path} holds several splits: give one of {splits}")
    rows: Sequence[Mapping[str, Any]] = dataset
    return rows
