"""PPOTrainer: TRL's trainer to the code that calls it, stage fusion on Ray workers inside."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fuse import checkpoint
from fuse.activity import Activity
from fuse.config.memory import within_memory
from fuse.config.ppo import PPOConfig
from fuse.config.settings import algorithm_of, fleet_settings
from fuse.driver.fleet import Fleet
from fuse.engines.engine import SamplingParams
from fuse.sample import Sample
from fuse.termination import Termination, graceful_termination
from fuse.trace import PhaseClock
from fuse.trainers import checks, loop, prompts
from fuse.trainers.callbacks import PolicyAndValue
from fuse.trainers.completions import show_completions
from fuse.trainers.data import check_dataset
from fuse.trainers.face import TrainerFace
from fuse.trainers.iteration import Iteration
from fuse.trainers.prompt_checks import kept_tokens, usable_prompts
from fuse.trainers.publish import push_policy, write_model_card, write_policy
from fuse.trainers.reward_calls import RewardCalls
from fuse.trainers.reward_columns import check_reward_columns
from fuse.trainers.rewards import RewardFunction
from fuse.trainers.rollouts import Rollouts, reward_calls
from fuse.trainers.run import Run
from fuse.trainers.special_tokens import special_tokens
from fuse.trainers.steps import seeded
from fuse.training.steps import Division, OptimizerStep
from fuse.workers.cluster import Cluster
from schedules.files import check_writable

# Sample ids of evaluation prompts: apart from training's, so that training draws the same noise with or without them.
_FIRST_EVALUATION_ID = 1 << 40
_GREEDY = 0.01 + 1e-7
"""The temperature of TRL's completions of evaluation prompts."""


