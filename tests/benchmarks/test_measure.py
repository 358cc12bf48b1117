"""The measuring itself: order, warm-up, memory, and whole files."""

import json
from itertools import count

import pytest
import torch

from fuse.benchmarks.measure import alternate, describe_machine, interleave, peak_bytes
from fuse.commands.output import write_json


def test_interleave_alternates_and_leaves_the_warm_up_out():
    calls = []
    seconds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_alternate_keeps_what_is_returned_after_the_warm_up():
    numbers = count()
    assert alternate({"a": lambda: next(numbers), True: lambda: -1}, repeats=2) == {"a": [1, 2], True: [-1, -1]}


def test_interleave_refuses_no_repeats():
    with pytest.raises(ValueError, match="repeats is 0"):
        interleave({}, repeats=0)


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="measures GPU memory then")
def test_peak_bytes_sees_temporaries_and_not_what_was_held_before():
    held = torch.ones(2**24)  # 64 MiB
    peak = peak_bytes(lambda: (held + 1).sum())  # one temporary of that size
    assert 0.9 * 2**26 < peak < 1.2 * 2**26


def test_machine_description_is_json():
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["num_cores"] >= 1
    assert machine["packages"]["torch"] == torch.__version__


def test_write_json_leaves_the_old_file_when_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
