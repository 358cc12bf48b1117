"""The page itself: markup, style and script are files beside this one, the data goes in as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def page(run: Mapping[str, Any], details: Mapping[int, Mapping[str, Any]], *, is_served: bool = False) -> str:
    """One HTML document, which needs nothing else. run: of `run_data`. details: by update, of `fuse.run_page.data`.

    is_served: the page asks whoever serves it for what is new, and for the details.
    """
    blobs = [_blob("run", run), *(_blob(f"update-{update}", of_one) for update, of_one in details.items())]
    parts = {
        "/*CSS*/": _text("page.css"),
        "/*JS*/": _text("page.js"),
        "/*TITLE*/": escape(str(run["title"])),
        "/*BODY*/": ' data-served="1"' if is_served else "",
        "<!--DATA-->": "\n".join(blobs),
    }
    document = _text("page.html")
    for place, text in parts.items():
        before, _, after = document.partition(place)
        document = before + text + after
    return document


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _blob(name: str, value: object) -> str:
    """JSON in a script element: `<` is escaped, so that no text in it ends the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
