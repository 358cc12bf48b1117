"""Talk to a model in the terminal, through the same engine that generates in training.

  fuse chat --model OUT/policy
  fuse chat --model OUT/policy --against OUT/sft

Where the tokenizer has a chat template, what was said before stays in the conversation; else every line is a prompt of
its own. /reset forgets the conversation, and Ctrl-D ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from fuse.commands.model_path import check_model_path
from fuse.commands.models import load_policy, load_reading_tokenizer
from fuse.commands.options import check_counts
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.printable import printable
from fuse.trainers.data import TOKENS, prompt_rows
from fuse.trainers.lone_engine import lone_engine

RESET = "/reset"
_CUT = "\ufffd"
"""What a decoder makes of half a character."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse chat`."""
    parser.usage = "%(prog)s --model PATH [OPTIONS]"
    parser.add_argument("--model", required=True, metavar="PATH", help="a causal language model")
    parser.add_argument("--against", metavar="PATH", help="another one, whose answers are shown too")
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (default: 0.7)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Answer line after line."""
    check_counts(arguments, "max_new_tokens")
    paths = [arguments.model, *([arguments.against] if arguments.against else [])]
    for path in paths:
        check_model_path(path)
    console = Console(highlight=False)
    disable_progress_bar()
    with console.status("loading"):
        speakers = [Speaker.load(path, arguments) for path in paths]
    while (line := _next_line(console)) is not None:
        if line == RESET:
            for speaker in speakers:
                speaker.forget()
        elif line:
            for speaker in speakers:
                _answer(console, speaker, line, named=len(speakers) > 1)
    return 0


@dataclass(kw_only=True)
class Speaker:
    """A model, and what was said to it and by it."""

    path: str
    tokenizer: Any
    engine: TransformersEngine
    params: SamplingParams
    system: list[dict[str, str]]
    messages: list[dict[str, str]] = field(default_factory=list)
    num_answers: int = 0

    @classmethod
    def load(cls, path: str, arguments: argparse.Namespace) -> Speaker:
        """Raises: ValueError for a path without a model, or options that it cannot take."""
        tokenizer, model = load_reading_tokenizer(path), load_policy(path)
        if arguments.system and not tokenizer.chat_template:
            raise ValueError(f"--system: the tokenizer at {path} has no chat template, so leave it out")
        engine, params = lone_engine(
            model,
            tokenizer,
            seed=arguments.seed,
            temperature=arguments.temperature,
            max_new_tokens=arguments.max_new_tokens,
            max_batch=1,
        )
        return cls(
            path=path,
            tokenizer=tokenizer,
            engine=engine,
            params=params,
            system=[{"role": "system", "content": arguments.system}] if arguments.system else [],
        )

    def forget(self) -> None:
        """Begin a new conversation."""
        self.messages.clear()

    def answer(self, line: str) -> Iterator[str]:
        """Yield the answer piece by piece, as it is decoded; what is said then stays in the conversation.

        Raises: ValueError where the conversation has become longer than the model's context.
        """
        said: list[dict[str, str]] = [*self.messages, {"role": "user", "content": line}]
        prompt = [*self.system, *said] if self.tokenizer.chat_template else line
        rows = prompt_rows([{"prompt": prompt}], self.tokenizer, prompt_column="prompt", response_length=1)
        self.engine.submit(
            GenerationRequest(sample_id=self.num_answers, prompt_ids=tuple(rows[0][TOKENS]), params=self.params)
        )
        self.num_answers += 1
        tokens: list[int] = []
        shown = ""
        while generated := self.engine.step():
            tokens += [token.token_id for token in generated]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith(_CUT) or generated[-1].finished:
                yield text[len(shown) :]
                shown = text
        self.messages = [*said, {"role": "assistant", "content": shown}]


def _answer(console: Console, speaker: Speaker, line: str, *, named: bool) -> None:
    if named:
        console.print(f"[bold]{speaker.path}[/bold]" if console.is_terminal else speaker.path)
    try:
        for piece in speaker.answer(line):
            lines = "\n".join(map(printable, piece.split("\n")))
            console.print(lines, end="", markup=False, soft_wrap=True)
            console.file.flush()
    except ValueError as error:
        console.print(f"{error} ({RESET} begins a new conversation)", markup=False, soft_wrap=True)
    console.print()


def _next_line(console: Console) -> str | None:
    """What the user says next; None at the end."""
    try:
        return (console.input("> ") if sys.stdin.isatty() else input()).strip()
    except EOFError:
        return None
