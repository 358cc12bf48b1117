"""What a policy's KL is measured from: a model of its own, or the policy by other adapters, or by none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from fuse.config.run import RunConfig
from fuse.driver.fleet_settings import Variant
from fuse.intrastage.adapters import Adapters, is_adapted
from fuse.roles import GENERATING

REFERENCE_ADAPTER = "ref"
"""What TRL's trainers without a critic call the copy of an adapter that they measure from."""


def reference_of(
    policy: PreTrainedModel, adapter: str | None, given: PreTrainedModel | None = None
) -> tuple[PreTrainedModel | None, Mapping[str, Variant]]:
    """The model, and which roles are variants of others. Where the policy has adapters and none is given: no model.

    adapter: that of the policy by which its reference computes; None for none.

    Raises: ValueError for an adapter that the policy lacks, or that trains, or beside a model.
    """
    adapters = Adapters.of(policy)
    if adapter is not None:
        if given is not None:
            raise ValueError("ref_adapter_name beside ref_model: either says what the reference is, so leave one out")
        if adapter not in adapters.configs or adapter == adapters.active:
            others = ", ".join(name for name in adapters.configs if name != adapters.active) or "none"
            raise ValueError(
                f"ref_adapter_name={adapter!r} is no adapter of the policy beside the one that trains, which are "
                f"{others}: add it by model.add_adapter or model.load_adapter"
            )
    if given is None and adapters:
        return None, {"reference": Variant(GENERATING, adapter)}
    return given if given is not None else copy.deepcopy(policy), {}


def with_reference(model: Any, is_wanted: bool) -> Any:
    """A model that comes with an adapter, with a frozen copy of it beside it, as TRL's trainers without a critic do."""
    if is_wanted and is_adapted(model) and REFERENCE_ADAPTER not in model.peft_config:
        name = model.active_adapter
        model.add_adapter(REFERENCE_ADAPTER, model.peft_config[name])
        state_dict = model.state_dict()
        for key, tensor in state_dict.items():
            if f".{REFERENCE_ADAPTER}." in key:
                tensor.copy_(state_dict[key.replace(f".{REFERENCE_ADAPTER}.", f".{name}.")])
    return model


def check_adapted_reference(args: RunConfig, policy: PreTrainedModel, *, is_given: bool, adapter: str | None) -> None:
    """Raises: ValueError for options of a reference that is another model, where a policy has adapters."""
    if not Adapters.of(policy):
        return
    if args.mixing is not None:
        raise ValueError(
            "sync_ref_model=True with adapters: the reference is the policy without them, which does not change; leave "
            "it out"
        )
    if getattr(args, "reward_baseline", None) == "reference" and (is_given or adapter is not None):
        raise ValueError(
            "reward_baseline='reference' with adapters: engines generate by the policy without them, and not by "
            f"{'ref_model' if is_given else 'ref_adapter_name'}; leave one of them out"
        )
