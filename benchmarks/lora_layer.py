"""A layer's forward and backward with one adapter and with both: ours, PEFT's own, and the frozen layer alone.

    python benchmarks/lora_layer.py --model .cache/demo/SmolLM2-135M-Instruct --tokens 2214 4448

The three are timed in turns, one thread, CPU time; outputs and gradients are compared first.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from dpa_engine import computed_by_peft, random_state
from table import spread, where_and_when

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.adapters.methods import adapter_table
from dpa_ds.adapters.mixed_lora import MixedLora
from dpa_ds.config.schema import LoraConfig, ModelConfig
from dpa_ds.model.base import load_base


def main() -> None:
    """Print a table: layer by tokens by adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/demo/SmolLM2-135M-Instruct", help="(%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2214, 4448], help="of a pass (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="(%(default)s)")
    args = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    config = ModelConfig(path=args.model, precision="fp32")
    base = load_base(config, Path(args.model), {}, torch.device("cpu"))
    lora = LoraConfig(dropout=0.0)
    adapters = AdapterModel(base, adapter_table(lora), lora)
    for adapter in adapters.table:
        adapters.load_state(adapter, random_state(adapters, adapter))
    adapters.set_trainable("global", False)  # with both: the local phase
    print(where_and_when(packages=("torch", "peft")))
    print("tokens   layer           adapters   ms alone   ours / alone              PEFT / ours")
    for tokens in args.tokens:
        for layer in adapters.layers[:2]:
            for alpha in (1.0, 0.5):
                alone, ours, theirs = _measure(adapters, layer, alpha, tokens, args.repeats)
                shape = f"{layer.in_features} -> {layer.out_features}"
                over_alone = spread([a / b for a, b in zip(ours, alone, strict=True)])
                over_ours = spread([a / b for a, b in zip(theirs, ours, strict=True)])
                print(
                    f"{tokens:6d}   {shape:14}  {'local' if alpha == 1 else 'both':9}  {statistics.median(alone):8.1f}"
                    f"   {over_alone:24}  {over_ours}"
                )


def _measure(
    adapters: AdapterModel, layer: MixedLora, alpha: float, tokens: int, repeats: int
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of each repeat: the frozen layer alone, ours, PEFT's."""
    adapters.set_mix(global_local_mix(alpha))
    x = torch.randn(1, tokens, layer.in_features, requires_grad=True)
    towards = torch.randn(1, tokens, layer.out_features)

    def timed(forward: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        adapters.peft_model.zero_grad()
        x.grad = None
        started = time.process_time()
        output = forward(x)
        output.backward(towards)
        milliseconds = (time.process_time() - started) * 1e3
        gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        return milliseconds, [output.detach(), x.grad, *gradients]

    rows = []
    for _ in range(repeats + 1):
        alone, _ = timed(layer.base_layer)
        ours, found = timed(layer)
        with computed_by_peft(adapters, alpha):
            theirs, expected = timed(layer)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        rows.append((alone, ours, theirs))
    first, second, third = zip(*rows[1:], strict=True)
    return list(first), list(second), list(third)


if __name__ == "__main__":
    main()
