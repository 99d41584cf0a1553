"""Chat templates of well-known families, written out from what is publicly known of their formats, and tokenizers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The quick brown fox jumps over the lazy dog. Is ice cold? Yes, it is. What is the capital of France? Paris. "
    "user assistant system model end of turn 0123456789 <|>[]_/ \n\n"
) * 8

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set ns = namespace(system=messages[0]['content'] "
    "+ '\n\n') %}{% set turns = messages[1:] %}{% else %}{% set ns = namespace(system='') %}{% set turns = messages %}"
    "{% endif %}{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ ns.system + message['content'] }} [/INST]{% set ns.system = '' %}"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ message['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def byte_level(special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([TEXTS], trainer)
    return backend


def metaspace(special: Sequence[str]) -> Tokenizer:
    """BPE with byte fallback and a space before every text, as Llama 2 and Mistral have it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bytes(backend, special)


def metaspace_first(special: Sequence[str]) -> Tokenizer:
    """The same with a space before the first part alone, as newer conversions have it."""
    backend = metaspace(special)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return backend


def replaced_spaces(special: Sequence[str]) -> Tokenizer:
    """BPE with byte fallback in which a space is a letter and nothing is put before a text, as Gemma has it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_bytes(backend, special)


def unigram(special: Sequence[str]) -> Tokenizer:
    """A unigram model, as T5, XLM and some Japanese models have it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = sorted(set(TEXTS) | {chr(code) for code in range(33, 127)} | {"\n", "\u2581"})
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", *special], unk_token="<unk>", initial_alphabet=alphabet
    )
    backend.train_from_iterator([TEXTS], trainer)
    return backend


def _with_bytes(backend: Tokenizer, special: Sequence[str]) -> Tokenizer:
    alphabet = sorted(set(TEXTS) | {chr(code) for code in range(33, 127)})
    bytes_as_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *special, *bytes_as_tokens], initial_alphabet=alphabet
    )
    backend.train_from_iterator([TEXTS], trainer)
    return backend


TOKENIZERS: dict[str, Callable[[Sequence[str]], Tokenizer]] = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "metaspace_first": metaspace_first,
    "replaced_spaces": replaced_spaces,
    "unigram": unigram,
}


@dataclass(frozen=True)
class Family:
    """A chat model's template, and the tokenizer that is usual with it."""

    template: str
    tokenizer: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end_of_turn: str
    has_system: bool = True


FAMILIES = {
    "llama3": Family(
        LLAMA_3,
        "byte_level",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "qwen": Family(
        CHATML, "byte_level", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"
    ),
    "mistral": Family(MISTRAL, "metaspace", ("<s>", "</s>"), "<s>", "</s>", "</s>"),
    "gemma": Family(
        GEMMA,
        "replaced_spaces",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        has_system=False,
    ),
    "phi3": Family(
        PHI_3,
        "metaspace_first",
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        None,
        "<|endoftext|>",
        "<|end|>",
    ),
    "smollm": Family(SMOLLM, "byte_level", ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"),
}


def make_chat_tokenizer(family: str, tokenizer: str | None = None) -> PreTrainedTokenizerFast:
    """The family's template on its tokenizer, or on another one, which puts BOS before a text where the family has one."""
    found = FAMILIES[family]
    backend = TOKENIZERS[tokenizer or found.tokenizer](found.special)
    if found.bos is not None:
        number = backend.token_to_id(found.bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{found.bos} $A", special_tokens=[(found.bos, number)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=found.bos, eos_token=found.eos)
    made.chat_template = found.template
    return made
