"""Random problems and random legal schedules, reproducible from a seed: to test whatever works on schedules."""

from __future__ import annotations

from collections import defaultdict, deque
from random import Random

from schedules.ir import Kind, Op, Pipeline, Problem, Schedule
from schedules.walk import Channel, channel_from, channel_into


def random_problem(
    random: Random,
    *,
    max_ranks: int = 4,
    max_pipelines: int = 3,
    max_stages: int = 4,
    max_micro_batches: int = 4,
    max_ticks: int = 9,
    max_bytes: int = 9,
    max_forward_only: int = 0,
) -> Problem:
    """Any shape the representation allows: virtual stages, idle ranks, transfers, split backwards; no memory limit.

    max_forward_only: pipelines more, some of which must come before the last stage of another.
    """
    num_ranks = random.randint(1, max_ranks)
    pipelines = []
    for number in range(random.randint(1, max_pipelines)):
        num_stages = random.randint(1, max_stages)
        can_split = random.random() < 0.5

        def draw(least: int, most: int, length: int = num_stages) -> tuple[int, ...]:
            return tuple(random.randint(least, most) for _ in range(length))

        pipelines.append(
            Pipeline(
                name=f"model{number}",
                ranks=draw(0, num_ranks - 1),
                num_micro_batches=random.randint(1, max_micro_batches),
                forward_ticks=draw(1, max_ticks),
                backward_ticks=draw(1, max_ticks),
                input_grad_ticks=draw(1, max_ticks) if can_split else None,
                weight_grad_ticks=draw(1, max_ticks) if can_split else None,
                activation_bytes=draw(0, max_bytes),
                weight_grad_bytes=draw(0, max_bytes),
                transfer_ticks=random.choice((0, random.randint(0, max_ticks))),
            )
        )
    num_with_backwards = len(pipelines)
    for number in range(random.randint(0, max_forward_only) if max_forward_only else 0):
        before = random.choice((None, random.randrange(num_with_backwards)))
        ranks = tuple(random.randrange(num_ranks) for _ in range(random.randint(1, max_stages)))
        least = 1
        if before is not None:
            ranks, least = (*ranks[1:], pipelines[before].ranks[-1]), pipelines[before].num_micro_batches
        pipelines.append(
            Pipeline(
                name=f"forward{number}",
                ranks=ranks,
                num_micro_batches=random.randint(least, max(least, max_micro_batches)),
                forward_ticks=tuple(random.randint(1, max_ticks) for _ in ranks),
                backward_ticks=(),
                transfer_ticks=random.choice((0, random.randint(0, max_ticks))),
                before=before,
            )
        )
    initial_bytes = tuple(random.randint(0, max_bytes) for _ in range(num_ranks))
    return Problem(num_ranks=num_ranks, pipelines=tuple(pipelines), initial_bytes=initial_bytes)


def random_schedule(problem: Problem, random: Random) -> Schedule:
    """A legal schedule but for memory: operations are appended in a random order in which each could run.

    Micro-batches of a stage are forwarded and taken back in order; backwards that can be split are split at random.
    O(operations * chains).
    """
    chains: list[deque[Op]] = []
    for number, pipeline in enumerate(problem.pipelines):
        for stage in range(pipeline.num_stages):
            chains.append(deque(Op(number, stage, m, Kind.F) for m in range(pipeline.num_micro_batches)))
            if pipeline.is_forward_only:
                continue
            backwards: deque[Op] = deque()
            for micro_batch in range(pipeline.num_micro_batches):
                kind = Kind.I if pipeline.can_split and random.random() < 0.5 else Kind.B
                backwards.append(Op(number, stage, micro_batch, kind))
            chains.append(backwards)
            chains.append(
                deque(Op(op.pipeline, op.stage, op.micro_batch, Kind.W) for op in backwards if op.kind is Kind.I)
            )
    orders: list[list[Op]] = [[] for _ in range(problem.num_ranks)]
    done: set[tuple[int, int, int, bool]] = set()
    input_grads: set[tuple[int, int, int]] = set()
    channels: defaultdict[Channel, deque[tuple[int, int]]] = defaultdict(deque)

    def is_ready(op: Op) -> bool:
        if op.kind is Kind.W:
            return (op.pipeline, op.stage, op.micro_batch) in input_grads
        forward = op.kind is Kind.F
        if not forward and (op.pipeline, op.stage, op.micro_batch, True) not in done:
            return False
        if any((one.pipeline, one.stage, one.micro_batch, True) not in done for one in problem.first(op)):
            return False
        feeding = op.stage - 1 if forward else op.stage + 1
        if 0 <= feeding < problem.pipelines[op.pipeline].num_stages:
            if (op.pipeline, feeding, op.micro_batch, forward) not in done:
                return False
            channel = channel_into(problem, op)
            return channel is None or channels[channel][0] == (op.stage, op.micro_batch)
        return True

    while any(chains):
        chain = random.choice([chain for chain in chains if chain and is_ready(chain[0])])
        op = chain.popleft()
        orders[problem.rank_of(op)].append(op)
        if op.kind is Kind.W:
            continue
        if op.kind is Kind.I:
            input_grads.add((op.pipeline, op.stage, op.micro_batch))
        done.add((op.pipeline, op.stage, op.micro_batch, op.kind is Kind.F))
        incoming, outgoing = channel_into(problem, op), channel_from(problem, op)
        if incoming is not None:
            channels[incoming].popleft()
        if outgoing is not None:
            channels[outgoing].append((op.stage + 1 if op.kind is Kind.F else op.stage - 1, op.micro_batch))
    return Schedule(problem, tuple(map(tuple, orders)))
