"""This project's trainer in `fuse bench iteration`: one iteration at a time, with forced lengths if there are any."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback

from fuse.algorithms.batch import Experience
from fuse.benchmarks.iteration_turns import PeakMemory, Response, TrainingThread, Turn, Turnstile, loader
from fuse.benchmarks.iteration_workload import Workload, forced_engine
from fuse.config.ppo import PPOConfig
from fuse.driver.fleet import Fleet
from fuse.sample import Sample
from fuse.trace import PhaseClock, Span, busy_s, write_chrome_trace
from fuse.trainers.ppo import PPOTrainer
from fuse.trainers.report import iteration_report

COMPUTING = frozenset({"generate", "infer", "train", "optimizer"})
"""Categories of spans: engine steps, inference, operations of pipelines, optimizer steps."""

Tracks = Mapping[str, Mapping[str, Sequence[Span]]]


@contextmanager
def fuse_variant(
    workload: Workload, fusion: Mapping[str, Any], *, num_devices: int, engine: Any, output_dir: Path
) -> Iterator[FuseVariant]:
    """A trainer with these fusions, and its workers; its traces and plans go to `output_dir`."""
    turnstile = Turnstile()
    config = PPOConfig(
        output_dir=str(output_dir),
        num_devices=num_devices,
        engine=engine,
        generation_batch_size=workload.batch,
        **workload.options(),
        **fusion,
    )
    trainer = TurnTrainer(workload, config, turnstile)
    with TrainingThread(turnstile, trainer.train):
        yield FuseVariant(trainer, turnstile)


class TurnTrainer(PPOTrainer):
    """The trainer as it is, but for the source of its prompts and where responses end; it remembers its last turn."""

    def __init__(self, workload: Workload, config: PPOConfig, turnstile: Turnstile) -> None:
        models = workload.models
        super().__init__(
            args=config,
            processing_class=models.tokenizer,
            model=models.policy,
            ref_model=models.reference,
            reward_model=models.reward,
            train_dataset=[row for index in range(workload.num_rounds) for row in workload.rows(index)],
            value_model=models.critic,
        )
        self.remove_callback(PrinterCallback)
        if workload.lengths is not None:
            engine = partial(forced_engine, self._settings.engine, workload.lengths)
            self._settings = replace(self._settings, engine=engine)
        self._workload, self._turnstile = workload, turnstile
        self.samples: Sequence[Sample] = ()
        self.tracks: Tracks = {}
        self.clock = PhaseClock()
        self.report: Mapping[str, float] = {}

    def get_train_dataloader(self) -> Any:
        return self

    def __len__(self) -> int:
        return self._workload.num_rounds

    def __iter__(self) -> Iterator[list[dict[str, list[int]]]]:
        return loader(self._turnstile, self._workload.num_rounds, self._workload.rows)

    @property
    def fleet(self) -> Fleet:
        assert self._fleet is not None
        return self._fleet

    def _prepare(self, samples: Sequence[Sample]) -> tuple[Experience, dict[str, float]]:
        self.samples = samples
        return super()._prepare(samples)

    def _report_time(self, clock: PhaseClock) -> dict[str, float]:
        """As the trainer does, but spans and clock stay."""
        self.clock, self.tracks = clock, self.fleet.drain_spans()
        path = self._output_dir / "traces" / f"iteration-{self.state.global_step:05d}.json"
        write_chrome_trace(path, self.tracks)
        report = iteration_report(self.tracks, clock, self.fleet.serial_bubble_ratio)
        self.report = report
        return report


class FuseVariant:
    """A `Variant` of this project's trainer."""

    def __init__(self, trainer: TurnTrainer, turnstile: Turnstile) -> None:
        self._trainer, self._turnstile = trainer, turnstile

    def turn(self, same: tuple[Response, ...] | None) -> Turn:
        trainer, turnstile = self._trainer, self._turnstile
        memory = PeakMemory(
            {
                "generation": [one.worker.process_id for one in trainer.fleet._generation_workers],
                "model": [one.worker.process_id for one in trainer.fleet._model_workers],
                "driver": [os.getpid()],
            }
        )
        memory.reset()
        turnstile.turn()
        start_s, end_s = turnstile.start_s, turnstile.end_s
        phases = dict(trainer.clock.seconds)
        bubbles = {
            name.removeprefix("bubble/"): share for name, share in trainer.report.items() if name.startswith("bubble/")
        }
        return Turn(
            seconds=end_s - start_s,
            responses=tuple(Response(one.prompt_ids, tuple(one.response_ids)) for one in trainer.samples),
            metrics=trainer.state.log_history[-1],
            phases=phases | {"other": end_s - start_s - sum(phases.values())},
            idle_share=idle_shares(trainer.tracks, start_s, end_s),
            outside_share=outside_share(trainer.tracks, start_s, end_s),
            bubbles=bubbles,
            peak_bytes=memory.read(),
        )


def idle_shares(tracks: Tracks, start_s: float, end_s: float) -> dict[str, float]:
    """By device: the share of the time in which no worker of it had a span."""
    return {
        device: 1 - busy_s([span for spans in workers.values() for span in spans], start_s, end_s) / (end_s - start_s)
        for device, workers in tracks.items()
    }


def outside_share(tracks: Tracks, start_s: float, end_s: float) -> float:
    """The share of the time in which no device at all computed anything of `COMPUTING`."""
    computing = [
        span
        for workers in tracks.values()
        for spans in workers.values()
        for span in spans
        if span.category in COMPUTING
    ]
    return 1 - busy_s(computing, start_s, end_s) / (end_s - start_s)
