"""The option of how adapters are saved."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AdapterOptions:
    """A part of `RunConfig`."""

    merge_adapters: bool = field(
        default=False,
        metadata={
            "help": "Save a policy with adapters as one without them, that computes the same, in place of PEFT's files."
        },
    )
