"""Answers of one client's model to a prompt, to a file of prompts, or to what is typed, each with its alpha."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from transformers import TextStreamer

from dpa_ds.config.paths import expand
from dpa_ds.config.schema import DataConfig, RunConfig
from dpa_ds.data.conversations import ASSISTANT, USER, Conversation, Message, Question
from dpa_ds.data.formats import ExampleFormat, TextFormat
from dpa_ds.data.limits import ModelLimits, check_prompts
from dpa_ds.data.sources import read_question
from dpa_ds.data.tables import read_rows, reading
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.errors import ClusterError, ConfigError, DataError
from dpa_ds.inference.client_model import ClientModel, Predictor, load_client_model
from dpa_ds.inference.loading import build_predictor, place_base
from dpa_ds.inference.weighting import BASE_ALONE, describe_weighting, resolve_weighting
from dpa_ds.model.directory import base_fingerprint
from dpa_ds.runs.private import open_run_folder
from dpa_ds.runs.tracking import logger, setup_logging

TABLES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Asking:
    """How a text becomes a prompt that the model can read."""

    example_format: ExampleFormat
    limits: ModelLimits
    max_new_tokens: int

    def tokens(self, question: Question) -> list[int]:
        """The prompt of the question.

        Raises:
            DataError: the model cannot read it, or has no room for the answer.
        """
        (tokens,) = check_prompts([question], self.example_format, self.limits, self.max_new_tokens)
        return tokens


@dataclass(frozen=True)
class Console:
    """One client's model, ready to answer."""

    predictor: Predictor
    client_model: ClientModel
    asking: Asking
    streams: bool
    """Tokens are shown as they come: with one beam only."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    client: str
    """Id or name of the client whose model answers."""
    prompt: str | None
    """One question; None: those of `input_path`, or what is typed."""
    input_path: str | None
    """A file of questions."""
    chat: bool
    """What is typed continues the conversation."""
    system: str | None
    """The system's turn, which a conversation begins with."""


def generate(config: RunConfig, job: JobStore, wanted: Wanted, out: TextIO) -> None:
    """Answer one prompt, all prompts of a file (as JSON lines on `out`), or what is typed. One rank.

    Raises:
        ClusterError, ConfigError, DataError: more ranks than one, no such client, nothing to answer, or more than the
            model can read.
    """
    if job.launch.job_world_size != 1:
        raise ClusterError("launch/generate.py is one process: start it with python, without a launcher")
    setup_logging(is_coordinator=wanted.input_path is None)
    folder = open_run_folder(config.run_dir, config.private_dir, group=None)
    server_round = folder.hold_trained_round()
    num_clients = len(folder.clients(server_round))
    (client,) = folder.find_clients([wanted.client], server_round)
    if wanted.prompt is not None and not wanted.prompt.strip():
        raise ConfigError("--prompt is empty: write a question, or leave --prompt out to be asked for one")
    questions = []
    if wanted.input_path is not None:  # before the base, whose loading takes much longer
        questions = read_questions(expand(wanted.input_path, "--input"), config.data, wanted.system)

    weighting = resolve_weighting(config.weighting, config.method, num_clients)
    base = place_base(
        job,
        config.model,
        config.data,
        config.evaluation.sharding,
        config.cluster,
        config.federation.timeout_seconds,
        num_clients,
    )
    folder.check_model(base_fingerprint(base.directory, base.example_format))
    asking = Asking(base.example_format, base.limits, config.generation.max_new_tokens)
    beginning = begin_conversation(wanted, asking)
    for question in questions:  # all of them before the first answer
        asking.tokens(question)
    predictor = build_predictor(base, config.lora, config.generation, weighting, folder, server_round)
    client_model = load_client_model(folder, server_round, client)
    described = describe_weighting(weighting, config.weighting.num_references)
    logger.info(f"{client_model.info.label} after round {server_round}, {described}")
    if not client_model.trained and not weighting.is_constant:
        logger.info("its local adapter was never trained: the global adapter alone answers, alpha is always 0")
    console = Console(predictor, client_model, asking, config.generation.num_beams == 1)

    if wanted.input_path is not None:
        for question in questions:
            answer_as_json(console, question, out)
    elif wanted.prompt is not None:
        answer_on_stdout(console, ask(beginning, wanted.prompt))
    else:
        converse(console, beginning, wanted.chat)
    base.world.close()


