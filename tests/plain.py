"""The method once more, written plainly: one process, transformers + PEFT + torch, one example at a time.

No DeepSpeed, no code of dpa_ds but the data it is given (tokens, order of examples, initial adapters).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_linear_schedule_with_warmup

State = dict[str, torch.Tensor]


@dataclass
class Client:
    """A client's tokens as (input_ids, label spans), its local adapter, and the order of its examples."""

    examples: list[tuple[list[int], list[tuple[int, int]]]]
    """A span is [start, stop) of tokens that are predicted."""
    local: State
    order: Callable[[int, str], list[list[int]]]
    """(server_round, adapter) -> examples of each optimizer step."""
    history: list[float] = field(default_factory=list)


def lora_config(rank: int, alpha: float, targets: Sequence[str] | str, rslora: bool = False) -> peft.LoraConfig:
    """PEFT's own, for its word all-linear, or for names: those of experts in one parameter begin with `experts.`."""
    modules: list[str] | str = targets if isinstance(targets, str) else [t for t in targets if "experts." not in t]
    parameters = None if isinstance(targets, str) else [t for t in targets if "experts." in t]
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )


def load_base(model_dir: Any, quantization: str, attention: str | None = None) -> Any:
    """In fp32, or in 8 or 4 bits as transformers loads it."""
    settings: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    if quantization == "none":
        return AutoModelForCausalLM.from_pretrained(model_dir, **settings)
    config = BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=config, **settings)
    return computes_as_in_training(base)


def computes_as_in_training(model: Any) -> Any:
    """In eval mode a CPU's layers of 8 bits quantise their inputs too, and those of 4 bits round their scales."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            module.train()
    return model


class Plain:
    """A PEFT model with adapters "global" and "local"."""

    def __init__(
        self,
        model_dir: Any,
        rank: int,
        alpha: float,
        targets: Sequence[str] | str,
        lr: float,
        clip: float,
        attention: str | None = None,
        epsilon: float = 1e-8,
        warmup: float = 0.0,
        rslora: bool = False,
        quantization: str = "none",
    ) -> None:
        # from_pretrained leaves the model in eval mode: the frozen base drops nothing.
        base = load_base(model_dir, quantization, attention)
        config = lora_config(rank, alpha, targets, rslora)
        self.model = peft.get_peft_model(base, config, adapter_name="global")
        self.model.add_adapter("local", config)
        self.lr, self.clip, self.epsilon, self.warmup = lr, clip, epsilon, warmup

    def parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        return {
            name.replace(f".{adapter}.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if f".{adapter}." in name
        }

    def load(self, adapter: str, state: State) -> None:
        with torch.no_grad():
            for key, parameter in self.parameters(adapter).items():
                parameter.copy_(state[key])

    def state(self, adapter: str) -> State:
        return {key: parameter.detach().clone() for key, parameter in self.parameters(adapter).items()}

    def mix(self, weight_global: float, weight_local: float) -> None:
        self.model.base_model.set_adapter(["global", "local"])
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale("global", weight_global)
                layer.set_scale("local", weight_local)

    def logits(self, input_ids: Sequence[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([input_ids])).logits[0]

    def phase(self, client: Client, adapter: str, weights: tuple[float, float], server_round: int) -> None:
        """Fresh AdamW, warm-up, linear decay to 0, loss normalised by the label tokens of the whole step."""
        self.mix(*weights)
        for name in ("global", "local"):
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(name == adapter)
        trained = list(self.parameters(adapter).values())
        optimizer = torch.optim.AdamW(trained, lr=self.lr, eps=self.epsilon, weight_decay=0.0)
        steps = client.order(server_round, adapter)
        scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(self.warmup * len(steps)), len(steps))
        for indices in steps:
            batch = [client.examples[i] for i in indices]
            label_tokens = sum(stop - start for _, spans in batch for start, stop in spans)
            total = 0.0
            for ids, spans in batch:
                logits = self.logits(ids)
                predicted = torch.cat([logits[start - 1 : stop - 1] for start, stop in spans])
                targets = torch.tensor([token for start, stop in spans for token in ids[start:stop]])
                loss = torch.nn.functional.cross_entropy(predicted, targets, reduction="sum")
                (loss / label_tokens).backward()
                total += float(loss.detach()) / label_tokens
            torch.nn.utils.clip_grad_norm_(trained, self.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            client.history.append(total)


def average(states: Sequence[State], weights: Sequence[float]) -> State:
    return {
        key: sum(w * s[key].double() for w, s in zip(weights, states, strict=True)).div(sum(weights)).float()
        for key in states[0]
    }


def feddpa_t(
    plain: Plain,
    clients: Sequence[Client],
    start: State,
    rounds: int,
    alpha: float,
    order: str = "global_first",
    partner: str = "own",
    weights: Sequence[float] | None = None,
) -> State:
    """FedDPA-T; the clients' local adapters change in place, the final global adapter is returned."""
    current = start

    def local_phase(client: Client, server_round: int) -> None:
        plain.load("local", client.local)
        plain.phase(client, "local", (1 - alpha, alpha), server_round)
        client.local = plain.state("local")

    for server_round in range(1, rounds + 1):
        uploads = []
        for client in clients:
            plain.load("global", current)
            if order == "local_first" and server_round > 1:
                local_phase(client, server_round)
            plain.phase(client, "global", (1.0, 0.0), server_round)
            uploads.append(plain.state("global"))
            if order == "global_first" and partner == "own":
                local_phase(client, server_round)
        current = average(uploads, weights or [1.0] * len(uploads))
        if partner == "aggregated":
            for client in clients:
                plain.load("global", current)
                local_phase(client, server_round)
    return current


def feddpa_f(plain: Plain, clients: Sequence[Client], start: State, rounds: int) -> State:
    """FedDPA-F: rounds of the global adapter alone; then each local one starts from it and is tuned alone."""
    current = start
    for server_round in range(1, rounds + 1):
        uploads = []
        for client in clients:
            plain.load("global", current)
            plain.phase(client, "global", (1.0, 0.0), server_round)
            uploads.append(plain.state("global"))
        current = average(uploads, [1.0] * len(uploads))
    for client in clients:
        plain.load("local", current)
        plain.phase(client, "local", (0.0, 1.0), rounds)
        client.local = plain.state("local")
    return current
