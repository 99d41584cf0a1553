"""The DeepSpeed JSON that `engine.deepspeed_config` names: reads it, and refuses what it may not say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from dpa_ds.config.fields import nearest
from dpa_ds.config.paths import expand
from dpa_ds.config.ranges import Requirement
from dpa_ds.config.shipped import find_file
from dpa_ds.config.validate import read_text, show
from dpa_ds.errors import ConfigError

_REMEDY = "name one of those in ds_configs/"
_ABSENT = object()
MAX_COMPARED = 100
"""Characters of an unknown key that are compared with those that are known."""
MAX_COUNT = 2**40
MAX_SIZE = 2**63
"""Beyond what DeepSpeed itself means by no bound."""
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
    "activation_checkpointing": "model.gradient_checkpointing",
}


def check_stage(kind: str, stage: int) -> None:
    """Raise ConfigError where ZeRO-3 is to divide a base in `kind`: none is a plain one."""
    if kind != "none" and stage == 3:
        raise ConfigError(
            f"a base in {kind} (model.quantization) does not go with ZeRO-3: DeepSpeed divides numbers of "
            "model.precision, and would part the codes from their scales; have each rank hold the small base whole, "
            "with a ds_configs/ file of stage 0, 1 or 2, or for answers evaluation.sharding: never"
        )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT


def _is_stage(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_SIZE


def _is_float_type(value: Any) -> bool:
    return value in ("fp32", "bf16", "fp16")


def _is_no_placeholder(value: Any) -> bool:
    return not isinstance(value, str) or value != "auto"


_BOOL = Requirement("must be true or false", _is_bool)
_COUNT = Requirement(f"must be a whole number in 1..{MAX_COUNT}", _is_count)
# Also read by the planner, which runs without DeepSpeed.
_STAGE = Requirement("must be a stage, 0 to 3", _is_stage)
_SIZE = Requirement("must be a number >= 0 and < 2^63", _is_size)
_FLOAT_TYPE = Requirement("must be one of fp32, bf16, fp16", _is_float_type)
# DeepSpeed has types for these, and refuses other values itself; but "auto", which the Trainer of transformers fills
# in, it silently takes for its default: ZeRO stage 0.
_BY_DEEPSPEED = Requirement("must be a value, which nobody fills in here", _is_no_placeholder)
_KEYS = {
    "communication_data_type": _FLOAT_TYPE,
    "data_types.grad_accum_dtype": _FLOAT_TYPE,
    "zero_allow_untested_optimizer": _BOOL,
    "zero_force_ds_cpu_optimizer": _BOOL,
    "wall_clock_breakdown": _BOOL,
    "memory_breakdown": _BOOL,
    "comms_logger.enabled": _BOOL,
    "comms_logger.verbose": _BOOL,
    "comms_logger.prof_all": _BOOL,
    "comms_logger.debug": _BOOL,
    "timers.throughput.enabled": _BOOL,
    "timers.throughput.synchronized": _BOOL,
    "aio.block_size": _COUNT,
    "aio.queue_depth": _COUNT,
    "aio.intra_op_parallelism": _COUNT,
    "aio.single_submit": _BOOL,
    "aio.overlap_events": _BOOL,
    "aio.use_gds": _BOOL,
    "bf16.check_grad_overflow": _BY_DEEPSPEED,
    "fp16.loss_scale": _BY_DEEPSPEED,
    "fp16.initial_scale_power": _BY_DEEPSPEED,
    "fp16.loss_scale_window": _BY_DEEPSPEED,
    "fp16.hysteresis": _BY_DEEPSPEED,
    "fp16.consecutive_hysteresis": _BY_DEEPSPEED,
    "fp16.min_loss_scale": _BY_DEEPSPEED,
    "zero_optimization.stage": _STAGE,
    "zero_optimization.contiguous_gradients": _BY_DEEPSPEED,
    "zero_optimization.overlap_comm": _BY_DEEPSPEED,
    "zero_optimization.reduce_scatter": _BY_DEEPSPEED,
    "zero_optimization.reduce_bucket_size": _SIZE,
    "zero_optimization.use_multi_rank_bucket_allreduce": _BY_DEEPSPEED,
    "zero_optimization.allgather_partitions": _BY_DEEPSPEED,
    "zero_optimization.allgather_bucket_size": _BY_DEEPSPEED,
    "zero_optimization.sub_group_size": _BY_DEEPSPEED,
    "zero_optimization.stage3_prefetch_bucket_size": _SIZE,
    "zero_optimization.stage3_param_persistence_threshold": _SIZE,
    "zero_optimization.stage3_model_persistence_threshold": _BY_DEEPSPEED,
    "zero_optimization.stage3_max_live_parameters": _SIZE,
    "zero_optimization.stage3_max_reuse_distance": _SIZE,
    "zero_optimization.stage3_module_granularity_threshold": _BY_DEEPSPEED,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _BY_DEEPSPEED,
    "zero_optimization.stage3_allgather_sequential": _BY_DEEPSPEED,
    "zero_optimization.memory_efficient_linear": _BY_DEEPSPEED,
    "zero_optimization.log_trace_cache_warnings": _BY_DEEPSPEED,
    "zero_optimization.enable_sanity_checks": _BY_DEEPSPEED,
    "zero_optimization.zero_hpz_partition_size": _COUNT,
    # Refused once they are true, with the reason (engine/engine.py).
    "zero_optimization.round_robin_gradients": _BY_DEEPSPEED,
    "zero_optimization.zero_quantized_weights": _BY_DEEPSPEED,
    "zero_optimization.zero_quantized_gradients": _BY_DEEPSPEED,
    "zero_optimization.zero_quantized_nontrainable_weights": _BY_DEEPSPEED,
    "zero_optimization.offload_param.device": _BY_DEEPSPEED,
    "zero_optimization.offload_param.nvme_path": _BY_DEEPSPEED,
    "zero_optimization.offload_param.buffer_count": _BY_DEEPSPEED,
    "zero_optimization.offload_param.buffer_size": _BY_DEEPSPEED,
    "zero_optimization.offload_param.max_in_cpu": _BY_DEEPSPEED,
    "zero_optimization.offload_param.pin_memory": _BY_DEEPSPEED,
    "zero_optimization.offload_optimizer.device": _BY_DEEPSPEED,
    "zero_optimization.offload_optimizer.nvme_path": _BY_DEEPSPEED,
    "zero_optimization.offload_optimizer.buffer_count": _BY_DEEPSPEED,
    "zero_optimization.offload_optimizer.pin_memory": _BY_DEEPSPEED,
}
"""Every key that the JSON may have, and what its value must be. DeepSpeed ignores others, or ends in a traceback.

