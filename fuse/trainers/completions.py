"""The table of completions shown while training, and given to TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from fuse.printable import printable
from fuse.sample import Sample

COLUMNS = ("step", "query", "model response", "score")
_NAME = "completions"
_NUM_PRINTED = 5

Row = tuple[int, str, str, float]


def show_completions(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], step: int, callbacks: Iterable[TrainerCallback]
) -> None:
    """Print the first scored samples after update `step`, and give all to those of `callbacks` that keep tables."""
    rows = [_row(tokenizer, sample, step) for sample in samples]
    _print(rows[:_NUM_PRINTED])
    for callback in callbacks:
        untyped: Any = callback
        if isinstance(callback, TensorBoardCallback) and untyped.tb_writer is not None:
            untyped.tb_writer.add_text(_NAME, _markdown(rows), step)
        elif isinstance(callback, WandbCallback) and untyped._wandb is not None and untyped._wandb.run is not None:
            table = untyped._wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
            untyped._wandb.log({_NAME: table, "train/global_step": step})


def _row(tokenizer: PreTrainedTokenizerBase, sample: Sample, step: int) -> Row:
    query = tokenizer.decode(list(sample.prompt_ids), skip_special_tokens=True)
    response = tokenizer.decode(sample.response_ids[: sample.length])
    assert sample.score is not None
    return step, str(query), str(response), sample.score


def _print(rows: Sequence[Row]) -> None:
    table = Table(show_lines=True)
    for column in COLUMNS:
        table.add_column(column)
    for step, query, response, score in rows:
        table.add_row(str(step), _shown(query), _shown(response), f"{score:.4g}")
    Console().print(table)


def _markdown(rows: Sequence[Row]) -> str:
    """As TensorBoard shows it: a line per row, so line breaks and what separates cells are written out."""
    lines: list[Sequence[object]] = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [(step, _cell(query), _cell(response), f"{score:.4g}") for step, query, response, score in rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\r", "\\\\r").replace("\n", "\\\\n")


def _shown(text: str) -> Text:
    """The lines as they are: no markup, and nothing that a terminal obeys."""
    return Text("\n".join(map(printable, text.split("\n"))))
