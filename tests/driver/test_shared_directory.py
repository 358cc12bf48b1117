"""Whether the output directory is the same everywhere, told before training begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fuse.driver.shared_directory import check_shared


def host(root: Path) -> Any:
    """A worker that sees the files of the driver that are under `root` here, by their names."""
    return SimpleNamespace(sees=lambda path: SimpleNamespace(result=lambda: (root / Path(path).name).is_file()))


def test_hosts_that_see_another_directory_are_named(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    other.mkdir()
    check_shared(shared, {"10.0.0.2": host(shared)})
    with pytest.raises(
        ValueError, match=r"shared' is another directory on 10\.0\.0\.3, .* that all hosts share"
    ) as error:
        check_shared(shared, {"10.0.0.2": host(shared), "10.0.0.3": host(other)})
    assert "\n" not in str(error.value)
    assert not list(shared.iterdir()), "nothing stays of the check"


def test_one_host_costs_nothing(tmp_path: Path) -> None:
    check_shared(tmp_path / "shared", {})
    assert not (tmp_path / "shared").exists()
