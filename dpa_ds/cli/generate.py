"""Ask one client's model: from a config, a job and prompts to answers and the weights that they were given with."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from transformers import TextStreamer

from dpa_ds.config.schema import RunConfig
from dpa_ds.data.tables import read_rows, reading
from dpa_ds.data.tokenize import tokenize_prompts
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.errors import ClusterError, ConfigError, DataError
from dpa_ds.inference.client_model import ClientModel, Predictor, load_client_model
from dpa_ds.inference.loading import build_predictor, place_base
from dpa_ds.inference.weighting import describe_weighting
from dpa_ds.model.directory import model_fingerprint
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.tracking import logger, setup_logging


def ask(config: RunConfig, job: JobStore, client: int, prompt: str | None, input_path: str | None, out: TextIO) -> None:
    """Answer one prompt, all prompts of a file (as JSON lines on `out`), or what is typed. One rank.

    Raises:
        ClusterError, ConfigError, DataError: more ranks than one, no such client, nothing to answer, or more than the
            model can read.
    """
    if job.launch.job_world_size != 1:
        raise ClusterError("launch/generate.py is one process: start it with python, without a launcher")
    setup_logging(is_coordinator=input_path is None)
    folder = RunFolder(config.run_dir)
    server_round = folder.trained_round()
    existing = folder.clients(server_round)
    if client not in existing:
        raise ConfigError(f"{config.run_dir} has no client {client}: its clients are {existing}")
    texts: Iterable[str] = _typed()
    if input_path is not None:
        texts = _read_prompts(Path(input_path).expanduser(), config)
    elif prompt is not None:
        texts = [prompt]
        if not prompt.strip():
            raise ConfigError("--prompt is empty: write a question, or leave --prompt out to be asked for one")
    directory, world, partitioned = place_base(config, job, len(existing))
    folder.check_model(model_fingerprint(directory))
    predictor = build_predictor(config, folder, server_round, directory, world, partitioned)
    client_model = load_client_model(folder, server_round, client)
    logger.info(
        f"{client_model.info.label} after round {server_round}, "
        f"{describe_weighting(predictor.weighting, config.weighting.num_references)}"
    )
    if not client_model.trained and not predictor.weighting.is_constant:
        logger.info("its local adapter was never trained: the global adapter alone answers, alpha is always 0")
    for text in texts:
        try:
            _answer(predictor, client_model, config, text, out if input_path is not None else None)
        except DataError as error:
            if prompt is not None or input_path is not None:
                raise
            sys.stdout.write(f"{error}\n")  # who types can try again
    world.close()


def _answer(
    predictor: Predictor, client_model: ClientModel, config: RunConfig, text: str, json_out: TextIO | None
) -> None:
    """Write one JSON line; or the answer as it comes where there is one beam, and then the weight.

    Raises:
        DataError: prompt and answer do not fit the model's context.
    """
    prompts = tokenize_prompts([text], predictor.tokenizer, config.data.template)
    predictor.check_context(len(prompts[0]), f"the prompt {text[:40]!r}")
    alphas: torch.Tensor = predictor.weights(client_model, prompts)
    streams = config.generation.num_beams == 1 and json_out is None
    streamer = None
    if streams:
        streamer = TextStreamer(predictor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = predictor.answer(client_model, prompts, alphas, streamer)
    alpha = float(alphas[0])
    if json_out is not None:
        json_out.write(json.dumps({"prompt": text, "alpha": alpha, "answer": answer}, ensure_ascii=False) + "\n")
    else:
        shown = "" if streams else f"{answer}\n"
        sys.stdout.write(f"{shown}[alpha {alpha:.3f}: local adapter {alpha:.0%}, global adapter {1 - alpha:.0%}]\n")
    sys.stdout.flush()


def _read_prompts(path: Path, config: RunConfig) -> list[str]:
    """Instructions of a table (.json, .jsonl, .csv, .parquet), else one prompt a line.

    Raises:
        DataError: no such file, not UTF-8, or nothing in it.
    """
    with reading(path):
        if path.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet"):
            prompts = [row.text(config.data.instruction_column) for row in read_rows(path)]
        else:
            try:
                prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: byte {error.start} is not UTF-8: convert the file to UTF-8") from error
    if not prompts:
        raise DataError(
            f"{path}: no prompts: write one a line, or give a table with {config.data.instruction_column!r}"
        )
    return prompts


def _typed() -> Iterator[str]:
    """What is typed, a line at a time, until an empty line or the end of input."""
    sys.stdout.write("Ask something; an empty line ends.\n")
    while True:
        sys.stdout.write("> ")
        sys.stdout.flush()
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
