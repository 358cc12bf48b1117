"""All workers of a run: started together, told what to do together, stopped together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fuse import roles
from fuse.activity import silent
from fuse.algorithms.batch import Experience
from fuse.driver import stage_by_stage
from fuse.driver.early_start import imported_for
from fuse.driver.engine_weights import EngineWeights
from fuse.driver.engines import Engines
from fuse.driver.fetch import fetch_average, fetch_scoring, fetch_trained
from fuse.driver.fleet_settings import FleetSettings
from fuse.driver.live import LiveRollout
from fuse.driver.live_tail import TailRollout
from fuse.driver.model_start import ModelStart
from fuse.driver.rollout_state import RolloutReport
from fuse.driver.shared_directory import check_shared
from fuse.driver.tail import Tail, TailPlan, tail_of
from fuse.driver.update import save_state, train
from fuse.driver.update_spans import UpdateSpans
from fuse.driver.weight_streams import Stream, WeightStreams
from fuse.engines.engine import SamplingParams
from fuse.interstage.costs import CostModel
from fuse.interstage.migration import Policy
from fuse.interstage.rollout_planner import RolloutPlanner
from fuse.intrastage.stage import Exported
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.roles import GENERATING
from fuse.sample import Sample
from fuse.trace import Span
from fuse.training.late_scores import REFERENCE_LOGPROBS, SCORED_BY
from fuse.training.rounds import Round
from fuse.training.steps import StepReport
from fuse.workers.calls import Future, gather
from fuse.workers.cluster import Cluster
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.model_handle import ModelHandle
from fuse.workers.weights import put_state_dict


class Fleet:
    """The workers of a run. A context manager: they start on entry and are gone on exit, whatever happened.

    models: by role; see `fuse.roles`.
    cluster: where they run, and end when it does; by default one of their own.
    tell: hears what is being done.

    Raises:
        WorkerError: from every method, when a worker died or raised.
    """

    def __init__(
        self,
        settings: FleetSettings,
        models: Mapping[str, PreTrainedModel],
        *,
        cluster: Cluster | None = None,
        tell: Callable[[str], None] = silent,
    ) -> None:
        self.settings = settings
        self._early = cluster
        self._trained = {role: models[role] for role in roles.training(models)}
        self._scoring = {role: models[role] for role in roles.scoring(models)}
        self._tell = tell
        self._resources = ExitStack()
        self._has_trained = False
        self._tail: Tail | None = None
        self.tail_report: dict[str, float] = {}
        """Of the last update: see `fuse.driver.tail`."""

    def __enter__(self) -> Fleet:
        with ExitStack() as resources:
            self._start(resources)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def _start(self, resources: ExitStack) -> None:
        """Start the engines, and the model workers behind them: samples are generated while models load."""
        settings = self.settings
        self._tell("starting: engines" if self._early else "starting: Ray")
        address, accelerator = settings.ray_address, settings.accelerator
        modules = imported_for(self._trained.values())
        self._cluster = self._early or resources.enter_context(
            Cluster(settings.num_devices, ray_address=address, accelerator=accelerator, imported=modules)
        )
        actor = put_state_dict(self._trained[GENERATING].state_dict())
        source = EngineWeights(self._trained[GENERATING], settings.exported)
        self._engines = Engines(
            *(self._cluster, settings, source.spec, source.initial(actor)), lambda: source.current(self._model_workers)
        )
        args = self._cluster, settings, self._trained, self._scoring, actor
        self._models = ModelStart(*args, after=self._engines.workers)
        self._streams = WeightStreams(self._cluster, settings)
        resources.callback(self._models.abandon)
        self._engines.wait_started(self._tell)
        check_shared(settings.output_dir, self._cluster.elsewhere())
        if settings.offloads_training:  # from the first update on, a device never holds both
            self._engines.call(GenerationHandle.sleep)
            self.synchronise()
        capacities = gather([engine.kv_capacity_tokens() for engine in self._engines.workers])
        self._rollouts = RolloutPlanner(
            settings.rollout.within(one for one in capacities if one is not None), num_scoring=len(self._scoring)
        )
        self._spans = UpdateSpans(self._engines, lambda: self._models.wait(self._tell), self._rollouts)

    @property
    def _model_workers(self) -> list[ModelHandle]:
        """Once they are ready."""
        return self._models.wait(self._tell).workers

    @property
    def _planner(self) -> TrainingPlanner:
        return self._models.wait(self._tell).planner

    @property
    def late_columns(self) -> frozenset[str]:
        """What the next update's steps will score, so that nothing need fill it in before; see `late_scores`.

        The first update's reference has scored before it is known where models are cut.
        """
        columns = self._planner.scorers if self.settings.late else frozenset[str]()
        return columns if self._has_trained else columns - {REFERENCE_LOGPROBS}

    @property
    def _scored_early(self) -> tuple[str, ...]:
        """The models that score samples before training."""
        late = {SCORED_BY[column] for column in self.late_columns} if self._has_trained else set[str]()
        return tuple(role for role in self._scoring if role not in late)

    # One iteration

    def roll_out(
        self,
        samples: Sequence[Sample],
        params: SamplingParams,
        on_generated: Callable[[Sequence[Sample]], None] = lambda samples: None,
        *,
        policy: Policy | None = None,
        max_new_tokens: Mapping[int, int] | None = None,
        teaches: bool = True,
        tail: TailPlan | None = None,
    ) -> RolloutReport:
        """Fill in responses and what models say of them, sample by sample; `on_generated` gets samples as they finish.

        policy: in place of the one that past rollouts suggest. max_new_tokens: see `LiveRollout`.
        teaches: whether later rollouts may be planned by this one. One that must not teach runs under a fixed policy;
            `forget_spans` drops what it cost.
        tail: what of the next `train` may be trained beside it.

        An engine that dies loses no sample, and another takes its place.
        """
        settings, rollouts = self.settings, self._rollouts
        self._offload_training()
        scored = self._scored_early
        is_planned = policy is None and teaches
        if policy is None:
            policy = rollouts.policy(samples) if teaches else rollouts.fixed_policy(len(samples))
        self._tail = None
        if tail is not None and self._models.is_ready:
            self._tail = tail_of(tail, settings, self._model_workers, self._planner, self.late_columns)
        kind: Any = LiveRollout if self._tail is None else partial(TailRollout, tail=self._tail)
        report: RolloutReport = kind(
            *(self._engines.workers, (lambda: self._model_workers) if scored else None, samples, params),
            policy=policy,
            limits=rollouts.limits,
            flow_roles=scored if settings.scoring.is_sharded else (),
            pad_token_id=settings.pad_token_id,
            costs=rollouts.costs(),
            dealing=rollouts.dealing(),
            on_generated=on_generated,
            max_new_tokens=max_new_tokens,
            timeout_s=settings.training.timeout_s,
            tell=self._tell,
        ).run()
        if teaches:
            is_plain = is_planned and not report.lost_engines and not (self._tail and self._tail.num_trained)
            calls = () if settings.scoring.is_sharded else report.scoring_calls
            rollouts.observe(samples, calls, report.makespan_s if is_plain else None)
        for engine in report.lost_engines:
            self._engines.replace(engine)
        return report

    @property
    def rollout_costs(self) -> CostModel | None:
        """What operations of rollouts cost here, as measured so far; None before there is enough."""
        return self._rollouts.costs()

    def generate(
        self, samples: Sequence[Sample], params: SamplingParams, *, max_new_tokens: Mapping[int, int] | None = None
    ) -> None:
        """Fill in the samples' responses. max_new_tokens: as of `roll_out`."""
        self._offload_training()
        stage_by_stage.generate(
            *(self._engines.workers, samples, params, self.settings.pad_token_id, self._tell),
            max_new_tokens=max_new_tokens,
            dealing=self._rollouts.dealing(),
            timeout_s=self.settings.training.timeout_s,
        )

    def infer(self, samples: Sequence[Sample]) -> None:
        """Fill in what models say of the samples."""
        if not (scored := self._scored_early):
            stage_by_stage.skip_inference(samples)
            return
        workers = self._model_workers
        self._tell("scoring")
        roles = scored if self.settings.scoring.is_sharded else ()
        stage_by_stage.infer(workers, samples, flow_roles=roles, timeout_s=self.settings.training.timeout_s)

    def recompute_logprobs(self, samples: Sequence[Sample]) -> None:
        """Fill in log-probabilities of the samples' tokens as the actor's training stages compute them now."""
        if self.settings.engines_sleep:
            self._engines.call(GenerationHandle.sleep)
        workers = self._model_workers
        self._tell("log-probabilities of the policy")
        stage_by_stage.recompute_logprobs(workers, samples, self.settings.training.timeout_s)

    def train(
        self,
        experience: Experience,
        rounds: Sequence[Round],
        learning_rates: Sequence[Mapping[str, float]],
        num_before: int = 0,
    ) -> Callable[[], dict[str, list[StepReport]]]:
        """Take the rounds' optimizer steps, and between them have what follows the policy move.

        Engines that sleep do so from now on until `synchronise`. learning_rates: by round, of the roles in it.
        num_before: steps of the policy that the run has taken. Returns what makes reports of each role's, and reads
        spans, which may be while weights travel.
        """
        if self.settings.engines_sleep:
            self._engines.call(GenerationHandle.sleep)
        training, mixing = self.settings.training, self.settings.mixing
        tail, self._tail = self._tail, None
        reports, planned = train(
            *(self._model_workers, self._planner, training, experience, rounds, learning_rates),
            late_columns=self.late_columns,
            tail=tail,
            pieces=[slice(len(rounds))] if mixing is None else mixing.pieces(num_before, len(rounds)),
            between=self._mix,
            meanwhile=(self._spans.ask_engines, self._rollouts.look_ahead),
            memory=self.settings.memory,
            tell=self._tell,
        )
        self._has_trained, self.tail_report = True, {} if tail is None else tail.report
        return self._spans.read_after(reports, planned)

    def synchronise(self, *beside: Stream, num_steps: int | None = None, part: Exported | None = None) -> None:
        """Give the trained weights to engines and to copies that score.

        num_steps: that the run has taken; None where what follows the policy is to stay. part: of what engines get.
        """
        self._tell("weights: to engines and inference")
        settings, workers, streams = self.settings, self._model_workers, self._streams
        is_sharded = settings.scoring.is_sharded  # then what trains is scored through its stages, without a copy
        copied = [role for role in self._trained if role in self._scoring and not is_sharded]
        self._offload_training(kept=(GENERATING, *copied))
        to_engines = streams.to_engines(workers, GENERATING, part or settings.exported, self._engines.takers)
        to_copies = [streams.to_copies(workers, role, role) for role in copied]
        lost = streams.run(to_engines, *to_copies, beside=beside)
        if num_steps is not None and settings.mixing is not None and settings.mixing.is_due(num_steps):
            self._mix()
        self._engines.replace_lost(lost)
        self._offload_training()

    @contextmanager
    def generating_by(self, role: str) -> Iterator[None]:
        """Have engines generate by the weights of this model, which scores and has the actor's shapes."""
        weights = put_state_dict(self.settings.spec(role, self._scoring[role]).computing(self._scoring[role]))
        self._exchange(lambda worker: worker.lend_stages(GENERATING, [weights]))
        yield
        self._exchange(lambda worker: worker.take_back_stages(GENERATING))

    def _exchange(self, call: Callable[[ModelHandle], Future[None]]) -> None:
        """Have the actor's stages get other weights, and engines generate by these."""
        if self.settings.engines_sleep:
            self._engines.call(GenerationHandle.sleep)
        gather([call(worker) for worker in self._model_workers])
        self.synchronise(part="whole" if self.settings.exported == "trained" else None)

    def _mix(self) -> None:
        """Move the model that follows the policy towards it, where its copies are."""
        mixing = self.settings.mixing
        assert mixing is not None
        self._streams.run(self._streams.to_copies(self._model_workers, GENERATING, mixing.role, mixing.alpha))

    def _offload_training(self, kept: Sequence[str] = ()) -> None:
        """Where asked for, but for weights of `kept` models; what is there already stays."""
        if self.settings.offloads_training:
            gather([worker.offload_training(kept) for worker in self._model_workers])

    # Weights, checkpoints, traces

    def fetch_weights(self, average: PreTrainedModel | None = None) -> None:
        """Copy the trained weights into the models that the run was started with, the actor's average into another."""
        self._tell("weights: to the driver")
        for role, model in self._trained.items():
            fetch_trained(model, self._model_workers, role)
        if average is not None:
            fetch_average(average, self._model_workers, GENERATING)

    def fetch_mixed_weights(self) -> None:
        """Copy what follows the policy into the model that the run was started with."""
        for role in self.settings.mixed_roles:
            fetch_scoring(self._scoring[role], self._model_workers[0], role)

    def save(self, directory: Path) -> None:
        """Write the training state of all models that change.

        Raises: OSError when a worker could not write it, or wrote it where it is not seen from here.
        """
        self._tell("saving: the training state")
        save_state(self._model_workers, directory, self.settings.mixed_roles)

    def load(self, directory: Path) -> None:
        """Read a training state, and give its weights to whoever holds copies."""
        self._tell("loading: the checkpoint")
        gather([worker.load(directory, self.settings.mixed_roles) for worker in self._model_workers])
        self.synchronise()

    def drain_spans(self) -> dict[str, dict[str, list[Span]]]:
        """Spans since the last call, by device and worker."""
        return self._spans.drain()

    def forget_spans(self) -> None:
        """Drop all spans since they were drained last: nothing is learnt from them, and no trace has them."""
        self._spans.forget()

    @property
    def planned(self) -> dict[str, float]:
        """What is known of the last update's plans, by the names of `iteration_report`."""
        return self._planner.report

    @property
    def process_ids(self) -> dict[str, list[int]]:
        """Of the workers, by their kind."""
        models = [handle.worker.process_id for handle in self._model_workers]
        return {"generation": self._engines.process_ids, "model": models}
