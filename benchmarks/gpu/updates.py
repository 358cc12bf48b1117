"""PPO updates of a random model on one device: generation, scoring and fused training, as a run of one device has them.

All in one process, through the classes that workers call. The policy's ratio in the first epoch compares the engine's
log-probabilities with the trainer's, by the same weights: what it is off by is what the two compute differently.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.gae import GAESettings
from fuse.algorithms.policy_loss import RATIO
from fuse.algorithms.ppo import PPOSettings, ppo
from fuse.benchmarks.gpu.requests import generate, requests_of
from fuse.benchmarks.gpu.setup import Row, Setup, gigabytes, random_model, spec_for, synchronize
from fuse.device_clock import clock_of
from fuse.driver.ledger_entry import Phase
from fuse.driver.memory import Ledger, ledger
from fuse.driver.memory_setup import MemorySetup, planned_models
from fuse.engines.transformers import TransformersEngine
from fuse.intrastage import communication
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import Counts, place
from fuse.intrastage.training_schedule import Plan, halved_serial_schedule
from fuse.roles import ROLES
from fuse.sample import Sample, SampleState, SpecialTokens
from fuse.trace import SpanRecorder
from fuse.training import scoring
from fuse.training.layout import RaggedLayout
from fuse.training.rank import TrainingRank, TrainingSettings
from fuse.training.reading import TokenSequence
from fuse.training.rounds import Round, rounds, step_reports
from fuse.training.steps import StepReport, optimizer_steps
from schedules.fused.greedy import greedy

_NUM_UPDATES = 3
_NUM_EPOCHS = 2
_RATIO_BOUND = 0.02
_TRAINED = ("actor", "critic")
_SCORED = ("reference", "reward")
_PLACEMENT = (*place("actor", 1, 1), *place("critic", 1, 1))
_LIMIT = scoring.MicroBatchLimit(max_samples=8, max_tokens=8192)
_LEARNING_RATES = {"actor": 1e-6, "critic": 1e-5}
_TIMEOUT_S = 120.0
_ALGORITHM: Algorithm = ppo(
    PPOSettings(
        gae=GAESettings(
            kl_coef=0.05, kl_estimator="k1", whiten_rewards=False, gamma=1.0, lam=0.95, missing_eos_penalty=None
        ),
        temperature=1.0,
        cliprange=0.2,
        vf_coef=0.1,
        cliprange_value=0.2,
    ),
    SpecialTokens(pad=0, eos=(), stop=()),
)


def check(setup: Setup) -> Iterator[Row]:
    """The ratio, whether all that was trained is finite, and the bytes of each phase."""
    run = _Run(setup)
    by_update: list[dict[str, list[StepReport]]] = []
    try:
        for update in range(_NUM_UPDATES):
            by_update.append(run.update(update))
    finally:
        communication.disconnect()
    ratios = [float(row[RATIO]) for reports in by_update for row in reports["actor"][0].metrics]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    yield Row(
        name="PPO ratio, first epoch",
        measured=f"{worst:.5f}",
        bound=f"1 +- {_RATIO_BOUND}",
        ok=abs(worst - 1) <= _RATIO_BOUND,
        detail=f"the farthest of {len(ratios)} micro-batches; their mean is {statistics.mean(ratios):.5f}",
    )
    norms = {role: [one.gradient_norm for reports in by_update for one in reports[role]] for role in _TRAINED}
    numbers = [value for reports in by_update for of_role in reports.values() for one in of_role
               for row in one.metrics for value in row.values()]  # fmt: skip
    are_finite = all(map(math.isfinite, (*numbers, *norms["actor"], *norms["critic"])))
    yield Row(
        name=f"{_NUM_UPDATES} PPO updates",
        measured="finite" if are_finite else "not finite",
        bound="finite, and all move",
        ok=are_finite and all(norm > 0 for of_role in norms.values() for norm in of_role),
        detail=f"{run.num_weights:,} weights; gradient norms {_shown(norms['actor'])} and {_shown(norms['critic'])}; "
        f"{setup.batch_size} samples of {setup.prompt_tokens} + {setup.response_tokens} tokens",
    )
    yield from _peaks(setup, run.peaks, _ledger(setup, run.counts))


def _peaks(setup: Setup, peaks: Mapping[Phase, int], planned: Ledger) -> Iterator[Row]:
    """Beside the ledger's bytes, but for those of contexts, which are not the allocator's."""
    for phase in Phase:
        contexts = sum(one.bytes.get(phase, 0) for one in planned.devices[0] if one.what == "contexts")
        bound = planned.total(0, phase) - contexts
        peak = peaks.get(phase)
        yield Row(
            name=f"peak bytes, {phase}",
            measured="" if peak is None else gigabytes(peak),
            bound=f"{gigabytes(bound)} by the ledger",
            ok=None if peak is None else peak <= bound,
            detail="CPUs do not tell" if peak is None else f"{peak / bound:.0%} of it",
        )


@dataclass(frozen=True, slots=True)
class _Scorers:
    """What scores, by role."""

    models: Mapping[str, PreTrainedModel]
    autocast: torch.dtype

    def score(self, samples: Sequence[Sample]) -> None:
        """Fill in what models say of generated samples."""
        settings = scoring.ScoringSettings(temperature=1.0, limit=_LIMIT, autocast=self.autocast)
        sequences = [TokenSequence(one.prompt_ids, one.response_ids) for one in samples]
        said = {
            role: scoring.score(kind, model, sequences, settings)
            for role, model in self.models.items()
            if (kind := ROLES[role].scores) is not None
        }
        for sample, inference in zip(samples, scoring.inferences(said), strict=True):
            assert inference.scores is not None
            sample.reference_logprobs, sample.values = inference.reference_logprobs, inference.values
            sample.scores, sample.score = inference.scores, inference.scores["reward"]
            sample.advance(SampleState.INFERRING)
            sample.advance(SampleState.SCORED)


class _Run:
    """Models, engine and training of one device."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._device = setup, torch.device(setup.device)
        self.peaks: dict[Phase, int] = {}
        self._store = communication.serve_store("127.0.0.1", _TIMEOUT_S)
        communication.connect(0, 1, "127.0.0.1", self._store.port, self._device, _TIMEOUT_S)
        specs = {role: spec_for(setup, role, torch.float32) for role in _TRAINED}
        self._training = TrainingRank(
            0, self._device, specs, _PLACEMENT, _settings(setup), SpanRecorder(clock_of(self._device))
        )
        models: dict[str, PreTrainedModel] = {}
        for role in _TRAINED:
            self._training.load_weights(role, random_model(setup, role, torch.float32).state_dict())
        (critic,) = self._training.stages_of("critic").values()
        untyped: Any = critic
        models["critic"] = untyped.model  # as a worker scores what it trains whole
        models |= {role: random_model(setup, role, setup.dtype) for role in _SCORED}
        self._scorers = _Scorers(models, setup.dtype)
        self._engine = TransformersEngine(
            random_model(setup, "actor", setup.dtype),
            max_batch=setup.batch_size,
            max_context=setup.prompt_tokens + setup.response_tokens,
        )
        self._rounds = _rounds(setup)
        (self.counts,) = {one.counts for one in self._rounds}
        self.num_weights = sum(one.numel() for one in self._training.export_weights("actor").values())

    def update(self, index: int) -> dict[str, list[StepReport]]:
        """One update, the first by halves and unfused, as runs take it, the others fused."""
        setup, samples = self._setup, self._generate(index)
        with _Peak(self, Phase.INFERENCE):
            self._scorers.score(samples)
        experience, _ = _ALGORITHM.estimate(samples)
        serial = halved_serial_schedule(_PLACEMENT, self.counts)
        plan = Plan(serial if index == 0 else greedy(serial.problem)).for_ranks
        with _Peak(self, Phase.TRAINING):
            rates = [_LEARNING_RATES] * len(self._rounds)
            told = self._training.train(experience, self._rounds, rates, {self.counts: plan})
            synchronize(setup)
        return step_reports(self._rounds, [told], _PLACEMENT)

    def _generate(self, update: int) -> list[Sample]:
        setup = self._setup
        requests = requests_of(setup, setup.batch_size, setup.response_tokens, first_id=update * setup.batch_size)
        with _Peak(self, Phase.GENERATION):
            self._engine.load_weights(self._training.export_weights("actor"))
            generated = generate(self._engine, requests)
        samples = []
        for request in requests:
            ids, logprobs = generated[request.sample_id]
            sample = Sample(request.sample_id, request.prompt_ids, response_ids=ids, logprobs=logprobs, length=len(ids))
            sample.advance(SampleState.GENERATING)
            sample.advance(SampleState.GENERATED)
            samples.append(sample)
        return samples


