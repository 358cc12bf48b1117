"""What of a planned run has adapters, and which of its models are over one base."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fuse.driver.model_size import without_weights
from fuse.driver.one_base import first_of_equals
from fuse.roles import training
from fuse.training.model_spec import ModelSpec

if TYPE_CHECKING:
    from fuse.intrastage.adapters import LoraConfig

_REPLACING = {"actor": (), "critic": ("score",)}


def adapted(
    specs: Mapping[str, ModelSpec], lora: LoraConfig, *, of_other_models: Container[str]
) -> dict[str, ModelSpec]:
    """What trains, with adapters; and the reference, which is the policy without them.

    of_other_models: roles of models that are another than the policy's. All others that train begin with its weights,
        as the plan has it, for there are none to compare.
    """
    made = {role: specs[role].adapted(lora, replacing=_REPLACING[role]) for role in training(specs)}
    if "reference" in specs and "reference" not in of_other_models:
        adapters = replace(made["actor"].adapters, active=None)
        made["reference"] = replace(made["actor"], adapters=adapters, variant_of="actor")
    fixed = {
        role: {name: one for name, one in without_weights(spec).named_parameters() if name in spec.frozen}
        for role, spec in made.items()
        if role not in of_other_models
    }
    origins = first_of_equals(fixed, lambda first, second: True)
    return made | {role: replace(made[role], origins=of_role) for role, of_role in origins.items()}
