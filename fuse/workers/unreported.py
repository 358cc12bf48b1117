"""What a generation worker knows of a live sample and has not told yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fuse.engines.engine import GeneratedToken
from fuse.trace import SpanRecorder


@dataclass(slots=True)
class Unreported:
    """Tokens of a live sample that no poll has taken yet, and where in the response they start.

    prefill_tokens: what the engine has to compute or to copy before the next token, 0 once that is there.
    prompt_tokens, first: of the sample, and where in its response it entered. entered, started: marks of then, and of
    the step that gave its first token here; None before it.
    """

    position: int
    context_tokens: int
    prefill_tokens: int = 0
    prompt_tokens: int = 0
    first: int = 0
    entered: Any = None
    started: Any = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    def add(self, token: GeneratedToken, start: Any) -> None:
        """A token that it got from a step which began at the mark `start`."""
        self.context_tokens, self.prefill_tokens = self.context_tokens + 1, 0
        self.started = start if self.started is None else self.started
        self.token_ids.append(token.token_id)
        self.logprobs.append(token.logprob)
        self.finished = token.finished

    def take(self) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
        """Where its tokens start, these, and their log-probabilities; from now on they are reported."""
        taken = self.position, tuple(self.token_ids), tuple(self.logprobs)
        self.position += len(self.token_ids)
        self.token_ids, self.logprobs = [], []
        return taken

    def record_stay(self, sample_id: int, recorder: SpanRecorder) -> None:
        """A span of its time in the engine, from the first step that gave it a token to now; none without a token."""
        if self.started is None:
            return
        sizes = {
            "sample": sample_id,
            "prompt_tokens": self.prompt_tokens,
            "first": self.first,
            "tokens": self.position + len(self.token_ids),
            "finished": self.finished,
        }
        name, end = f"sample {sample_id}", recorder.mark()
        recorder.record(name, "sample", ready=self.entered, start=self.started, end=end, arguments=sizes)
