"""Answers of one client's model to a prompt, to a file of prompts, or to what is typed, each with its alpha."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedTokenizerBase, TextStreamer

from dpa_ds.config.paths import expand
from dpa_ds.config.schema import DataConfig, RunConfig
from dpa_ds.data.limits import ModelLimits
from dpa_ds.data.sources import read_instruction
from dpa_ds.data.tables import read_rows, reading
from dpa_ds.data.tokenize import tokenize_prompts
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.errors import ClusterError, ConfigError, DataError
from dpa_ds.inference.client_model import ClientModel, Predictor, load_client_model
from dpa_ds.inference.loading import build_predictor, place_base
from dpa_ds.inference.weighting import BASE_ALONE, describe_weighting, resolve_weighting
from dpa_ds.model.directory import model_fingerprint
from dpa_ds.runs.private import open_run_folder
from dpa_ds.runs.tracking import logger, setup_logging

TABLES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Asking:
    """How a text becomes a prompt that the model can read."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    limits: ModelLimits
    max_new_tokens: int

    def tokens(self, text: str) -> list[int]:
        """The text in the template, as tokens.

        Raises:
            DataError: the model cannot read them, or has no room for the answer.
        """
        (tokens,) = tokenize_prompts([text], self.tokenizer, self.template)
        self.limits.check_prompt(tokens, self.max_new_tokens, f"the prompt {text[:40]!r}")
        return tokens


@dataclass(frozen=True)
class Console:
    """One client's model, ready to answer."""

    predictor: Predictor
    client_model: ClientModel
    asking: Asking
    streams: bool
    """Tokens are shown as they come: with one beam only."""


def generate(
    config: RunConfig, job: JobStore, wanted: str, prompt: str | None, input_path: str | None, out: TextIO
) -> None:
    """Answer one prompt, all prompts of a file (as JSON lines on `out`), or what is typed. One rank.

    Args:
        wanted: id or name of the client whose model answers.

    Raises:
        ClusterError, ConfigError, DataError: more ranks than one, no such client, nothing to answer, or more than the
            model can read.
    """
    if job.launch.job_world_size != 1:
        raise ClusterError("launch/generate.py is one process: start it with python, without a launcher")
    setup_logging(is_coordinator=input_path is None)
    folder = open_run_folder(config.run_dir, config.private_dir, group=None)
    server_round = folder.hold_trained_round()
    num_clients = len(folder.clients(server_round))
    (client,) = folder.find_clients([wanted], server_round)
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt is empty: write a question, or leave --prompt out to be asked for one")
    prompts = []
    if input_path is not None:  # before the base, whose loading takes much longer
        prompts = read_prompts(expand(input_path, "--input"), config.data)

    weighting = resolve_weighting(config.weighting, config.method, num_clients)
    base = place_base(
        job,
        config.model,
        config.data.cache_dir,
        config.evaluation.sharding,
        config.cluster,
        config.federation.timeout_seconds,
        num_clients,
    )
    folder.check_model(model_fingerprint(base.directory))
    asking = Asking(base.tokenizer, config.data.template, base.limits, config.generation.max_new_tokens)
    for text in prompts:  # all of them before the first answer
        asking.tokens(text)
    predictor = build_predictor(base, config.lora, config.generation, weighting, folder, server_round)
    client_model = load_client_model(folder, server_round, client)
    described = describe_weighting(weighting, config.weighting.num_references)
    logger.info(f"{client_model.info.label} after round {server_round}, {described}")
    if not client_model.trained and not weighting.is_constant:
        logger.info("its local adapter was never trained: the global adapter alone answers, alpha is always 0")
    console = Console(predictor, client_model, asking, config.generation.num_beams == 1)

    if input_path is not None:
        for text in prompts:
            answer_as_json(console, text, out)
    elif prompt is not None:
        answer_on_stdout(console, prompt)
    else:
        converse(console)
    base.world.close()


def converse(console: Console) -> None:
    """Answer what is typed, until an empty line."""
    for line in _typed_lines():
        try:
            answer_on_stdout(console, line)
        except DataError as error:  # too long: who types can try again
            sys.stdout.write(f"{error}\n")


def answer_on_stdout(console: Console, prompt: str) -> None:
    """Write the answer, as it comes where there is one beam, and then alpha.

    Raises:
        DataError: prompt and answer do not fit the model's context.
    """
    streamer = None
    if console.streams:
        streamer = TextStreamer(console.predictor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    alpha, answer = _answer(console, prompt, streamer)
    if streamer is None:
        sys.stdout.write(f"{answer}\n")
    shares = f"alpha {alpha:.3f}: local adapter {alpha:.0%}, global adapter {1 - alpha:.0%}"
    if console.predictor.weighting.kind == BASE_ALONE:
        shares = "the base alone"
    sys.stdout.write(f"[{shares}]\n")
    sys.stdout.flush()


def answer_as_json(console: Console, prompt: str, out: TextIO) -> None:
    """Write prompt, alpha and answer as one line to `out`.

    Raises:
        DataError: prompt and answer do not fit the model's context.
    """
    alpha, answer = _answer(console, prompt)
    line = json.dumps({"prompt": prompt, "alpha": alpha, "answer": answer}, ensure_ascii=False)
    out.write(line + "\n")
    out.flush()


def read_prompts(path: Path, data: DataConfig) -> list[str]:
    """What the rows of a table (.json, .jsonl, .csv, .parquet) ask in the columns of `data`, else one prompt a line.

    Raises:
        DataError: no such file, not UTF-8, nothing in it, or a row that asks nothing.
    """
    with reading(path):
        if path.suffix.lower() in TABLES:
            prompts = [read_instruction(row, data) for row in read_rows(path)]
        else:
            prompts = _nonempty_lines(path)
    if not prompts:
        raise DataError(f"{path}: no prompts: write one a line, or give a table with {data.instruction_column!r}")
    return prompts


def _answer(console: Console, prompt: str, streamer: TextStreamer | None = None) -> tuple[float, str]:
    """Alpha and the answer."""
    predictor = console.predictor
    prompts = [console.asking.tokens(prompt)]
    alphas = predictor.weights(console.client_model, prompts)
    (answer,) = predictor.answer(console.client_model, prompts, alphas, streamer)
    return float(alphas[0]), answer


def _nonempty_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: convert the file to UTF-8") from error
    return [line for line in lines if line.strip()]


def _typed_lines() -> Iterator[str]:
    """What is typed, a line at a time, until an empty line or the end of input."""
    sys.stdout.write("Type a prompt; an empty line ends.\n")
    while True:
        sys.stdout.write("> ")
        sys.stdout.flush()
        try:
            line = sys.stdin.readline().strip()
            line.encode("utf-8")
        except UnicodeError as error:
            raise DataError("what was typed is not UTF-8: set the terminal to UTF-8") from error
        if not line:
            return
        yield line
