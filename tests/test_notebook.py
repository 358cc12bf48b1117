"""The visualizer runs from top to bottom, shows what it promises, and keeps its pictures and nothing else."""

from __future__ import annotations

import base64
import io
import re
import time
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient
from PIL import Image
from traitlets import Type

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "visualizer.ipynb"


class _ShellChannel(AsyncZMQSocketChannel):
    """Looks again each second for a message.

    The client answers widgets over the socket that it awaits replies from. ZeroMQ reports only changes of a socket, and
    a send takes note of them: a reply that arrives just then wakes nobody.
    """

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                return await super().get_msg(timeout=min(max(left, 0.0), 1.0))
            except Empty:
                if left <= 0:
                    raise


class _KernelClient(AsyncKernelClient):
    shell_channel_class = Type(_ShellChannel)


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def test_is_stored_with_its_pictures_alone(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert all("image/png" in output.get("data", {}) for output in cell.outputs)
            assert cell.execution_count is None
        assert cell.metadata == {}
    pictures = [picture for of_cell in _pictures(notebook) for picture in of_cell]
    assert len(pictures) == 4, "`make figures` saves them"
    for picture in pictures:
        width, height = picture.size
        assert width > height > 200
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 10
    assert NOTEBOOK.stat().st_size < 500_000
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "widgets" not in notebook.metadata


def test_calls_the_library_only(notebook: Any) -> None:
    """It imports no private names and defines no types."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert not re.findall(r"from (?:schedules|fuse)\S* import .*\b_\w", code)
    assert "class " not in code


@pytest.mark.processes
def test_runs_from_top_to_bottom(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = [len(pictures) for pictures in _pictures(notebook)]
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("VISUALIZER_QUICK", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        startup_timeout=200,
        timeout=200,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.create_kernel_manager().client_factory = _KernelClient
    client.execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    widgets = list(client.widget_state.values())
    nested = [output for widget in widgets for output in widget.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in nested)
    assert re.search(r"serial 1F1B +46 +27\.8% +21\.7% +4\n", printed)
    assert re.search(r"fused +36 +0\.0% +0\.0% +4\n", printed)
    assert "Chimera" in printed
    assert "lower bound" in printed
    titles = [title for output in [*outputs, *nested] for title in _titles(output)]
    assert titles == ["fused", "Step 1 of 2", "Stage by stage", "Fused"]
    assert [len(pictures) for pictures in _pictures(notebook)] == saved, "`make figures` saves them anew"
    assert any("optimal, found by" in str(widget.get("value", "")) for widget in widgets)


def _pictures(notebook: Any) -> list[list[Any]]:
    """Of each code cell's outputs, without widgets."""
    return [
        [
            Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _titles(output: Any) -> list[str]:
    """Of a plotly figure, without its bold face."""
    figure = output.get("data", {}).get("application/vnd.plotly.v1+json")
    return [] if figure is None else [re.sub("</?b>", "", figure["layout"]["title"]["text"])]
