"""PPOTrainer: generate, infer, train, over and over, on Ray workers; TRL's trainer to the code that calls it."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl

from fuse import checkpoint
from fuse.activity import Activity
from fuse.algorithms.experience import Experience, prepare
from fuse.config.ppo import PPOConfig
from fuse.config.settings import fleet_settings
from fuse.driver.fleet import Fleet
from fuse.engines.engine import SamplingParams
from fuse.sample import Sample
from fuse.trace import PhaseClock, Span, write_chrome_trace
from fuse.trainers import checks, prompts
from fuse.trainers.callbacks import PolicyAndValue, PPOState, callback_handler, initial_state, learning_rate_schedule
from fuse.trainers.completions import print_completions
from fuse.trainers.iteration import Iteration
from fuse.trainers.publish import push_policy, write_model_card, write_policy
from fuse.trainers.report import iteration_report, summary_line
from fuse.trainers.rewards import RewardCalls, RewardFunction
from fuse.training.model_spec import ModelSpec
from fuse.training.steps import (
    OptimizerStep,
    average_statistics,
    optimizer_steps,
    sampler_differences,
    trl_optimizer_steps,
)
from fuse.workers.cluster import Cluster

logger = logging.getLogger(__name__)

# Sample ids of evaluation prompts: apart from training's, so that training draws the same noise with or without them.
_FIRST_EVALUATION_ID = 1 << 40


class PPOTrainer:
    """Proximal policy optimisation from rewards, in place of `trl.experimental.ppo.PPOTrainer`.

    args: see `PPOConfig`.
    processing_class: the tokenizer; it needs a pad token.
    model: the policy, any causal language model that declares `base_model_pp_plan`.
    ref_model: what the KL penalty measures from; None takes a copy of the policy.
    reward_model: a sequence classifier with one label, or a callable
        `(prompts: list[str], responses: list[str], **columns: list) -> list[float]`, given the dataset's other columns.
    train_dataset: rows with `input_ids`.
    value_model: a sequence classifier with one label, trained as the critic.
    data_collator, eval_dataset, callbacks: as in TRL. optimizers and peft_config must stay unset.

    After `train()` the trained weights are in `model` and `value_model`.

    max_new_tokens: an attribute, by the number of a sample in the run: at most so many tokens of its response, in place
        of `args.response_length`. Without a stop token it forces lengths.

    Raises:
        ValueError: arguments that cannot be trained, with what, why and the remedy; nothing has been started then.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        reward_model: PreTrainedModel | RewardFunction,
        train_dataset: Any,
        value_model: PreTrainedModel,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[None, None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: None = None,
    ) -> None:
        checks.check_arguments(model, ref_model, reward_model, train_dataset, value_model, optimizers, peft_config)
        checks.check_tokenizer(processing_class, needs_eos=args.stop_token == "eos")
        self.args = args
        self.processing_class = processing_class
        self.policy_model = model
        self.ref_model = ref_model if ref_model is not None else copy.deepcopy(model)
        self.reward_model = reward_model
        self.value_model = value_model
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.data_collator = data_collator
        self.max_new_tokens: Mapping[int, int] = {}
        self._output_dir = Path(args.output_dir or "trainer_output")
        self.stop_token_id = processing_class.eos_token_id if args.stop_token == "eos" else args.stop_token_id
        self.model = PolicyAndValue(model, value_model)
        self._check_models_and_prompts()
        checks.fill_batch_sizes(args, len(train_dataset))

        self.dataloader = prompts.prompt_loader(train_dataset, _known(args.local_batch_size), args.seed, data_collator)
        self.activity = Activity()
        self.activity.listen(self._show_activity)
        self.cluster: Cluster | None = None
        self._fleet: Fleet | None = None
        self._settings = fleet_settings(  # refuses what cannot be placed
            args, processing_class.pad_token_id, prompts.typical_length(train_dataset), model.config
        )
        self.optimizer, self.lr_scheduler = learning_rate_schedule(args, self.model)
        self.callback_handler = callback_handler(
            args,
            callbacks,
            model=self.model,
            processing_class=processing_class,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
        )
        self.control = TrainerControl()
        self.state = initial_state(self.callback_handler, self.control)
        for step in self._optimizer_steps(update=1):
            self._settings.check(num_micro_batches=len(step.micro_batches))

    # The loop

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Run all updates, or those left after a checkpoint: a path, or True for the last one in `args.output_dir`.

        Raises:
            WorkerError: a worker died or raised, naming device, role and cause; the last checkpoint is intact.
            ValueError: there is no such checkpoint, it is another run's, or a reward is unusable.
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
        resumed = checkpoint.find(self._output_dir, resume_from_checkpoint) if resume_from_checkpoint else None
        self._begin_state(resumed)
        with self._workers(resumed) as fleet:
            yield self._updates(fleet)

    def _updates(self, fleet: Fleet) -> Iterator[Iteration]:
        args = self.args
        batches = prompts.batches(self.get_train_dataloader(), start=self.state.global_step)
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        for update in range(self.state.global_step + 1, self.state.max_steps + 1):
            clock = PhaseClock()
            samples = self._samples(next(batches))
            self._roll_out(fleet, samples, self._sampling_params(args.temperature + 1e-7), clock)
            experience, metrics = self._prepare(samples)
            with clock.phase("training"):
                steps = self._optimizer_steps(update)
                statistics = fleet.train(experience, steps, self._learning_rate)
            with clock.phase("weights"):
                fleet.synchronise()
            yield self._finish_update(samples, metrics | self._training_metrics(steps, statistics), clock)
            if self.control.should_training_stop:
                break
        fleet.fetch_weights(self.policy_model, self.value_model)
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        if self.control.should_save:
            self._save_checkpoint()

    @property
    def process_ids(self) -> dict[str, list[int]]:
        """Of the workers that run, by their kind: generation and model."""
        return {} if self._fleet is None else self._fleet.process_ids

    # What the loop is made of

    def _begin_state(self, resumed: Path | None) -> None:
        args = self.args
        run = {"batch_size": _known(args.batch_size), "seed": args.seed, "dataset_rows": len(self.train_dataset)}
        self._run = run
        if resumed is None:
            self.state.global_step, self.state.episode, self.state.log_history = 0, 0, []
        else:
            self.state = PPOState.load_from_json(str(resumed / "trainer_state.json"))
            run_state = checkpoint.RunState.load(resumed / checkpoint.RUN_STATE_NAME, run)
            self.lr_scheduler.load_state_dict(run_state.lr_scheduler)
            checkpoint.restore_random_generators(run_state.random_generators)
        self.state.max_steps = _known(args.num_total_batches)
        self.state.num_train_epochs = math.ceil(_known(args.total_episodes) / len(self.train_dataset))
        untyped: Any = self.state
        untyped.compute_steps(args, self.state.max_steps)

    @contextmanager
    def _workers(self, resumed: Path | None) -> Iterator[Fleet]:
        """Start the workers with the models, or a checkpoint of them; they stop with the body."""
        reward_model = self.reward_model if isinstance(self.reward_model, PreTrainedModel) else None
        with (
            self.activity.lasting(),
            Fleet(
                self._settings,
                actor=self.policy_model,
                critic=self.value_model,
                reference=self.ref_model,
                reward=reward_model,
                cluster=self.cluster,
                tell=self.activity.tell,
            ) as fleet,
        ):
            if resumed is not None:
                fleet.load(resumed / checkpoint.WORKER_STATE_NAME)
            self._fleet, self._start_s, self._start_episode = fleet, time.time(), self.state.episode
            try:
                yield fleet
            finally:
                self._fleet = None

    def _samples(self, batch: Any) -> list[Sample]:
        pad = self.processing_class.pad_token_id
        samples = prompts.make_samples(batch, self.state.episode, pad, drop_padding=self.args.trl_quirks)
        self.state.episode += len(samples)
        return samples

    def _roll_out(self, fleet: Fleet, samples: Sequence[Sample], params: SamplingParams, clock: PhaseClock) -> None:
        """Generate responses, and score them by models and by the reward function, where there is one."""
        function = None if isinstance(self.reward_model, PreTrainedModel) else self.reward_model
        decode = partial(self.processing_class.batch_decode, skip_special_tokens=True)
        with RewardCalls(function, decode) as rewards:
            if self.args.inter_stage_fusion:
                with clock.phase("rollout"):
                    fleet.roll_out(samples, params, rewards.submit, max_new_tokens=self.max_new_tokens)
            else:
                with clock.phase("generation"):
                    fleet.generate(samples, params, max_new_tokens=self.max_new_tokens)
                with clock.phase("inference"):
                    fleet.infer(samples)
                rewards.submit(samples)
            with clock.phase("reward"):
                self.activity.tell("waiting: for rewards")
                rewards.finish()

    def _prepare(self, samples: Sequence[Sample]) -> tuple[Experience, dict[str, float]]:
        tokenizer = self.processing_class
        return prepare(
            samples,
            self.args,
            stop_token_id=self.stop_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def _permutation(self, update: int, epoch: int) -> NDArray[np.int64]:
        """The order in which an epoch visits the batch: a function of (seed, update, epoch)."""
        return np.random.default_rng([self.args.seed, update, epoch]).permutation(_known(self.args.batch_size))

    def _optimizer_steps(self, update: int) -> list[OptimizerStep]:
        args = self.args
        permutations = [self._permutation(update, epoch) for epoch in range(args.num_ppo_epochs)]
        size = args.per_device_train_batch_size
        if not args.trl_quirks:
            return optimizer_steps(permutations, num_mini_batches=args.num_mini_batches, micro_batch_size=size)
        return trl_optimizer_steps(
            permutations,
            num_mini_batches=args.num_mini_batches,
            micro_batch_size=size,
            accumulation=args.gradient_accumulation_steps,
            last_of_pass=update % len(self.get_train_dataloader()) == 0,
        )

    def _training_metrics(
        self, steps: Sequence[OptimizerStep], statistics: Sequence[Sequence[dict[str, float]]]
    ) -> dict[str, float]:
        """Means over all micro-batches; TRL's table counts places too that no micro-batch fills."""
        args = self.args
        shape = (args.num_ppo_epochs, args.num_mini_batches, args.gradient_accumulation_steps)
        averages = average_statistics(steps, statistics, table_shape=shape if args.trl_quirks else None)
        return averages | sampler_differences(statistics[0])

    def _finish_update(self, samples: Sequence[Sample], metrics: dict[str, float], clock: PhaseClock) -> Iteration:
        """Count the update, report it, and save what is due."""
        args, state = self.args, self.state
        assert self._fleet is not None
        state.global_step += 1
        state.epoch = state.episode / len(self.train_dataset)
        eps = int((state.episode - self._start_episode) / (time.time() - self._start_s))
        tracks = self._fleet.drain_spans()
        report = self._report_time(clock, tracks, self._fleet.serial_bubble_ratio)
        self.log({"eps": eps, **metrics, "lr": self._learning_rate, "episode": state.episode, **report})
        iteration = Iteration(
            update=state.global_step,
            samples=samples,
            metrics=state.log_history[-1],
            phases=dict(clock.seconds),
            tracks=tracks,
        )
        self.optimizer.step()  # holds no gradients: tells the schedule that the workers stepped
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, state, self.control)
        if self.control.should_save:
            self._save_checkpoint()
        every = max(1, state.max_steps // args.num_sample_generations) if args.num_sample_generations else 0
        if every and (state.global_step - 1) % every == 0:
            self.generate_completions(sampling=True)
        return iteration

    def _report_time(
        self, clock: PhaseClock, tracks: Mapping[str, Mapping[str, Sequence[Span]]], serial_bubble_ratio: float | None
    ) -> dict[str, float]:
        """Write the iteration's trace, log its summary line, and return where its time went as metrics."""
        step = self.state.global_step
        if self.args.trace_steps and step % self.args.trace_steps == 0:
            write_chrome_trace(self._output_dir / "traces" / f"iteration-{step:05d}.json", tracks)
        report = iteration_report(tracks, clock, serial_bubble_ratio)
        logger.info("update %d/%d: %s", step, self.state.max_steps, summary_line(report))
        return report

    @property
    def _learning_rate(self) -> float:
        return float(self.lr_scheduler.get_last_lr()[0])

    # Checkpoints and models

    def _save_checkpoint(self) -> None:
        assert self._fleet is not None
        output_dir = self._output_dir
        self.activity.tell("saving: a checkpoint")
        with checkpoint.writing(output_dir, self.state.global_step) as directory:
            self._fleet.fetch_weights(self.policy_model, self.value_model)
            write_policy(directory, self.policy_model, self.processing_class)
            if not self.args.save_only_model:
                self._fleet.save(directory / checkpoint.WORKER_STATE_NAME)
                checkpoint.RunState(
                    run=self._run,
                    lr_scheduler=self.lr_scheduler.state_dict(),
                    random_generators=checkpoint.random_generators(),
                ).save(directory / checkpoint.RUN_STATE_NAME)
            self.state.save_to_json(str(directory / "trainer_state.json"))
        checkpoint.rotate(output_dir, self.args.save_total_limit)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy and the tokenizer, as `AutoModelForCausalLM.from_pretrained` reads them."""
        if self._fleet is not None:
            self._fleet.fetch_weights(self.policy_model, self.value_model)
        write_policy(Path(output_dir or self._output_dir), self.policy_model, self.processing_class)

    def push_to_hub(self, commit_message: str = "End of training", **options: Any) -> str:
        """Upload the policy and the tokenizer to `args.hub_model_id`, by default the output directory's name."""
        options = {"commit_message": commit_message, "token": self.args.hub_token, **options}
        return push_policy(self._name, self.policy_model, self.processing_class, **options)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output directory: what was trained, from what, how."""
        tags = [tags] if isinstance(tags, str) else tags or []
        name = model_name or self._name
        write_model_card(self._output_dir, name, self.policy_model, self.state.episode, dataset_name, tags)

    @property
    def _name(self) -> str:
        return self.args.hub_model_id or self._output_dir.name

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
        pad = self.processing_class.pad_token_id
        samples: list[Sample] = []
        for batch in self.get_eval_dataloader():
            samples += prompts.make_samples(batch, _FIRST_EVALUATION_ID + len(samples), pad)
            if sampling:
                break
        self._roll_out(self._fleet, samples, self._sampling_params(0.01 + 1e-7), PhaseClock())
        print_completions(self.processing_class, samples[:5])

    # What TRL's trainer offers to callbacks and scripts

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.dataloader

    def get_eval_dataloader(self) -> DataLoader[Any]:
        size = self.args.per_device_eval_batch_size
        return DataLoader(self.eval_dataset, batch_size=size, collate_fn=self.data_collator or list, drop_last=True)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.callback_handler.remove_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        popped: TrainerCallback | None = self.callback_handler.pop_callback(callback)
        return popped

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epoch, remember and report to the callbacks; `start_time` is accepted and not used, as in TRL."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _show_activity(self, text: str) -> None:
        """Say behind transformers' progress bar what is being done, if there is one."""
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.set_postfix_str(text)

    def is_local_process_zero(self) -> bool:
        return True

    def is_world_process_zero(self) -> bool:
        return True

    # Construction

    def _sampling_params(self, temperature: float) -> SamplingParams:
        return SamplingParams(
            seed=self.args.seed,
            temperature=temperature,
            max_new_tokens=self.args.response_length,
            stop_token_id=self.stop_token_id,
        )

    def _check_models_and_prompts(self) -> None:
        config = self.policy_model.config.get_text_config()
        others = {"ref_model": self.ref_model, "reward_model": self.reward_model, "value_model": self.value_model}
        models = {role: model for role, model in others.items() if isinstance(model, PreTrainedModel)}
        checks.check_vocabularies(self.policy_model, models)
        for model in (self.policy_model, *models.values()):
            ModelSpec.of(model)  # refuses what cannot be built again
        for dataset in (self.train_dataset, self.eval_dataset):
            if dataset is not None:
                checks.check_prompts(
                    dataset,
                    context=getattr(config, "max_position_embeddings", None),
                    response_length=self.args.response_length,
                    vocabulary_size=config.vocab_size,
                    pad_token_id=self.processing_class.pad_token_id,
                )


def _known(value: int | None) -> int:
    """A batch size or count, which the constructor has filled in."""
    assert value is not None
    return value
