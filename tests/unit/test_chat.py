"""Conversations as tokens, for six chat templates and five tokenizers: what is predicted is what assistants say."""

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dpa_ds.config.schema import DataConfig, PartitionConfig
from dpa_ds.data.conversations import Conversation, Message, Question, read_answered
from dpa_ds.data.formats import TextFormat, build_format
from dpa_ds.data.sources import Example, read_client
from dpa_ds.data.tables import Row
from dpa_ds.data.tokenize import TokenizedExamples, tokenize_examples
from dpa_ds.data.tokens import tokenize
from dpa_ds.errors import DataError, ModelError
from tests.chat_templates import CHATML, FAMILIES, TOKENIZERS, make_chat_tokenizer

SINGLE = (("user", "Is ice cold?"), ("assistant", "Yes, it is."))
MULTI = (
    ("system", "Be brief."),
    ("user", "Is ice cold?"),
    ("assistant", "Yes, it is."),
    ("user", "What is the capital of France?"),
    ("assistant", "Paris.\n\nIs it not?"),
    ("user", "Yes."),
    ("assistant", " 42 "),
)
SPELLED = ("user", "what ends a turn: {end}?"), ("assistant", "{end} does, and <|im_start|>"), *SINGLE


def conversation(turns: Any, tools: str = "") -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), tools)


def example(turns: Any, tools: str = "") -> Example:
    return Example("?", turns[-1][1], "t", "file: row 1", conversation(turns, tools))


def turns_for(family: str, turns: Any) -> Any:
    """Without the system's turn where the family has none; with its own end of a turn where one is spelled."""
    found = FAMILIES[family]
    kept = [turn for turn in turns if found.has_system or turn[0] != "system"]
    return [(role, content.replace("{end}", found.end_of_turn)) for role, content in kept]


def encode(tokenizer: Any, turns: Any, train_on: Any = "all") -> TokenizedExamples:
    chat = build_format(tokenizer, DataConfig(template="chat", train_on=train_on))
    return tokenize_examples([example(turns)], chat, 4096, "client_0")


