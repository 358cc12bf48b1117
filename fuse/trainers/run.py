"""Where a run is: its state, its log, its learning rate, its checkpoints, and the callbacks that hear of them."""

from __future__ import annotations

import copy
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl
from transformers.trainer_utils import SaveStrategy

from fuse import checkpoint, run_state, update_log
from fuse.config.differences import differences, kept_options
from fuse.config.run import RunConfig
from fuse.config.run_length import RunLength
from fuse.driver.fleet import Fleet
from fuse.idle_causes import Tracks
from fuse.sample import Sample
from fuse.termination import Terminated
from fuse.trace import PhaseClock
from fuse.trace_file import DRIVER, write_chrome_trace
from fuse.trainers.callbacks import (
    PPOState,
    callback_handler,
    callback_states,
    restore_callbacks,
)
from fuse.trainers.iteration import Iteration
from fuse.trainers.learning_rates import (
    LearningRates,
    learning_rate_schedule,
    learning_rates,
    logged_rates,
    restore_learning_rates,
)
from fuse.trainers.publish import write_policies
from fuse.trainers.report import iteration_report, summary_line
from fuse.trainers.reporters import continue_reports, named_for, reported_to
from fuse.trainers.update_metrics import device_bytes, drafts, migrations, token_rates
from fuse.training.rounds import Round, roles_of
from schedules.files import dispensable

logger = logging.getLogger(__name__)


