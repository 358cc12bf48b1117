"""This project's trainer in `fuse bench iteration`: one iteration at a time, with forced lengths if there are any."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback

from fuse.activity import Listener, silent
from fuse.benchmarks.iteration.exposed import exposed_s
from fuse.benchmarks.iteration.turn import PeakMemory, Response, Turn, Variant
from fuse.benchmarks.iteration.workload import Workload, even_tokens
from fuse.benchmarks.measure import Tracks, idle_shares, spans_of
from fuse.config.grpo import GRPOConfig
from fuse.config.ppo import PPOConfig
from fuse.trace import busy_s, now_s
from fuse.trainers.grpo import GRPOTrainer
from fuse.trainers.iteration import Iteration
from fuse.trainers.ppo import PPOTrainer
from fuse.trainers.trainer import Trainer

COMPUTING = frozenset({"generate", "infer", "train", "optimizer"})
"""Categories of spans: engine steps, inference, operations of pipelines, optimizer steps."""
_BUBBLE = "bubble/"


def fuse_config(
    workload: Workload, fusion: Mapping[str, Any], *, num_devices: int, engine: Any, output_dir: Path
) -> PPOConfig | GRPOConfig:
    """A trainer's configuration with these fusions; its traces and plans go to `output_dir`."""
    options = {
        "output_dir": str(output_dir),
        "num_devices": num_devices,
        "engine": engine,
        "engine_batch_size": workload.batch,
        "trace_limit": 0,  # every trace is a result
        **workload.options(),
        **fusion,
    }
    if workload.algorithm == "grpo":
        return GRPOConfig(**options, stop_token="eos" if workload.lengths is None else "none")
    return PPOConfig(**options)


@contextmanager
def fuse_variant(
    workload: Workload, config: PPOConfig | GRPOConfig, *, cluster: Any = None, tell: Listener = silent
) -> Iterator[Variant]:
    """A trainer and its workers. cluster: where they run, by default one of their own. tell: hears what is done."""
    trainer = _trainer(workload, config)
    trainer.cluster = cluster
    trainer.activity.listen(tell)
    trainer.remove_callback(PrinterCallback)
    in_order: Any = trainer.train_dataset
    trainer.dataloader = DataLoader(in_order, batch_size=workload.prompts_per_round, collate_fn=list)
    trainer.max_new_tokens = dict(enumerate(workload.lengths or ()))
    with trainer.updates() as updates:
        yield lambda same: _turn(trainer, updates)


def _trainer(workload: Workload, config: PPOConfig | GRPOConfig) -> Trainer:
    models = workload.models
    if isinstance(config, GRPOConfig):
        return GRPOTrainer(
            model=models.policy,
            reward_funcs=even_tokens,
            args=config,
            train_dataset=workload.dataset(),
            processing_class=models.tokenizer,
        )
    return PPOTrainer(
        args=config,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.reference,
        reward_model=models.reward,
        train_dataset=workload.dataset(),
        value_model=models.critic,
    )


def _turn(trainer: Trainer, updates: Iterator[Iteration]) -> Turn:
    memory = PeakMemory({**trainer.process_ids, "driver": [os.getpid()]})
    start_s = now_s()
    iteration = next(updates)
    end_s = now_s()
    metrics, tracks = iteration.metrics, iteration.tracks
    return Turn(
        seconds=end_s - start_s,
        responses=tuple(Response(one.prompt_ids, tuple(one.response_ids)) for one in iteration.samples),
        metrics=metrics,
        phases={**iteration.phases, "other": end_s - start_s - sum(iteration.phases.values())},
        idle_share=idle_shares(tracks, start_s, end_s),
        outside_share=outside_share(tracks, start_s, end_s),
        exposed_s=exposed_s(tracks, start_s, end_s),
        bubbles={name.removeprefix(_BUBBLE): metrics[name] for name in metrics if name.startswith(_BUBBLE)},
        peak_bytes=memory.read(),
    )


def outside_share(tracks: Tracks, start_s: float, end_s: float) -> float:
    """The share of the time in which no device at all computed anything of `COMPUTING`."""
    spans = [span for workers in tracks.values() for span in spans_of(workers) if span.category in COMPUTING]
    return 1 - busy_s(spans, start_s, end_s) / (end_s - start_s)
