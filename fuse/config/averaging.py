"""The option of averaging weights over optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AveragingOptions:
    """A part of `RunConfig`."""

    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep a moving average of the policy's weights, of which every optimizer step keeps this share and "
            "takes the rest from the new weights. It is saved beside the policy, in `ema`, and part of checkpoints; "
            "nothing is generated or trained by it. Default: none."
        },
    )

    def check_averaging(self) -> None:
        """Raises: ValueError for a share that is none, or with which nothing is averaged."""
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay={self.ema_decay} must lie between 0 and 1, both excluded: at 0 the average is the policy, "
                "at 1 it never moves; leave it out for none"
            )
