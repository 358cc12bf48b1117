"""Rows and tables of whole iterations."""

from __future__ import annotations

from fuse.benchmarks.iteration.rows import markdown, row_of, tables

from .made import ONE, SCALE, made_turn


def test_ratios_are_those_of_turns_in_the_same_repeat() -> None:
    turns = {
        "off": [made_turn(seconds, [ONE]) for seconds in (4.0, 8.0, 6.0)],
        "both": [made_turn(seconds, [ONE], peak_bytes={"driver": 9}) for seconds in (2.0, 2.0, 6.0)],
    }
    row = row_of("both", turns, SCALE)
    assert (row["ratio_to_serial"], row["ratio_to_serial_range"]) == (2.0, (1.0, 4.0))
    assert (row["ratio_to_trl"], row["ratio_to_trl_range"]) == (None, None)
    assert (row["seconds"], row["samples_per_s"], row["tokens_per_s"]) == (2.0, 0.5, 1.5)
    assert row["repeats"] == [2.0, 2.0, 6.0]
    assert row["peak_bytes"] == {"driver": 9}
    assert len(tables([row_of(name, turns, SCALE) for name in turns])) == 2


def test_a_table_without_trl_has_no_column_for_it() -> None:
    rows = [row_of("off", {"off": [made_turn(1.0, [ONE])]}, SCALE)]
    options = dict.fromkeys(("devices", "batch", "epochs", "mini_batches", "micro_batch", "repeats"), 1)
    options |= {"model": None, "lengths": "a/mix.csv", "max_new_tokens": 3}
    results = {"rows": rows, "machine": {"cpu": "EPYC", "packages": {}}, "options": options, "date": "2026-01-01"}
    text = markdown(results)
    assert text.splitlines()[0] == "| variant | samples/s | tokens/s | x off |"
    assert "lengths: mix;" in text
    assert text.endswith("idle 50% of the time: filled completely, that would be 2.00 times as fast.")
    assert markdown(results | {"options": options | {"smoke": True}}).endswith("proves nothing about speed.")


def test_rates_are_by_device_phase_and_what_the_machine_multiplies() -> None:
    turn = made_turn(4.0, [ONE, ONE], phases={"rollout": 1.0, "training": 2.0, "weights": 0.0, "other": 1.0})
    row = row_of("both", {"off": [turn], "both": [turn]}, SCALE)
    assert row["tokens_per_s_per_device"] == 2 * 5 / 4.0 / 2
    assert row["phase_rates"] == {"rollout": 6.0, "training": 3 * 10 / 2.0}
    assert row["exposed_s"] == {"training": 3.0}
    assert row["training_mfu"] == 1000 / (2.0 * 2 * 500.0)