def labels(tokenizer: Any, encoded: TokenizedExamples) -> list[str]:
    """The texts that are predicted, with special tokens."""
    ids = encoded.input_ids(0).tolist()
    return [tokenizer.decode(ids[start:stop]) for start, stop in encoded.label_spans(0)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turns", [SINGLE, MULTI, SPELLED], ids=["single", "multi", "spelled"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_labels_are_exactly_what_assistants_say(family: str, turns: Any, train_on: str) -> None:
    tokenizer, end = make_chat_tokenizer(family), FAMILIES[family].end_of_turn
    turns = turns_for(family, turns)
    said = [content for role, content in turns if role == "assistant"]
    expected = said if train_on == "all" else said[-1:]
    found = labels(tokenizer, encode(tokenizer, turns, train_on))
    assert [text.strip().removesuffix(end).strip() for text in found] == [text.strip() for text in expected]
    assert all(text.endswith(end) for text in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turns", [SINGLE, MULTI], ids=["single", "multi"])
def test_tokens_are_those_of_the_library(family: str, turns: Any) -> None:
    """What transformers makes of the conversation, as far as the end of its last answer; with one BOS."""
    tokenizer = make_chat_tokenizer(family)
    turns = turns_for(family, turns)
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    ids = encode(tokenizer, turns).input_ids(0).tolist()
    assert tokenizer.decode(ids) == tokenizer.decode(whole)[: len(tokenizer.decode(ids))]
    assert ids == whole[: len(ids)], (tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(whole))
    assert ids[-1] == tokenizer.convert_tokens_to_ids(FAMILIES[family].end_of_turn)
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_what_was_trained_before_the_answer(family: str) -> None:
    """Token for token, for every answer, so that inference asks as training did."""
    tokenizer = make_chat_tokenizer(family)
    for turns in (SINGLE, MULTI, SPELLED):
        turns = turns_for(family, turns)
        chat = build_format(tokenizer, DataConfig(template="chat"))
        encoded = encode(tokenizer, turns)
        ids = encoded.input_ids(0).tolist()
        answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
        for number, (start, _) in zip(answers, encoded.label_spans(0), strict=True):
            (prompt,) = chat.prompts([Question("?", conversation(turns[:number]), "here")])
            assert prompt == ids[:start], number
        assert encoded.prompt(0).tolist() == prompt


def test_a_single_turn_is_the_row_rendered_by_hand() -> None:
    """Bit for bit: the chat template, and the same written as a text template."""
    tokenizer = make_chat_tokenizer("qwen")
    by_hand = TextFormat(tokenizer, "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n")
    rows = [Example(question, answer, "t") for question, answer in (("Is ice cold?", "Yes."), ("And {fire}?\n", "no"))]
    chat = build_format(tokenizer, DataConfig(template="chat"))
    ours, theirs = (tokenize_examples(rows, one, 512, "client_0") for one in (chat, by_hand))
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.spans.tolist() == theirs.spans.tolist()
    assert chat.prompts([rows[0].question]) == by_hand.prompts([rows[0].question])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_that_a_turn_spells_are_text(name: str) -> None:
    """They neither end a turn nor train an end, with every kind of tokenizer; the text is kept as it is."""
    tokenizer = make_chat_tokenizer("qwen", name)
    turns = [
        ("user", "say <|im_end|>\n<|im_start|>assistant"),
        ("assistant", "it is <|im_end|> and<|im_start|>!"),
        ("user", "\ue0000\ue001 <|endoftext|>"),
        ("assistant", "<|im_end|>"),
    ]
    encoded = encode(tokenizer, turns)
    ids = encoded.input_ids(0).tolist()
    start, end = (tokenizer.convert_tokens_to_ids(text) for text in ("<|im_start|>", "<|im_end|>"))
    assert (ids.count(start), ids.count(end)) == (4, 4), "the template's own"
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") not in ids
    if name != "unigram":  # it has no bytes to spell a character with that it does not know
        messages = [{"role": role, "content": content} for role, content in turns]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids).replace(" ", "") == rendered.removesuffix("\n").replace(" ", "")
    found = [tokenizer.decode(ids[first:stop]) for first, stop in encoded.label_spans(0)]
    assert [text.strip() for text in found] == ["it is <|im_end|> and<|im_start|>!<|im_end|>", "<|im_end|><|im_end|>"]
    (split,) = tokenize(["a <|im_end|>"], tokenizer, split_special=True)
    assert end not in split
    assert tokenizer.decode(split).strip() == "a <|im_end|>"
    if name != "unigram":  # which finds the special token again among its own words
        assert split == tokenizer("a <|im_end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_the_end_of_a_turn_ends_an_answer() -> None:
    for family, found in FAMILIES.items():
        tokenizer = make_chat_tokenizer(family)
        ends = build_format(tokenizer, DataConfig(template="chat")).end_ids
        expected = dict.fromkeys([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(found.end_of_turn)])
        assert ends == tuple(expected), family


REWRITES_HISTORY = CHATML.replace(
    "{{ message['content'] }}", "{% if loop.last and loop.index > 3 %}(last) {% endif %}{{ message['content'] }}"
)
THINKS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_ANSWERS = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper }}")
NO_END = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
NO_END += "{% if add_generation_prompt %}assistant: {% endif %}"


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_chat_tokenizer("qwen")
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_rewrites_history_is_refused() -> None:
    with pytest.raises(DataError, match=r"file: row 1: the tokenizer's chat template writes what stands before turn 5"):
        encode(with_template(REWRITES_HISTORY), MULTI)
    with pytest.raises(ModelError, match="does not write the prompt, and after it the answer, as they are"):
        encode(with_template(DROPS_ANSWERS), SINGLE)
    with pytest.raises(ModelError, match="ends an answer with no special token"):
        encode(with_template(NO_END), SINGLE)


def test_a_template_that_treats_the_last_turn_in_its_own_way_is_labelled_right() -> None:
    """As Qwen 3: an empty thought before the last answer, which the model must write itself, and none in history."""
    tokenizer = with_template(THINKS)
    found = labels(tokenizer, encode(tokenizer, MULTI))
    assert found[:-1] == ["Yes, it is.<|im_end|>", "Paris.\n\nIs it not?<|im_end|>"]
    assert found[-1] == "<think>\n\n</think>\n\n 42 <|im_end|>"


def test_a_thought_before_each_answer_is_no_part_of_it() -> None:
    """The prompt of a second question keeps the first answer without it, and a score compares without it."""
    tokenizer = with_template(THINKS)
    chat = build_format(tokenizer, DataConfig(template="chat"))
    assert chat.answer_prefix == "<think>\n\n</think>"
    (prompt,) = chat.prompts([Question("?", conversation(MULTI[:4]), "here")])
    assert tokenizer.decode(prompt).count("Yes, it is.<|im_end|>") == 1
    assert build_format(make_chat_tokenizer("qwen"), DataConfig(template="chat")).answer_prefix == ""


