"""Tests that start processes, in files that do not say so themselves."""

from __future__ import annotations

MARKED: dict[str, tuple[str, ...]] = {
    "processes": (
        "tests/benchmarks/test_engine_process.py",
        "tests/benchmarks/test_peer_process.py",
        "tests/benchmarks/kernels/test_command.py::test_counts_what_calls_add_to_a_process",
        "tests/benchmarks/kernels/test_command.py::test_says_why_no_instructions_were_counted",
        "tests/benchmarks/kernels/test_command.py::test_what_callgrind_runs_starts_without_torch",
        "tests/benchmarks/kernels/test_command.py::test_writes_complete_rows_of_every_kernel",
        "tests/benchmarks/rollout/test_command.py::test_compares_with_vllm",
        "tests/benchmarks/training/test_command.py::test_emulates_schedules_and_says_so",
        "tests/schedules/export/test_drawings.py::test_libraries_are_loaded_only_to_draw",
        "tests/run_page/test_page_in_browser.py",
        "tests/schedules/export/test_page_in_browser.py",
        "tests/schedules/export/test_playground_in_browser.py",
    ),
}
"""By marker, how the tests begin that have it."""
