"""The DeepSpeed JSON that `engine.deepspeed_config` names: reads it, and refuses what the recipe owns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa_ds.config.validate import REPOSITORY, read_text, show
from dpa_ds.errors import ConfigError

_REMEDY = "name one of those in ds_configs/"
_ABSENT = object()
# DeepSpeed ends in a traceback where one of these is no object. Each stands after the object that it is in.
_OBJECTS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "fp16",
    "bf16",
)
_OWNER_OF_DEEPSPEED_KEY = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_size",
    "managed_gradient_accumulation": "train.batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_*",
    "scheduler": "train.lr_schedule",
    "fp16.enabled": "model.precision",
    "bf16.enabled": "model.precision",
    "bfloat16.enabled": "model.precision",
    "tensorboard": "tracking.tensorboard",
}


def load_deepspeed_json(path: str) -> dict[str, Any]:
    """Read `engine.deepspeed_config`, a path from the working directory or else from the root of the repository.

    ConfigError: missing, unreadable, malformed (with its line), a key given twice, a section that is no object, or keys
    that the recipe owns.
    """
    found = _find(path)
    content = _read(found)
    if not isinstance(content, dict):
        raise ConfigError(f"{found}: a DeepSpeed JSON is an object of keys, got {show(content)}")
    for key in _OBJECTS:
        value = _value_at(content, key, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{found}: {key} must be an object of keys, got {show(value)}")
    check_deepspeed_owner(content, str(found))
    return content


def check_deepspeed_owner(content: Mapping[str, Any], path: str) -> None:
    """One ConfigError with every key of the DeepSpeed JSON that the recipe owns, and the file to edit."""
    clashes = []
    for key, owner in _OWNER_OF_DEEPSPEED_KEY.items():
        if _value_at(content, key, _ABSENT) is not _ABSENT:
            clashes.append(f"{key} (owned by {owner})")
    if clashes:
        what = "it" if len(clashes) == 1 else "them"
        raise ConfigError(f"{path} sets what the recipe owns: {', '.join(clashes)}.\nRemove {what} from {path}.")


def _find(path: str) -> Path:
    given = Path(path).expanduser()
    tried = []
    for candidate in (given, REPOSITORY / given):
        if candidate.exists():
            return candidate
        if str(candidate.absolute()) not in tried:
            tried.append(str(candidate.absolute()))
    raise ConfigError(f"engine.deepspeed_config: no such file: {path} (tried {' and '.join(tried)}): {_REMEDY}")


def _read(path: Path) -> Any:
    text = read_text(path, "engine.deepspeed_config", _REMEDY)
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not a DeepSpeed JSON: nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key} is given twice: keep one")
        content[key] = value
    return content


def _value_at(content: Mapping[str, Any], key: str, default: Any) -> Any:
    """Value of a dotted key; `default` if it or one of the objects around it is absent."""
    value: Any = content
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value
