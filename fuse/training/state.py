"""A worker's training state on disk: what trains and AdamW's moments of it by Hugging Face names, as safetensors.

What is frozen is not part of it: whoever resumes brings the model that it was frozen in.

The names know nothing of stages and their kind, of replicas, ranks or shards, so what some number of ranks saved any
other number loads. The storage is torch.distributed.checkpoint's safetensors one: every rank writes a file with what
it alone holds, what several ranks hold is written once, and nothing on disk is a pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fuse.intrastage.optimizer import ModelOptimizer
from fuse.state_dict import check_fit

FILE_BYTES = 256 << 20
"""The most of a file with more than one tensor."""
_NO_MODELS: Mapping[str, nn.Module] = MappingProxyType({})


def save_state(
    directory: Path, optimizers: Mapping[str, ModelOptimizer], models: Mapping[str, nn.Module] = _NO_MODELS
) -> dict[str, int]:
    """Write the models' parameters and optimizer state; every rank of the world calls this with the same directory.

    Returns the bytes of every file that this rank now sees there, by name.

    directory: new or empty, and seen by every rank; see `check_saved`.
    optimizers: by model name; a rank leaves out models of which it has no stage.
    models: whole ones that change without being trained, by name; one rank gives them.

    When it returns, the files of all ranks are complete and on disk.

    Raises: OSError when some rank could not write.
    """
    writer = _Writer(str(directory), save_distributed=True)
    try:
        with _single_process_is_meant():
            dcp.save(_saved(optimizers, models), storage_writer=writer, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # not an Exception: nothing above would handle it
        rank, cause = next(iter(error.failures.items()))
        raise OSError(f"cannot save the training state in {directory}: rank {rank}: {cause[0]}") from error
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def check_saved(directory: Path, seen: Sequence[Mapping[str, int]]) -> None:
    """Whether all that ranks wrote is here. seen: by rank, what `save_state` returned there.

    Raises: OSError when it is not, naming what is missing and why that may be.
    """
    here = {path.name: path.stat().st_size for path in directory.iterdir()} if directory.is_dir() else {}
    for rank, files in enumerate(seen):
        missing = [name for name, size in files.items() if here.get(name) != size]
        if missing or not files:
            raise OSError(
                f"the training state of rank {rank} is not in {directory} (missing: {', '.join(missing) or 'all'}): "
                "workers see another directory under this name; name an output_dir that all hosts share"
            )


def load_state(
    directory: Path, optimizers: Mapping[str, ModelOptimizer], models: Mapping[str, nn.Module] = _NO_MODELS
) -> None:
    """Read into the models' parameters and optimizer state what `save_state` wrote, on whatever ranks it did.

    Ranks load independently of each other. The parameters of `models` are replaced, not written to: they may lie where
    others read them.

    Raises: ValueError when the checkpoint misses a tensor of these models, has one more, or one of another shape or
    type, or is damaged; then nothing was loaded.
    """
    reader = _Reader(str(directory))
    try:
        saved = reader.read_metadata().state_dict_metadata
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"cannot read the training state in {directory}: {error}: resume from another checkpoint"
        ) from error
    _check(directory, saved, optimizers, models)
    steps = {f"{model}.step": torch.zeros(1, dtype=torch.int64) for model in optimizers}
    _read(reader, steps)
    for model, optimizer in optimizers.items():
        optimizer.num_steps = int(steps[f"{model}.step"])
        for part in optimizer.state_parts:  # one at a time, so that the host holds no more
            prefix = f"{model}.{part}."
            tensors = {f"{prefix}{name}": torch.empty(shape) for name, shape in optimizer.state_shapes.items()}
            _read(reader, tensors)
            optimizer.import_state(part, {key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    for name, whole in models.items():
        parameters = _parameters(name, whole)
        tensors = {key: torch.empty(one.shape, dtype=one.dtype) for key, one in parameters.items()}
        _read(reader, tensors)
        for key, parameter in parameters.items():
            parameter.data = tensors[key].to(parameter.device)


def _parameters(name: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """Of a whole model, by their keys; a tied one has the first of its names."""
    return {f"{name}.parameter.{key}": parameter for key, parameter in model.named_parameters()}


class _Writer(dcp.HuggingFaceStorageWriter):
    """Writes what a rank has in several files, for each is made in memory, twice, before it is written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files = {"fqn_to_index_mapping": _files(plan.items)}
        return super().write_data(replace(plan, storage_data=(plan.storage_data or {}) | files), planner)


def _files(items: Iterable[WriteItem]) -> dict[str, int]:
    """The number of each tensor's file, from 1."""
    numbers: dict[str, int] = {}
    number, held = 1, 0
    for item in items:
        assert item.tensor_data is not None
        num_bytes = item.tensor_data.size.numel() * item.tensor_data.properties.dtype.itemsize
        if held and held + num_bytes > FILE_BYTES:
            number, held = number + 1, 0
        numbers[item.index.fqn] = number
        held += num_bytes
    return numbers


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads the headers of the files once, and not again with every part of a state."""

    _metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata()
        return self._metadata


def _read(reader: _Reader, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors from disk by their keys."""
    with _single_process_is_meant():
        dcp.load(tensors, storage_reader=reader, no_dist=True)


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _saved(optimizers: Mapping[str, ModelOptimizer], models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What this rank writes, by the key it has on disk."""
    tensors: dict[str, Tensor] = {}
    for model, optimizer in optimizers.items():
        tensors[f"{model}.step"] = torch.tensor([optimizer.num_steps])
        for part in optimizer.state_parts:
            tensors |= {f"{model}.{part}.{name}": tensor for name, tensor in optimizer.export_state(part).items()}
    for name, whole in models.items():
        tensors |= {key: parameter.detach().cpu() for key, parameter in _parameters(name, whole).items()}
    return tensors


def _expected(
    optimizers: Mapping[str, ModelOptimizer], models: Mapping[str, nn.Module]
) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    """Key, shape and type of every tensor of these models, also those on other ranks."""
    for model, optimizer in optimizers.items():
        yield f"{model}.step", torch.Size([1]), torch.int64
        for part in optimizer.state_parts:
            for name, shape in optimizer.model_shapes.items():
                yield f"{model}.{part}.{name}", shape, torch.float32
    for name, whole in models.items():
        for key, parameter in _parameters(name, whole).items():
            yield key, parameter.shape, parameter.dtype


def _check(
    directory: Path,
    saved: Mapping[str, object],
    optimizers: Mapping[str, ModelOptimizer],
    models: Mapping[str, nn.Module],
) -> None:
    found = {}
    frozen = {
        f"{model}.parameter.{name}" for model, one in optimizers.items() for name in one.frozen
    }  # in earlier ones
    for key, tensor in saved.items():
        if key.partition(".")[0] in (*optimizers, *models) and key not in frozen:
            assert isinstance(tensor, TensorStorageMetadata)
            found[key] = f"{tensor.properties.dtype} {list(tensor.size)}"
    check_fit(
        found,
        {key: f"{dtype} {list(shape)}" for key, shape, dtype in _expected(optimizers, models)},
        f"training state in {directory}",
        "resume with the models and configuration of the run that wrote it",
    )
