"""What a recipe may say: ranges (beside the fields, in schema.py), combinations, and what determines a result.

Also how the text of a recipe is read and how a value is shown in a message.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from dpa_ds.config.fields import REQUIREMENTS
from dpa_ds.config.paths import CLIENT, has_client_files
from dpa_ds.config.schema import (
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LoraConfig,
    MethodConfig,
    MetricsConfig,
    PartitionConfig,
    RunConfig,
    WeightingConfig,
)
from dpa_ds.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
"""A recipe or DeepSpeed JSON is a few kB: more is the wrong file, and is not read."""

# Fields that may change between the parts of one run: they move work and output about, never the result (but for its
# rounding, and for the dropout masks, which each rank draws for itself). num_rounds is among them so that a finished
# run can be extended: nothing inside a round depends on it.
_NOT_IN_FINGERPRINT = {
    "name",
    "output_dir",
    "private_dir",
    "data.cache_dir",
    "federation.num_rounds",
    "federation.timeout_seconds",
    "federation.min_clients",
    "federation.max_update_norm",
    "federation.on_bad_update",
    "model.attention",
    "resume",
    "train.micro_batch_tokens",
    "weighting.kind",
    "weighting.scale",
    "weighting.representation",
    "weighting.encoder",
}
_SECTIONS_NOT_IN_FINGERPRINT = {"checkpoint", "cluster", "engine", "evaluation", "generation", "metrics", "tracking"}


def validate(config: RunConfig) -> None:
    """Raise ConfigError on the first value out of range or combination without sense; types are taken as checked."""
    values = flatten(config)
    problems = itertools.chain(
        # First: of NaN every comparison below is false, and its message would name a bound that nobody crossed.
        _not_finite(values),
        _out_of_range(values),
        _group_problems(config.cluster),
        _partition_problems(config.data),
        _client_file_problems(config.data, config.method, config.evaluation, config.cluster),
        _method_problems(config.method, config.lora),
        _weighting_problems(config.weighting, config.method),
        _sharing_problems(config.metrics, config.private_dir),
        _sampling_problems(config.generation),
    )
    first = next(problems, None)
    if first is not None:
        raise ConfigError(first)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every field under its dotted key, as JSON would read it back (tuples are lists)."""
    return dict(_leaves(asdict(config)))


def fingerprint_sections(config: RunConfig) -> dict[str, Any]:
    """Flat dotted dict of every field that determines the result of training: a resumed run must agree in all."""
    return _determining(flatten(config))


def _determining(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of all fields of a recipe those that determine the result."""
    determining = {}
    for key, value in values.items():
        section = key.partition(".")[0]
        if key not in _NOT_IN_FINGERPRINT and section not in _SECTIONS_NOT_IN_FINGERPRINT:
            determining[key] = value
    return determining


def agreed_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal in rank groups with launchers of their own: what determines the result, and what is shared.

    They exchange tables of one size, and all of them save a round in as many parts.

    Args:
        values: every field of the recipe, as `flatten` gives them.
    """
    sharing = {"metrics.share": values["metrics.share"], "private_dir is set": values["private_dir"] is not None}
    return _determining(values) | sharing


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines such as `train.learning_rate: 0.0003 -> 0.001` for two flat dotted dicts, in the order of the keys."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if key in old and key in new and old[key] == new[key]:
            continue
        before = show(old[key]) if key in old else "absent"
        after = show(new[key]) if key in new else "absent"
        lines.append(f"{key}: {before} -> {after}")
    return lines


def show(value: Any, limit: int = 80) -> str:
    """One line for a message: JSON spelling (null, true, quoted text), cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_utf8(word: str) -> None:
    """ConfigError for a word of the command line that no file of ours, and no tokenizer, could take."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{ascii(word)[:80]} on the command line is not UTF-8 (character {error.start}): type it in a terminal "
            "that is set to UTF-8, or rename the file"
        ) from error


def read_text(path: Path, what: str, remedy: str) -> str:
    """Text of a file of at most MAX_FILE_BYTES; ConfigError `what: reason: remedy` if it cannot be had."""
    try:
        # Opening a pipe would wait for a writer, and reading a terminal for somebody who types.
        if path.exists() and not path.is_file() and not path.is_dir():
            kind = "pipe" if path.is_fifo() else "device"
            raise ConfigError(f"{what}: {path} is a {kind}, not a regular file: {remedy}")
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
        raise ConfigError(f"{what}: cannot read {show(str(path), limit=300)} ({reason}): {remedy}") from error


# ---- the messages that `validate` could raise, of each subject the most basic first -------------------------------


def _not_finite(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, float) and not math.isfinite(item) for item in items):
            yield f"{key} must be finite, got {show(value)}"


def _out_of_range(values: Mapping[str, Any]) -> Iterator[str]:
    found = []
    for key, requirements in REQUIREMENTS.items():
        value = values[key]
        if value is None:  # the types were checked, so this field may be null
            continue
        for position, requirement in enumerate(requirements):
            if not requirement.holds(value):
                found.append((position, f"{key} {requirement.text}, got {show(value)}"))
                break  # a later demand takes the earlier ones for granted
    # The first demand of each field before any second one: a path that is wrong, before another that is missing.
    found.sort(key=itemgetter(0))
    for _, message in found:
        yield message


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
    if cluster.rendezvous is not None and not _is_address(cluster.rendezvous):
        yield (
            f"cluster.rendezvous must be host:port, such as node1:29600 or [::1]:29600, got {show(cluster.rendezvous)}"
        )


