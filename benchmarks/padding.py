"""Tokens computed for each token of the examples, over one epoch: `python benchmarks/padding.py --model DIR
--data DIR`.

Without a shared prefix (padding alone) and with one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpa_ds.config.schema import DataConfig
from dpa_ds.data.batching import BatchingConfig, build_step, num_steps, step_indices
from dpa_ds.data.formats import build_format
from dpa_ds.data.sources import list_clients, read_clients
from dpa_ds.data.tokenize import TokenizedExamples, tokenize_examples
from dpa_ds.model.directory import load_tokenizer


def main() -> None:
    """Print a table: batch size by ranks, all clients and (the worst client)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".cache/demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--data", default=".cache/demo/federation", help="a folder in the authors' layout")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096)
    arguments = parser.parse_args()
    config = DataConfig(path=arguments.data)
    tokenizer = load_tokenizer(arguments.model)
    clients = read_clients(config, 0, range(len(list_clients(config, 0))))
    example_format = build_format(tokenizer, config)
    tokens = [tokenize_examples(c.train, example_format, config.max_length, c.name) for c in clients]
    print("batch  ranks   padded  shared prefix   (of the client with most)")
    for batch_size in (16, 32, 64):
        for world_size in (1, 2, 4):
            cells = [f"{batch_size:5d}  {world_size:5d}"]
            for prefix_sharing in (False, True):
                batching = BatchingConfig(arguments.micro_batch_tokens, 0, prefix_sharing)
                cells.append(_measure(tokens, batch_size, world_size, batching))
            print("   ".join(cells))


def _measure(clients: Sequence[TokenizedExamples], batch_size: int, world_size: int, batching: BatchingConfig) -> str:
    """Computed tokens for each real one, of all clients and (of the worst)."""
    all_real, all_computed, worst = 0, 0, 0.0
    for client, examples in enumerate(clients):
        real, computed = _count(examples, client, batch_size, world_size, batching)
        all_real += real
        all_computed += computed
        worst = max(worst, computed / real)
    return f"{all_computed / all_real:.3f} ({worst:.3f})"


def _count(
    examples: TokenizedExamples, client: int, batch_size: int, world_size: int, batching: BatchingConfig
) -> tuple[int, int]:
    """Real and computed tokens of a client's epoch."""
    epoch = step_indices(len(examples), batch_size, num_steps(len(examples), batch_size, 1.0, None), (0, 1, client, 0))
    real, computed = 0, 0
    for indices in epoch:
        step = build_step(examples, indices, 0, world_size, batching)
        real += step.real_tokens
        computed += step.computed_tokens
    return real, computed


if __name__ == "__main__":
    main()