class PPOTrainer(TrainerFace):
    """Proximal policy optimisation from rewards, in place of `trl.experimental.ppo.PPOTrainer`.

    args: see `PPOConfig`.
    processing_class: the tokenizer; it needs a pad token.
    model: the policy, any causal language model that declares `base_model_pp_plan`.
    ref_model: what the KL penalty measures from; None takes a copy of the policy.
    reward_model: a sequence classifier with one label, or a callable
        `(prompts: list[str], responses: list[str], **columns: list) -> list[float]`, given the dataset's other columns.
    train_dataset: rows with `input_ids`. No models share parameters.
    value_model: a sequence classifier with one label, trained as the critic.
    data_collator, eval_dataset, callbacks: as in TRL. optimizers and peft_config must stay unset.

    After `train()` the trained weights are in `model` and `value_model`.

    max_new_tokens: an attribute, by the number of a sample in the run: at most so many tokens of its response, which
        are no more than `args.response_length`. Without a stop token it forces lengths.

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
        check_dataset(train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset")
        checks.check_tokenizer(processing_class)
        self.args = args
        self.processing_class = processing_class
        self.policy_model = model
        self.ref_model = ref_model if ref_model is not None else copy.deepcopy(model)
        self.reward_model = reward_model
        self.value_model = value_model
        self.data_collator = data_collator
        self.max_new_tokens: Mapping[int, int] = {}
        self._special = special_tokens(args, processing_class, model)
        self.model = PolicyAndValue(model, value_model)
        checks.check_models(self._models, args.train_backend)
        checks.check_reward_options(args, reward_model)
        self.train_dataset = train_dataset = self._usable(train_dataset, "train_dataset")
        self.eval_dataset: Any = None if eval_dataset is None else self._usable(eval_dataset, "eval_dataset")
        checks.check_evaluation(args, eval_dataset)
        check_writable(Path(str(args.output_dir)), "output_dir")
        batch_size = checks.fill_batch_sizes(args, len(train_dataset))
        self.dataloader = prompts.prompt_loader(train_dataset, batch_size, args.seed, data_collator)
        self.activity = Activity()
        self.cluster: Cluster | None = None
        self._fleet: Fleet | None = None
        self._rewards: RewardCalls | None = None
        self._algorithm = algorithm_of(args, self._special)
        self._kept_tokens = kept_tokens(model.config, args)
        collates = data_collator is not None
        tokens = prompts.prompt_tokens(train_dataset, self.eval_dataset, self._kept_tokens, collates=collates)
        checks.check_engine(args, model, tokens)
        self._settings = fleet_settings(  # refuses what cannot be placed
            args, self._algorithm, self._special, tokens, model.config
        )
        self._settings = within_memory(args, self._settings, self._models, tokens)
        self._layout = self._settings.training.layout
        self._division = Division(
            num_epochs=args.num_ppo_epochs,
            num_mini_batches=args.num_mini_batches,
            micro_batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
        )
        self._permutation = seeded(args.seed, batch_size)
        self._run = Run(args, self.model, processing_class, callbacks, num_rows=len(train_dataset), tell=self._tell)
        for update in {1, min(len(self.dataloader), self._run.num_updates_left)}:  # TRL's last of a pass differs
            for step in self._optimizer_steps(update):
                self._settings.check(num_micro_batches=len(step.micro_batches))
        self.activity.listen(self._run.show_activity)

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
        checks.check_limits(self.max_new_tokens, self.args.response_length)
        resumed = checkpoint.start(run.output_dir, resume_from_checkpoint)
        run.begin(resumed)
        with self._workers(resumed) as fleet, graceful_termination(self.args.sigterm_grace_s) as termination:
            yield self._updates(fleet, termination)

    def _updates(self, fleet: Fleet, termination: Termination) -> Iterator[Iteration]:
        run = self._run
        for iteration in loop.updates(
            run,
            fleet,
            self._algorithm,
            self._rollouts,
            self._sampling_params(self.args.sampling_temperature),
            batches=prompts.batches(self.get_train_dataloader(), start=run.state.global_step),
            samples_of=self._training_samples,
            max_new_tokens=self.max_new_tokens,
            steps_of=self._optimizer_steps,
            num_places=self._layout.num_places(self._division),
        ):
            if run.shows_completions:
                self.generate_completions(sampling=True)
            yield iteration
            if termination.is_requested:
                run.terminate(fleet)
        fleet.fetch_weights()
        run.end(fleet)

    @property
    def how_to_resume(self) -> str:
        """What an interrupted run can go on from, in a line."""
        return self._run.how_to_resume

    @property
    def process_ids(self) -> dict[str, list[int]]:
        """Of the workers that run, by their kind: generation and model."""
        return {} if self._fleet is None else self._fleet.process_ids

    @contextmanager
    def _workers(self, resumed: Path | None) -> Iterator[Fleet]:
        """Start the workers with the models, or a checkpoint of them; they stop with the body."""
        settings = self._settings.for_updates(self._run.num_updates_left)
        fleet = Fleet(settings, self._models, cluster=self.cluster, tell=self._tell)
        calls = reward_calls(self.args, self.reward_model, self.processing_class)
        with self.activity.lasting(), calls as self._rewards, fleet:
            if resumed is not None:
                fleet.load(resumed / checkpoint.WORKER_STATE_NAME)
            self._fleet = fleet
            try:
                yield fleet
            finally:
                self._fleet = None

    @property
    def _models(self) -> dict[str, PreTrainedModel]:
        """By role; a reward function is none."""
        models: dict[str, Any] = {
            "actor": self.policy_model,
            "critic": self.value_model,
            "reference": self.ref_model,
            "reward": self.reward_model,
        }
        return {role: model for role, model in models.items() if isinstance(model, PreTrainedModel)}

    @property
    def _rollouts(self) -> Rollouts:
        assert self._rewards is not None, "only while workers run"
        return Rollouts(self._rewards, self.args.inter_stage_fusion, self._tell)

    def _usable(self, dataset: Any, argument: str) -> Any:
        """The rows to be used. Raises: ValueError for those that cannot be."""
        usable = usable_prompts(dataset, argument, self.policy_model.config, self.args, self._special.pad)
        if not isinstance(self.reward_model, PreTrainedModel) and self.data_collator is None:
            check_reward_columns(self.reward_model, dataset, argument)  # a collator's are not known
        return usable

    def _samples(self, batch: Any, first_id: int, *, drop_padding: bool = False) -> list[Sample]:
        pad, most = self._special.pad, self._kept_tokens
        return prompts.make_samples(batch, first_id, pad, drop_padding=drop_padding, most_tokens=most)

    def _training_samples(self, batch: Any) -> list[Sample]:
        samples = self._samples(batch, self.state.episode, drop_padding=self._layout.drops_padding)
        self.state.episode += len(samples)
        return samples

    def _optimizer_steps(self, update: int) -> list[OptimizerStep]:
        last_of_pass = update % len(self.get_train_dataloader()) == 0
        permutations = [self._permutation(update, epoch) for epoch in range(self._division.num_epochs)]
        return self._layout.steps(permutations, self._division, last_of_pass=last_of_pass)

    def _sampling_params(self, temperature: float) -> SamplingParams:
        return SamplingParams(
            seed=self.args.seed,
            temperature=temperature,
            max_new_tokens=self.args.response_length,
            stop_token_ids=self._special.stop,
        )

    def _tell(self, text: str) -> None:
        self.activity.tell(text)

    # Models

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy and the tokenizer, as `AutoModelForCausalLM.from_pretrained` reads them.

        With `args.push_to_hub` they are uploaded, too.
        """
        if self._fleet is not None:
            self._fleet.fetch_weights()
        directory = Path(output_dir or self._run.output_dir)
        with checkpoint.saving(directory):
            write_policy(directory, self.policy_model, self.processing_class)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub("Model save")

    def push_to_hub(self, commit_message: str = "End of training", **options: Any) -> str:
        """Upload the policy and the tokenizer to `args.hub_model_id`, by default the output directory's name."""
        args = self.args
        place = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
        options = {"commit_message": commit_message, **place, **options}
        return push_policy(self._name, self.policy_model, self.processing_class, **options)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output directory: what was trained, from what, how."""
        tags = [tags] if isinstance(tags, str) else tags or []
        name = model_name or self._name
        write_model_card(self._run.output_dir, name, self.policy_model, self.state.episode, dataset_name, tags)

    @property
    def _name(self) -> str:
        return self.args.hub_model_id or self._run.output_dir.name

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
            samples += self._samples(batch, _FIRST_EVALUATION_ID + len(samples))
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
