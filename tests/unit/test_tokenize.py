"""Tokens: the layout of an example, what is left out, and a cache that may break but never lies."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_for_tests import make_tokenizer
from tokenizers import AddedToken

from dpa_ds.config.schema import DataConfig
from dpa_ds.data import tokenize, tokens
from dpa_ds.data.conversations import Question
from dpa_ds.data.formats import TextFormat, build_format, render_prompt
from dpa_ds.data.sources import Example
from dpa_ds.data.tokenize import TokenizedExamples, load_or_tokenize, tokenize_examples
from dpa_ds.errors import DataError, ModelError
from tests import tiny

BOS, EOS = 1, 2
TOKENIZER = make_tokenizer()
EXAMPLES = [Example("Is ice cold?", "yes", "t"), Example("And {fire} {0}?", "no \u00e9", "t")]
TEMPLATE = '{"q": "{instruction}"}\n'


def as_lists(tokenized: TokenizedExamples) -> list[list[int]]:
    return [tokenized.input_ids(index).tolist() for index in range(len(tokenized))]


def text_format(template: str, tokenizer: Any = TOKENIZER) -> TextFormat:
    return TextFormat(tokenizer, template)


def assert_same(left: TokenizedExamples, right: TokenizedExamples) -> None:
    assert as_lists(left) == as_lists(right)
    assert left.spans.tolist() == right.spans.tolist()
    assert left.span_offsets.tolist() == right.span_offsets.tolist()
    assert left.num_dropped == right.num_dropped


def test_braces_in_template_and_instruction_survive() -> None:
    assert render_prompt(TEMPLATE, "And {fire} {0}?") == '{"q": "And {fire} {0}?"}\n'


def test_layout_is_prompt_answer_end_token() -> None:
    tokenized = tokenize_examples(EXAMPLES, text_format(TEMPLATE), 512, "client_0")
    assert (len(tokenized), tokenized.num_dropped) == (2, 0)
    for index, example in enumerate(EXAMPLES):
        ids, border = tokenized.input_ids(index).tolist(), tokenized.first_label(index)
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert ids.count(BOS) == ids.count(EOS) == 1
        assert TOKENIZER.decode(ids[1:border]) == render_prompt(TEMPLATE, example.instruction)
        assert TOKENIZER.decode(ids[border:-1]) == example.output
        assert tokenized.length(index) == len(ids)
        assert tokenized.num_label_tokens(index) == len(ids) - border


def test_end_token_that_a_tokenizer_appends_to_the_prompt_is_taken_off() -> None:
    ending = make_tokenizer(ending="</s>")
    assert ending("x")["input_ids"][-1] == EOS
    assert_same(
        tokenize_examples(EXAMPLES, text_format(TEMPLATE, ending), 512, "client_0"),
        tokenize_examples(EXAMPLES, text_format(TEMPLATE), 512, "client_0"),
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("ab {}\u00e9", min_size=1), st.text("xyz", min_size=1)), min_size=1, max_size=8))
def test_any_text_comes_back_exactly(pairs: list[tuple[str, str]]) -> None:
    examples = [Example(instruction, output, "") for instruction, output in pairs]
    tokenized = tokenize_examples(examples, text_format("{instruction}|"), 512, "client_0")
    for ids, border, (instruction, output) in zip(as_lists(tokenized), tokenized.spans[:, 0], pairs, strict=True):
        assert TOKENIZER.decode(ids[1:border]) == f"{instruction}|"
        assert TOKENIZER.decode(ids[border:-1]) == output


def test_batches_of_texts_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example("i" * n, "o" * n, "") for n in range(1, 8)]
    at_once = tokenize_examples(examples, text_format("{instruction}"), 512, "client_0")
    monkeypatch.setattr(tokens, "_TEXTS_PER_CALL", 3)
    monkeypatch.setattr(tokenize, "_EXAMPLES_AT_A_TIME", 2)
    assert_same(tokenize_examples(examples, text_format("{instruction}"), 512, "client_0"), at_once)


def test_examples_that_do_not_fit_are_left_out_and_counted() -> None:
    # bos + n + n + eos tokens: 4, 6, 8 without merges
    examples = [Example("q" * n, "z" * n, "") for n in (1, 2, 3)]
    tokenized = tokenize_examples(examples, text_format("{instruction}"), 6, "client_0")
    assert [tokenized.length(index) for index in range(len(tokenized))] == [4, 6]
    assert tokenized.spans.tolist() == [[2, 4], [3, 6]]
    assert tokenized.num_dropped == 1
    with pytest.raises(DataError, match=r"client_5: none of 3 examples fits into data.max_length 3: raise it .* 8 tok"):
        tokenize_examples(examples, text_format("{instruction}"), 3, "client_5")


def test_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has no end token: set eos_token"):
        tokenize_examples(EXAMPLES, text_format(TEMPLATE, tokenizer), 512, "client_0")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(template=TEMPLATE, cache_dir=str(tmp_path / "cache"))


def cache_files(config: DataConfig) -> list[Path]:
    return sorted((Path(config.cache_dir) / "tokens").iterdir())


def forbid_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenize, "tokenize_examples", refuse)


def test_second_time_comes_from_the_cache(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0")
    assert [path.suffix for path in cache_files(config)] == [".safetensors"]
    # Padding leaves a trace inside a fast tokenizer; the key must not see it.
    TOKENIZER(["a", "bb"], padding=True, truncation=True, max_length=4)
    forbid_tokenizing(monkeypatch)
    second = load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0")
    assert_same(first, second)
    assert second.tokens.dtype == np.int32


def test_whatever_changes_the_tokens_changes_the_key(config: DataConfig) -> None:
    load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0")
    load_or_tokenize(EXAMPLES[:1], build_format(TOKENIZER, config), config, "client_0")
    load_or_tokenize(EXAMPLES, text_format("{instruction}"), config, "client_0")
    load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), replace(config, max_length=100), "client_0")
    load_or_tokenize(
        EXAMPLES, build_format(make_tokenizer(["ice ice"] * 9, vocab_size=262), config), config, "client_0"
    )
    moved = [Example(EXAMPLES[0].instruction + "y", "es", "t"), EXAMPLES[1]]
    load_or_tokenize(moved, build_format(TOKENIZER, config), config, "client_0")
    assert len(cache_files(config)) == 6


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "flipped"])
def test_damaged_cache_is_rebuilt(config: DataConfig, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0")
    (path,) = cache_files(config)
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[intact.index(first.tokens.tobytes())] ^= 1
    path.write_bytes({"cut": intact[:-7], "empty": b"", "noise": b"\xff" * 99, "flipped": bytes(flipped)}[damage])
    with caplog.at_level(logging.WARNING, logger="dpa_ds"):
        assert_same(load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0"), first)
    assert "is damaged: tokenising again" in caplog.text
    assert path.read_bytes() == intact


def test_unusable_cache_folder_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    config = DataConfig(cache_dir=str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="dpa_ds"):
        assert len(load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0")) == 2
    assert "data.cache_dir" in caplog.text


def test_unwritable_cache_folder_is_a_warning(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, how: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    with caplog.at_level(logging.WARNING, logger="dpa_ds"):
        assert len(load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0")) == 2
    assert "No space left on device" in caplog.text
    assert cache_files(config) == []


def test_several_writers_at_once_leave_one_intact_file(config: DataConfig) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(
                lambda k: load_or_tokenize(EXAMPLES, build_format(make_tokenizer(), config), config, f"c{k}"), range(16)
            )
        )
    for result in results:
        assert_same(result, results[0])
    assert len(cache_files(config)) == 1


def test_writer_killed_before_the_rename_leaves_no_broken_entry(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0")
    assert cache_files(config) == []
    assert len(load_or_tokenize(EXAMPLES, build_format(TOKENIZER, config), config, "client_0")) == 2


def prompt(instruction: str, template: str = TEMPLATE, ending: str = "") -> list[int]:
    return text_format(template, make_tokenizer(ending=ending)).prompts([Question(instruction)])[0]


@pytest.mark.parametrize("ending", ["", "</s>"])
def test_special_tokens_that_a_users_text_spells_are_text(ending: str) -> None:
    """In prompt and answer: a second end token among the labels would teach the model to stop there."""
    example = Example("what does </s> mean", "the end: </s>, after <s>", "t")
    tokenized = tokenize_examples(
        [example], text_format("<s>{instruction}\n", make_tokenizer(ending=ending)), 512, "client_0"
    )
    ids, border = tokenized.input_ids(0).tolist(), tokenized.first_label(0)
    assert (ids.count(BOS), ids.count(EOS), ids[0], ids[-1]) == (1, 1, BOS, EOS)
    assert TOKENIZER.decode(ids[1:border]) == "what does </s> mean\n"
    assert TOKENIZER.decode(ids[border:-1]) == example.output


@pytest.mark.parametrize("ending", ["", "</s>"])
def test_a_template_may_spell_what_the_tokenizer_adds(ending: str) -> None:
    assert prompt("x", "<s>{instruction}", ending) == prompt("x", "{instruction}", ending)
    assert prompt("x", "{instruction}</s>", ending) == [*prompt("x", "{instruction}", ending), EOS], "it means it"


@pytest.mark.parametrize("ending", ["", "</s>"])
@pytest.mark.parametrize(
    "template", ["{instruction}</s>", "<s>{instruction}</s>", "{instruction} </s>\n", "</s>{instruction}"]
)
@pytest.mark.parametrize("instruction", ["x", "what is <s>", "</s>"])
def test_one_begin_token_and_the_end_tokens_of_the_template(ending: str, template: str, instruction: str) -> None:
    """Whatever the tokenizer adds, the template spells, and a user writes."""
    ids = prompt(instruction, template, ending)
    assert (ids[0], ids.count(BOS), ids.count(EOS)) == (BOS, 1, 1)
    assert TOKENIZER.decode(ids[1:]) == render_prompt(template, instruction).removeprefix("<s>")


def test_a_tokenizer_that_adds_nothing_reads_the_template_alone() -> None:
    tokenizer = tiny.make_tokenizer()
    (plain,) = text_format("<|end|>{instruction}<|end|>", tokenizer).prompts([Question("x")])
    assert plain == [tokenizer.eos_token_id, *tokenizer("x").input_ids, tokenizer.eos_token_id]


def test_special_tokens_without_a_role_are_text_in_a_users_text() -> None:
    """Llama 3 names only two of its special tokens in `special_tokens_map`: <|eot_id|> is none of them."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)])
    example = Example("what is <|eot|>", "<|eot|>", "t")
    tokenized = tokenize_examples([example], text_format("{instruction}<|eot|>", tokenizer), 512, "client_0")
    ids, special = tokenized.input_ids(0).tolist(), len(tokenizer) - 1
    assert ids.count(special) == 1
    assert ids[tokenized.first_label(0) - 1] == special, "the template's own"


@pytest.mark.parametrize(("template", "warns"), [(r"Q: {instruction}\nA:", True), ("Q: {instruction}\nA:", False)])
def test_a_line_break_in_two_characters_is_a_warning(
    template: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="dpa_ds"):
        tokenize.warn_of_template(template)
    assert ("write \\n between double quotes in YAML" in caplog.text) == warns