def _is_address(text: str) -> bool:
    match = re.fullmatch(r"(?:[^\s:/\[\]]+|\[[^\s/\[\]]+\]):([0-9]{1,5})", text)
    return match is not None and 0 < int(match[1]) < 65536


def _partition_problems(data: DataConfig) -> Iterator[str]:
    partition = data.partition
    if data.format != "table" or has_client_files(data.path):
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


def _client_file_problems(
    data: DataConfig, method: MethodConfig, evaluation: EvaluationConfig, cluster: ClusterConfig
) -> Iterator[str]:
    if not has_client_files(data.path):
        if has_client_files(data.test_path):
            yield "data.test_path has {client}, and data.path has none: write it in both, or in neither"
        if data.clients is not None:
            yield "data.clients has no effect without {client} in data.path: write data/{client}.jsonl, or leave it out"
        return
    if data.format != "table":
        yield f"data.path has {{client}}, which data.format {data.format} does not know: set data.format table"
    if max(data.path.count(CLIENT), (data.test_path or "").count(CLIENT)) > 1:
        yield "data.path and data.test_path may have {client} once each"
    if data.partition != PartitionConfig():
        yield "data.partition has no effect where {client} in data.path gives each client its own file: leave it out"
    if data.clients is None:
        if cluster.group is not None:
            yield "data.clients is missing: groups with launchers of their own cannot find all clients: name them"
        return
    all_files = "data.clients says that each host has the files of its own clients only"
    if method.name == "centralized":
        yield f"method centralized trains on all clients' data, and {all_files}: leave data.clients out where all are"
    needs_others = has_client_files(data.test_path) or evaluation.split == "held_out"
    if evaluation.scores_every_rounds and needs_others:
        yield (
            "evaluation.scores_every_rounds scores every client on the test rows of all, and "
            f"{all_files}: set it to 0, or give one data.test_path without {{client}} that all hosts have"
        )


def _method_problems(method: MethodConfig, lora: LoraConfig) -> Iterator[str]:
    if method.name in ("feddpa_f", "fedlora") and lora.local_rank not in (None, lora.rank):
        yield (
            f"lora.local_rank is {lora.local_rank}, but {method.name} starts the local adapter from the global one of "
            f"rank {lora.rank}: leave lora.local_rank out"
        )
    if method.name == "feddpa_t":
        yield from _feddpa_t_problems(method)
        return
    default = MethodConfig()
    for key in ("phase_order", "global_source"):
        value = getattr(method, key)
        if value != getattr(default, key):
            yield f"method.{key}: {value} has no effect with method {method.name}, only with feddpa_t: leave it out"


def _feddpa_t_problems(method: MethodConfig) -> Iterator[str]:
    if method.alpha == 0:
        yield (
            "method.alpha must be in (0, 1] for feddpa_t, got 0: the local adapter would have no weight in its own "
            "phase; for the global adapter alone choose method fedit"
        )
    if method.phase_order == "local_first" and method.global_source == "aggregated":
        yield (
            "method.global_source: aggregated contradicts method.phase_order: local_first (this round's average does "
            "not exist yet when the local phase comes first): choose global_source own or phase_order global_first"
        )


def _weighting_problems(weighting: WeightingConfig, method: MethodConfig) -> Iterator[str]:
    if weighting.kind == "fixed" and weighting.scale is not None and weighting.scale > 1:
        yield f"weighting.scale must be in [0, 1] with weighting.kind fixed, got {show(weighting.scale)}"
    centred = weighting.kind == "centred_cosine"
    if weighting.kind == "auto":
        centred = method.name in ("feddpa_t", "feddpa_f")
    if centred and weighting.encoder not in ("auto", "none"):
        yield (
            f"weighting.encoder {weighting.encoder} does not go with weighting.kind centred_cosine: clients can share "
            "one reference mean only of the encoder that all of them have and that never changes: use encoder none, or "
            "weighting.kind cosine"
        )


def _sharing_problems(metrics: MetricsConfig, private_dir: str | None) -> Iterator[str]:
    if metrics.share == "sums" and private_dir is None:
        yield (
            "metrics.share sums needs private_dir, where the numbers of each client go: set it, or metrics.share "
            "per_client"
        )


def _sampling_problems(generation: GenerationConfig) -> Iterator[str]:
    if generation.temperature > 0:
        if generation.num_beams > 1:
            yield (
                f"generation.temperature {show(generation.temperature)} samples one answer, and generation.num_beams "
                f"{generation.num_beams} searches for the likeliest: set num_beams 1 (--beams 1), or temperature 0"
            )
        return
    default = GenerationConfig()
    for key in ("top_k", "top_p", "seed"):
        value = getattr(generation, key)
        if value != getattr(default, key):
            yield (
                f"generation.{key} {show(value)} has no effect with generation.temperature 0, which samples nothing: "
                "set a temperature such as 0.7, or leave it out"
            )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
