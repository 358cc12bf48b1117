"""Options that the command lines of benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fuse.commands.options import option_name
from fuse.commands.output import output_file


def add_numbers(
    parser: argparse.ArgumentParser, **options: tuple[int, str] | tuple[float, str] | tuple[list[int], str]
) -> None:
    """Options that take a number, or several: by name, the default and what it is. Fractions are seconds."""
    for name, (default, text) in options.items():
        several = default if isinstance(default, list) else [default]
        parser.add_argument(
            option_name(name),
            type=type(several[0]),
            nargs="+" if isinstance(default, list) else None,
            default=default,
            metavar="S" if isinstance(default, float) else "N",
            help=f"{text} (default: {' '.join(f'{one:g}' for one in several)})",
        )


def add_choices(parser: argparse.ArgumentParser, option: str, choices: Sequence[str], text: str = "") -> None:
    """One of `choices`, by default the first."""
    default = choices[0]
    parser.add_argument(option, choices=choices, default=default, help=f"{text} (default: {default})".strip())


def add_selection(parser: argparse.ArgumentParser, option: str, choices: Sequence[str], text: str) -> None:
    """Some of `choices`, by default all of them."""
    parser.add_argument(
        option, nargs="+", choices=choices, default=list(choices), metavar=option.strip("-").upper(), help=text
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """A causal language model: one at a path, or a random Llama."""
    parser.add_argument("--model", metavar="PATH", help="causal language model (default: a random Llama, 4 x 256)")
    add_numbers(parser, vocab_size=(4096, "of the random Llama"), kv_heads=(4, "of the random Llama's 4 heads"))


def add_engine_option(parser: argparse.ArgumentParser, text: str = "") -> None:
    """What generates."""
    add_choices(parser, "--engine", ("transformers", "vllm"), text)


def add_json_option(parser: argparse.ArgumentParser, contents: str = "machine, options and rows") -> None:
    """Where results go."""
    parser.add_argument("--json", type=output_file, metavar="FILE", help=f"write {contents} to FILE")
