"""The one version of TRL that can be compared with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from fuse.benchmarks.iteration import trl


@pytest.mark.parametrize("found", ["1.13.0", None])
def test_without_the_right_trl_there_is_no_peer(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(trl, "version", version)
    with pytest.raises(ValueError, match=r"pip install trl==1\.12\.0"):
        trl.require_trl()
