"""PPOTrainer: TRL's trainer to the code that calls it, stage fusion on Ray workers inside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.batch import Experience
from fuse.algorithms.gae import GAESettings
from fuse.algorithms.kl_control import next_kl_coef
from fuse.algorithms.ppo import PPOSettings, ppo
from fuse.config.clip_range import as_pair
from fuse.config.ppo import PPOConfig
from fuse.config.run_length import RunLength
from fuse.driver.fleet import Fleet
from fuse.intrastage.adapters import base_of, train_adapter, with_adapter
from fuse.roles import GENERATING
from fuse.sample import Sample, SpecialTokens
from fuse.termination import Termination
from fuse.trace import PhaseClock
from fuse.trainers import checks, prompts
from fuse.trainers.callbacks import PolicyAndValue
from fuse.trainers.data import check_dataset
from fuse.trainers.iteration import Iteration
from fuse.trainers.prompt_checks import usable_prompts
from fuse.trainers.reference import check_adapted_reference, reference_of
from fuse.trainers.reference_scores import check_reference, missing_rows, score_references
from fuse.trainers.reward_calls import RewardCalls
from fuse.trainers.reward_columns import check_reward_columns
from fuse.trainers.rewards import RewardFunction
from fuse.trainers.rollouts import reward_calls
from fuse.trainers.special_tokens import special_tokens
from fuse.trainers.spread_filter import left_out, probes, score_variances, untried
from fuse.trainers.steps import seeded
from fuse.trainers.trainer import Trainer
from fuse.training.layout import Layout, RaggedLayout, TRLLayout
from fuse.training.steps import Division, OptimizerStep
from schedules.files import check_writable

if TYPE_CHECKING:
    from fuse.intrastage.adapters import LoraConfig, PeftModel


class PPOTrainer(Trainer):
    """Proximal policy optimisation from rewards, in place of `trl.experimental.ppo.PPOTrainer`.

    args: see `PPOConfig`.
    processing_class: the tokenizer; it needs a pad token.
    model: the policy, any causal language model that declares `base_model_pp_plan`.
    ref_model: what the KL penalty measures from; None takes a copy of the policy. Of one with adapters there is none:
        the policy itself, without them or by `args.ref_adapter_name`, is what it measures from.
    reward_model: a sequence classifier with one label, with adapters or without, or a callable
        `(prompts: list[str], responses: list[str], **columns: list) -> list[float]`, given the dataset's other columns.
    train_dataset: rows with `input_ids`. No models share parameters.
    value_model: a sequence classifier with one label, trained as the critic.
    data_collator, eval_dataset, callbacks: as in TRL. optimizers must stay unset.
    peft_config, value_peft_config: a `peft.LoraConfig` of adapters that train in place of the policy's weights, and of
        the critic's, whose head trains beside them. Models may come with adapters, as `peft.PeftModel`, instead.

    After `train()` the trained weights are in `model` and `value_model`.

    Raises:
        ValueError: arguments that cannot be trained, with what, why and the remedy; nothing has been started then.
    """

    NAME = "PPO"
    SOURCE = "proximal policy optimisation (arXiv 1707.06347)"

    args: PPOConfig

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None,
        reward_model: PreTrainedModel | PeftModel | RewardFunction,
        train_dataset: Any,
        value_model: PreTrainedModel | PeftModel,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[None, None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: LoraConfig | None = None,
        value_peft_config: LoraConfig | None = None,
    ) -> None:
        checks.check_arguments(model, ref_model, reward_model, train_dataset, value_model, optimizers)
        check_dataset(train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset")
        checks.check_tokenizer(processing_class)
        self.args = args
        self.processing_class = processing_class
        self.policy_model = with_adapter(model, peft_config, "peft_config")
        train_adapter(self.policy_model, args.model_adapter_name)
        self.reward_model = reward_model = base_of(reward_model)
        self.value_model = with_adapter(value_model, value_peft_config, "value_peft_config", replacing=("score",))
        policy, critic = base_of(self.policy_model), base_of(self.value_model)
        self.ref_model, variants = reference_of(policy, args.ref_adapter_name, ref_model)
        check_adapted_reference(args, policy, is_given=ref_model is not None, adapter=args.ref_adapter_name)
        special = special_tokens(args, processing_class, policy, samples_padding=args.trl_quirks)
        models = {"actor": policy, "critic": critic, "reference": self.ref_model or policy}
        if isinstance(reward_model, PreTrainedModel):
            models["reward"] = reward_model
        checks.check_models(models, args.train_backend)
        checks.check_reward_options(args, reward_model)
        for name, without in {"reward_baseline": "none", "min_reward_variance": None}.items():
            if (value := getattr(args, name)) != without:
                check_reference(f"{name}={value!r}", policy, models["reference"])
        train_dataset, lengths = self._usable(train_dataset, "train_dataset", special, data_collator)
        eval_lengths: list[int] = []
        if eval_dataset is not None:
            eval_dataset, eval_lengths = self._usable(eval_dataset, "eval_dataset", special, data_collator)
        checks.check_evaluation(args, eval_dataset)
        check_writable(Path(str(args.output_dir)), "output_dir")
        length = fill_batch_sizes(args, len(train_dataset))
        self._divisions = divisions(args)
        self._permutation = seeded(args.seed, length.samples_per_update)
        layout: Layout = RaggedLayout.of(models, args.train_backend, args.accelerator)
        if args.trl_quirks:
            layout = TRLLayout(special.pad)
        algorithm = algorithm_of(args, special)
        if args.adaptive_kl:
            early = algorithm.early and replace(algorithm.early, estimate=self._estimate_early)
            algorithm = replace(algorithm, estimate=self._estimate_and_adapt, early=early)
        self._set_up(
            models,
            algorithm,
            length,
            layout,
            special,
            shown=PolicyAndValue(self.policy_model, self.value_model),
            variants=variants,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            prompt_lengths=[lengths, eval_lengths],
            data_collator=data_collator,
            callbacks=callbacks,
            num_places=layout.num_places(self._divisions[GENERATING]),
        )

    def _usable(self, dataset: Any, argument: str, special: SpecialTokens, data_collator: Any) -> tuple[Any, list[int]]:
        """The rows to be used, and their prompts' lengths. Raises: ValueError for those that cannot be."""
        usable = usable_prompts(dataset, argument, self.policy_model.config, self.args, special.pad)
        if not isinstance(self.reward_model, PreTrainedModel) and data_collator is None:
            check_reward_columns(self.reward_model, dataset, argument)  # a collator's are not known
        return usable

    def _updates(self, fleet: Fleet, termination: Termination) -> Iterator[Iteration]:
        if self.args.min_reward_variance is not None:
            self._leave_out_prompts(fleet, self.args.min_reward_variance)
        if self.args.reward_baseline == "reference":
            self._score_references(fleet)
        yield from super()._updates(fleet, termination)

    def _leave_out_prompts(self, fleet: Fleet, min_variance: float) -> None:
        """See `fuse.trainers.spread_filter`."""
        state, length, sampler = self.state, self._run.length, self.dataloader.sampler
        assert isinstance(sampler, prompts.PassSampler)
        sampler.left_out, sampler.pass_index = frozenset(), 0
        size, num_probes = length.prompts_per_update, self.args.reward_variance_samples
        state.reward_variances = state.reward_variances or [None] * len(self.train_dataset)
        variances, order, num_needed = state.reward_variances, list(sampler), length.num_steps * size
        of_run = untried(variances, order, num_needed=num_needed, min_variance=min_variance, num_together=size)
        with ExitStack() as lent:
            for number, rows in enumerate(of_run):
                if number == 0:
                    lent.enter_context(fleet.generating_by("reference"))
                samples = probes(rows, num_probes, self._samples_of)
                self._roll_out_reference(fleet, "responses to try prompts by, after {} prompts", samples, number * size)
                for row, variance in zip(rows, score_variances(samples, num_probes), strict=True):
                    variances[row] = variance
        sampler.left_out = left_out(variances, min_variance, batch_size=size)

    def _roll_out(
        self, fleet: Fleet, prompts_left: Iterator[Any], clock: PhaseClock
    ) -> tuple[Sequence[Sample], dict[str, float]]:
        samples, metrics = super()._roll_out(fleet, prompts_left, clock)
        sampler = self.dataloader.sampler
        if self.args.min_reward_variance is not None and isinstance(sampler, prompts.PassSampler):
            metrics["spread_filter/prompts"] = float(len(sampler.left_out))
        return samples, metrics

    def _score_references(self, fleet: Fleet) -> None:
        """See `fuse.trainers.reference_scores`."""
        updates = islice(self._rows_of_updates(), self._run.num_updates_left)
        scores = self.state.reference_scores or [None] * len(self.train_dataset)
        missing = missing_rows(scores, (row for rows in updates for row in rows))
        if not missing:
            return
        with fleet.generating_by("reference"):
            self.state.reference_scores = score_references(
                scores,
                missing,
                samples_of=self._samples_of,
                roll_out=partial(self._roll_out_reference, fleet, f"reference responses after {{}} of {len(missing)}"),
                num_together=self._run.length.samples_per_update,
            )

    def _samples_of(self, rows: Sequence[int]) -> list[Sample]:
        """New ones, of rows of the dataset."""
        batch = self.get_train_dataloader().collate_fn([self.train_dataset[row] for row in rows])
        return self._samples(batch, 0, drop_padding=self._layout.drops_padding)

    def _roll_out_reference(self, fleet: Fleet, told: str, samples: Sequence[Sample], num_before: int) -> None:
        """Have samples generated and scored as in training, apart from it. told: with a place for `num_before`."""
        params = self._sampling_params(self.args.sampling_temperature)
        with self.activity.part_of(told.format(num_before)):
            self._rollouts.roll_out(fleet, samples, params, PhaseClock(), teaches=False)

    def _rows_of_updates(self) -> Iterator[list[int]]:
        """Of the dataset, from the next update on."""
        return prompts.row_numbers(self.get_train_dataloader(), start=self._run.num_updates_done)

    def _training_samples(self, batch: Any) -> list[Sample]:
        samples = self._samples(batch, self.state.episode, drop_padding=self._layout.drops_padding)
        self.state.episode += len(samples)
        if self.args.reward_baseline == "reference":
            for sample, row in zip(samples, next(self._rows_of_updates()), strict=True):
                sample.baseline = self.state.reference_scores[row]
        return samples

    def _optimizer_steps(self, update: int) -> Mapping[str, Sequence[OptimizerStep]]:
        last_of_pass = update % len(self.get_train_dataloader()) == 0
        steps = {}
        for role, division in self._divisions.items():
            if role != GENERATING or update > self.args.critic_warmup_updates:
                permutations = [self._permutation(update, epoch) for epoch in range(division.num_epochs)]
                steps[role] = self._layout.steps(permutations, division, last_of_pass=last_of_pass)
        return steps

    def _estimate_and_adapt(self, samples: Sequence[Sample]) -> tuple[Experience, dict[str, float]]:
        """With the coefficient of the KL as it is now; the next update has another."""
        control, state = self.args.kl_control, self.state
        assert control is not None
        kl_coef = self._kl_coef
        experience, metrics = algorithm_of(self.args, self._special, kl_coef).estimate(samples)
        state.kl_coef = next_kl_coef(
            kl_coef, metrics["objective/kl"], len(samples), target=control.target, horizon=control.horizon
        )
        return experience, metrics | {"objective/kl_coef": kl_coef}

    def _estimate_early(self, samples: Sequence[Sample], width: int) -> Experience:
        """With the same coefficient."""
        early = algorithm_of(self.args, self._special, self._kl_coef).early
        assert early is not None
        return early.estimate(samples, width)

    @property
    def _kl_coef(self) -> float:
        return self.args.kl_coef if self.state.kl_coef is None else self.state.kl_coef

    def _make_rewards(self) -> AbstractContextManager[RewardCalls]:
        return reward_calls(self.args, self.reward_model, self.processing_class)


