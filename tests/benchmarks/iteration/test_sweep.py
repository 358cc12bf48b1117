"""Several settings in one run."""

from __future__ import annotations

import argparse
import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image

from fuse import cli
from fuse.benchmarks.iteration import command
from fuse.benchmarks.iteration.sweep import Swept, draw, points, swept


def test_keys_are_those_of_options_and_values_have_their_types() -> None:
    assert swept("batch=32,64") == Swept("batch", (32, 64))
    assert swept("--max-new-tokens=8") == Swept("max_new_tokens", (8,))
    assert swept("lengths=natural,a=b.csv") == Swept("lengths", ("natural", "a=b.csv"))
    assert swept("time-scale=0.5,2") == Swept("time_scale", (0.5, 2.0))
    assert swept("speculation=off,int8") == Swept("speculation", ("off", "int8"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed=1,2", "one of the keys algorithm, num-generations"),
        ("batch", "whole numbers with commas between"),
        ("batch=x", "whole numbers with commas between"),
        ("batch=8,8", "values that differ"),
        ("lengths=", "values that differ"),
        ("time-scale=slow", "time-scale takes numbers with commas between"),
        ("speculation=off,int2", "speculation is one of off, int8, int4, ngram, not int2"),
    ],
)
def test_what_cannot_be_swept_is_refused(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        swept(text)


def test_points_are_all_combinations() -> None:
    arguments = argparse.Namespace(batch=64, epochs=1, seed=0, sweep=[Swept("batch", (8, 16)), Swept("epochs", (1, 4))])
    found = [(settings, point.batch, point.epochs, point.seed) for settings, point in points(arguments)]
    assert [one[1:] for one in found] == [(8, 1, 0), (8, 4, 0), (16, 1, 0), (16, 4, 0)]
    assert found[1][0] == {"batch": 8, "epochs": 4}
    with pytest.raises(ValueError, match="--sweep has batch twice"):
        list(points(argparse.Namespace(sweep=[Swept("batch", (8,)), Swept("batch", (16,))])))


def made_row(variant: str, ratio: float) -> dict[str, Any]:
    return {"variant": variant, "ratio_to_serial": ratio, "ratio_to_serial_range": [ratio - 0.1, ratio + 0.1]}


def test_a_picture_and_a_page_show_every_line(tmp_path: Path) -> None:
    measured = [
        {"settings": {"batch": batch, "epochs": epochs}, "rows": [made_row("off", 1.0), made_row("both", ratio)]}
        for batch, epochs, ratio in ((8, 1, 1.1), (8, 4, 1.2), (16, 1, 1.3), (16, 4, 1.4))
    ]
    png, html = tmp_path / "sweep.png", tmp_path / "sweep.html"
    draw(measured, png, html)
    assert Image.open(png).size == (1050, 600)
    text = html.read_text()
    assert "both, epochs 1" in text
    assert "both, epochs 4" in text
    assert "https://cdn.plot.ly" not in text.partition("<body>")[0], "it opens without a network"
    assert '"mode":"lines+markers"' in text
    assert "emulated" not in text.partition("Plotly.newPlot")[2]


def test_names_are_not_joined_by_a_line_and_emulated_devices_are_called_so(tmp_path: Path) -> None:
    measured = [
        {
            "settings": {"costs": name},
            "rows": [{**made_row(variant, ratio), "emulated": True} for variant, ratio in rows],
        }
        for name, rows in (("one.json", (("off", 1.0), ("both", 1.2))), ("h100-33b", (("off", 1.0), ("both", 1.3))))
    ]
    seen: list[Any] = []

    def errorbar(self: Axes, *arguments: Any, **options: Any) -> Any:
        seen.append((arguments[0], options["linestyle"]))
        return drawn(self, *arguments, **options)

    drawn = Axes.errorbar
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "errorbar", errorbar)
        draw(measured, tmp_path / "sweep.png", tmp_path / "sweep.html")
    assert seen == [(["one", "h100-33b"], "")]
    text = (tmp_path / "sweep.html").read_text().partition("Plotly.newPlot")[2]
    assert '"mode":"markers"' in text
    assert "times as fast as off, on emulated devices" in text


def test_results_are_written_after_each_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    seen: list[int] = []
    models: list[weakref.ref[Any]] = []

    def measure(arguments: argparse.Namespace, devices: None) -> dict[str, Any]:
        trainer = argparse.Namespace(model=argparse.Namespace())
        trainer.model.trainer = trainer
        models.append(weakref.ref(trainer))
        if seen:
            assert models[-2]() is None, "what a point has used is still there"
            assert len(json.loads(path.read_text())["points"]) == len(seen)
        if len(seen) == 2:
            raise ValueError("the third fails")
        seen.append(arguments.batch)
        same = {"machine": {}, "date": "2026-01-01", "commit": None, "dirty": None, "configuration": {}}
        return same | {"options": {"batch": arguments.batch}, "rows": []}

    monkeypatch.setattr(command, "_measure", measure)
    monkeypatch.setattr(command, "_print", lambda *_: None)
    options = ["--sweep", "batch=8,16,32", "--mini-batches", "1", "--json", str(path)]
    gc.disable()
    try:
        assert cli.main(["bench", "iteration", *options]) == 2
    finally:
        gc.enable()
    assert "the third fails" in capsys.readouterr().err
    results = json.loads(path.read_text())
    assert results["sweep"] == {"batch": [8, 16, 32]}
    assert [point["settings"] for point in results["points"]] == [{"batch": 8}, {"batch": 16}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "batch=8,12"], "so that their product divides it"),
        (["--sweep", "batch=8,16", "--compare", "old.json"], "No such file"),
        (["--sweep", "batch=8,16", "--markdown"], "--sweep has several results"),
    ],
)
def test_every_point_is_checked_before_the_first_is_measured(
    options: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_measure", None)
    assert cli.main(["bench", "iteration", *options]) == 2
    assert message in capsys.readouterr().err
