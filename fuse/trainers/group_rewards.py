"""Rewards from several functions and models, by TRL's signature."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from fuse.roles import numbered
from fuse.sample import Group, Sample
from fuse.trace import Span
from fuse.trainers.reward_calls import RewardCalls, RewardSettings
from fuse.trainers.rewards import RewardFunction, function_name

_logger = logging.getLogger(__name__)

_PROMPT, _TOKENS, _SAMPLE, _STATE = "prompt", "completion_ids", "sample_id", "trainer_state"
"""What calls carry of each sample, beside its texts and the dataset's columns."""

RewardSource = RewardFunction | PreTrainedModel


@dataclass(frozen=True, slots=True)
class ByName:
    """A reward function of TRL's, to be called with prompts and responses by position.

    It gets `prompts`, `completions` and `completion_ids`, the dataset's other columns, the trainer's state, and, in
    threads, what logs for it. Completions of conversations are messages. It may return None, for no reward.
    """

    function: RewardFunction
    journal: Journal | None = None

    may_abstain = True

    @property
    def __name__(self) -> str:
        return function_name(self.function)

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        /,
        *,
        prompt: list[Any],
        completion_ids: list[list[int]],
        sample_id: list[int],
        trainer_state: list[TrainerState],
        **columns: list[Any],
    ) -> Any:
        completions: list[Any] = [
            response if isinstance(of_one, str) else [{"role": "assistant", "content": response}]
            for of_one, response in zip(prompt, responses, strict=True)
        ]
        logs: dict[str, Any] = {} if self.journal is None else self.journal.for_call(sample_id)
        return self.function(
            prompts=prompt,
            completions=completions,
            completion_ids=completion_ids,
            trainer_state=trainer_state[0],
            **columns,
            **logs,
        )


