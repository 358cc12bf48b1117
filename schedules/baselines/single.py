"""What the baselines for one model ask of a problem."""

from __future__ import annotations

from schedules.ir import Pipeline, Problem


def only_pipeline(problem: Problem, baseline: str) -> Pipeline:
    """The problem's only pipeline.

    Raises:
        ValueError: the problem has several pipelines, or a forward-only one.
    """
    if len(problem.pipelines) != 1:
        raise ValueError(f"{baseline} is for one pipeline, not {len(problem.pipelines)}; use serial for several")
    if problem.pipelines[0].is_forward_only:
        raise ValueError(f"{baseline} is for a pipeline with backwards; use serial for forward-only ones beside it")
    return problem.pipelines[0]


def one_stage_per_rank(problem: Problem, baseline: str) -> Pipeline:
    """The problem's only pipeline, whose stages are all on different ranks.

    Raises:
        ValueError: the problem has several pipelines, or a rank with several stages.
    """
    pipeline = only_pipeline(problem, baseline)
    for rank in pipeline.ranks:
        if pipeline.ranks.count(rank) > 1:
            raise ValueError(f"{baseline}: rank {rank} has {pipeline.ranks.count(rank)} stages; it is for one per rank")
    return pipeline
