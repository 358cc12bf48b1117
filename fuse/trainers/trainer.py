"""What trains by rollouts: the part of a trainer that does not depend on the algorithm."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback

from fuse import checkpoint, garbage, roles
from fuse.activity import Activity
from fuse.algorithms.algorithm import Algorithm
from fuse.config.memory import within_memory
from fuse.config.run_length import RunLength
from fuse.config.settings import fleet_settings
from fuse.driver.fleet import Fleet
from fuse.driver.fleet_settings import FleetSettings, Variant
from fuse.driver.one_base import origins_of
from fuse.engines.engine import SamplingParams
from fuse.roles import GENERATING
from fuse.sample import Sample, SpecialTokens
from fuse.termination import Termination, graceful_termination
from fuse.threads import quick_turns, torch_threads
from fuse.trace import PhaseClock
from fuse.trainers import checks, loop, prompts
from fuse.trainers.auxiliary_text import auxiliary_text
from fuse.trainers.completions import show_completions
from fuse.trainers.face import TrainerFace
from fuse.trainers.iteration import Iteration
from fuse.trainers.prompt_checks import kept_tokens
from fuse.trainers.rollouts import Rewards, Rollouts
from fuse.trainers.run import Run
from fuse.trainers.tail import tail_plan
from fuse.training.layout import Layout
from fuse.training.rounds import Round, rounds
from fuse.training.steps import OptimizerStep
from fuse.workers.cluster import Cluster

# Sample ids of evaluation prompts: apart from training's, so that training draws the same noise with or without them.
FIRST_EVALUATION_ID = 1 << 40
_GREEDY = 0.01 + 1e-7
"""The temperature of TRL's completions of evaluation prompts."""


