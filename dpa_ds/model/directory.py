"""A Hugging Face model directory before it is trusted: config, tokenizer and headers of the weights.

Each fault is a ModelError with the file and a remedy; the libraries that load a model say little, or hang.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpa_ds.data.chat_format import ChatFormat
from dpa_ds.data.formats import ExampleFormat
from dpa_ds.data.limits import ModelLimits
from dpa_ds.errors import DpaError, ModelError, list_some

IDENTITY_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_INDEX = "model.safetensors.index.json"
_MOST = {
    "vocab_size": 100_000_000,
    "hidden_size": 10_000_000,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1_000_000,
}
"""What no model exceeds: building one of 10^7 layers would take hours before its weights are found missing."""
_ALWAYS_CAUSAL = ("gpt_neox",)
"""Model types of decoders whose config has is_decoder, and says that they are none."""
_SHARES = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")


def check_directory(directory: Path) -> None:
    """Read the config and the headers of all weight files.

    Raises:
        ModelError: no model can be loaded from there.
    """
    read_config(directory)
    for path in sorted({*tensor_files(directory).values()}):
        _names(path)


def read_config(directory: Path) -> PretrainedConfig:
    """What `config.json` says.

    Raises:
        ModelError: it is missing, damaged, or of a model that transformers does not know, or that is no causal LM; or
            an adapter lies beside it.
    """
    path = directory / "config.json"
    # transformers (5.24) would load the base that the adapter names, whatever lies beside it.
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"model.path {directory} holds a PEFT adapter (adapter_config.json), not a base: give the base, or merge "
            "the adapter (LoRA, DoRA or another) into it by PEFT's merge_and_unload and save_pretrained, and give that"
        )
    if not path.is_file():
        raise ModelError(
            f"model.path {directory} has no config.json: give a Hugging Face model directory or a GGUF file"
        )
    with _library_errors(directory, f"{path} describes no model", "correct it, or download the model again"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        _check_kind(config, path)
        text = config.get_text_config()
    for name, most in _MOST.items():
        value = getattr(text, name, 1)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{path}: {name} must be a whole number >= 1, got {value!r}: download the model again")
        if value > most:
            raise ModelError(f"{path}: {name} must be at most {most}, got {value!r}: download the model again")
    for name in _SHARES:
        value = getattr(text, name, 0)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ModelError(f"{path}: {name} must be a number in [0, 1), got {value!r}: download the model again")
    assert isinstance(config, PretrainedConfig)
    return config


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Tokenizer with an end token; padding falls back to it.

    It may have ids that the model does not know, as gemma-3-1b has one: what the data uses is checked there
    (`data/limits.py`).

    Raises:
        ModelError: no tokenizer there, or one without an end token that the model knows.
    """
    remedy = "it needs the model's own tokenizer.json and tokenizer_config.json, undamaged"
    with _library_errors(directory, f"no usable tokenizer in {directory}", remedy):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer("a")  # reads settings that loading does not, such as model_max_length
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {directory} has no end token (eos_token): set it in tokenizer_config.json")
    vocab_size = read_limits(directory).vocab_size
    if tokenizer.eos_token_id >= vocab_size:
        raise ModelError(
            f"the end token of the tokenizer in {directory} has the id {tokenizer.eos_token_id}, but the model knows "
            f"{vocab_size} tokens (vocab_size of config.json): it belongs to another model; put the right one there"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def read_limits(directory: Path) -> ModelLimits:
    """What the model's config says about its input.

    Raises:
        ModelError: there is no usable config.
    """
    text = read_config(directory).get_text_config()
    vocab_size = getattr(text, "vocab_size", None)
    if vocab_size is None:
        vocab_size = sys.maxsize  # such a model says it nowhere
    return ModelLimits(getattr(text, "max_position_embeddings", None), vocab_size)


def base_fingerprint(directory: Path, example_format: ExampleFormat) -> str:
    """`model_fingerprint`, and where prompts are made by the tokenizer's chat template 8 digits of that.

    A template may lie in a file of its own, and another one would ask in another way; a text template is in the recipe.
    """
    fingerprint = model_fingerprint(directory)
    if isinstance(example_format, ChatFormat):
        template = repr(example_format.identity)
        fingerprint += f"-{hashlib.sha256(template.encode()).hexdigest()[:8]}"
    return fingerprint


def model_fingerprint(directory: Path) -> str:
    """SHA-256 (first 16 digits) of config, tokenizer, and of the tensors' names, shapes and a sample of their bytes.

    64 blocks of 4 KiB from every weight file: a second for 100 GB, and enough to tell two trained models apart.
    """
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        path = directory / name
        if path.is_file():
            digest.update(path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            digest.update(file.read(min(header_length, size)))
            for block in range(64):
                file.seek(8 + header_length + (size - 8 - header_length) * block // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file.

    Raises:
        ModelError: there is none, or the index is damaged.
    """
    index, single = directory / _INDEX, directory / "model.safetensors"
    if index.is_file():
        return {name: directory / file for name, file in _weight_map(index).items()}
    if not single.exists() and not single.is_symlink():
        raise ModelError(f"{directory} has no model.safetensors: convert the weights (pickled files are not read)")
    return dict.fromkeys(_names(single), single)


def _check_kind(config: PretrainedConfig, path: Path) -> None:
    """Raise ModelError unless transformers has a causal LM of text alone for the config."""
    name = (config.architectures or [type(config).__name__])[0]
    described = f"{path} describes {name}"
    remedy = "adapters are trained on causal LMs of text, such as Llama, Qwen or Gemma (docs/models.md): use one"
    if config.is_encoder_decoder:
        raise ModelError(f"{described}, an encoder-decoder; {remedy}")
    causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    parts = [part for part in ("vision_config", "audio_config") if getattr(config, part, None) is not None]
    if parts and not _has_text_model(config, causal_lm):
        raise ModelError(
            f"{described}, which reads more than text ({' and '.join(parts)}); use the text-only model of its family, "
            f"whose config.json has no {parts[0]}"
        )
    is_encoder = getattr(config, "is_decoder", None) is False and not config.model_type.startswith(_ALWAYS_CAUSAL)
    if causal_lm is None or is_encoder:
        raise ModelError(f"{described}, which is no causal LM; {remedy}")


def _has_text_model(config: PretrainedConfig, causal_lm: str | None) -> bool:
    """Whether transformers loads the text part of the checkpoint alone, as of Qwen3.5 and Llama 4."""
    if causal_lm is None:
        return False
    kind = getattr(transformers, causal_lm, None)
    return kind is not None and kind.config_class is type(config.get_text_config())


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in found.items() if Path(file).name == file}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged ({error}): download it again") from error
    if not names or len(names) < len(found):
        raise ModelError(f"{index}: weight_map must name a file of that directory for each tensor: download it again")
    return names


def _names(path: Path) -> list[str]:
    """Names of the tensors that the header of a weight file lists."""
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ModelError(f"{path} is not there, or no file: download it again")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is truncated or damaged ({error}): download it again") from error


@contextlib.contextmanager
def _library_errors(directory: Path, reported: str, remedy: str) -> Iterator[None]:
    """Whatever a library raises at a damaged file of `directory` becomes one line: tokenizers raises bare Exception."""
    try:
        yield
    except DpaError:
        raise
    except Exception as error:
        if "custom code" in str(error):
            raise ModelError(
                f"{directory} brings code of its own ({_named_code(directory)}), which is never run: use a model that "
                "this version of transformers knows by itself"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{reported} ({' '.join(lines[:2])[:300]}): {remedy}") from error


def _named_code(directory: Path) -> str:
    """What `auto_map` of config or tokenizer names, such as modeling_x.XForCausalLM."""
    names = []
    for file in ("config.json", "tokenizer_config.json"):
        try:
            found: Any = json.loads((directory / file).read_text(encoding="utf-8"))["auto_map"].values()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
        for entry in found:  # a tokenizer has two names, of which one may be null
            names += [name for name in (entry if isinstance(entry, list) else [entry]) if isinstance(name, str)]
    return f"auto_map: {list_some(sorted(set(names)))}"
