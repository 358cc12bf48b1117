"""The table of completions shown while training."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fuse.printable import printable
from fuse.sample import Sample


def print_completions(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> None:
    """Print one row per sample: query, model response, score."""
    table = Table(show_lines=True)
    for column in ("query", "model response", "score"):
        table.add_column(column)
    for sample in samples:
        query = tokenizer.decode(list(sample.prompt_ids), skip_special_tokens=True)
        response = tokenizer.decode(sample.response_ids[: sample.length])
        table.add_row(_cell(str(query)), _cell(str(response)), f"{sample.score:.4g}")
    Console().print(table)


def _cell(text: str) -> Text:
    """The lines as they are: no markup, and nothing that a terminal obeys."""
    return Text("\n".join(map(printable, text.split("\n"))))
