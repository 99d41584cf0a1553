"""What a recipe may say: ranges and combinations, what determines a result; and how its text is read and shown."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpa_ds.config.schema import ClusterConfig, DataConfig, MethodConfig, RanksPerGroup, RunConfig
from dpa_ds.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_FILE_BYTES = 1 << 20
"""A recipe or DeepSpeed JSON is a few kB: more is the wrong file, and is not read."""
_MAX_NAME_BYTES = 200
_YEAR = 365 * 24 * 3600
_WAITS = (
    "cluster.timeout_seconds",
    "cluster.heartbeat_timeout_seconds",
    "federation.timeout_seconds",
    "checkpoint.grace_seconds",
)
"""Seconds that libraries count in integers, which overflow."""

# dotted key, test, what the message says is allowed. A null is always allowed where the type has it.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("seed", lambda value: value >= 0, "must be >= 0"),
    ("output_dir", bool, "must not be empty"),
    ("cluster.timeout_seconds", lambda value: value > 0, "must be > 0"),
    ("cluster.heartbeat_timeout_seconds", lambda value: value >= 2, "must be >= 2"),
    ("cluster.group", lambda value: value >= 0, "must be >= 0, or null for all groups in one job"),
    ("cluster.num_groups", lambda value: value >= 1, "must be >= 1, or null for one group a client"),
    ("model.path", bool, "must not be empty (give a model directory, a GGUF file or a hub id)"),
    ("lora.rank", lambda value: value >= 1, "must be >= 1"),
    ("lora.alpha", lambda value: value > 0, "must be > 0"),
    ("lora.dropout", lambda value: 0 <= value < 1, "must be in [0, 1)"),
    (
        "lora.target_modules",
        lambda value: value and all(value),
        "must name at least one linear layer, such as [q_proj]",
    ),
    ("lora.local_rank", lambda value: value >= 1, "must be >= 1, or null for lora.rank"),
    ("data.path", bool, "must not be empty (give the file or folder of the clients' data)"),
    ("data.num_clients", lambda value: value >= 1, "must be >= 1, or null for the only folder there is"),
    ("data.held_out_fraction", lambda value: 0 <= value < 1, "must be in [0, 1)"),
    ("data.template", lambda value: value.count("{instruction}") == 1, "must contain {instruction} exactly once"),
    ("data.max_length", lambda value: value >= 2, "must be >= 2"),
    ("data.cache_dir", bool, "must not be empty"),
    ("method.alpha", lambda value: 0 <= value <= 1, "must be in [0, 1]"),
    ("federation.num_rounds", lambda value: value >= 1, "must be >= 1"),
    ("federation.client_fraction", lambda value: 0 < value <= 1, "must be in (0, 1]"),
    ("federation.timeout_seconds", lambda value: value > 0, "must be > 0"),
    ("federation.min_clients", lambda value: value >= 1, "must be >= 1"),
    ("federation.max_update_norm", lambda value: value > 0, "must be > 0, or null for no bound"),
    ("train.batch_size", lambda value: value >= 1, "must be >= 1"),
    ("train.micro_batch_tokens", lambda value: value >= 1, "must be >= 1"),
    ("train.local_epochs", lambda value: value > 0, "must be > 0"),
    ("train.max_steps", lambda value: value >= 1, "must be >= 1, or null to train for train.local_epochs"),
    ("train.learning_rate", lambda value: value > 0, "must be > 0"),
    ("train.weight_decay", lambda value: value >= 0, "must be >= 0"),
    ("train.adam_betas", lambda value: all(0 <= beta < 1 for beta in value), "must both be in [0, 1)"),
    ("train.adam_epsilon", lambda value: value > 0, "must be > 0"),
    ("train.max_grad_norm", lambda value: value >= 0, "must be >= 0 (0 turns clipping off)"),
    ("engine.deepspeed_config", bool, "must not be empty (such as ds_configs/zero1.json)"),
    ("evaluation.every_rounds", lambda value: value >= 0, "must be >= 0 (0 evaluates only before and after training)"),
    ("evaluation.max_examples", lambda value: value >= 1, "must be >= 1"),
    ("evaluation.scores_every_rounds", lambda value: value >= 0, "must be >= 0 (0: no answers while training)"),
    ("evaluation.instances_per_task", lambda value: value >= 1, "must be >= 1, or null for all"),
    ("evaluation.clients", lambda value: value and min(value) >= 0, "must be ids of clients such as [0, 3]"),
    ("evaluation.tasks", lambda value: value and all(value), "must be names of tasks such as [paraphrase]"),
    ("weighting.scale", lambda value: value >= 0, "must be >= 0, or null for the default of weighting.kind"),
    ("weighting.num_references", lambda value: value >= 1, "must be >= 1"),
    ("generation.num_beams", lambda value: value >= 1, "must be >= 1 (1: greedy)"),
    ("generation.max_new_tokens", lambda value: value >= 1, "must be >= 1"),
    ("generation.batch_tokens", lambda value: value >= 1, "must be >= 1"),
    ("checkpoint.every_steps", lambda value: value >= 1, "must be >= 1, or null to save by time"),
    ("checkpoint.every_minutes", lambda value: value > 0, "must be > 0, or null to save by steps"),
    ("checkpoint.keep_rounds", lambda value: value >= 1, "must be >= 1"),
    ("checkpoint.grace_seconds", lambda value: value > 0, "must be > 0"),
    ("tracking.log_every_seconds", lambda value: value >= 0, "must be >= 0"),
    *((key, lambda value: value <= _YEAR, "must be at most 31536000, a year") for key in _WAITS),
)

# Fields that may change between the parts of one run: they move work and output about, never the result (but for the
# dropout masks, which each rank draws for itself). num_rounds is
# among them so that a finished run can be extended; nothing inside a round depends on it.
_NOT_IN_FINGERPRINT = {
    "name",
    "output_dir",
    "data.cache_dir",
    "federation.num_rounds",
    "federation.timeout_seconds",
    "federation.min_clients",
    "federation.max_update_norm",
    "federation.on_bad_update",
    "resume",
    "train.micro_batch_tokens",
    "weighting.kind",
    "weighting.scale",
    "weighting.representation",
    "weighting.encoder",
}
_SECTIONS_NOT_IN_FINGERPRINT = {"checkpoint", "cluster", "engine", "evaluation", "generation", "tracking"}


def validate(config: RunConfig) -> None:
    """Raise ConfigError on the first value out of range or combination without sense; types are taken as checked."""
    for message in _problems(config):
        raise ConfigError(message)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every field under its dotted key, as JSON would read it back (tuples are lists)."""
    return dict(_leaves(asdict(config)))


