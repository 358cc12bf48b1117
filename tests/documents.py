"""What the documents contain: their pages, blocks of code, and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Those fenced as of this language; none: ''."""
    return [code for of, code in _FENCED.findall(page.read_text(encoding="utf-8")) if of == language]


def without_blocks(page: Path) -> str:
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def command_lines(page: Path) -> Iterator[list[str]]:
    """Those in blocks of their own, without `fuse`."""
    indented = re.findall(r"^ {4}(fuse .+)$", without_blocks(page), re.MULTILINE)
    for line in [*"\n".join(blocks(page, "")).replace("\\\n", " ").splitlines(), *indented]:
        if line.startswith("fuse "):
            yield shlex.split(line, comments=True)[1:]


def mentioned_commands(page: Path) -> Iterator[list[str]]:
    """Those within sentences, without `fuse`."""
    for command in re.findall(r"`fuse ([^`]+)`", without_blocks(page)):
        yield ["2" if word in ("N", "GB") else word for word in shlex.split(" ".join(command.split()))]


def config_files(page: Path) -> dict[str, str]:
    """By the name that a command of the page has for it; the page's last YAML block."""
    names = re.findall(r"--config (\S+\.yaml)", page.read_text(encoding="utf-8"))
    return {name: blocks(page, "yaml")[-1] for name in names}