def test_a_prompt_needs_no_answer_that_could_be_trained() -> None:
    """Where a template writes an earlier answer in another way, what it writes is the prompt."""
    template = CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('|')[-1] }}")
    tokenizer = with_template(template)
    chat = build_format(tokenizer, DataConfig(template="chat"))
    turns = (*SINGLE[:1], ("assistant", "hm|Yes"), ("user", "Sure?"))
    (prompt,) = chat.prompts([Question("Sure?", conversation(turns), "here")])
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    with pytest.raises(DataError, match=r"does not write the answer of turn 2 as it is: set data.train_on: last"):
        encode(tokenizer, (*turns, ("assistant", "Yes")))


TWO_ENDS = CHATML.replace("<|im_end|>", "<|endoftext|><|im_end|>")
OTHER_LAST_END = CHATML.replace(
    "<|im_end|>",
    "{{ '<|endoftext|>' if loop.last and message['role'] == 'assistant' else '<|im_end|>' }}",
)
CALLS = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>"
    "{% endfor %}",
)


def test_all_tokens_that_end_a_turn_are_trained() -> None:
    """Two special tokens at the end of every turn; another one at the end of the last turn, as gpt-oss has it."""
    tokenizer = with_template(TWO_ENDS)
    assert all(text.endswith("<|endoftext|><|im_end|>") for text in labels(tokenizer, encode(tokenizer, MULTI)))
    assert build_format(tokenizer, DataConfig()).end_ids == (tokenizer.eos_token_id,)
    tokenizer = with_template(OTHER_LAST_END)
    found = labels(tokenizer, encode(tokenizer, MULTI))
    assert [text.endswith("<|im_end|>") for text in found] == [True, True, False]
    assert found[-1].endswith("<|endoftext|>")


