"""A tied embedding that a pipeline's first and last stage hold a copy of: one gradient, and one that steps.

The first stage has the moments, steps its copy and gives it to the last one: 8 bytes of a parameter less there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fuse.intrastage.communication import ModelGroups
from fuse.intrastage.gradient_sums import add_onto_first, all_reduce_gradients, give_first_to_others
from fuse.intrastage.optimizer_shards import give_to_peer
from fuse.intrastage.stage import TrainedStage


class TiedCopies:
    """Those of one model on this rank. name: of the model. parameters: that train, by (replica, stage) and name."""

    def __init__(
        self,
        name: str,
        stages: Mapping[tuple[int, int], TrainedStage],
        parameters: Mapping[tuple[int, int], Mapping[str, nn.Parameter]],
        groups: ModelGroups,
    ) -> None:
        self._name, self._groups, self._parameters = name, groups, parameters
        self._last = groups.num_stages - 1
        self._names = {
            key: sorted(name for name in stages[key].tied_names if name in held)
            for key, held in parameters.items()
            if key[1] in (0, self._last)
        }

    def given(self, key: tuple[int, int]) -> frozenset[str]:
        """Names of a stage's parameters that another one steps."""
        return frozenset(self._names[key]) if key[1] == self._last > 0 else frozenset()

    def add_gradients(self) -> None:
        """Give both copies the sum of their gradients, replica by replica. Waits for peers."""
        for replica, _, copies in self._by_replica():
            group = self._groups.ends.get(replica)
            if group is not None:
                all_reduce_gradients(copies[0], group, f"tied embedding gradients of {self._name}")
            else:
                add_onto_first(copies)
                give_first_to_others(copies)

    def share(self) -> None:
        """Give last stages what first ones have stepped, replica by replica. Waits for peers."""
        for replica, ends, copies in self._by_replica():
            group = self._groups.ends.get(replica)
            if group is None:
                first, last = ([one.detach() for one in own] for own in copies)
                torch._foreach_copy_(last, first)
                continue
            what = f"the tied embedding of {self._name}"
            give_to_peer([one.detach() for one in copies[0]], group, what, gives=ends[0][1] == 0)

    def _by_replica(self) -> list[tuple[int, list[tuple[int, int]], list[list[nn.Parameter]]]]:
        """Replica, its ends here, and their copies, of each that has some."""
        found = []
        for replica in range(self._groups.num_replicas):
            ends = [key for key in dict.fromkeys([(replica, 0), (replica, self._last)]) if self._names.get(key)]
            if ends:
                found.append(
                    (replica, ends, [[self._parameters[key][one] for one in self._names[key]] for key in ends])
                )
        return found