class _Peak:
    """Notes the most that a phase takes, where the device tells."""

    def __init__(self, run: _Run, phase: Phase) -> None:
        self._run, self._phase = run, phase

    def __enter__(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_initialized():
            taken = torch.cuda.max_memory_allocated()
            self._run.peaks[self._phase] = max(taken, self._run.peaks.get(self._phase, 0))


def _rounds(setup: Setup) -> list[Round]:
    """Two epochs of one step each, on one sample after the other."""
    steps = optimizer_steps([np.arange(setup.batch_size)] * _NUM_EPOCHS, num_mini_batches=1, micro_batch_size=1)
    return rounds(dict.fromkeys(_TRAINED, steps), dict.fromkeys(_TRAINED, 1), is_fused=True)


def _settings(setup: Setup) -> TrainingSettings:
    return TrainingSettings(
        backend="transformers",
        split_backward=True,
        losses=_ALGORITHM.losses,
        targets=_ALGORITHM.targets,
        layout=RaggedLayout(packs=True),
        adamw=AdamWConfig(max_grad_norm=1.0),
        autocast=setup.dtype,
        gradient_checkpointing=False,
        timeout_s=_TIMEOUT_S,
    )


def _ledger(setup: Setup, counts: Counts) -> Ledger:
    """What a run like this is planned to hold."""
    types = dict.fromkeys(_TRAINED, torch.float32) | dict.fromkeys(_SCORED, setup.dtype)
    plan = partial(planned_models, autocast=setup.dtype, gradient_checkpointing=False, split_backward=True)
    is_gpu = setup.device == "cuda"
    return ledger(
        MemorySetup(
            models=plan({role: spec_for(setup, role, dtype) for role, dtype in types.items()}, device=setup.device),
            placement=_PLACEMENT,
            num_devices=1,
            device_memory_bytes=torch.cuda.mem_get_info()[1] if is_gpu else 80 * 10**9,
            accelerator=setup.device,
            prompt_tokens=setup.prompt_tokens,
            response_tokens=setup.response_tokens,
            micro_batch_size=1,
            num_micro_batches=counts,
            autocast=setup.dtype,
            generation_dtype=setup.dtype,
            engine_batch_size=setup.batch_size,
            inference_batch_size=_LIMIT.max_samples,
            inference_batch_tokens=_LIMIT.max_tokens,
        )
    )


def _shown(norms: Sequence[float]) -> str:
    return f"{min(norms):.2g} to {max(norms):.2g}"
