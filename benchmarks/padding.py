"""Share of the computed tokens that are real, over one epoch: `python benchmarks/padding.py --model DIR --data DIR`."""

import argparse
from pathlib import Path

from dpa_ds.config import DataConfig
from dpa_ds.data.batches import build_step, num_steps, step_indices
from dpa_ds.data.prompts import tokenize_examples
from dpa_ds.data.sources import list_clients, read_clients
from dpa_ds.model.base import load_tokenizer


def main() -> None:
    """Print a table: batch size by ranks, all clients and (the worst client)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".cache/demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--data", default=".cache/demo/federation", help="a folder in the authors' layout")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096)
    arguments = parser.parse_args()
    config, tokenizer = DataConfig(path=arguments.data), load_tokenizer(arguments.model)
    clients = read_clients(config, 0, range(len(list_clients(config, 0))))
    tokens = [tokenize_examples(c.train, tokenizer, config.template, config.max_length, c.name) for c in clients]
    for batch_size in (16, 32, 64):
        for world_size in (1, 2, 4):
            counts = []
            for client, examples in enumerate(tokens):
                total = num_steps(len(examples), batch_size, 1.0, None)
                steps = [
                    build_step(examples, indices, 0, world_size, arguments.micro_batch_tokens, 0)
                    for indices in step_indices(len(examples), batch_size, total, (0, 1, client, 0))
                ]
                counts.append((sum(s.real_tokens for s in steps), sum(s.computed_tokens for s in steps)))
            real, computed = (sum(column) for column in zip(*counts, strict=True))
            worst = min(r / c for r, c in counts)
            print(f"batch {batch_size:3d}  ranks {world_size}  {real / computed:.3f} ({worst:.3f})")


if __name__ == "__main__":
    main()
