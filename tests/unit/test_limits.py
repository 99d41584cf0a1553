"""What a model can read is found out before anything is trained: its positions, and the tokens that it knows."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizer_for_tests import make_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dpa_ds.config.schema import DataConfig, EvaluationConfig
from dpa_ds.data.formats import TextFormat, build_format
from dpa_ds.data.limits import ModelLimits, check_examples, check_prompts
from dpa_ds.data.sources import Example, pool_clients, read_client
from dpa_ds.data.tokenize import load_or_tokenize
from dpa_ds.errors import DataError, ModelError
from dpa_ds.evaluation.dataset import check_test_prompts
from dpa_ds.model.directory import load_tokenizer, read_limits
from tests import families, tiny

LIMITS = ModelLimits(num_positions=40, vocab_size=400)


def federation(root: Path, rows: list[dict[str, str]], test: list[dict[str, str]] | None = None) -> DataConfig:
    (root / "1").mkdir()
    (root / "1" / "local_training_0.json").write_text(json.dumps(rows))
    if test is not None:
        (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return DataConfig(path=str(root), template="{instruction}", cache_dir=str(root / "cache"))


def row(num_characters: int, output: str = "b") -> dict[str, str]:
    """Of as many tokens, and one for BOS."""
    return {"instruction": "q" * num_characters, "output": output, "category": "t"}


def check(config: DataConfig, limits: ModelLimits, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    example_format = build_format(tokenizer or make_tokenizer(), config)
    examples = read_client(config, 0, 0).train
    tokenized = load_or_tokenize(examples, example_format, config, "client_0")
    check_examples(tokenized, examples, example_format, config.max_length, limits)


@pytest.mark.parametrize("cached", [False, True])
def test_the_longest_example_fits_exactly_and_the_next_is_named(tmp_path: Path, cached: bool) -> None:
    config = federation(tmp_path, [row(3), row(37)])  # BOS, 37, the answer, EOS
    check(config, LIMITS)
    if cached:  # the tokens come from there; what fits is asked again
        check(config, LIMITS)
    words = (
        r"local_training_0.json: row 2 has 40 tokens with its answer, more than the model's context of 39: lower "
        r"data.max_length to 39, which leaves such rows out, or shorten it"
    )
    with pytest.raises(DataError, match=words):
        check(config, ModelLimits(39, 400))
    check(config, ModelLimits(None, 400))


def test_rows_above_max_length_are_left_out_and_need_not_fit(tmp_path: Path) -> None:
    config = federation(tmp_path, [row(3), row(60)])
    config = DataConfig(path=config.path, template="{instruction}", cache_dir=config.cache_dir, max_length=40)
    check(config, LIMITS)


def with_an_id_too_many() -> PreTrainedTokenizerFast:
    """As gemma-3-1b: 262,144 tokens in the model, and the tokenizer has an id more."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=False)])
    return tokenizer


@pytest.mark.parametrize("column", ["instruction", "output"])
def test_an_id_that_the_model_does_not_know_is_refused_where_it_occurs(tmp_path: Path, column: str) -> None:
    tokenizer = with_an_id_too_many()
    limits = ModelLimits(None, len(tokenizer) - 1)
    config = federation(tmp_path, [row(3), row(5) | {column: "an <image>"}])
    message = f"row 2 becomes the token id {len(tokenizer) - 1}, but the model knows {len(tokenizer) - 1} tokens"
    with pytest.raises(DataError, match=message):
        check(config, limits, tokenizer)
    check(config, ModelLimits(None, len(tokenizer)), tokenizer)


def test_prompts_need_room_for_the_answer() -> None:
    examples = [Example("a" * 29, "b", "t", "file: row 1"), Example("a" * 30, "b", "t", "file: row 2")]
    questions, text_format = [example.question for example in examples], TextFormat(make_tokenizer(), "{instruction}")
    check_prompts(questions, text_format, LIMITS, 9)
    words = r"file: row 2 has 31 tokens: with generation.max_new_tokens 10 that is more than the model's context of 40"
    with pytest.raises(DataError, match=words):
        check_prompts(questions, text_format, LIMITS, 10)


def test_the_test_data_is_checked_as_the_evaluation_will_ask_it(tmp_path: Path) -> None:
    config = federation(tmp_path, [row(3)], [row(3), row(36)])
    text_format = build_format(make_tokenizer(), config)
    check_test_prompts(config, 0, EvaluationConfig(), text_format, LIMITS, 3)
    with pytest.raises(DataError, match=r"row 1 of task t has 37 tokens: with generation.max_new_tokens 4"):
        check_test_prompts(config, 0, EvaluationConfig(), text_format, LIMITS, 4)
    check_test_prompts(config, 0, EvaluationConfig(instances_per_task=1), text_format, LIMITS, 4)


def test_without_a_test_file_there_is_nothing_to_ask(tmp_path: Path) -> None:
    config = federation(tmp_path, [row(3)])
    check_test_prompts(config, 0, EvaluationConfig(), build_format(make_tokenizer(), config), LIMITS, 40)


def test_the_same_row_in_two_places_is_the_same_example(tmp_path: Path) -> None:
    """Pooled clients count a shared test row once, wherever it was read."""
    config = federation(tmp_path, [row(3)], [row(4)])
    client = read_client(config, 0, 0)
    assert client.train[0].place.endswith("local_training_0.json: row 1")
    assert client.train[0] == Example("qqq", "b", "t")
    assert len(pool_clients([client, client]).held_out) == 1


@pytest.mark.parametrize(("family", "num_positions"), [("llama", 192), ("gpt2", 192), ("bloom", None)])
def test_limits_are_those_of_the_config(tmp_path: Path, family: str, num_positions: int | None) -> None:
    """GPT-2 calls them n_positions; Bloom has ALiBi, and no bound."""
    limits = read_limits(families.make_family(tmp_path / family, family))
    assert limits == ModelLimits(num_positions, len(tiny.make_tokenizer()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model") / "llama")


def test_a_tokenizer_may_have_ids_that_the_model_does_not_know(model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(model, tmp_path / "llama"))
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=False), AddedToken("<|filler|>", special=True)])
    tokenizer.pad_token = "<|filler|>"  # beyond, too: the end token pads
    tokenizer.save_pretrained(directory)
    loaded = load_tokenizer(directory)
    assert max(loaded.get_vocab().values()) > read_limits(directory).vocab_size
    assert loaded.pad_token_id == loaded.eos_token_id


def test_an_end_token_that_the_model_does_not_know_belongs_to_another_model(model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(model, tmp_path / "llama"))
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True)])
    tokenizer.eos_token = "<|stop|>"
    tokenizer.save_pretrained(directory)
    with pytest.raises(ModelError, match=r"has the id 258, but the model knows 258 tokens .*belongs to another model"):
        load_tokenizer(directory)
