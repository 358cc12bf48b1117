"""One optimizer step of a model whose stages and replicas are spread over ranks: AdamW as if it were in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fuse.intrastage.communication import ModelGroups, all_gather_floats
from fuse.intrastage.gradient_block import GradientBlock
from fuse.intrastage.gradient_sums import add_onto_first, all_reduce_gradients, give_first_to_others, gradient_of
from fuse.intrastage.optimizer_shards import owned, owners, share_parameters
from fuse.intrastage.stage import TrainedStage
from fuse.intrastage.tied_copies import TiedCopies

AVERAGE = "average"
"""A part of the state: the moving average of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWConfig:
    """AdamW's settings, with the meaning transformers.TrainingArguments gives them; max_grad_norm 0 never clips."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0


class ModelOptimizer:
    """Steps the stages of one model that this rank holds, in agreement with the ranks that hold the rest.

    name: of the model, for errors.
    stages: by (replica, stage).
    groups: from `open_model`; None when the whole model is on this device alone.
    frozen: Hugging Face names of the model's parameters that stay as they are, and do not require gradients: they have
        no state, and no part in the gradient's norm.

    gradients: where those of an update may lie.
    average_decay: keeps a moving average of the weights w, from the initial ones on, which every step makes
        average_decay * average + (1 - average_decay) * w; None for none. Source: DeepSpeed-Chat's `enable_ema`, which
        averages after every micro-batch, between two steps over the same weights.

    Replicas on different ranks share the optimizer's state, as `fuse.intrastage.optimizer_shards` has it; of a tied
    embedding the first stage has it, see `fuse.intrastage.tied_copies`.

    Weight decay spares biases and normalisations, as transformers.Trainer's groups do. Gradients of replicas, and of
    the two copies of a tied embedding, are added up: the losses are expected to be weighted for a sum. Ranks that hold
    stages of several models come to sums in the same order, and then to what they share. Sums of each are of replicas
    stage by stage, then of tied copies replica by replica, then of the norm. Opposite replicas, of which a rank holds
    different stages, meet in that order too, so that none waits for a rank that waits for it.
    """

    def __init__(
        self,
        name: str,
        stages: Mapping[tuple[int, int], TrainedStage],
        groups: ModelGroups | None,
        config: AdamWConfig,
        *,
        frozen: frozenset[str] = frozenset(),
        average_decay: float | None = None,
    ) -> None:
        if groups is None:
            groups = ModelGroups(1, 1 + max(stage for _, stage in stages), {}, {}, {})
        self._name, self._groups, self._config, self.frozen = name, groups, config, frozen
        self._stages = dict(sorted(stages.items(), key=lambda item: (item[0][1], item[0][0])))
        self._num_steps, self._average_decay = 0, average_decay
        self._all_parameters = {key: dict(stage.named_parameters()) for key, stage in self._stages.items()}
        self._parameters = {
            key: {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
            for key, parameters in self._all_parameters.items()
        }
        self._tied = TiedCopies(name, self._stages, self._parameters, groups)
        stepped = {
            key: {name: one for name, one in held.items() if name not in self._tied.given(key)}
            for key, held in self._parameters.items()
        }
        self._owners = {  # by stage that several ranks hold, by name
            key[1]: owners({name: one.numel() for name, one in held.items()}, groups.replicas[key[1]])
            for key, held in stepped.items()
            if key[1] in groups.replicas
        }
        self._own = {key: self._owned(key[1], held) for key, held in stepped.items()}
        decayed: list[nn.Parameter] = []
        undecayed: list[nn.Parameter] = []
        for key, stage in self._stages.items():
            spared = stage.undecayed_names
            for parameter_name, parameter in self._own[key].items():
                (undecayed if parameter_name in spared else decayed).append(parameter)
        param_groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        self._adamw: torch.optim.AdamW | None = None
        if decayed or undecayed:
            self._adamw = torch.optim.AdamW(
                [group for group in param_groups if group["params"]],
                betas=config.betas,
                eps=config.eps,
                fused=True,
            )
        self.gradients = GradientBlock(one for held in self._parameters.values() for one in held.values())
        # Made now rather than by the first step, so that it can be saved and loaded before it.
        for parameter in (*decayed, *undecayed):
            assert self._adamw is not None
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            if average_decay is not None:
                self._adamw.state[parameter][AVERAGE] = torch.zeros_like(parameter)

    def step(self, learning_rate: float) -> float:
        """Apply the gradients gathered since the last step, and clear them: `reduce`, `apply` and `share`.

        Returns the norm of the whole model's gradient before clipping, 0.0 on a rank without any stage of it.

        Raises: CommunicationError when a peer died or did not answer in time.
        """
        norm = self.reduce()
        self.apply(norm, learning_rate)
        self.share()
        return norm

    def reduce(self, computing: Callable[[], AbstractContextManager[None]] = nullcontext) -> float:
        """Add gradients up over replicas and tied copies; returns the norm of the whole model's. Waits for peers.

        A parameter that got no gradient has a gradient of zero. computing: is entered where nobody is waited for.

        Raises: CommunicationError when a peer died or did not answer in time.
        """
        for parameters in self._parameters.values():
            for parameter in parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self._add_replicas()
        self._tied.add_gradients()
        return self._gradient_norm(computing)

    def apply(self, norm: float, learning_rate: float) -> None:
        """Clip the reduced gradients, of this norm, step what is this rank's, and clear them. Waits for nobody."""
        if self._adamw is not None:
            self._clip(norm)
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            if self._num_steps == 0:
                self._begin_average()
            self._adamw.step()
            if self._average_decay is not None:
                averages, weights = self._averages_and_weights()
                torch._foreach_lerp_(averages, weights, 1 - self._average_decay)
        self.gradients.clear()
        self._num_steps += 1

    def share(self) -> None:
        """Give replicas and copies what this rank has stepped, and take what they have. Waits for peers.

        Raises: CommunicationError when a peer died or did not answer in time.
        """
        for stage in dict.fromkeys(stage for _, stage in self._parameters):
            if stage in self._owners:
                copies = [self._detached(key) for key in self._parameters if key[1] == stage]
                what = f"parameters of {self._name} stage {stage}"
                share_parameters(copies, self._owners[stage], self._groups.replicas[stage], what)
        self._tied.share()

    STATE_PARTS = ("parameter", "exp_avg", "exp_avg_sq")

    @property
    def state_parts(self) -> tuple[str, ...]:
        """STATE_PARTS, and the average where there is one."""
        return self.STATE_PARTS if self._average_decay is None else (*self.STATE_PARTS, AVERAGE)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name of every parameter here that trains, and those `state_parts` of it that are here, as moments may not be.

        Live tensors of its shape. Copies repeat.
        """
        for key, parameters in self._parameters.items():
            parts = {part: self._state_part(key, part) for part in self.state_parts}
            for name in parameters:
                yield name, {part: held[name] for part, held in parts.items() if name in held}

    def weights(self) -> Iterator[Tensor]:
        """Every parameter here, whether it trains or not."""
        return (one.detach() for parameters in self._all_parameters.values() for one in parameters.values())

    def export_state(self, part: str) -> dict[str, Tensor]:
        """One of `state_parts` of every parameter here that trains, as far as it is, by its name, in host memory.

        Of the devices that share a stage the first has all, the others nothing; all of them call this at once.
        """
        if part == AVERAGE and self._num_steps == 0:
            self._begin_average()
        whole: dict[str, Tensor] = {}
        for key, stage in self._stages.items():
            for name, tensor in self._state_part(key, part).items():
                named = stage.to_hugging_face({name: tensor})  # one by one: a device never holds two wholes
                if self._groups.lane == 0:
                    whole |= {source: one.cpu() for source, one in named.items()}
        return whole

    def import_state(self, part: str, whole: Mapping[str, Tensor]) -> None:
        """Set what is here of one of `state_parts`, given at least all of `state_shapes`."""
        for key, stage in self._stages.items():
            own = self._state_part(key, part)
            for name, tensor in stage.from_hugging_face(whole):
                if name in own:
                    own[name].copy_(tensor)

    def _state_part(self, key: tuple[int, int], part: str) -> dict[str, Tensor]:
        """Live tensors by the parameters' names."""
        if part == "parameter":
            return self._detached(key)
        moments = {} if self._adamw is None else self._adamw.state
        return {name: moments[parameter][part] for name, parameter in self._own[key].items()}

    def _begin_average(self) -> None:
        """From the weights, which are loaded after this is made, and before the first step."""
        if self._adamw is not None and self._average_decay is not None:
            torch._foreach_copy_(*self._averages_and_weights())

    def _averages_and_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        assert self._adamw is not None
        stepped = [parameter for group in self._adamw.param_groups for parameter in group["params"]]
        return [self._adamw.state[one][AVERAGE] for one in stepped], [one.detach() for one in stepped]

    def _owned(self, stage: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that this rank steps."""
        if stage not in self._owners:
            return dict(parameters)
        names = owned(self._owners[stage], self._groups.replicas[stage])
        return {name: one for name, one in parameters.items() if name in names}

    def _detached(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters[key].items()}

    @property
    def model_shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every parameter of the model that trains; none on a rank without a stage."""
        return self._trained(next((stage.model_shapes for stage in self._stages.values()), {}))

    @property
    def state_shapes(self) -> Mapping[str, torch.Size]:
        """Those of `model_shapes` that are here, whole or in part."""
        return self._trained({name: one for stage in self._stages.values() for name, one in stage.stage_shapes.items()})

    def _trained(self, shapes: Mapping[str, torch.Size]) -> Mapping[str, torch.Size]:
        return {name: shape for name, shape in shapes.items() if name not in self.frozen}

    @property
    def num_steps(self) -> int:
        """Steps taken, which AdamW's bias correction depends on."""
        return self._num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        self._num_steps = num_steps
        if self._adamw is not None:
            for moments in self._adamw.state.values():
                moments["step"].fill_(num_steps)

    def _add_replicas(self) -> None:
        # Stage by stage: ranks that hold several stages meet in the same order everywhere.
        for stage in dict.fromkeys(stage for _, stage in self._parameters):
            copies = [list(held.values()) for (_, number), held in self._parameters.items() if number == stage]
            if not copies[0]:
                continue
            add_onto_first(copies)
            group = self._groups.replicas.get(stage)
            if group is not None:
                all_reduce_gradients(copies[0], group, f"gradients of {self._name} stage {stage}")
            give_first_to_others(copies)

    def _gradient_norm(self, computing: Callable[[], AbstractContextManager[None]]) -> float:
        norm = 0.0
        for replica in range(self._groups.num_replicas):
            own = [self._parameters[key] for key in self._parameters if key[0] == replica]
            if not own:
                continue
            once = {name: parameter for parameters in own for name, parameter in parameters.items()}
            if (replica, 0) not in self._stages and (replica, self._groups.num_stages - 1) in self._stages:
                # The first stage's rank counts the tied copy.
                for name in self._stages[replica, self._groups.num_stages - 1].tied_names:
                    once.pop(name, None)
            if self._groups.lane > 0:  # the first lane's device counts what all lanes have whole
                shards = frozenset[str]().union(*(stage.sharded_names for stage in self._stages.values()))
                once = {name: parameter for name, parameter in once.items() if name in shards}
            with computing():
                norms = torch._foreach_norm([gradient_of(parameter) for parameter in once.values()]) if once else ()
                squares = float(torch.stack(norms).double().square().sum()) if norms else 0.0
            group = self._groups.members.get(replica)
            if group is not None:
                device = next(parameter.device for held in self._all_parameters.values() for parameter in held.values())
                what = f"the gradient norm of {self._name}"
                squares = math.fsum(all_gather_floats(squares, group, device, what))
            norm = math.sqrt(squares)
        return norm

    def _clip(self, norm: float) -> None:
        """As torch.nn.utils.clip_grad_norm_ does, with its 1e-6."""
        if self._config.max_grad_norm > 0 and norm + 1e-6 > self._config.max_grad_norm:
            gradients = [gradient_of(one) for parameters in self._own.values() for one in parameters.values()]
            torch._foreach_mul_(gradients, self._config.max_grad_norm / (norm + 1e-6))