class Journal:
    """What reward functions log of an update: metrics, and columns of the table of completions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics: dict[str, list[float]] = {}
        self.columns: dict[str, dict[int, Any]] = {}

    def for_call(self, sample_ids: Sequence[int]) -> dict[str, Callable[..., None]]:
        """The arguments `log_metric(name, value)` and `log_extra(column, values)` of a call with these samples."""

        def log_metric(name: str, value: float) -> None:
            with self._lock:
                self._metrics.setdefault(name, []).append(float(value))

        def log_extra(column: str, values: Sequence[Any]) -> None:
            with self._lock:
                self.columns.setdefault(column, {}).update(zip(sample_ids, values, strict=False))

        return {"log_metric": log_metric, "log_extra": log_extra}

    def drain(self) -> dict[str, float]:
        """Means of the metrics since the last call."""
        with self._lock:
            metrics, self._metrics = self._metrics, {}
        return {name: sum(values) / len(values) for name, values in metrics.items()}


class GroupRewards:
    """Calls every reward function on groups as they are complete, and has reward models read samples as they come.

    sources: functions and models. weights, tokenizers: of the sources; a function has no tokenizer.
    state: of the run, which functions are given.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        weights: Sequence[float],
        tokenizer: PreTrainedTokenizerBase,
        tokenizers: Sequence[PreTrainedTokenizerBase | None],
        settings: RewardSettings,
        state: Callable[[], TrainerState],
    ) -> None:
        self._tokenizer, self._state = tokenizer, state
        self._weights, self._tokenizers = weights, tokenizers
        self._models = {role: index for index, role in reward_roles(sources).items()}
        self.journal = Journal()
        journal = self.journal if settings.workers == "thread" else None
        self._calls = [
            RewardCalls(
                ByName(source, journal),
                self._decode,
                settings,
                columns_of=self._columns_of,
                write=_writer(index),
            )
            for index, source in enumerate(sources)
            if not isinstance(source, PreTrainedModel)
        ]
        self._samples: list[Sample] = []
        self._incomplete: dict[int, list[Sample]] = {}
        self._resources = ExitStack()

    def __enter__(self) -> GroupRewards:
        with ExitStack() as resources:
            for calls in self._calls:
                resources.enter_context(calls)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Write what reward models read: prompts and completions as texts, in their own tokens."""
        for sample in samples:
            sample.rewards = [math.nan] * len(self._weights)
        if not self._models:
            return
        responses = self._decode([sample.response_ids[: sample.length] for sample in samples])
        for sample, response in zip(samples, responses, strict=True):
            for role, index in self._models.items():
                sample.rewarded_ids[role] = _model_tokens(self._tokenizers[index], sample.columns[_PROMPT], response)

    def submit(self, samples: Sequence[Sample]) -> None:
        self._samples += samples
        for sample in samples:
            group = sample.group or Group(sample.id, 1)
            siblings = self._incomplete.setdefault(group.number, [])
            siblings.append(sample)
            if len(siblings) == group.size:
                complete = sorted(self._incomplete.pop(group.number), key=lambda one: one.id)
                for calls in self._calls:
                    calls.submit(complete)

    def finish(self) -> dict[str, float]:
        """As `RewardCalls.finish`, of all functions: samples then have `rewards`, and their weighted sum as score."""
        metrics: dict[str, float] = {}
        for calls in self._calls:
            for name, value in calls.finish().items():
                metrics[name] = metrics.get(name, 0.0) + value
        samples, self._samples = self._samples, []
        for sample in samples:
            self._complete(sample)
        without = [sample for sample in samples if all(math.isnan(reward) for reward in sample.rewards)]
        if without:
            _logger.warning(
                "no reward function returned a reward for %d of %d samples (the first to %r): their advantage is 0",
                len(without),
                len(samples),
                self._decode([list(without[0].prompt_ids)])[0][:60],
            )
        return {**metrics, **self.journal.drain()}

    def drain_spans(self) -> list[Span]:
        """As `RewardCalls.drain_spans`, of all functions."""
        return [span for calls in self._calls for span in calls.drain_spans()]

    def rewarded(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those of these samples, which models have scored, that all functions have rewarded; they have rewards."""
        found = list(samples)
        for calls in self._calls:
            found = calls.rewarded(found)
        for sample in found:
            self._complete(sample)
        return found

    def _complete(self, sample: Sample) -> None:
        """Write what models say, and the weighted sum of all rewards."""
        for role, index in self._models.items():
            assert sample.scores is not None
            sample.rewards[index] = sample.scores[role]
        pairs = zip(self._weights, sample.rewards, strict=True)
        sample.score = sum(weight * reward for weight, reward in pairs if not math.isnan(reward))

    def _columns_of(self, sample: Sample) -> Mapping[str, Any]:
        return {
            **sample.columns,
            _TOKENS: sample.response_ids[: sample.length],
            _SAMPLE: sample.id,
            _STATE: self._state(),
        }

    def _decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return self._tokenizer.batch_decode([list(one) for one in token_ids], skip_special_tokens=True)


def reward_roles(sources: Sequence[RewardSource]) -> dict[int, str]:
    """The role of each source that is a model, by its place."""
    places = [index for index, source in enumerate(sources) if isinstance(source, PreTrainedModel)]
    return dict(zip(places, numbered("reward", len(places)), strict=True))


def _model_tokens(tokenizer: Any, prompt: Any, response: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of prompt and response, of the whole conversation through the model's template, or of both texts.

    The prompt ends where its own tokens end, or before a token that is partly the response's.
    """
    if isinstance(prompt, str):
        before, text = prompt, prompt + response
    else:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)
    of_prompt, whole = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (before, text))
    num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(of_prompt, whole, strict=False)))
    end = max(1, num_common)
    return tuple(whole[:end]), tuple(whole[end:])


def _writer(index: int) -> Callable[[Sample, float], None]:
    def write(sample: Sample, reward: float) -> None:
        sample.rewards[index] = reward

    return write
