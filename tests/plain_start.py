"""What the plain loop (tests/plain.py) begins from: the tokens, orders and initial adapters of a recipe."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import adapter_table
from dpa_ds.cli.session import GLOBAL_SEED
from dpa_ds.config.schema import RunConfig
from dpa_ds.data.batching import num_steps, step_indices
from dpa_ds.data.formats import build_format
from dpa_ds.data.sources import list_clients, pool_clients, read_clients
from dpa_ds.data.tokenize import load_or_tokenize
from dpa_ds.federation.clients import LOCAL_SEED
from tests import plain


def start_plain(config: RunConfig, pooled: bool = False) -> tuple[plain.Plain, list[plain.Client], plain.State]:
    """The plain model, its clients and the initial global adapter."""
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    drawn = AdapterModel(base, adapter_table(config.lora), config.lora)
    train, lora = config.train, config.lora
    reference = plain.Plain(
        config.model.path,
        lora.rank,
        lora.alpha,
        lora.target_modules,
        train.learning_rate,
        train.max_grad_norm,
        None if config.model.attention == "auto" else config.model.attention,
        train.adam_epsilon,
        train.warmup_ratio,
        lora.scaling == "rslora",
        config.model.quantization,
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    everyone = read_clients(config.data, config.seed, range(len(list_clients(config.data, config.seed))))
    clients = []
    for client_id, client in enumerate([pool_clients(everyone)] if pooled else everyone):
        tokens = load_or_tokenize(client.train, build_format(tokenizer, config.data), config.data, client.name)
        examples = [(tokens.input_ids(i).tolist(), tokens.label_spans(i).tolist()) for i in range(len(tokens))]
        steps = num_steps(len(tokens), train.batch_size, train.local_epochs, train.max_steps)

        def order(
            server_round: int, adapter: str, client_id: int = client_id, n: int = len(tokens), steps: int = steps
        ) -> Any:
            words = (config.seed, server_round, client_id, 0 if adapter == "global" else 1)
            return step_indices(n, train.batch_size, steps, words)

        local = drawn.initial_state("local", (config.seed, LOCAL_SEED, client_id))
        clients.append(plain.Client(examples, local, order))
    return reference, clients, drawn.initial_state("global", (config.seed, GLOBAL_SEED))
