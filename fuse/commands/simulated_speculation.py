"""What `fuse simulate --speculation` adds: engines that draft, and what that saves of rollouts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from fuse.commands.tables import cell
from fuse.interstage.costs import CostModel
from fuse.interstage.speculation import DRAFTS, Speculation

SPECULATION = ("speculation", "acceptance", "draft_share")
"""The options, as they are named in arguments."""
NO_DRAFTS = "off"
KINDS = (NO_DRAFTS, *DRAFTS)
"""Values of the first."""
_BATCHES, _TOKENS = (1, 8, 64, 256), 1000


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of speculative decoding."""
    parser.add_argument(
        "--speculation", choices=KINDS,
        help=f"simulated engines draft, as many tokens as pay for each batch; {NO_DRAFTS}: they do not (default: as "
        "the costs say)",
    )  # fmt: skip
    defaults = (
        ", ".join(f"{draft.acceptance} of {name}" for name, draft in DRAFTS.items()),
        ", ".join(f"{draft.draft_share} of {name}" for name, draft in DRAFTS.items()),
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        metavar="A",
        help=f"a token's chance of being drafted right (default: {defaults[0]})",
    )
    parser.add_argument(
        "--draft-share", type=float, metavar="C",
        help=f"what a step of the draft takes of one of the model, but for its context (default: {defaults[1]})",
    )  # fmt: skip


def speculation_of(arguments: argparse.Namespace, own: Speculation | None) -> Speculation | None:
    """How engines are asked to draft, or else as costs have it by themselves; None if they do not.

    Raises:
        ValueError: what drafts are like is given without drafts, or is impossible.
    """
    given = {name: getattr(arguments, name) for name in SPECULATION[1:] if getattr(arguments, name) is not None}
    if arguments.speculation in (None, NO_DRAFTS):
        if given:
            option = next(iter(given)).replace("_", "-")
            raise ValueError(f"--{option} says what drafts are like: give --speculation {'|'.join(DRAFTS)}, too")
        return own if arguments.speculation is None else None
    return replace(DRAFTS[arguments.speculation], **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationRow:
    """Mean seconds of a rollout under a policy, without drafts and with them."""

    policy: str
    plain_s: float
    seconds: float

    @property
    def gain(self) -> float:
        return self.plain_s / self.seconds


def show_drafts(console: Console, costs: CostModel) -> None:
    """How well engines draft, and how many tokens; nothing where they do not."""
    draft = costs.speculation
    if draft is None:
        return
    counts = (f"{draft.best(costs.plain_step, batch, batch * _TOKENS).num_drafts} of {batch}" for batch in _BATCHES)
    console.print(
        f"drafts: {draft.acceptance:g} of tokens are right, a step takes {draft.draft_share:g} of the model's; tokens "
        f"drafted in batches with {_TOKENS:,} tokens of context each: {', '.join(counts)}",
        soft_wrap=True,
        markup=False,
    )


def show_speculation(console: Console, rows: Sequence[tuple[str, SpeculationRow]]) -> None:
    """A line per setting and policy. rows: with the setting's name."""
    titles = (Column("lengths", overflow="fold"), "policy", "no drafts", "drafts", "gain")
    table = Table(*titles, box=SIMPLE, padding=(0, 0, 0, 1))
    for column in table.columns[2:]:
        column.justify = "right"
    for setting, row in rows:
        table.add_row(cell(setting), row.policy, f"{row.plain_s:.4g}", f"{row.seconds:.4g}", f"{row.gain:.3f}x")
    console.print(table)
