"""Converts GGUF files to plain Hugging Face directories: de-quantised weights, config and tokenizer, without a hub.

LLaMA files with a known GPT-2-type tokenizer are read directly (llama.py says why); every other file goes through
transformers, with the special tokens set from the file's own metadata.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dpa_ds.errors import ModelError
from dpa_ds.model.gguf.file import GgufFile, read_gguf, special_ids
from dpa_ds.model.gguf.llama import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, is_readable, write_llama
from dpa_ds.model.gguf.parts import is_split

logger = logging.getLogger(__name__)


def convert_gguf(gguf_path: Path, out_dir: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write `gguf_path` as a Hugging Face directory that AutoModelForCausalLM and AutoTokenizer read.

    float32 holds the de-quantised weights exactly; a narrower `dtype` rounds them once more. A complete `out_dir`
    is returned as it is. The directory appears whole or not at all, so several processes may convert at once.

    Raises ModelError for a file that is missing, damaged, or of an architecture that cannot be converted, and where
    `out_dir` holds something else.
    """
    if is_model_dir(out_dir):
        return out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ModelError(f"{out_dir} exists but is not a complete model directory: remove it, or name another")
    file = read_gguf(gguf_path)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        if is_readable(file):
            write_llama(file, partial_dir, dtype)
        else:
            _write_by_transformers(file, partial_dir, dtype)
        _make_readable(partial_dir)
        _rename_dir(partial_dir, out_dir)  # last, so that the directory appears whole or not at all
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    logger.info("converted %s to %s", gguf_path, out_dir)
    return out_dir


def is_model_dir(path: Path) -> bool:
    """Whether `path` holds a config, weights and a tokenizer."""
    has_weights = (path / WEIGHTS_NAME).is_file() or (path / WEIGHTS_INDEX_NAME).is_file()
    return has_weights and (path / "config.json").is_file() and (path / "tokenizer.json").is_file()


def _write_by_transformers(file: GgufFile, out_dir: Path, dtype: torch.dtype) -> None:
    """Load with transformers' own GGUF reader, de-quantised so that the model can be saved and trained."""
    folder = file.path.parent
    name = file.path.name
    if is_split(file.metadata):
        raise ModelError(
            f"{file.path}: transformers, which reads architecture {file.require('general.architecture')!r} with this "
            "tokenizer, takes one file only: merge the parts with llama.cpp's gguf-split --merge"
        )
    tokens = file.require("tokenizer.ggml.tokens")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{file.path}: architecture {file.require('general.architecture')!r} with tokenizer "
            f"{file.require('tokenizer.ggml.model')!r} cannot be converted ({error}): use a llama file with a gpt2 "
            "tokenizer, one that this version of transformers reads, or a Hugging Face directory"
        ) from error
    model, report = loaded
    for missing in sorted(report["missing_keys"]):  # transformers only warns, and draws the tensor at random
        raise ModelError(f"{file.path}: has no tensor for {missing!r}: it is incomplete; download it again")
    ids = special_ids(file)
    # From the file, because transformers' reader (5.17) sets another end token and no pad token.
    tokenizer.eos_token = tokens[ids.eos]
    tokenizer.pad_token = tokens[ids.pad]
    for config in (model.config, model.generation_config):
        config.bos_token_id = ids.bos
        config.eos_token_id = ids.eos
        config.pad_token_id = ids.pad
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _make_readable(directory: Path) -> None:
    """Let other users read what mkdtemp and safetensors make private: the cache may serve a whole cluster."""
    file_mode = (directory / "config.json").stat().st_mode
    for path in directory.iterdir():
        path.chmod(file_mode)
    directory.chmod(0o755)


def _rename_dir(source: Path, target: Path) -> None:
    """Rename a finished directory; keep `target` if another process has finished it meanwhile."""
    try:
        source.rename(target)
    except OSError as error:
        if not is_model_dir(target):
            raise ModelError(f"cannot write {target}: {error}") from error