def algorithm_of(config: PPOConfig, special: SpecialTokens, kl_coef: float | None = None) -> Algorithm:
    """The algorithm that `config` asks for. kl_coef: in place of its own."""
    gae = GAESettings(
        kl_coef=config.kl_coef if kl_coef is None else kl_coef,
        kl_estimator=config.kl_estimator,
        whiten_rewards=config.whiten_rewards,
        gamma=config.gamma,
        lam=config.lam,
        missing_eos_penalty=config.missing_eos_penalty,
        reward_range=as_pair(config.reward_clip_range),
    )
    settings = PPOSettings(
        gae=gae,
        temperature=config.sampling_temperature,
        cliprange=config.cliprange,
        vf_coef=config.vf_coef,
        cliprange_value=config.cliprange_value,
        num_tokens=special.num_tokens,
        loss_normalization=config.loss_normalization,
    )
    return ppo(settings, special)


def divisions(args: PPOConfig) -> dict[str, Division]:
    """How an update is divided into the optimizer steps of each role."""
    actor = Division(
        num_epochs=args.num_ppo_epochs,
        num_mini_batches=args.num_mini_batches,
        micro_batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
    )
    critic = replace(
        actor,
        num_epochs=args.critic_ppo_epochs or args.num_ppo_epochs,
        num_mini_batches=args.critic_num_mini_batches or args.num_mini_batches,
    )
    return {GENERATING: actor, "critic": critic}