def begin_conversation(wanted: Wanted, asking: Asking) -> Conversation | None:
    """What is said before the first question; None where each is an instruction by itself.

    Raises:
        ConfigError: a conversation is wanted, and the run's prompts are a text template around an instruction.
    """
    if not wanted.chat and wanted.system is None:
        return None
    if isinstance(asking.example_format, TextFormat):
        raise ConfigError(
            "--chat and --system need the model's chat template, but this run was trained with a text template: leave "
            "them out, or train with data.template chat"
        )
    if wanted.system is None:
        return Conversation(())
    return Conversation((Message("system", wanted.system),))


def ask(beginning: Conversation | None, text: str) -> Question:
    """The question `text`, after what was said before."""
    place = f"the prompt {text[:40]!r}"
    if beginning is None:
        return Question(text, None, place)
    return Question(text, beginning.continued(USER, text), place)


def converse(console: Console, beginning: Conversation | None, keeps_turns: bool) -> None:
    """Answer what is typed, until an empty line.

    Args:
        beginning: what was said before.
        keeps_turns: each question continues the conversation.
    """
    said = beginning
    for line in _typed_lines():
        question = ask(said, line)
        try:
            answer = answer_on_stdout(console, question)
        except DataError as error:  # too long: who types can try again
            sys.stdout.write(f"{error}\n")
            if said != beginning:
                sys.stdout.write("A new conversation begins.\n")
            said = beginning
            continue
        if keeps_turns and question.conversation is not None:
            said = question.conversation.continued(ASSISTANT, answer)


def answer_on_stdout(console: Console, question: Question) -> str:
    """Write the answer, as it comes where there is one beam, and then alpha; the answer.

    Raises:
        DataError: prompt and answer do not fit the model's context.
    """
    streamer = None
    if console.streams:
        streamer = TextStreamer(console.predictor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    alpha, answer = _answer(console, question, streamer)
    if streamer is None:
        sys.stdout.write(f"{answer}\n")
    shares = f"alpha {alpha:.3f}: local adapter {alpha:.0%}, global adapter {1 - alpha:.0%}"
    if console.predictor.weighting.kind == BASE_ALONE:
        shares = "the base alone"
    sys.stdout.write(f"[{shares}]\n")
    sys.stdout.flush()
    return answer


def answer_as_json(console: Console, question: Question, out: TextIO) -> None:
    """Write prompt, alpha and answer as one line to `out`.

    Raises:
        DataError: prompt and answer do not fit the model's context.
    """
    alpha, answer = _answer(console, question)
    line = json.dumps({"prompt": question.instruction, "alpha": alpha, "answer": answer}, ensure_ascii=False)
    out.write(line + "\n")
    out.flush()


def read_questions(path: Path, data: DataConfig, system: str | None = None) -> list[Question]:
    """What the rows of a table (.json, .jsonl, .csv, .parquet) ask in the columns of `data`, else one question a line.

    Args:
        system: the system's turn before each that has none.

    Raises:
        DataError: no such file, not UTF-8, nothing in it, or a row that asks nothing.
    """
    with reading(path):
        if path.suffix.lower() in TABLES:
            questions = [read_question(row, data) for row in read_rows(path)]
        else:
            questions = [ask(None, line) for line in _nonempty_lines(path)]
    if not questions:
        raise DataError(f"{path}: no prompts: write one a line, or give a table with {data.instruction_column!r}")
    return questions if system is None else [_with_system(question, system) for question in questions]


def _with_system(question: Question, system: str) -> Question:
    conversation = question.as_conversation()
    if conversation.messages[0].role == "system":
        return question
    messages = (Message("system", system), *conversation.messages)
    return replace(question, conversation=Conversation(messages, conversation.tools))


def _answer(console: Console, question: Question, streamer: TextStreamer | None = None) -> tuple[float, str]:
    """Alpha and the answer."""
    predictor = console.predictor
    prompts = [console.asking.tokens(question)]
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
