"""A tiny random Llama, a tokenizer and a small federation on disk: real parts, seconds to train."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("red", "blue", "green", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", "sings", "near", "far")
TASKS = ("colour", "count", "animal", "verb")


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A 2-layer Llama of hidden size 32 (about 30,000 parameters) with a word tokenizer, saved to `folder`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 192,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            # larger than usual: a random model with tiny weights has gradients too small to tell anything
            "initializer_range": 0.3,
            **changes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 256 bytes and two special tokens: reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def make_federation(folder: Path, sizes: tuple[int, ...] = (7, 5, 9, 6), num_test: int = 4) -> Path:
    """The authors' layout: one task a client, `sizes[k]` training examples each, `num_test` test rows a task."""
    generator = random.Random(3)
    (folder / str(len(sizes))).mkdir(parents=True)
    test = []
    for k, size in enumerate(sizes):
        rows = [_example(TASKS[k % len(TASKS)] + str(k), generator) for _ in range(size + num_test)]
        (folder / str(len(sizes)) / f"local_training_{k}.json").write_text(json.dumps(rows[:size]))
        test += rows[size:]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return folder


def _example(task: str, generator: random.Random) -> dict[str, str]:
    words = generator.choices(WORDS, k=generator.randint(2, 6))
    answer = " ".join(sorted(words)[: generator.randint(1, 3)])
    return {"instruction": f"{task}: {' '.join(words)}", "output": answer, "task": task, "category": task}


def recipe(model: Path, data: Path, output_dir: Path, **overrides: Any) -> list[str]:
    """Arguments for a small exact run (fp32, no dropout): a recipe file beside `output_dir`, and `--config` for it.

    `overrides` are written section__field=value.
    """
    settings = {
        "name": "tiny",
        "output_dir": output_dir,
        "cluster.timeout_seconds": 60,
        "cluster.device": "cpu",
        "model.path": model,
        "model.precision": "fp32",
        "lora.rank": 4,
        "lora.alpha": 8,
        "lora.dropout": 0.0,
        "data.path": data,
        "data.template": "{instruction} = ",
        "data.cache_dir": output_dir / "cache",
        "federation.num_rounds": 2,
        "federation.timeout_seconds": 60,
        "train.batch_size": 4,
        "train.micro_batch_tokens": 128,
        "train.local_epochs": 1.0,
        "train.learning_rate": 1e-2,
        "evaluation.max_examples": 4,
        "tracking.tensorboard": False,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    path = output_dir.with_suffix(".yaml")
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    path.write_text(yaml.safe_dump(plain))
    return ["--config", str(path)]