class Run:
    """A run's state, from one update to the next.

    model: what callbacks are given; `policy` is what is saved, with the `average` of its weights where one is kept.
    num_rows: of the dataset. rate_name: what the learning rate is logged as. tell: hears what is being done.
    """

    def __init__(
        self,
        args: RunConfig,
        length: RunLength,
        model: nn.Module,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None,
        *,
        num_rows: int,
        rate_name: str = "lr",
        tell: Callable[[str], None],
    ) -> None:
        self.args, self.length, self.model, self.policy, self.tokenizer = args, length, model, policy, tokenizer
        self.average = None if args.ema_decay is None else copy.deepcopy(policy)
        self.output_dir = Path(str(args.output_dir))
        self._log = self.output_dir / update_log.NAME
        self._num_rows, self._rate_name, self._tell = num_rows, rate_name, tell
        self._is_new = True
        self._saved_step: int | None = None  # of the last checkpoint that this run can go on from
        self._written: Future[None] | None = None  # of the last update
        self.optimizer, self.lr_scheduler = learning_rate_schedule(args, model, length.num_steps)
        self.callback_handler = callback_handler(
            args,
            callbacks,
            model=model,
            processing_class=tokenizer,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
        )
        self.control = TrainerControl()
        self.state = PPOState()

    @property
    def num_steps_left(self) -> int:
        return max(0, self.length.num_steps - self.state.global_step)

    @property
    def num_updates_left(self) -> int:
        return math.ceil(self.num_steps_left / self.length.steps_per_update)

    @property
    def num_updates_done(self) -> int:
        return self.state.global_step // self.length.steps_per_update

    # Updates

    def begin(self, resumed: Path | None) -> None:
        """Start afresh, or where a checkpoint was written.

        Raises:
            ValueError: the checkpoint is another run's.
        """
        args = self.args
        if not self._is_new:
            self._schedule_anew()
        self._is_new = False
        self._run_id, self._saved_s = uuid.uuid4().hex, 0.0
        if resumed is None:
            self.state.global_step, self.state.episode, self.state.log_history = 0, 0, []
            self.state.kl_coef, self.state.reference_scores, self.state.reward_variances = None, [], []
        else:
            self.state = PPOState.load_from_json(str(resumed / "trainer_state.json"))
            saved = run_state.RunState.load(resumed / checkpoint.RUN_STATE_NAME, self._identity())
            self._run_id, self._saved_s = saved.run_id, saved.saved_s
            self._saved_step = self.state.global_step
            if changed := differences(saved.options, kept_options(args)):
                logger.warning("%s was written with other options: %s", resumed, ", ".join(changed))
            restore_learning_rates(self.lr_scheduler, saved.lr_scheduler, resumed)
            continue_reports(self.callback_handler, saved.reports, self.state.global_step)
            if args.restore_callback_states_from_checkpoint:
                untyped: Any = self.state.stateful_callbacks  # transformers has it as a list
                restore_callbacks(self.callback_handler, untyped)
            run_state.restore_random_generators(saved.random_generators)
        with dispensable(self._log):
            update_log.keep_until(self._log, self.state.global_step)
        self.state.max_steps = self.length.num_steps
        self.state.num_train_epochs = self.length.num_epochs(self._num_rows)
        state: Any = self.state
        state.compute_steps(args, self.state.max_steps)

    def _schedule_anew(self) -> None:
        """Where an earlier run of this trainer has used up the learning-rate schedule, or was asked to stop."""
        handler: Any = self.callback_handler
        self.optimizer, self.lr_scheduler = learning_rate_schedule(self.args, self.model, self.length.num_steps)
        handler.optimizer, handler.lr_scheduler = self.optimizer, self.lr_scheduler
        self.control = TrainerControl()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What updates leave to look at is written beside the updates that follow, and is there after the body."""
        with ThreadPoolExecutor(1, thread_name_prefix="traces") as self._writer:
            yield
        self._wait_written()

    def _wait_written(self) -> None:
        """Raises: what it was not written for, other than its disk."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def updates(self) -> Iterator[int]:
        """The updates that are left, counted from 1; ends early where a callback asks for it."""
        self._start_s, self._start_episode = time.monotonic(), self.state.episode
        with named_for(self._run_id, self.args):
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        while self.num_steps_left and not self.control.should_training_stop:
            yield self.num_updates_done + 1

    def take_steps(self, rounds: Sequence[Round]) -> tuple[Sequence[Round], list[LearningRates]]:
        """The rounds of an update that the run has left, and the learning rates of each: the schedule goes on."""
        counts_each = self.length.steps_per_update > 1 or len(rounds) == 1
        taken = rounds[: self.num_steps_left] if counts_each else rounds
        self._num_counted = len(taken) if counts_each else 1
        rates: list[LearningRates] = []
        for _ in range(self._num_counted):
            rates.append(learning_rates(self.args, self.lr_scheduler, roles_of(rounds)))
            self._logged_rates = logged_rates(self.args, self.lr_scheduler, self._rate_name)
            self.lr_scheduler.step()
        return taken, rates * (len(taken) // self._num_counted)

    def finish_update(
        self,
        fleet: Fleet,
        samples: Sequence[Sample],
        rounds: Sequence[Round],
        metrics: Mapping[str, float],
        clock: PhaseClock,
    ) -> Iteration:
        """Count the update, report it, and save what is due. rounds: that were taken."""
        state = self.state
        self.control.should_evaluate = False  # of the update before
        for _ in range(self._num_counted - 1):
            state.global_step += 1
            self.control = self.callback_handler.on_step_end(self.args, state, self.control)
        state.global_step += 1
        state.num_input_tokens_seen += sum(len(sample.prompt_ids) + sample.length for sample in samples)
        state.epoch = state.episode / (self._num_rows * self.length.samples_per_prompt)
        eps = int((state.episode - self._start_episode) / (time.monotonic() - self._start_s))
        tracks = fleet.drain_spans()
        times = iteration_report(tracks, clock, fleet.planned)
        logger.info("update %d/%d: %s", state.global_step, state.max_steps, summary_line(times))
        times |= (
            token_rates(samples, rounds, tracks, clock) | drafts(tracks) | migrations(tracks) | device_bytes(tracks)
        )
        counts = {"episode": state.episode, "num_tokens": float(state.num_input_tokens_seen)}
        self.log({"eps": eps, **metrics, **self._logged_rates, **counts, "step_time": times["time/total"], **times})
        logged = state.log_history[-1]
        if self.args.trace_steps:
            self._wait_written()
            self._written = self._writer.submit(self._write, state.global_step, logged, tracks, clock)
        self.control = self.callback_handler.on_step_end(self.args, state, self.control)
        if self.control.should_save:
            self.save_checkpoint(fleet)
        return Iteration(
            update=state.global_step,
            samples=samples,
            metrics=logged,
            phases=dict(clock.seconds),
            tracks=tracks,
        )

    def terminate(self, fleet: Fleet) -> NoReturn:
        """The process was asked to end, and an update has ended.

        Raises: Terminated, after saving what is not saved yet, unless the run saves nothing.
        """
        if self.args.save_strategy != SaveStrategy.NO and self._saved_step != self.state.global_step:
            self.save_checkpoint(fleet)
        raise Terminated(f"terminated after update {self.state.global_step}: {self.how_to_resume}")

    @property
    def how_to_resume(self) -> str:
        """For who has ended a run."""
        if self._saved_step is None or self.args.save_only_model:
            return "nothing was saved to resume from"
        return f"checkpoint-{self._saved_step} is in {self.output_dir}, to go on with by resume_from_checkpoint=True"

    def end(self, fleet: Fleet) -> None:
        """All updates are done, and the trained weights are with the caller's models."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.control.should_save:
            self.save_checkpoint(fleet)

    @property
    def shows_completions(self) -> bool:
        """Whether completions of the evaluation prompts are due after this update."""
        wanted = self.args.num_sample_generations
        if self.control.should_evaluate:
            return True
        return wanted > 0 and (self.state.global_step - 1) % max(1, self.state.max_steps // wanted) == 0

    # The log

    def log(self, logs: dict[str, float]) -> None:
        """Add the epoch, remember and report to the callbacks."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def show_activity(self, text: str) -> None:
        """Say behind transformers' progress bar what is being done, if there is one."""
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.set_postfix_str(text)

    def _about_traces(self, update: int) -> dict[str, object]:
        """What readers of a trace need to know to simulate its rollout."""
        args = self.args
        policy = args.migration_policy if args.inter_stage_fusion else "none"
        limits = {"max_new_tokens": args.max_response_tokens, "max_batch": args.engine_batch_size}
        return {"update": update, "policy": policy, **limits}

    def _write(self, update: int, logged: Mapping[str, float], tracks: Tracks, clock: PhaseClock) -> None:
        """Write the update's line in the log, and its trace if that is due."""
        if update % self.args.trace_steps == 0:
            path = self.output_dir / "traces" / f"iteration-{update:05d}.json"
            with dispensable(path):
                driver = {"phases": clock.spans, "rewards": clock.rewards}
                write_chrome_trace(path, {**tracks, DRIVER: driver}, self._about_traces(update))
                _delete_oldest(path, self.args.trace_limit)
        with dispensable(self._log):
            update_log.append(self._log, update_log.record_of(update, logged, tracks, clock))

    # Checkpoints

    def save_checkpoint(self, fleet: Fleet) -> None:
        """Raises: SaveError when it cannot be written; earlier ones are intact."""
        self._tell("saving: a checkpoint")
        self._wait_written()  # a run that goes on from it has all that came before
        self._saved_s = max(time.time(), self._saved_s)  # also where this host's clock is behind that of the last
        with checkpoint.writing(self.output_dir, self.state.global_step) as directory:
            fleet.fetch_weights(self.average)
            merges = self.args.merge_adapters
            write_policies(directory, self.policy, self.average, self.tokenizer, merges=merges)
            if not self.args.save_only_model:
                fleet.save(directory / checkpoint.WORKER_STATE_NAME)
            run_state.RunState(
                run_id=self._run_id,
                saved_s=self._saved_s,
                run=self._identity(),
                lr_scheduler=self.lr_scheduler.state_dict(),
                random_generators=run_state.random_generators(),
                options=kept_options(self.args),
                reports=reported_to(self.callback_handler),
            ).save(directory / checkpoint.RUN_STATE_NAME)
            remembered: Any = callback_states(self.callback_handler, self.control)
            self.state.stateful_callbacks = remembered
            self.state.save_to_json(str(directory / "trainer_state.json"))
        written = self.output_dir / f"checkpoint-{self.state.global_step}"
        self._saved_step = self.state.global_step
        checkpoint.rotate(self.output_dir, self.args.save_total_limit, written)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _identity(self) -> dict[str, int]:
        """What must not change on resumption."""
        mixes = {} if self.args.mixing is None else {"sync_ref_model": 1}  # earlier checkpoints have no such entry
        return {**self.length.identity, "seed": self.args.seed, "dataset_rows": self._num_rows, **mixes}


def _delete_oldest(written: Path, most: int) -> None:
    """Keep `most` traces beside the one just written, itself included; 0 keeps all."""
    if most:
        others = [path for path in written.parent.glob("iteration-*.json") if path != written]
        others.sort(key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
        for path in others[most - 1 :]:
            path.unlink(missing_ok=True)
