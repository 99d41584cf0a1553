"""Conversations from end to end over a tiny model: trained as a plain loop does, asked as they were trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dpa_ds.config.load import load_config
from tests import plain, tiny
from tests.launch.processes import PYTHON, adapters, assert_same_adapters, run, type_into
from tests.plain_inference import PlainClient
from tests.plain_start import start_plain
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TASKS = ("colour0", "count1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    folder = tiny.make_model(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients with conversations of one to three questions, and test conversations."""
    folder = tmp_path_factory.mktemp("data")
    rows = tiny.make_federation(folder / "rows", sizes=(9, 7), num_test=4)
    (folder / "chat" / "2").mkdir(parents=True)
    for client in range(2):
        singles = json.loads((rows / "2" / f"local_training_{client}.json").read_text())
        conversations, start = [], 0
        while start < len(singles):
            stop = start + 1 + len(conversations) % 3
            conversations.append(as_conversation(singles[start:stop]))
            start = stop
        (folder / "chat" / "2" / f"local_training_{client}.json").write_text(json.dumps(conversations))
    tests = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
    pairs = [as_conversation(tests[k : k + 2]) for k in range(0, len(tests), 2)]
    (folder / "chat" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder / "chat"


def as_conversation(rows: list[dict[str, str]]) -> dict[str, Any]:
    turns = [{"role": "system", "content": "sort"}]
    for row in rows:
        turns.append({"role": "user", "content": row["instruction"]})
        turns.append({"role": "assistant", "content": row["output"]})
    return {"messages": turns, "category": rows[0]["category"]}


def recipe(model: Path, data: Path, folder: Path, **overrides: Any) -> list[str]:
    return tiny.recipe(model, data, folder, data__template="auto", train__micro_batch_tokens=512, **overrides)


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adapters_are_those_of_a_plain_loop(
    model: Path, data: Path, tmp_path: Path, train_on: str, num_ranks: int
) -> None:
    """Several answers in an example, with packed rows and a shared prefix, on one rank and on a group of two."""
    argv = recipe(model, data, tmp_path / "runs", data__train_on=train_on, cluster__ranks_per_group=num_ranks)
    run_on_ranks(train_on_rank, num_ranks, tmp_path, argv)
    reference, clients, start = start_plain(load_config(argv))
    assert any(len(spans) > 1 for _, spans in clients[0].examples) == (train_on == "all")
    expected = {"global": plain.feddpa_t(reference, clients, start, 2, 0.5)}
    for number, client in enumerate(clients):
        expected[f"local/client_{number:02d}"] = client.local
    tensors = {f"{name}/{key}": tensor for name, state in expected.items() for key, tensor in state.items()}
    assert_same_adapters(adapters(tmp_path / "runs" / "tiny"), tensors, tolerance=1e-3)


def test_answers_are_asked_as_trained(model: Path, data: Path, tmp_path: Path) -> None:
    """Evaluation, a file of conversations and a kept conversation: prompts, weights and answers of plain PEFT."""
    argv = recipe(model, data, tmp_path / "runs")
    run_on_ranks(train_on_rank, 1, tmp_path, argv)
    run_dir = tmp_path / "runs" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(model)
    alone = PlainClient(model, run_dir / "adapters", 1)

    def expected(messages: list[dict[str, str]]) -> tuple[float, str]:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        alpha = alone.alpha(prompt, "centred_cosine", 1.0, "last_token")
        return alpha, alone.answer(prompt, alpha, beams=1, new_tokens=6)

    ended = run([PYTHON, "launch/evaluate.py", "--run", str(run_dir), "--max_new_tokens", "6", "--beams", "1"])
    assert ended.returncode == 0, ended.output
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    answers = {}
    for path in run_dir.glob("evaluations/*/answers/*.jsonl"):
        for line in path.read_text().splitlines():
            answer = json.loads(line)
            answers[answer["client"], answer["task"], answer["row"]] = answer
    count: dict[str, int] = {}
    for row in rows:
        number = count.setdefault(row["category"], 0)
        count[row["category"]] += 1
        alpha, text = expected(row["messages"][:-1])
        answer = answers[1, row["category"], number]
        assert (answer["alpha"], answer["text"]) == (pytest.approx(alpha, abs=1e-5), text)

    options = ["--run", str(run_dir), "--client", "1", "--max_new_tokens", "6"]
    ended = run([PYTHON, "launch/generate.py", *options, "--input", str(data / "test.jsonl")])
    lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    assert [line["answer"] for line in lines] == [expected(row["messages"][:-1])[1] for row in rows]

    command = [PYTHON, "launch/generate.py", *options, "--chat", "--system", "sort"]
    talk = type_into(command, "count1: red cat\nand now: blue\n\n")
    assert talk.returncode == 0, talk.stderr
    messages = [{"role": "system", "content": "sort"}, {"role": "user", "content": "count1: red cat"}]
    alpha, first = expected(messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and now: blue"}]
    second_alpha, second = expected(messages)
    said = talk.stdout.split("> ", 1)[1]
    assert first in said
    assert second in said
    assert [line for line in said.splitlines() if line.startswith("[alpha")] == [
        f"[alpha {one:.3f}: local adapter {one:.0%}, global adapter {1 - one:.0%}]" for one in (alpha, second_alpha)
    ]


def test_plain_texts_are_trained_and_not_scored(model: Path, tmp_path: Path) -> None:
    """Domain adaptation: held-out losses, and one line where answers are wanted."""
    (tmp_path / "2").mkdir()
    for client in range(2):
        rows = [{"text": " ".join(tiny.WORDS[client : client + 4 + k])} for k in range(6)]
        (tmp_path / "2" / f"local_training_{client}.json").write_text(json.dumps(rows))
    argv = recipe(model, tmp_path, tmp_path / "runs", data__held_out_fraction=0.3)
    run_on_ranks(train_on_rank, 1, tmp_path, argv)
    run_dir = tmp_path / "runs" / "tiny"
    losses = json.loads((run_dir / "results.json").read_text())["clients"][0]["held_out_loss"]
    assert losses[-1][1] < losses[0][1]
    ended = run([PYTHON, "launch/evaluate.py", "--run", str(run_dir), "--evaluation.split", "held_out"])
    assert ended.returncode == 2, ended.output
    (error,) = ended.errors
    assert "a plain text asks nothing, so that there is no answer to score" in error


def test_another_chat_template_is_noticed(model: Path, data: Path, tmp_path: Path) -> None:
    """It lies in a file of its own beside the tokenizer: an exchanged one would ask in another way."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    argv = recipe(copy, data, tmp_path / "runs", federation__num_rounds=1)
    run_on_ranks(train_on_rank, 1, tmp_path, argv)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace(": ", " says: "))
    run_dir = tmp_path / "runs" / "tiny"
    ended = run([PYTHON, "launch/generate.py", "--run", str(run_dir), "--client", "0", "--prompt", "red"])
    assert ended.returncode == 4, ended.output
    (error,) = ended.errors
    assert "the base model, or its chat template, differs from the one that" in error