class Trainer(TrainerFace):
    """Runs updates on workers. An algorithm's trainer makes one of itself by `_set_up`, once its arguments are checked.

    It also says what an update's samples and optimizer steps are, and what rewards.

    max_new_tokens: an attribute, by the number of a sample in the run: at most so many tokens of its response, which
        are no more than responses may have. Without a stop token it forces lengths.
    """

    def _set_up(
        self,
        models: Mapping[str, PreTrainedModel],
        algorithm: Algorithm,
        length: RunLength,
        layout: Layout,
        special: SpecialTokens,
        *,
        shown: nn.Module,
        train_dataset: Any,
        eval_dataset: Any,
        prompt_lengths: Sequence[Sequence[int]],
        data_collator: Any,
        callbacks: list[TrainerCallback] | None,
        num_places: int | None = None,
        shuffles: bool = True,
        whole_replicas: bool = False,
        bidirectional: bool | None = False,
        forward_only: bool | None = False,
        rate_name: str = "lr",
        variants: Mapping[str, Variant] = MappingProxyType({}),
    ) -> None:
        """models: by role. shown: what callbacks get as the model. Datasets: the rows to be used.

        prompt_lengths: of these, in tokens; first of those that are trained on.
        num_places: see `fuse.training.layout.Layout`. shuffles: whether prompts are drawn at random.
        whole_replicas, bidirectional, forward_only: see `fleet_settings`.
        rate_name: what the learning rate is logged as. variants: as of `FleetSettings`.

        Raises:
            ValueError: what cannot be placed, scheduled or generated.
        """
        args, policy, self.model, self.length = self.args, models[GENERATING], shown, length
        self.train_dataset, self.eval_dataset, self.data_collator = train_dataset, eval_dataset, data_collator
        self.max_new_tokens: Mapping[int, int] = {}
        self._models, self._algorithm, self._layout = models, algorithm, layout
        self._special, self._num_places = special, num_places
        self.dataloader = prompts.prompt_loader(
            train_dataset, length.prompts_per_update, args.seed, data_collator, shuffles=shuffles
        )
        self.activity = Activity()
        self.cluster: Cluster | None = None
        self._fleet: Fleet | None = None
        self._rewards: Rewards | None = None
        self._kept_tokens = kept_tokens(policy.config, args)
        collates = data_collator is not None
        tokens = prompts.prompt_tokens(prompt_lengths, self._kept_tokens, collates=collates)
        checks.check_engine(args, policy, tokens)
        self._text = auxiliary_text(args, self.processing_class, policy.config, tokens)
        self._settings = fleet_settings(
            args,
            algorithm,
            length,
            layout,
            special,
            tokens,
            policy.config,
            whole_replicas=whole_replicas,
            bidirectional=bidirectional,
            forward_only=forward_only,
        )
        self._settings = replace(self._settings, variants=variants)
        self._settings = replace(self._settings, origins=origins_of(models, self._settings))
        updates = {1, min(len(self.dataloader), length.num_updates), length.num_updates}  # a pass's last may differ
        self._settings = self._settings.for_rounds([one for update in updates for one in self._rounds(update)])
        text_shape = None if self._text is None else self._text.largest
        self._settings = within_memory(args, self._settings, models, tokens, text_shape)
        self._run = Run(
            args,
            length,
            shown,
            self.policy_model,
            self.processing_class,
            callbacks,
            num_rows=len(train_dataset),
            rate_name=rate_name,
            tell=self._tell,
        )
        self.activity.listen(self._run.show_activity)

    # What an algorithm's trainer says and does

    def _on_update(self, fleet: Fleet, iteration: Iteration) -> None:
        """After every update: what is due of evaluation."""
        if self._run.shows_completions:
            self.generate_completions(sampling=True)

    def _prompts_left(self) -> Iterator[Any]:
        """Prompts, from the first that the run has not consumed: batches of an update each."""
        return prompts.batches(self.get_train_dataloader(), start=self._run.num_updates_done)

    def _roll_out(
        self, fleet: Fleet, prompts_left: Iterator[Any], clock: PhaseClock
    ) -> tuple[Sequence[Sample], dict[str, float]]:
        """The samples of the next update, scored, and metrics of rewarding them."""
        samples = self._training_samples(next(prompts_left))
        return samples, self._score(fleet, samples, clock)

    def _score(self, fleet: Fleet, samples: Sequence[Sample], clock: PhaseClock) -> dict[str, float]:
        """Have samples generated and scored, to be trained on. Returns metrics of rewarding them."""
        params = self._sampling_params(self.args.sampling_temperature)
        rollouts, update = self._rollouts, self._run.num_updates_done + 1
        tail = tail_plan(self.args, self._algorithm, rollouts.rewards, partial(self._rounds, update), samples)
        return rollouts.roll_out(fleet, samples, params, clock, self.max_new_tokens, tail=tail)

    def _training_samples(self, batch: Any) -> list[Sample]:
        """The samples that a batch of prompts becomes, with ids that no other of the run has."""
        raise NotImplementedError

    def _optimizer_steps(self, update: int) -> Mapping[str, Sequence[OptimizerStep]]:
        """Of an update, counted from 1, by role."""
        raise NotImplementedError

    def _make_rewards(self) -> AbstractContextManager[Rewards]:
        """What rewards samples while workers run."""
        raise NotImplementedError

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Run all updates, or those left after a checkpoint: a path, or True for the last one in `args.output_dir`.

        Raises:
            WorkerError: a worker died or raised, naming device, role and cause; the last checkpoint is intact.
            ValueError: there is no such checkpoint, it is another run's, or a reward is unusable.
            RewardError: the reward function raised, or did not return in time.
            SaveError: a checkpoint could not be written; earlier ones are intact.
            ClusterError: a process of Ray itself ended.
            Terminated: SIGTERM came; a checkpoint was written if the update ended within `args.sigterm_grace_s`.
        """
        with self.updates(resume_from_checkpoint) as updates:
            for _ in updates:
                pass

    @contextmanager
    def updates(self, resume_from_checkpoint: str | bool | None = None) -> Iterator[Iterator[Iteration]]:
        """What `train` does, update by update: workers run within, and each `next` of what this gives is an update.

        Asked for all of them, it ends as `train` does; left before, it stops the workers.

        Raises: as `train`.
        """
        run = self._run
        checks.check_limits(self.max_new_tokens, self.args)
        resumed = checkpoint.start(run.output_dir, resume_from_checkpoint)
        run.begin(resumed)
        with (
            run.writing(),
            self._workers(resumed) as fleet,
            graceful_termination(self.args.sigterm_grace_s) as termination,
        ):
            yield self._updates(fleet, termination)

    def _updates(self, fleet: Fleet, termination: Termination) -> Iterator[Iteration]:
        run = self._run
        for iteration in loop.updates(
            run,
            fleet,
            self._algorithm,
            roll_out=partial(self._roll_out, fleet, self._prompts_left()),
            rounds_of=self._rounds,
            num_places=self._num_places,
        ):
            self._on_update(fleet, iteration)
            yield iteration
            if termination.is_requested:
                run.terminate(fleet)
        fleet.fetch_weights(self._run.average)
        fleet.fetch_mixed_weights()
        run.end(fleet)

    @property
    def how_to_resume(self) -> str:
        """What an interrupted run can go on from, in a line."""
        return self._run.how_to_resume

    @property
    def trained_models(self) -> dict[str, PreTrainedModel]:
        """By role."""
        return {role: self._models[role] for role in roles.training(self._models)}

    @property
    def process_ids(self) -> dict[str, list[int]]:
        """Of the workers that run, by their kind: generation and model."""
        return {} if self._fleet is None else self._fleet.process_ids

    def _rounds(self, update: int) -> list[Round]:
        settings, steps = self._settings, dict(self._optimizer_steps(update))
        if self._text is not None and GENERATING in steps:
            steps[GENERATING] = self._text.beside(steps[GENERATING], update)
        return rounds(steps, settings.num_replicas, is_fused=settings.plan.fused)

    @contextmanager
    def _workers(self, resumed: Path | None) -> Iterator[Fleet]:
        """Start the workers with the models, or a checkpoint of them; they stop with the body."""
        settings = self._settings.for_updates(self._run.num_updates_left)
        fleet = Fleet(settings, self._models, cluster=self.cluster, tell=self._tell)
        with self.activity.lasting(), self._make_rewards() as self._rewards, fleet:
            if resumed is not None:
                fleet.load(resumed / checkpoint.WORKER_STATE_NAME)
            self._fleet = fleet
            try:
                with garbage.set_apart(), quick_turns(), torch_threads(_num_idle_cores(settings)):
                    yield fleet
            finally:
                self._fleet = None

    @property
    def _rollouts(self) -> Rollouts:
        assert self._rewards is not None, "only while workers run"
        return Rollouts(self._rewards, self.args.inter_stage_fusion, self._tell, self.args.recomputes_logprobs)

    def _samples(self, batch: Any, first_id: int, *, drop_padding: bool = False) -> list[Sample]:
        pad, most = self._special.pad, self._kept_tokens
        return prompts.make_samples(batch, first_id, pad, drop_padding=drop_padding, most_tokens=most)

    def _sampling_params(self, temperature: float) -> SamplingParams:
        return SamplingParams(
            seed=self.args.seed,
            temperature=temperature,
            max_new_tokens=self.args.max_response_tokens,
            stop_token_ids=self._special.stop,
            **self.args.sampling_filters,
        )

    def _tell(self, text: str) -> None:
        self.activity.tell(text)

    # Completions of the evaluation prompts

    def generate_completions(self, sampling: bool = False) -> None:
        """Print completions of the evaluation prompts with their scores, nearly greedy; `sampling`: of the first batch.

        Without workers running, before or after training, workers are started for it.
        """
        if self.eval_dataset is None:
            return
        if self._fleet is None:
            with self._workers(None):
                self.generate_completions(sampling)
            return
        samples: list[Sample] = []
        for batch in self.get_eval_dataloader():
            samples += self._samples(batch, FIRST_EVALUATION_ID + len(samples))
            if sampling:
                break
        self._rollouts.roll_out(self._fleet, samples, self._sampling_params(_GREEDY), PhaseClock(), teaches=False)
        show_completions(self.processing_class, samples, self.state.global_step, self.callback_handler.callbacks)

    # Data

    @property
    def stop_token_id(self) -> int | None:
        """The first, where several end a response."""
        return next(iter(self._special.stop), None)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.dataloader

    def get_eval_dataloader(self) -> DataLoader[Any]:
        size = self.args.per_device_eval_batch_size
        return DataLoader(self.eval_dataset, batch_size=size, collate_fn=self.data_collator or list)


def _num_idle_cores(settings: FleetSettings) -> int:
    """Those that devices leave to this process; one at least."""
    num_devices = settings.num_devices if settings.accelerator == "cpu" else 0
    return max(1, len(os.sched_getaffinity(0)) - num_devices)
