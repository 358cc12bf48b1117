"""Whatever a command is given, it ends with status 0, or with status 2 and one line.

FUSE_EXAMPLES: cases per command, e.g. 500.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuse import cli
from fuse.cli import main
from fuse.commands import train
from fuse.commands.train_inputs import read_inputs
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.interstage.costs import SMALL_CPU, costs_to_json
from fuse.trainers.data import prompt_rows
from schedules import evaluate
from schedules.baselines import serial
from schedules.formats import problem_to_json, problem_to_text, schedule_to_json, schedule_to_text
from schedules.fused.solve import solution_to_json, solve
from schedules.instances import actor_and_critic

CASES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

PROBLEM = replace(
    actor_and_critic(
        actor_stages=2,
        critic_stages=2,
        actor_microbatches=2,
        critic_microbatches=2,
        actor_forward=2,
        critic_forward=1,
        actor_activation=2,
        critic_activation=1,
        split_backward=True,
    ).problem,
    memory_limit_bytes=(100, 100),
)


class Raw(str):
    """JSON as it is written, whatever `json` makes of it."""


def deep(levels: int) -> Raw:
    return Raw("[" * levels + "1" + "]" * levels)


ODD_NUMBERS = ("1e999", "-1e999", "NaN", "Infinity", "1e300", "1e18", "-1", "0", "0.5", "9" * 19, "9" * 30, "9" * 5000)
ODD_VALUES = st.one_of(
    st.sampled_from(ODD_NUMBERS).map(Raw),
    st.sampled_from([None, True, "", "x", [], {}, [[]], {"a": 1}, deep(90), deep(3000), "\ud800", "\x1b[31m", "[/]"]),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
).map(copy.deepcopy)  # what is drawn may be mutated further


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every node of a JSON value, as the keys that lead there."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def written(value: Any) -> str:
    """JSON of a value, with `Raw` as it stands."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


@st.composite
def mutated_json(draw: st.DrawFn, originals: list[Any]) -> str:
    """One of some JSON values with some nodes replaced, removed or repeated."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            value = draw(ODD_VALUES)
            break
        *way, key = path
        owner = value
        for step in way:
            owner = owner[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"]))
        if kind == "replace":
            owner[key] = draw(ODD_VALUES)
        elif kind == "remove":
            del owner[key]
        elif isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        else:
            owner[draw(st.text(max_size=4))] = copy.deepcopy(owner[key])
    return written(value)


@st.composite
def mutated_bytes(draw: st.DrawFn, originals: list[str]) -> bytes:
    """One of some texts with some pieces replaced."""
    content = draw(st.sampled_from(originals)).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 8)))
        odd = st.one_of(
            st.binary(max_size=6),
            st.sampled_from([*(number.encode() for number in ODD_NUMBERS), b"\x00", b'"', b"\n", b"[" * 5000]),
        )
        content = content[:start] + draw(odd) + content[end:]
    return content


def any_file(values: list[Any], texts: list[str]) -> st.SearchStrategy[bytes]:
    return st.one_of(
        mutated_json(values).map(lambda text: text.encode("utf-8", "surrogatepass")),
        mutated_bytes([*map(json.dumps, values), *texts]),
    )


NUMBERS = st.one_of(
    st.integers(-2, 4).map(str), st.sampled_from([*ODD_NUMBERS, "inf", "nan", "-inf", "1e-300", "x", ""])
)


@st.composite
def options(draw: st.DrawFn, names: list[str]) -> list[str]:
    """Some options of these names with numbers that may be anything."""
    chosen = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    return [f"--{name}={draw(NUMBERS)}" for name in chosen]


def answer(argv: list[str]) -> None:
    """Run a command and assert that it ends as commands end."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        try:
            status = main(argv)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    message = error.getvalue()
    assert status in (0, 2), message
    assert message.count("\n") == (status == 2), message
    assert message.replace("\n", "").isprintable()
    assert len(message) < 2200
    assert "\x1b" not in out.getvalue()


