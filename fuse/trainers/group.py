"""What the trainers without a critic share: TRL's arguments, groups of responses, and rewards of several functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.group_batch import GroupSettings, rollout_metrics
from fuse.config.group import GroupConfig
from fuse.driver.fleet import Fleet
from fuse.intrastage.adapters import base_of, is_adapted, with_adapter
from fuse.roles import GENERATING
from fuse.sample import Group, Sample, SpecialTokens
from fuse.trace import PhaseClock
from fuse.trainers import checks, prompts
from fuse.trainers.completions import show_completions
from fuse.trainers.data import TOKENS, check_dataset, prompt_rows
from fuse.trainers.device_memory import replicas_fit
from fuse.trainers.dynamic_sampling import DynamicSampling
from fuse.trainers.group_rewards import GroupRewards, RewardSource, reward_roles
from fuse.trainers.iteration import Iteration
from fuse.trainers.prompt_checks import usable_prompts
from fuse.trainers.reference import REFERENCE_ADAPTER, check_adapted_reference, reference_of, with_reference
from fuse.trainers.reward_columns import check_named_arguments
from fuse.trainers.rewards import function_name
from fuse.trainers.rollouts import reward_settings
from fuse.trainers.special_tokens import special_tokens
from fuse.trainers.spread_filter import filtered_groups
from fuse.trainers.steps import seeded
from fuse.trainers.trainer import FIRST_EVALUATION_ID, Trainer
from fuse.training.advantage_model import is_advantage_model
from fuse.training.layout import RaggedLayout
from fuse.training.steps import OptimizerStep, rollout_steps, side_by_side
from schedules.files import check_writable

if TYPE_CHECKING:
    from fuse.intrastage.adapters import LoraConfig, PeftModel

PROMPT = "prompt"


class GroupTrainer(Trainer):
    """Trains a policy on groups of responses.

    model: a causal language model, or its path or name on the Hub.
    reward_funcs: one or a list of functions `(prompts, completions, completion_ids, **columns) -> list[float | None]`,
        which are also given `trainer_state`, and `log_extra` and `log_metric` in threads; plain or `async`. Some may be
        sequence classifiers with one label, or their paths.
    train_dataset: rows with a `prompt`, a string or chat messages, and its `input_ids` where it is tokenised; the other
        columns go to the reward functions.
    processing_class: the tokenizer; by default the model's. reward_processing_classes: those of reward
        models, in the order of reward_funcs.
    eval_dataset, callbacks: as in TRL. What else TRL takes must stay unset.
    peft_config: a `peft.LoraConfig` of adapters that train in place of the policy's weights; the KL is measured from
        the policy without them. A model that comes with adapters, as a `peft.PeftModel`, is its own reference, as it
        comes.

    After `train()` the trained weights are in `model`.

    Raises:
        ValueError: arguments that cannot be trained, with what, why and the remedy; nothing has been started then.
    """

    CONFIG: ClassVar[type[GroupConfig]]

    args: GroupConfig

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        reward_funcs: RewardSource | str | list[RewardSource | str] | None = None,
        args: GroupConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[None, None] = (None, None),
        quantization_config: None = None,
        peft_config: LoraConfig | None = None,
        tools: None = None,
        rollout_func: None = None,
        environment_factory: None = None,
    ) -> None:
        unsupported = {"quantization_config": quantization_config, "tools": tools, "rollout_func": rollout_func}
        checks.check_unset({**unsupported, "environment_factory": environment_factory}, optimizers)
        args = self.CONFIG(f"{_name_of(model)}-{self.NAME}") if args is None else args
        self.args = args
        check_dataset(train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset")
        checks.check_evaluation(args, eval_dataset)
        check_writable(Path(str(args.output_dir)), "output_dir")
        options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **_objects(args.model_init_kwargs)}
        given = AutoModelForCausalLM.from_pretrained(model, **options) if isinstance(model, str) else model
        checks.check_policy(given)
        adds_reference = args.needs_reference and peft_config is None
        self.policy_model = with_reference(with_adapter(given, peft_config, "peft_config"), adds_reference)
        policy = base_of(self.policy_model)
        checks.check_no_experts(policy.config, args.router_aux_loss_coef)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(policy.config._name_or_path, padding_side="left")
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        checks.check_tokenizer(processing_class)
        self.processing_class = processing_class
        self.reward_funcs, self.reward_processing_classes = _reward_sources(
            reward_funcs, reward_processing_classes, options
        )
        self.reward_func_names = [_source_name(source) for source in self.reward_funcs]
        self._weights = tuple(args.reward_weights or [1.0] * len(self.reward_funcs))
        if len(self._weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(self._weights)} weights for {len(self.reward_funcs)} reward functions: give "
                f"one each"
            )
        adapter = REFERENCE_ADAPTER if adds_reference and is_adapted(self.policy_model) else None
        self.ref_model, variants = reference_of(policy, adapter) if args.needs_reference else (None, {})
        check_adapted_reference(args, policy, is_given=False, adapter=adapter)
        special = special_tokens(args, processing_class, policy)
        models = {"actor": policy} | ({"reference": self.ref_model or policy} if args.needs_reference else {})
        checks.check_models(models, args.train_backend)
        roles = reward_roles(self.reward_funcs)
        for index, source in enumerate(self.reward_funcs):
            if isinstance(source, PreTrainedModel):
                checks.check_reward_model(source)
                models[roles[index]] = source
            else:
                checks.check_reward_options(args, source)
        train_dataset, lengths = self._rows(train_dataset, "train_dataset", policy, special)
        eval_lengths: list[int] = []
        if eval_dataset is not None:
            eval_dataset, eval_lengths = self._rows(eval_dataset, "eval_dataset", policy, special)
        length = args.run_length(len(train_dataset))
        self._permutation = seeded(args.seed, args.trained_size // args.num_together)
        self._group = GroupSettings(
            num_generations=args.num_generations,
            rollout_size=args.rollout_size,
            reward_names=tuple(self.reward_func_names),
            reward_weights=self._weights,
            penalties=args.penalties,
            mask_truncated=args.mask_truncated_completions,
            min_variance=args.min_reward_variance,
        )
        self._set_up(
            models,
            self._make_algorithm(self._group, special),
            length,
            RaggedLayout.of(models, args.train_backend, args.accelerator),
            special,
            shown=self.policy_model,
            variants=variants,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            prompt_lengths=[lengths, eval_lengths],
            data_collator=None,
            callbacks=callbacks,
            shuffles=args.shuffle_dataset,
            whole_replicas=not args.bidirectional and replicas_fit(policy, args),
            bidirectional=args.bidirectional,
            forward_only=args.forward_only,
            rate_name="learning_rate",
        )

    def _make_algorithm(self, group: GroupSettings, special: SpecialTokens) -> Algorithm:
        """The algorithm that `args` asks for."""
        raise NotImplementedError

    # Data

    def _rows(
        self, dataset: Any, argument: str, policy: PreTrainedModel, special: SpecialTokens
    ) -> tuple[Any, list[int]]:
        """The rows to be used, tokenised unless they are, each with its prompt as it was; and these prompts' lengths.

        Raises: ValueError for those that cannot be.
        """
        rows = prompt_rows(
            dataset,
            self.processing_class,
            prompt_column=None if TOKENS in next(iter(dataset), ()) else PROMPT,
            response_length=self.args.max_completion_length,
            keep_prompt=True,
            template_options=_objects(self.args.chat_template_kwargs),
        )
        for source in self.reward_funcs:
            if not isinstance(source, PreTrainedModel):
                check_named_arguments(source, rows, argument, in_process=self.args.reward_workers == "process")
        return usable_prompts(rows, argument, policy.config, self.args, special.pad)

    def _prompts_left(self) -> Iterator[Any]:
        """One by one: an update may consume more prompts than it trains on."""
        length = self._run.length
        return prompts.rows(
            self.get_train_dataloader(),
            start=self.state.episode // length.samples_per_prompt,
            batch_size=length.prompts_per_update,
        )

    def _roll_out(
        self, fleet: Fleet, prompts_left: Iterator[Any], clock: PhaseClock
    ) -> tuple[Sequence[Sample], dict[str, float]]:
        num_groups = self._run.length.prompts_per_update

        def draw(count: int) -> list[Sample]:
            return self._training_samples([*islice(prompts_left, count)])

        def score(samples: Sequence[Sample]) -> dict[str, float]:
            return self._score(fleet, samples, clock)

        args = self.args
        least, of_groups = args.min_reward_variance, (args.num_generations, self._weights)
        if not args.dynamic_sampling:
            samples = draw(num_groups)
            return samples, {**score(samples), **filtered_groups(samples, *of_groups, least)}
        sampling = DynamicSampling(
            most_rounds=args.max_dynamic_rounds,
            num_generations=args.num_generations,
            reward_weights=self._weights,
            draw=draw,
            score=score,
            min_variance=least,
        )
        samples, replaced, metrics = sampling.roll_out(num_groups)
        self.state.num_input_tokens_seen += sum(len(sample.prompt_ids) + sample.length for sample in replaced)
        return samples, {**metrics, **filtered_groups(samples, *of_groups, least)}

    def _training_samples(self, batch: Any) -> list[Sample]:
        samples = self._grouped(batch, self.state.episode, self.args.num_generations)
        self.state.episode += len(samples)
        return samples

    def _grouped(self, rows: Any, first_id: int, num_generations: int) -> list[Sample]:
        """So many samples of each row, side by side."""
        samples = self._samples([row for row in rows for _ in range(num_generations)], first_id)
        for index, sample in enumerate(samples):
            sample.group = Group(first_id + index // num_generations, num_generations)
        return samples

    def _optimizer_steps(self, update: int) -> Mapping[str, Sequence[OptimizerStep]]:
        args = self.args
        size, together = args.trained_size, args.num_together
        orders = [self._permutation(update, index) for index in range(args.rollouts_per_update)]
        steps = rollout_steps(
            [index * size + side_by_side(order, together) for index, order in enumerate(orders)],
            micro_batch_size=args.per_device_train_batch_size,
            num_iterations=args.num_iterations,
            accumulation=args.gradient_accumulation_steps,
        )
        return {GENERATING: steps}

    def _make_rewards(self) -> AbstractContextManager[GroupRewards]:
        return GroupRewards(
            self.reward_funcs,
            self._weights,
            self.processing_class,
            self.reward_processing_classes,
            reward_settings(self.args),
            lambda: self.state,
        )

    # What is shown

    def _on_update(self, fleet: Fleet, iteration: Iteration) -> None:
        if self.args.log_completions:
            shown = iteration.samples[: self.args.num_completions_to_print]
            show_completions(self.processing_class, shown, self.state.global_step, self.callback_handler.callbacks)
        if self.control.should_evaluate:
            self.evaluate()
        elif self._run.shows_completions:
            self.generate_completions(sampling=True)

    def evaluate(self) -> dict[str, float]:
        """Generate responses to all evaluation prompts as in training, and log what they are rewarded, as `eval_*`.

        Without workers running, before or after training, workers are started for it.
        """
        if self.eval_dataset is None:
            raise ValueError("there is no eval_dataset: pass one to the trainer")
        if self._fleet is None:
            with self._workers(None):
                return self.evaluate()
        num_generations = self.args.num_generations_eval or self.args.num_generations
        samples = self._grouped(self.eval_dataset, FIRST_EVALUATION_ID, num_generations)
        params = self._sampling_params(self.args.sampling_temperature)
        self._rollouts.roll_out(self._fleet, samples, params, PhaseClock(), teaches=False)
        metrics = rollout_metrics(samples, num_generations=num_generations, settings=self._group, special=self._special)
        logged = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(logged)
        return logged


def _objects(options: dict[str, Any] | str | None) -> dict[str, Any]:
    assert not isinstance(options, str), "the configuration parses it"
    return options or {}


def _name_of(model: PreTrainedModel | PeftModel | str) -> str:
    return str(model if isinstance(model, str) else model.config._name_or_path).rstrip("/").rpartition("/")[2]


def _source_name(source: RewardSource) -> str:
    return _name_of(source) if isinstance(source, PreTrainedModel) else function_name(source)


def _reward_sources(
    given: RewardSource | str | list[RewardSource | str] | None, tokenizers: Any, options: Mapping[str, Any]
) -> tuple[list[RewardSource], list[PreTrainedTokenizerBase | None]]:
    """Functions and models, and the tokenizers of those that are models.

    Raises: ValueError for none, or what is neither.
    """
    sources: list[Any] = list(given) if isinstance(given, list) else [] if given is None else [given]
    if not sources:
        raise ValueError("reward_funcs is empty: pass a function, a sequence classifier, or a list of these")
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(sources)
    if len(tokenizers) != len(sources):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} tokenizers for {len(sources)} reward functions: give one "
            f"each, or None"
        )
    own: list[PreTrainedTokenizerBase | None] = [None] * len(sources)
    for index, source in enumerate(sources):
        if isinstance(source, str):
            num_labels = {} if is_advantage_model(AutoConfig.from_pretrained(source)) else {"num_labels": 1}
            source = AutoModelForSequenceClassification.from_pretrained(source, **num_labels, **options)
            sources[index] = source
        source = sources[index] = base_of(source)
        if isinstance(source, PreTrainedModel):
            own[index] = tokenizers[index] or AutoTokenizer.from_pretrained(source.config._name_or_path)
        elif not callable(source):
            raise ValueError(
                f"reward_funcs has {source!r}: pass functions (prompts, completions, **columns) -> list[float], or a "
                f"sequence classifier"
            )
    return sources, own