def test_calls_of_tools_are_trained_whole() -> None:
    """With special tokens around them, in the order of their keys, without the nulls of Arrow; what they spell is text."""
    tokenizer = with_template(CALLS)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=True), AddedToken("</tool_call>", special=True)])
    call = {"name": "look", "arguments": {"z": "<|im_end|>", "a": None, "b": 1}}
    turns = [
        {"role": "user", "content": "How warm?", "timestamp": datetime.datetime(2026, 1, 1)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12", "name": "look"},
        {"role": "assistant", "content": "12 degrees", "tool_calls": None},
    ]
    found = read_answered(Row({"messages": turns}, "file: row 1"))
    for train_on in ("all", "last"):
        chat = build_format(tokenizer, DataConfig(template="chat", train_on=train_on))
        (encoded,) = chat.encode([Example("?", "12 degrees", "t", "", found)])
        texts = [tokenizer.decode(encoded.tokens[start:stop]) for start, stop in encoded.spans]
        assert texts[-1] == "12 degrees<|im_end|>"
    (encoded,) = build_format(tokenizer, DataConfig(template="chat")).encode([Example("?", "", "t", "", found)])
    first = tokenizer.decode(encoded.tokens[slice(*encoded.spans[0])])
    written = '<tool_call>{"name": "look", "arguments": {"z": "<|im_end|>", "b": 1}}</tool_call><|im_end|>'
    assert first == written
    assert encoded.tokens.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4, "one for each turn"
    with pytest.raises(DataError, match="does not write the answer of turn 2 as it is"):
        build_format(make_chat_tokenizer("qwen"), DataConfig()).encode([Example("?", "", "t", "", found.until(2))])
    with pytest.raises(DataError, match="such as calls of tools, does not fit a text template"):
        TextFormat(tokenizer, "{instruction}").encode([Example("?", "", "t", "", found.until(2))])


def test_answers_that_are_not_to_be_learned() -> None:
    """Weight 0, an empty one, and one before any question."""
    turns = [
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": " "},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "yes", "weight": 1},
    ]
    tokenizer = make_chat_tokenizer("qwen")
    found = read_answered(Row({"messages": turns}, "file: row 1"))
    (encoded,) = build_format(tokenizer, DataConfig()).encode([Example("c", "yes", "t", "", found)])
    assert [tokenizer.decode(encoded.tokens[start:stop]) for start, stop in encoded.spans] == ["yes<|im_end|>"]
    with pytest.raises(DataError, match="the last answer has the weight 0"):
        read_answered(Row({"messages": turns[:3]}, "file: row 1"))


def test_a_system_column_is_the_first_turn() -> None:
    row = {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert [message.role for message in read_answered(Row(row, "")).messages] == ["system", "user", "assistant"]


def test_rows_of_several_kinds_in_one_table(tmp_path: Path) -> None:
    """In Arrow each has all columns, and those of the other kinds are null."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "instruction": None},
        {"messages": None, "instruction": "c", "output": "d"},
    ]
    rows = [{"messages": None, "instruction": None, "output": None} | row for row in rows]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(format="table", path=str(tmp_path / "own.jsonl"), partition=PartitionConfig("iid", num_clients=1))
    assert sorted(example.instruction for example in read_client(data, 0, 0).train) == ["a", "c"]


@pytest.mark.parametrize("call", ["strftime_now(format)", "strftime_now(format='%Y')", "strftime_now"])
def test_a_date_that_cannot_be_fixed_is_refused(call: str) -> None:
    template = "{% set format = '%Y' %}{% set now = " + call + " %}" + CHATML
    with pytest.raises(ModelError, match="writes today's date in a way that cannot be made constant"):
        encode(with_template(template), SINGLE)


def test_the_date_does_not_change() -> None:
    """Llama 3.1 writes today's date into every prompt: tokens would be other ones on the next day."""
    dated = CHATML + "{% if false %}{% endif %}"
    dated = dated.replace("{% for", "{% set date = strftime_now('%d %b %Y') %}Today: {{ date }}\n{% for", 1)
    tokenizer = with_template(dated)
    ids = encode(tokenizer, SINGLE).input_ids(0).tolist()
    assert tokenizer.decode(ids).startswith("Today: 26 Jul 2024\n")


def test_tools_go_to_the_template() -> None:
    template = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + CHATML
    tokenizer = with_template(template)
    row = {
        "messages": [
            {"role": "user", "content": "How warm is it?"},
            {"role": "assistant", "content": "12 degrees", "weight": 1},
            {"role": "user", "content": "Thanks"},
        ],
        "tools": '[{"type": "function", "function": {"name": "thermometer"}}]',
    }
    found = read_answered(Row(row, "file: row 1"))
    assert [message.content for message in found.messages] == ["How warm is it?", "12 degrees"], "nobody answers thanks"
    chat = build_format(tokenizer, DataConfig(template="chat"))
    (ids,) = (one.tokens for one in chat.encode([Example("?", "12 degrees", "t", "", found)]))
    assert tokenizer.decode(ids).startswith('tools: [{"type": "function", "function": {"name": "thermometer"}}]\n')


COLUMNS = {
    "messages": {"messages": [{"role": role, "content": content} for role, content in MULTI]},
    "parts": {"messages": [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in MULTI]},
    "conversations": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content} for role, content in MULTI
        ]
    },
    "a cell of CSV": {"messages": json.dumps([{"role": role, "content": content} for role, content in MULTI])},
    "prompt and completion": {
        "prompt": [{"role": role, "content": content} for role, content in MULTI[:-1]],
        "completion": [{"role": "assistant", "content": " 42 "}],
    },
}


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_way_of_writing_a_conversation_is_the_same(columns: str) -> None:
    assert read_answered(Row(COLUMNS[columns], "file: row 1")) == conversation(MULTI)


def test_texts_of_prompt_and_completion_are_turns() -> None:
    row = Row({"prompt": "Is ice cold?", "completion": "Yes, it is."}, "file: row 1")
    assert read_answered(row) == conversation(SINGLE)


USER = {"role": "user", "content": "a"}
WRONG = [
    ({"messages": "hello"}, r"column 'messages' must be a list of turns such as"),
    ({"messages": None}, r"column 'messages' must be a list of turns"),
    ({"messages": []}, r"a conversation without turns: fill it in, or remove the row"),
    ({"messages": ["a"]}, r"turn 1 of 'messages' must be an object"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, r"turn 1 of 'messages' is spoken by 'wizard': the role"),
    ({"messages": [{"content": "a"}]}, r"turn 1 of 'messages' is spoken by None"),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, r"turn 2 of 'messages': its content must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"a part that is not text: images and sounds"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, r"half a surrogate pair"),
    ({"messages": [USER]}, r"a conversation in which no assistant answers: add the answer, or remove the row"),
    ({"messages": [{"role": "user"}]}, r"turn 1 of 'messages' has no content"),
    ({"messages": [USER, {"role": "assistant", "content": "", "id": 7}]}, r"the last answer is empty: fill"),
    ({"prompt": "a", "completion": " "}, r"column 'completion' is empty: fill it in"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"the last answer is empty: fill it in"),
    ({"messages": [USER, {"role": "assistant", "content": "b"}], "tools": "{"}, r"column 'tools' is not JSON"),
    ({"messages": [USER, {"role": "assistant", "content": "b"}], "tools": ["x"]}, r"'tools' must be a list of schemas"),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_no_conversation_is_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=f"file: row 1: .*{words}|file: row 1: {words}"):
        read_answered(Row(values, "file: row 1"))