Each was tried (tests/multirank/test_deepspeed_keys.py): a written adapter is the one that the next step starts from,
and that is read. A key that moves or renames DeepSpeed's fp32 masters would break that without a word.
"""


def _sections() -> dict[str, None]:
    """The objects around the keys, the outer ones first."""
    found: dict[str, None] = {}
    for key in _KEYS:
        names = key.split(".")
        for depth in range(1, len(names)):
            found[".".join(names[:depth])] = None
    return found


_SECTIONS = _sections()


def load_deepspeed_json(path: str) -> dict[str, Any]:
    """Read `engine.deepspeed_config`, a path from the working directory or else one that the package brings.

    ConfigError: missing, unreadable, malformed (with its line), a key given twice, keys that the recipe owns, a key
    that is not among those that the JSON may have, or a value that its key does not take.
    """
    found = find_file(expand(path, "engine.deepspeed_config"), "engine.deepspeed_config", _REMEDY)
    content = _read(found)
    if not isinstance(content, dict):
        raise ConfigError(f"{found}: a DeepSpeed JSON is an object of keys, got {show(content)}")
    _check_sections(content, str(found))
    check_deepspeed_owner(content, str(found))
    _check_keys(content, str(found))
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


def _check_sections(content: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError where a section is no object: DeepSpeed would end in a traceback."""
    for section in _SECTIONS:
        value = _value_at(content, section, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {section} must be an object of keys, got {show(value)}")


def _check_keys(content: Mapping[str, Any], path: str, section: str = "") -> None:
    """Raise ConfigError for a key that is not among `_KEYS`, or a value that it does not take.

    Args:
        section: dotted key of `content` with a dot at its end; empty for the whole JSON.
    """
    for name, value in content.items():
        key = section + name
        if "." in name or key not in {*_KEYS, *_SECTIONS}:
            raise ConfigError(f"{path}: {show(key)} is not a key that the JSON may have{_remedy_for(key, section)}")
        if key in _SECTIONS:
            _check_keys(value, path, f"{key}.")
        elif not _KEYS[key].holds(value):
            raise ConfigError(f"{path}: {key} {_KEYS[key].text}, got {show(value)}")


def _remedy_for(key: str, section: str) -> str:
    similar = nearest(key[:MAX_COMPARED], [*_KEYS, *_SECTIONS])
    if similar is not None:
        return f": did you mean {similar}?"
    names = [known[len(section) :] for known in [*_KEYS, *_SECTIONS] if known.startswith(section)]
    here = sorted({name for name in names if "." not in name})
    return f": remove it; {section.removesuffix('.') or 'the JSON'} may have {', '.join(here)}"


def _read(path: Path) -> Any:
    text = read_text(path, "engine.deepspeed_config", _REMEDY)
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no number")


def _value_at(content: Mapping[str, Any], key: str, default: Any) -> Any:
    """Value of a dotted key; `default` if it or one of the objects around it is absent."""
    value: Any = content
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value
