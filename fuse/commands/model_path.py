"""Paths of models, checked before anything that reads them is imported."""

from __future__ import annotations

from pathlib import Path


def check_model_path(path: str) -> None:
    """Refuse a path that does not exist at once; a name such as `owner/model` may be on the Hugging Face Hub.

    Raises:
        ValueError: there is no such directory.
    """
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise ValueError(f"no model at {path}: there is no such directory")