def small_trace() -> dict[str, Any]:
    """A step as it was planned and as it ran, a tick a millisecond."""
    schedule = serial(PROBLEM)
    timing = evaluate(schedule)
    events: list[dict[str, Any]] = []
    for rank, order in enumerate(schedule.ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"device{rank}"}})
        for op, start, end in zip(order, timing.start[rank], timing.end[rank], strict=True):
            name = f"{op.kind} {PROBLEM.pipelines[op.pipeline].name}.{op.stage}.{op.micro_batch}"
            planned = {"planned_start_s": 1e-3 * start, "planned_end_s": 1e-3 * end}
            times = {"ts": 1e3 * start, "dur": 1e3 * (end - start)}
            events.append({"ph": "X", "name": name, "cat": "train", "pid": rank, **times, "args": planned})
        last = {"ts": 1e3 * timing.makespan, "dur": 5.0}
        events.append({"ph": "X", "name": "step actor", "cat": "optimizer", "pid": rank, **last, "args": {}})
    return {"traceEvents": events}


SHOWN = [
    problem_to_json(PROBLEM),
    schedule_to_json(serial(PROBLEM)),
    solution_to_json(solve(PROBLEM, time_limit_s=0.05, num_workers=1)),
    small_trace(),
]


@CASES
@given(content=any_file(SHOWN, [problem_to_text(PROBLEM), schedule_to_text(serial(PROBLEM))]))
def test_show(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    answer(["show", str(path)])


SHAPE = ["actor-stages", "critic-stages", "actor-microbatches", "critic-microbatches"]
COSTS = ["actor-forward", "critic-forward", "actor-activation", "critic-activation", "memory-limit"]


@CASES
@given(content=any_file([problem_to_json(PROBLEM)], []), given_options=options(["memory-limit", "seed", "workers"]))
def test_solve_a_file(content: bytes, given_options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    answer(["solve", str(path), "--time-limit=0.05", "--workers=1", *given_options])


@CASES
@given(given_options=options([*SHAPE, *COSTS, "time-limit", "workers", "seed"]))
def test_solve_options(given_options: list[str]) -> None:
    defaults = ["--actor-stages=2", "--actor-microbatches=2", "--time-limit=0.05", "--workers=1"]
    long = ("--time-limit=1", "--time-limit=2", "--time-limit=3", "--time-limit=4")  # seconds that a search may take
    answer(["solve", *defaults, *(one for one in given_options if one not in long)])


LENGTHS = "prompt_id,prompt_tokens,output_tokens\n" + "a,10,100\nb,12,8\nc,9,30\nd,8,10\n" * 2
SIZES = ["devices", "batch", "iterations", "max-tokens", "prompt-tokens", "max-batch", "kv-tokens"]


@CASES
@given(
    lengths=mutated_bytes([LENGTHS, LENGTHS.replace("a", "a" * 200_000, 1)]),
    costs=any_file([costs_to_json(SMALL_CPU)], []),
    given_options=options(SIZES),
)
def test_simulate(lengths: bytes, costs: bytes, given_options: list[str], tmp_path: Path) -> None:
    path, costs_path = tmp_path / "lengths.csv", tmp_path / "costs.json"
    path.write_bytes(lengths)
    costs_path.write_bytes(costs)
    sizes = ["--devices=2", "--batch=4"]
    answer(["simulate", "--lengths", str(path), *sizes, "--costs", str(costs_path), *given_options])


ROWS = [
    [{"input_ids": [3, 4, 5], "a": 2}, {"input_ids": [6], "a": 4}],
    [{"q": "1+1=", "a": 2}, {"q": [{"role": "user", "content": "1"}]}],
]
TRAINED = ["seed", "data-seed", "learning-rate", "temperature", "kl-coef", "response-length", "num-devices", "gamma"]
TRAINED += ["total-episodes", "max-steps", "stop-token-id", "cliprange", "worker-timeout-s", "max-grad-norm"]
TRAINED += ["per-device-train-batch-size", "engine-batch-size", "save-steps", "logging-steps", "warmup-steps"]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    made = cli.Parser(prog="fuse train", parents=train.parents([]))
    train.add_arguments(made)
    return made


@CASES
@given(
    content=st.one_of(any_file(ROWS, []), any_file([row for rows in ROWS for row in rows], [])),
    given_options=options(TRAINED),
    column=st.sampled_from([None, "q", "a", "input_ids"]),
)
def test_train_up_to_its_models(
    content: bytes, given_options: list[str], column: str | None, parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert train_status(parser, column, ["--use_cpu", f"--dataset={path}", *given_options]) in (0, 2)


def train_status(parser: argparse.ArgumentParser, column: str | None, argv: list[str]) -> int:
    """What `fuse train` would end with, were it to end before its models."""
    argv = ["--model=owner/model", "--reward-function=json:dumps", *argv]
    try:
        with redirect_stderr(io.StringIO()):
            arguments = parser.parse_args(argv)
        inputs = read_inputs(arguments)
        prompt_rows(inputs.rows, arithmetic_tokenizer(), prompt_column=column, response_length=4, context=64)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except (ValueError, OSError):
        return 2
    return 0


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[" * 5000, "is nested more than 100 deep"),
        ('{"problem": 1, "num_ranks": 1' + "0" * 30 + "}", "has the integer 1000000"),
        ('{"problem": 1, "num_ranks": 1e999}', "has the number 1e999, which is not finite"),
        ('{"problem": 1, "num_ranks": 1' + "0" * 5000 + "}", "has an integer of thousands of digits"),
        ('{"problem": 1, "num_ranks": 999999999, "pipelines": []}', "num_ranks is 999999999; the most is"),
        ('{"traceEvents": [{"ph": "X", "pid": 1e300, "dur": 1}]}', "an event's pid is 1e+300, not a number of at most"),
        ('{"traceEvents": [{"ph": "X", "pid": 0, "dur": -1}]}', "an event's dur is -1"),
    ],
)
def test_show_says_what_it_cannot_read(
    content: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    assert main(["show", str(path)]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("name", ["num_micro_batches", "forward_ticks", "activation_bytes"])
def test_a_problem_beyond_all_measure_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = problem_to_json(PROBLEM)
    pipelines: Any = problem["pipelines"]
    pipelines[0][name] = 10**17 if name == "num_micro_batches" else [10**18, 10**18]
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(problem))
    for command in ("show", "solve"):
        assert main([command, str(path)]) == 2
        assert "the most is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "given_options", "line"),
    [
        ("output_tokens,x\n1," + "y" * 200_000 + "\n", [], "line 2 is not CSV (field larger than field limit"),
        ("output_tokens\n1\n" + "9" * 18 + "\n", [], "line 3: output_tokens is 999999999999999999: the most is"),
        ("output_tokens\n" + "9" * 5000 + "\n", [], "line 2: output_tokens is 9999"),
        ("output_tokens\n5\n", ["--devices", "9" * 12], "--devices is 999999999999: the most is"),
        ("output_tokens\n5\n", ["--max-batch", "9" * 30], "--max-batch is 9999"),
    ],
)
def test_simulate_says_what_it_cannot_read(
    content: str, given_options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(content)
    limit = csv.field_size_limit(128 * 1024)  # with which a process begins; whoever has read prompts has raised it
    try:
        assert main(["simulate", "--lengths", str(path), "--batch", "1", *given_options]) == 2
    finally:
        csv.field_size_limit(limit)
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given_options", "line"),
    [
        (["--memory-limit", "inf"], "--memory-limit is inf: give a finite number"),
        (["--actor-activation", "1e-300"], "actor_activation is 1e-300: give at most nine decimals"),
        (["--actor-stages", "9" * 12], "actor_stages is 999999999999: the most is"),
        (["--time-limit", "nan"], "time_limit_s nan must be positive"),
        (["--workers", "9" * 9], "num_workers 999999999 must be from 1 to"),
        (["--seed", "9" * 20], "must be from 0 to"),
    ],
)
def test_solve_says_which_option_is_out_of_range(
    given_options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["solve", "--actor-stages=2", "--actor-microbatches=2", *given_options]) == 2
    assert line in capsys.readouterr().err
