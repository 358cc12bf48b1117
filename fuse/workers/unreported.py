"""What a generation worker knows of a live sample and has not told yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
