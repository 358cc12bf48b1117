"""Options from a YAML file: `--config FILE` of every command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

OPTION = "--config"


def with_config_file(argv: Sequence[str]) -> list[str]:
    """The command line with the options of the file that it names, if any, before its own, which win.

    A file is a mapping of options to values. A mapping inside gives options with a prefix: `sft: {learning_rate: 1e-4}`
    is `--sft.learning_rate=1e-4`. Lists are several values; true is an option without a value.

    Raises:
        ValueError: no such file, or one that is no mapping.
    """
    path = last_value(argv, OPTION)
    return list(argv) if not path else [*_options(_mapping(Path(path)), "--"), *argv]


def last_value(argv: Sequence[str], option: str) -> str | None:
    """What a command line gives an option last, before any parser reads it; None where it does not."""
    found = None
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        name, separator, value = argument.partition("=")
        if name == option:
            found = value if separator else following
    return found


def _mapping(path: Path) -> Mapping[str, Any]:
    import yaml  # most command lines name no file

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{OPTION} {path} cannot be read ({' '.join(str(error).split())}): give a YAML file"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{OPTION} {path} holds no mapping of options to values: write lines such as `seed: 1`")
    return content


def _options(mapping: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in mapping.items():
        option = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _options(value, f"{option}.")
        elif isinstance(value, list):
            yield from (option, *map(_text, value))
        elif value is True:
            yield option
        elif value is not None:
            yield f"{option}={_text(value)}"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
