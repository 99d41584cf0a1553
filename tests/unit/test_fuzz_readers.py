"""Every reader of bytes from outside gives a result or an error of this package, whatever the bytes are.

A valid file is spoilt in many ways (fixed seed). A reader is added with one row of READERS.
"""

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpa_ds.cli import evaluate
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.fields import FIELDS
from dpa_ds.config.load import load_config, to_yaml
from dpa_ds.config.schema import DataConfig, ModelConfig, RunConfig, TrackingConfig
from dpa_ds.config.validate import fingerprint_sections
from dpa_ds.data.formats import build_format
from dpa_ds.data.sources import ClientInfo, Example, read_clients, read_test_rows
from dpa_ds.data.tables import read_rows
from dpa_ds.data.tokenize import load_or_tokenize
from dpa_ds.demo.archives import read_members, verified_manifest, write_manifest
from dpa_ds.distributed.launchers import (
    MPI_SIZE_VARIABLES,
    check_hostfile_of_launcher,
    discover_launch,
    expand_hostlist,
)
from dpa_ds.engine.engine import build_deepspeed_json
from dpa_ds.errors import DpaError
from dpa_ds.evaluation.answers import Answer, Instance, append_answers, read_answers
from dpa_ds.evaluation.statistics import summarize
from dpa_ds.experiments.compare import build_plan
from dpa_ds.experiments.comparison import find_evaluation, held_out_curve, read_evaluation
from dpa_ds.federation.progress import ClientState, PhaseProgress
from dpa_ds.inference.client_model import describe_client, load_client_model
from dpa_ds.model.base import resolve_model
from dpa_ds.model.directory import load_tokenizer, model_fingerprint
from dpa_ds.model.gguf.convert import convert_gguf
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.resume import find_resume_round, validate_run_dir
from dpa_ds.runs.storage import BackgroundWriter
from dpa_ds.runs.tracking import Tracker
from tests import tiny
from tests.unit.round_state_for_tests import make_round_state, one_client
from tests.unit.test_gguf import tiny_llama, write_gguf

