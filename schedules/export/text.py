"""Names on their way into documents."""

from __future__ import annotations


def drawable(text: str) -> str:
    """The text with what neither XML nor UTF-8 can hold, such as control characters, as escapes; spaces stay."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
