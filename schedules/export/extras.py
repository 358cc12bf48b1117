"""Drawing libraries, which are an extra of the installation."""

from __future__ import annotations

from importlib.util import find_spec


def require(package: str) -> None:
    """Accept a package that is installed.

    Raises:
        ValueError: it is not; the line has the command that installs it.
    """
    if find_spec(package) is None:
        raise ValueError(f"{package} is not installed, and this needs it: pip install 'fuse-rlhf[viz]'")