def fill_batch_sizes(args: PPOConfig, num_rows: int) -> RunLength:
    """Derive what TRL derives, for one process: the batch does not depend on the number of devices.

    Raises:
        ValueError: batches that cannot be divided as asked for.
    """
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.world_size = 1
    args.micro_batch_size = args.per_device_train_batch_size
    args.batch_size = args.local_batch_size = batch_size
    for name in ("num_mini_batches", "critic_num_mini_batches"):
        if batch_size % ((value := getattr(args, name)) or 1):
            raise ValueError(
                f"{name}={value} does not divide the batch of {batch_size} "
                f"(per_device_train_batch_size x gradient_accumulation_steps): choose a divisor"
            )
    args.mini_batch_size = args.local_mini_batch_size = batch_size // args.num_mini_batches
    if args.whiten_rewards and args.local_mini_batch_size < 8:
        raise ValueError(
            f"whiten_rewards needs mini-batches of at least 8 samples, these have {args.local_mini_batch_size}: "
            f"raise per_device_train_batch_size or gradient_accumulation_steps, or lower num_mini_batches"
        )
    most = args.max_steps * batch_size if args.max_steps > 0 else None
    if args.total_episodes is None:
        args.total_episodes = int(args.num_train_epochs * num_rows) if most is None else most
    elif most is not None:
        args.total_episodes = min(args.total_episodes, most)
    args.num_total_batches = math.ceil(args.total_episodes / batch_size)
    return RunLength(
        prompts_per_update=batch_size,
        num_steps=args.num_total_batches,
        optimizer_steps_per_update=max(one.num_epochs * one.num_mini_batches for one in divisions(args).values()),
        micro_batches_per_step=math.ceil(args.gradient_accumulation_steps / args.num_mini_batches),
    )
