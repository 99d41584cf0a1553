"""Tokens computed for each token of the examples, over one epoch: `python benchmarks/padding.py --model DIR --data DIR`.

Without a shared prefix (padding alone) and with one.
"""

import argparse
import itertools
from pathlib import Path

from dpa_ds.config.schema import DataConfig
from dpa_ds.data.batching import BatchingConfig, build_step, num_steps, step_indices
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
    config, tokenizer = DataConfig(path=arguments.data), load_tokenizer(arguments.model)
    clients = read_clients(config, 0, range(len(list_clients(config, 0))))
    tokens = [tokenize_examples(c.train, tokenizer, config.template, config.max_length, c.name) for c in clients]
    print("batch  ranks   padded  shared prefix   (of the client with most)")
    for batch_size, world_size in itertools.product((16, 32, 64), (1, 2, 4)):
        print(f"{batch_size:5d}  {world_size:5d}", end="")
        for prefix_sharing in (False, True):
            batching = BatchingConfig(arguments.micro_batch_tokens, 0, prefix_sharing)
            counts = [
                _count(examples, client, batch_size, world_size, batching) for client, examples in enumerate(tokens)
            ]
            real, computed = (sum(column) for column in zip(*counts, strict=True))
            print(f"   {computed / real:.3f} ({max(c / r for r, c in counts):.3f})", end="")
        print()


def _count(
    examples: TokenizedExamples, client: int, batch_size: int, world_size: int, batching: BatchingConfig
) -> tuple[int, int]:
    """Real and computed tokens of a client's epoch."""
    epoch = step_indices(len(examples), batch_size, num_steps(len(examples), batch_size, 1.0, None), (0, 1, client, 0))
    steps = [build_step(examples, indices, 0, world_size, batching) for indices in epoch]
    return sum(s.real_tokens for s in steps), sum(s.computed_tokens for s in steps)


if __name__ == "__main__":
    main()