def fingerprint_sections(config: RunConfig) -> dict[str, Any]:
    """Flat dotted dict of every field that determines the result of training: a resumed run must agree in all."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key not in _NOT_IN_FINGERPRINT and key.partition(".")[0] not in _SECTIONS_NOT_IN_FINGERPRINT
    }


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines such as `train.learning_rate: 0.0003 -> 0.001` for two flat dotted dicts, in the order of the keys."""
    keys = [*old, *(key for key in new if key not in old)]
    shown = [{key: show(value) for key, value in side.items()} for side in (old, new)]
    return [
        f"{key}: {shown[0].get(key, 'absent')} -> {shown[1].get(key, 'absent')}"
        for key in keys
        if key not in old or key not in new or old[key] != new[key]
    ]


def show(value: Any, limit: int = 80) -> str:
    """One line for a message: JSON spelling (null, true, quoted text), cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_text(path: Path, what: str, remedy: str) -> str:
    """Text of a file of at most MAX_FILE_BYTES; ConfigError `what: reason: remedy` if it cannot be had."""
    try:
        if path.is_fifo():  # opening it would wait for a writer
            raise ConfigError(f"{what}: {path} is a pipe, not a regular file: {remedy}")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{what}: {path} is larger than {MAX_FILE_BYTES >> 20} MiB: {remedy}")
        return content.decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: no such file: {path}: {remedy}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{what}: {path} is a directory: {remedy}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: {path} is not text in UTF-8 (byte {error.start}): {remedy}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{what}: cannot read {show(str(path))} ({reason}): {remedy}") from error


def _problems(config: RunConfig) -> Iterator[str]:
    """Every message `validate` could raise, first things first."""
    values = flatten(config)
    yield from (
        f"{key} must be finite, got {show(value)}"
        for key, value in values.items()
        if any(isinstance(item, float) and not math.isfinite(item) for item in _items(value))
    )
    if config.name in ("", ".", "..") or "/" in config.name or "\\" in config.name or not config.name.isprintable():
        yield f"name must be a plain folder name, not empty and without / or \\, got {show(config.name)}"
    elif len(config.name.encode()) > _MAX_NAME_BYTES:
        yield f"name must be a folder name of at most {_MAX_NAME_BYTES} bytes, got {show(config.name)}"
    for key in ("output_dir", "model.path", "data.path", "data.test_path", "data.cache_dir", "engine.deepspeed_config"):
        if not _is_path(values[key] or ""):
            yield f"{key} must be a path (no NUL character, names of up to 255 bytes), got {show(values[key])}"
    for key, allowed, text in _RANGES:
        if values[key] is not None and not allowed(values[key]):
            yield f"{key} {text}, got {show(values[key])}"
    yield from _rank_problems(config.cluster.ranks_per_group)
    yield from _group_problems(config.cluster)
    yield from _partition_problems(config.data)
    yield from _method_problems(config)
    if config.weighting.kind == "fixed" and (config.weighting.scale or 0) > 1:
        yield f"weighting.scale must be in [0, 1] with weighting.kind fixed, got {show(config.weighting.scale)}"
    centres = config.weighting.kind == "centred_cosine"
    centres |= config.weighting.kind == "auto" and config.method.name in ("feddpa_t", "feddpa_f")
    if centres and config.weighting.encoder not in ("auto", "none"):
        yield (
            f"weighting.encoder {config.weighting.encoder} does not go with weighting.kind centred_cosine: clients can "
            "share one mean state only of the encoder that all of them have and that never changes: use encoder none, or "
            "weighting.kind cosine"
        )


def _rank_problems(ranks: RanksPerGroup) -> Iterator[str]:
    numbers = ranks if isinstance(ranks, list) else [] if ranks == "auto" else [ranks]
    if ranks == [] or any(not isinstance(number, int) or number < 1 for number in numbers):
        yield f"cluster.ranks_per_group must be auto, a number >= 1 or a list of them such as [2, 2, 1], got {show(ranks)}"


def _group_problems(cluster: ClusterConfig) -> Iterator[str]:
    if (cluster.group is None) != (cluster.rendezvous is None):
        yield (
            "cluster.group and cluster.rendezvous belong together: give both for a job that is one rank group "
            "(--cluster.group 2 --cluster.rendezvous host:port, see launch/rendezvous.py), or neither"
        )
    if cluster.group is None and cluster.num_groups is not None:
        yield "cluster.num_groups has no effect without cluster.group: set cluster.ranks_per_group instead"
    if cluster.num_groups is not None and cluster.group is not None and cluster.group >= cluster.num_groups:
        yield f"cluster.group must be in 0..{cluster.num_groups - 1} (cluster.num_groups), got {cluster.group}"
    if cluster.rendezvous is not None and not re.fullmatch(r"[^\s:]+:\d{1,5}", cluster.rendezvous):
        yield f"cluster.rendezvous must be host:port, such as node1:29600, got {show(cluster.rendezvous)}"


def _partition_problems(data: DataConfig) -> Iterator[str]:
    partition = data.partition
    if data.format != "table":
        return
    if partition.kind in ("column", "dirichlet") and not partition.column:
        yield (
            f"data.partition.column is missing: data.partition.kind {partition.kind} needs the name of a column "
            "(kind iid needs none)"
        )
    if partition.kind in ("iid", "dirichlet") and (partition.num_clients is None or partition.num_clients < 1):
        yield (
            f"data.partition.num_clients must be >= 1 with data.partition.kind {partition.kind}, "
            f"got {show(partition.num_clients)}"
        )
    if partition.kind == "dirichlet" and partition.concentration <= 0:
        yield f"data.partition.concentration must be > 0, got {show(partition.concentration)}"


def _method_problems(config: RunConfig) -> Iterator[str]:
    method, lora, default = config.method, config.lora, MethodConfig()
    if method.name in ("feddpa_f", "fedlora") and lora.local_rank not in (None, lora.rank):
        yield (
            f"lora.local_rank is {lora.local_rank}, but {method.name} starts the local adapter from the global one of "
            f"rank {lora.rank}: leave lora.local_rank out"
        )
    if method.name == "feddpa_t" and method.alpha == 0:
        yield (
            "method.alpha must be in (0, 1] for feddpa_t, got 0: the local adapter would have no weight in its own phase; "
            "for the global adapter alone choose method fedit"
        )
    if method.name != "feddpa_t":
        for key in ("phase_order", "global_source"):
            if getattr(method, key) != getattr(default, key):
                yield (
                    f"method.{key}: {getattr(method, key)} has no effect with method {method.name}, "
                    "only with feddpa_t: leave it out"
                )
    elif method.phase_order == "local_first" and method.global_source == "aggregated":
        yield (
            "method.global_source: aggregated contradicts method.phase_order: local_first (this round's average does "
            "not exist yet when the local phase comes first): choose global_source own or phase_order global_first"
        )


def _is_path(text: str) -> bool:
    try:
        names = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        return False
    return "\0" not in text and all(len(name) <= 255 for name in names) and len(text) < 4000


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
