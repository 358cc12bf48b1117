"""Pipeline schedules for one or more models on shared ranks: representation, evaluation, validation, search."""

from schedules.ir import Kind, Op, Pipeline, Problem, Schedule
from schedules.timing import Timing, evaluate
from schedules.validate import Rule, Violation, check, violations

__all__ = [
    "Kind",
    "Op",
    "Pipeline",
    "Problem",
    "Rule",
    "Schedule",
    "Timing",
    "Violation",
    "check",
    "evaluate",
    "violations",
]