ROWS = [{"instruction": f"ask {n}", "output": "say", "category": "ab"[n % 2], "n": n, "x": None} for n in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Reader:
    """One reader."""

    make: Callable[[Path], Path]
    """Writes a valid file, and what belongs to it, into an empty folder."""
    read: Callable[[Path], object]
    """Reads the file."""
    num_examples: int = 60


# ---- ways to spoil a file ----------------------------------------------------------------------------------------


@st.composite
def spoilt(draw: st.DrawFn, valid: bytes) -> bytes:
    """Anything, or `valid` cut off, with bytes changed, put in, taken out or doubled; of JSON also with another value."""
    start = draw(st.integers(0, len(valid)))
    end = draw(st.integers(start, min(len(valid), start + 64)))
    match draw(st.sampled_from(["anything", "cut", "change", "put in", "take out", "double", "value", "value"])):
        case "anything":
            return draw(st.binary(max_size=64))
        case "cut":
            return valid[:start]
        case "change":
            return (
                valid[:start]
                + bytes(byte ^ draw(st.integers(1, 255)) for byte in valid[start : start + 3])
                + valid[start + 3 :]
            )
        case "put in":
            return (
                valid[:start]
                + draw(st.sampled_from([b"\0", b"\xff", b"[", b"{", b'"', b"9" * 5000, b"\n", b"-"]))
                + valid[start:]
            )
        case "take out":
            return valid[:start] + valid[end:]
        case "double":
            return valid[:end] + valid[start:]
    try:
        tree = json.loads(valid)
    except ValueError:
        return valid[:start] + draw(st.binary(max_size=8)) + valid[end:]
    return json.dumps(draw(with_another_value(tree))).encode()


ODD_VALUES = st.sampled_from(
    [None, True, 0, -1, 3, 1e308, 10**30, float("nan"), "", "x", "../x", "\0", [], [1], {}, {"a": 1}]
)


@st.composite
def with_another_value(draw: st.DrawFn, tree: Any) -> Any:
    """`tree` with one value in it replaced, or one key left out."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(ODD_VALUES)
    if isinstance(tree, list):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], draw(with_another_value(tree[at])), *tree[at + 1 :]]
    key = draw(st.sampled_from(list(tree)))
    if draw(st.integers(0, 3)) == 0:
        return {other: value for other, value in tree.items() if other != key}
    return {**tree, key: draw(with_another_value(tree[key]))}


# ---- recipes and commands ----------------------------------------------------------------------------------------

DEEPSPEED = {
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
    "bf16": {},
    "fp16": {"loss_scale": 0},
}
CONFIG = RunConfig(model=ModelConfig(path="m"), data=DataConfig(path="d"))


def file(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return make


def read_deepspeed(path: Path) -> None:
    build_deepspeed_json(load_deepspeed_json(str(path)), str(path), CONFIG.train, CONFIG.model.precision, 1)


# ---- data --------------------------------------------------------------------------------------------------------


def read_all_cells(path: Path) -> None:
    for row in read_rows(path):
        for column in row.values:
            with suppress(DpaError):
                row.text(column)
            with suppress(DpaError):
                row.optional_text(column)


def parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder / "rows.parquet"


def saved_dataset(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
        return folder / "saved" / name

    return make


def federation(name: str) -> Callable[[Path], Path]:
    return lambda folder: tiny.make_federation(folder / "data", sizes=(3, 2)) / name


def read_federation(root: Path) -> None:
    config = DataConfig(path=str(root), num_clients=2)
    read_clients(config, 0, [0, 1])
    read_test_rows(config, 0, "test")


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pairs.jsonl", LINES)
        archive.writestr("inner.zip", zip_of_a_line())
    return folder / "a.whl"


def zip_of_a_line() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("pairs.jsonl", "{}")
    return stream.getvalue()


def tarred(folder: Path) -> Path:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("pairs.jsonl")
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES.encode()))
    (folder / "a.tar.gz").write_bytes(gzip.compress(stream.getvalue(), mtime=0))
    return folder / "a.tar.gz"


def read_archive(path: Path) -> None:
    for pattern in ("*.jsonl", "*.zip!*.jsonl"):
        with suppress(DpaError):
            read_members(path, pattern)


def manifest(folder: Path) -> Path:
    file("rows.jsonl", LINES)(folder)
    write_manifest(folder, {"made": "here"})
    return folder / "manifest.json"


def token_cache(folder: Path) -> Path:
    read_tokens(folder / "tokens" / "x")
    (path,) = (folder / "tokens").glob("*.safetensors")
    return path


def read_tokens(path: Path) -> None:
    """A damaged cache is found out: the tokens are the right ones."""
    config = DataConfig(cache_dir=str(path.parents[1]), template="{instruction}")
    examples = load_or_tokenize(
        [Example("ask", "say", "")], build_format(tiny.make_tokenizer(), config), config, "client_0"
    )
    expected = tiny.make_tokenizer()("asksay")["input_ids"]
    assert examples.tokens.tolist()[:-1] == expected


# ---- runs --------------------------------------------------------------------------------------------------------

INSTANCES = [Instance("a", row, f"ask {row}", "say") for row in range(2)]
ANSWERS = [Answer(0, "a", row, 0.5, "say") for row in range(2)]
INFO = {"label": "client_0", "tasks": ["a"], "steps_taken": {"global": 1, "local": 1}, "loss_scale": {}}
ROUND = "rounds/round_000001"


def run(name: str) -> Callable[[Path], Path]:
    """A complete run of one round: FOLDER/run, whose file `name` is to be spoilt."""

    def make(folder: Path) -> Path:
        root = folder / "run"
        run_folder, lora = RunFolder(root), peft.LoraConfig(r=2, target_modules=["q_proj"])
        weights = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}
        references = {
            "tokens": torch.tensor([1, 2, 3], dtype=torch.int32),
            "lengths": torch.tensor([3], dtype=torch.int32),
        }
        references |= {f"embeddings.{kind}": torch.ones(1, 3) for kind in ("last_token", "mean")}
        run_folder.save_adapter(1, "global", weights, lora, {}, {"num_clients": 1})
        run_folder.save_adapter(1, "local/client_00", weights, lora, {"references": references}, INFO)
        run_folder.complete_round(1, {}, 2)
        with BackgroundWriter() as writer:
            client = one_client(ClientState(weights, {"global": 1, "local": 1}))
            kept = make_round_state(root, writer)
            kept.open(client).inside = PhaseProgress(2, [1.0], [1.0])
            kept.save(client, 2)
        (root / "config.yaml").write_text(to_yaml(config_of(root)))
        (root / "model.json").write_text(json.dumps({"fingerprint": "abc", "path": "m"}))
        records = [{"kind": "round", "round": number, "held_out_loss": 1.0} for number in range(2)]
        (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        evaluation = root / "evaluations" / "test"
        for name_of_folder in ("answers", "all"):
            (evaluation / name_of_folder).mkdir(parents=True)
        append_answers(evaluation / "answers" / "rank_0000.jsonl", ANSWERS)
        summary = {"settings": {"run": "run"}, **summarize(INSTANCES, ANSWERS, [ClientInfo(0, "client_0", ("a",))])}
        file("summary.json", json.dumps(summary))(evaluation / "all")
        return root / name

    return make


def config_of(root: Path) -> RunConfig:
    return replace(CONFIG, name=root.name, output_dir=str(root.parent))


def run_of(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.name == "run")


def read_round(path: Path) -> None:
    folder = RunFolder(run_of(path))
    for name in ("global", "local/client_00"):
        with suppress(DpaError):
            folder.load_adapter(1, name)
    with suppress(DpaError):
        describe_client(folder, 1, 0)
    load_client_model(folder, 1, 0)


def resume_run(path: Path) -> None:
    fingerprint = fingerprint_sections(config_of(run_of(path)))
    find_resume_round(RunFolder(run_of(path)), fingerprint, "auto")


def read_progress(path: Path) -> None:
    with BackgroundWriter() as writer:
        client = one_client(ClientState({}, {"global": 0, "local": 0}))
        make_round_state(run_of(path), writer).restore_progress([client], 2)


def read_metrics(path: Path) -> None:
    content = path.read_bytes()
    held_out_curve([path.parent])
    Tracker(path.parent, True, TrackingConfig()).drop_records_after(1)
    path.write_bytes(content)


def read_summary(path: Path) -> None:
    find_evaluation(run_of(path), {"run": "run"})
    read_evaluation(path.parent, INSTANCES)


# ---- models ------------------------------------------------------------------------------------------------------


def model(name: str) -> Callable[[Path], Path]:
    return lambda folder: tiny.make_model(folder / "model") / name


def indexed(folder: Path) -> Path:
    tiny.make_model(folder / "model")
    (folder / "model" / "model.safetensors").rename(folder / "model" / "model-1.safetensors")
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    return file(
        "model.safetensors.index.json", json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")})
    )(folder / "model")


def read_model(path: Path) -> None:
    directory = resolve_model(ModelConfig(path=str(path.parent)), str(path.parents[1]))
    model_fingerprint(directory)
    load_tokenizer(directory)


def gguf(folder: Path) -> Path:
    write_gguf(folder / "m.gguf", tiny_llama(tied=True))
    return folder / "m.gguf"


def read_gguf(path: Path) -> None:
    try:
        convert_gguf(path, path.parent / "out")
    finally:
        shutil.rmtree(path.parent / "out", ignore_errors=True)


READERS = {
    "recipe": Reader(file("r.yaml", to_yaml(CONFIG)), lambda path: load_config(["--config", str(path)]), 40),
    "DeepSpeed JSON": Reader(file("ds.json", json.dumps(DEEPSPEED)), read_deepspeed, 100),
    "JSON": Reader(file("rows.json", json.dumps(ROWS)), read_all_cells, 100),
    "JSONL": Reader(file("rows.jsonl", LINES), read_all_cells, 100),
    "CSV": Reader(file("rows.csv", 'a,b\n1,"x, y"\n2,z\n'), read_all_cells, 100),
    "parquet": Reader(parquet, read_all_cells),
    "data set": Reader(saved_dataset("state.json"), lambda path: read_all_cells(path.parent)),
    "data set's features": Reader(saved_dataset("dataset_info.json"), lambda path: read_all_cells(path.parent)),
    "data set's table": Reader(saved_dataset("data-00000-of-00001.arrow"), lambda path: read_all_cells(path.parent)),
    "client": Reader(federation("2/local_training_1.json"), lambda path: read_federation(path.parents[1])),
    "test rows": Reader(federation("test.jsonl"), lambda path: read_federation(path.parent)),
    "wheel": Reader(zipped, read_archive, 100),
    "sdist": Reader(tarred, read_archive, 100),
    "manifest of the demo": Reader(manifest, lambda path: verified_manifest(path.parent)),
    "cache of tokens": Reader(token_cache, read_tokens),
    "recipe of a run": Reader(run("config.yaml"), lambda path: evaluate.load(["--run", str(path.parent)]), 20),
    "run to claim": Reader(
        run("config.yaml"),
        lambda path: validate_run_dir(RunFolder(path.parent), fingerprint_sections(config_of(path.parent))),
        20,
    ),
    "fingerprint": Reader(run("model.json"), lambda path: RunFolder(path.parent).check_model("abc")),
    "meta.json": Reader(run(f"{ROUND}/meta.json"), resume_run, 20),
    "state.json": Reader(run(f"{ROUND}/local/client_00/state.json"), read_round),
    "adapter": Reader(run(f"{ROUND}/local/client_00/adapter_model.safetensors"), read_round),
    "references": Reader(run(f"{ROUND}/local/client_00/references.safetensors"), read_round),
    "progress": Reader(run("rounds/round_000002.tmp/progress/client_00/000000/state.json"), read_progress),
    "progress of an adapter": Reader(
        run("rounds/round_000002.tmp/progress/client_00/000000/local.safetensors"), read_progress
    ),
    "metrics": Reader(run("metrics.jsonl"), read_metrics),
    "answers": Reader(
        run("evaluations/test/answers/rank_0000.jsonl"), lambda path: [asdict(a) for a in read_answers(path.parent)]
    ),
    "summary": Reader(run("evaluations/test/all/summary.json"), read_summary),
    "model's config": Reader(model("config.json"), read_model),
    "tokenizer": Reader(model("tokenizer.json"), read_model),
    "tokenizer's config": Reader(model("tokenizer_config.json"), read_model),
    "weights": Reader(model("model.safetensors"), read_model),
    "index of the weights": Reader(indexed, read_model),
    "GGUF": Reader(gguf, read_gguf),
}


@pytest.mark.parametrize("name", READERS)
def test_file(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = reader.make(tmp_path)
    reader.read(path)  # undamaged it is fine

    @settings(FUZZ, max_examples=reader.num_examples)
    @given(spoilt(path.read_bytes()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        reported = ""
        try:
            reader.read(path)
        except DpaError as error:
            reported = str(error)
        assert not reported or str(tmp_path) in reported or any(key in reported for key in FIELDS), (
            "names neither file nor key"
        )
        assert len(reported) < 2000, "nobody reads that"

    check()


WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["-1", "1e999", ".nan", "[", "{a: 1}", "[1, 2]", "null", "&a *a", "9" * 5000, "[" * 5000, "\ud800"]
    ),
)


@settings(FUZZ, max_examples=60)
@given(st.sampled_from(sorted(FIELDS)), WORDS)
def test_override(key: str, value: str) -> None:
    with suppress(DpaError):
        load_config(["--model.path=m", "--data.path=d", f"--{key}={value}"])


@settings(FUZZ, max_examples=60)
@given(st.lists(st.one_of(WORDS, st.sampled_from(["--config", "--train", "--seed", "--run", "--x.y", "--", "--="]))))
def test_command_lines(words: list[str]) -> None:
    for read in (load_config, evaluate.load, check_hostfile_of_launcher):
        with suppress(DpaError):
            read(words)


@settings(FUZZ, max_examples=100)
@given(WORDS, WORDS, WORDS, WORDS)
def test_words_of_a_comparison(methods: str, seeds: str, weightings: str, tuning_instances: str) -> None:
    for plan in (
        (methods, "0", None, "1"),
        ("fedit", seeds, None, "1"),
        ("feddpa_t", "0", weightings, "1"),
        ("feddpa_t", "0", f"cosine:{weightings}", "1"),
        ("fedit", "0", None, tuning_instances),
    ):
        with suppress(DpaError):
            build_plan(*plan)


ENVIRONMENT = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
SLURM = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID"]
NUMBERS = st.sampled_from(["0", "1", "2", "70000", "-1", "", "x", "²", "1_0", " 1", "9" * 5000])


@settings(FUZZ, max_examples=200)
@given(st.dictionaries(st.sampled_from([*ENVIRONMENT, *SLURM, "SLURM_STEP_NODELIST"]), st.one_of(NUMBERS, st.text())))
def test_environment(environ: dict[str, str]) -> None:
    with suppress(DpaError):
        launch = discover_launch(environ)
        assert 0 <= launch.global_rank < launch.job_world_size
        assert launch.launcher == "single" or 1 <= launch.master_port <= 65535
    assert not set(environ) & set(MPI_SIZE_VARIABLES)


@settings(FUZZ, max_examples=200)
@given(st.text("n[]-,0123456789 ", max_size=30))
def test_list_of_hosts(text: str) -> None:
    with suppress(DpaError):
        assert expand_hostlist(text)
