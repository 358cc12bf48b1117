"""Text from files and errors on its way to a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with what a terminal would obey as escapes such as `\\x1b`; spaces stay."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