def test_a_template_that_refuses_names_the_row() -> None:
    words = r"file: row 1: the tokenizer's chat template refuses the conversation \(System role not supported\)"
    with pytest.raises(DataError, match=words):
        encode(make_chat_tokenizer("gemma"), MULTI)
    with pytest.raises(DataError, match="roles must alternate"):
        encode(make_chat_tokenizer("mistral"), [SINGLE[0], SINGLE[0], SINGLE[1]])


def test_which_format_is_taken() -> None:
    chatting, plain = make_chat_tokenizer("qwen"), make_chat_tokenizer("qwen")
    plain.chat_template = None
    assert build_format(chatting, DataConfig()).identity[0] == "chat"
    assert build_format(plain, DataConfig()).identity == ("text", "### Instruction:\n{instruction}\n\n### Response:\n")
    assert build_format(chatting, DataConfig(template="{instruction}")).identity == ("text", "{instruction}")
    with pytest.raises(ModelError, match=r"data.template chat: the model's tokenizer has no chat template"):
        build_format(plain, DataConfig(template="chat"))
    text = build_format(plain, DataConfig())
    assert len(text.encode([example(SINGLE)])) == 1, "one question and its answer fit a text template"
    with pytest.raises(DataError, match=r"file: row 1: a conversation of several turns does not fit a text template"):
        text.encode([example(MULTI)])


def test_a_plain_text_is_trained_as_a_whole() -> None:
    tokenizer = make_chat_tokenizer("llama3")
    chat = build_format(tokenizer, DataConfig())
    text = "The quick brown fox <|eot_id|> jumps"
    encoded = tokenize_examples([Example("", text, "t")], chat, 512, "client_0")
    ids = encoded.input_ids(0).tolist()
    assert (ids[0], ids[-1], ids.count(tokenizer.eos_token_id)) == (tokenizer.bos_token_id, tokenizer.eos_token_id, 1)
    assert tokenizer.decode(ids[1:-1]) == text
    assert encoded.label_spans(0).tolist() == [[1, len(ids)]]
    assert encoded.prompt(0).tolist() == ids
    cut = tokenize_examples([Example("", text, "t")], chat, 5, "client_0")
    assert cut.num_dropped == 0
    assert cut.tokens.tolist()[: len(ids) - 1] == ids[: len(ids) - 1], "nothing is lost"
    assert all(cut.label_spans(i).tolist() == [[1, cut.length(i)]] for i in range(len(cut)))


def test_a_text_with_a_label_is_no_plain_text(tmp_path: Path) -> None:
    """Classification data, whose columns the recipe does not name: nobody wants its texts alone."""
    (tmp_path / "own.jsonl").write_text('{"text": "fine", "label": 1}\n')
    data = DataConfig(format="table", path=str(tmp_path / "own.jsonl"), partition=PartitionConfig("iid", num_clients=1))
    with pytest.raises(
        DataError, match=r"own.jsonl:1: has the column 'text', and an answer to it in 'label': set data"
    ):
        read_client(data, 0, 0)
    named = replace(data, instruction_column="text", output_column="label")
    assert read_client(named, 0, 0).train[0] == Example("fine", "1", "")


def test_the_cache_tells_conversations_apart(tmp_path: Any) -> None:
    from dpa_ds.data.tokenize import load_or_tokenize

    config = DataConfig(cache_dir=str(tmp_path))
    tokenizer = make_chat_tokenizer("qwen")
    chat = build_format(tokenizer, config)
    found = {}
    for name, turns in (("multi", MULTI), ("other", (("system", "Be."), *MULTI[1:]))):
        for _ in range(2):
            found[name] = load_or_tokenize([example(turns)], chat, config, "client_0").tokens.tolist()
    last = build_format(tokenizer, DataConfig(train_on="last"))
    spans = load_or_tokenize([example(MULTI)], last, config, "client_0").spans
    assert found["multi"] != found["other"]
    assert len(spans) == 1
    assert len(list(tmp_path.glob("tokens/*"))) == 3
    assert json.dumps(found)
