"""The two LoRA adapters on one frozen base: which is mixed in with what weight, and which parameters they have.

    h = W0 x + (1 - alpha) * s * B_g A_g x + alpha * s * B_l A_l x        s = lora.alpha / lora.rank

alpha weights the LOCAL adapter (FedDPA, section 3; the published code reverses it at inference). PEFT is used
unforked; its LoRA layers compute both adapters at once (`mixed_lora.py`).
"""

import hashlib
import inspect
import math
from collections.abc import Sequence
from typing import Literal

import peft
import torch
from transformers import PreTrainedModel

from dpa_ds.adapters.mixed_lora import MixedLora, with_mixed_layers
from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.schema import LoraConfig
from dpa_ds.errors import ModelError

Adapter = Literal["global", "local"]
ADAPTERS: tuple[Adapter, Adapter] = ("global", "local")


class DualAdapter:
    """A PEFT model with the adapters "global" and "local" on every target layer."""

    def __init__(self, base: PreTrainedModel, config: LoraConfig) -> None:
        _check_target_modules(base, config)
        base.requires_grad_(False)
        self.base_model = base
        """The causal LM under PEFT."""
        takes_it = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.one_logit = {"logits_to_keep": 1} if takes_it else {}
        """Arguments of a forward pass whose logits nobody needs: the output head then runs at one position a row."""
        # autocast_adapter_dtype=False: DeepSpeed keeps the fp32 master, the working copy has the base's precision.
        self.peft_model = peft.PeftModel(
            base, _peft_config(config, "global"), adapter_name="global", autocast_adapter_dtype=False
        )
        self.peft_model.add_adapter("local", _peft_config(config, "local"), autocast_adapter_dtype=False)
        self.scale = config.alpha / config.rank
        self.layers = [module for module in self.peft_model.modules() if isinstance(module, MixedLora)]
        self.parameters = {adapter: _adapter_parameters(self.peft_model, adapter) for adapter in ADAPTERS}
        """Per adapter: PEFT's adapter-less key -> parameter, in a fixed order."""
        # Before DeepSpeed takes over both must be trainable: it only manages what then requires gradients.
        for adapter in ADAPTERS:
            self.set_trainable(adapter, True)
        # Full shapes, kept because ZeRO-3 empties the parameters themselves.
        self.shapes = {
            adapter: {key: tuple(p.shape) for key, p in self.parameters[adapter].items()} for adapter in ADAPTERS
        }
        self.set_mix(0.0)

    @property
    def device(self) -> torch.device:
        """Where inputs go (under ZeRO-3 too, where parameters themselves are elsewhere)."""
        return self.base_model.device

    @torch.no_grad()
    def load_state(self, adapter: Adapter, state: AdapterState) -> None:
        """Install `state` in a model without an engine (with one: `AdapterEngine.write_state`).

        Raises:
            ModelError: the state is one of another model.
        """
        self.check_shapes(adapter, state)
        for key, parameter in self.parameters[adapter].items():
            parameter.copy_(state[key])

    def check_shapes(self, adapter: Adapter, state: AdapterState) -> None:
        """Raise ModelError unless `state` has the keys and shapes of `adapter` on this model."""
        expected, found = self.shapes[adapter], {key: tuple(value.shape) for key, value in state.items()}
        if found != expected:
            key = next(key for key in (*expected, *found) if expected.get(key) != found.get(key))
            raise ModelError(
                f"the saved {adapter} adapter does not fit this model: {key} has shape {found.get(key, 'none')}, expected "
                f"{expected.get(key, 'none')}: set model.path and lora.* to what it was trained with"
            )

    def set_mix(self, alpha: float | torch.Tensor | None) -> None:
        """Weight the adapters (1 - alpha, alpha) in every layer.

        Args:
            alpha: one weight in [0, 1], or one per instance, shape (batch,). At exactly 0.0 or 1.0 (as a float)
                the other adapter is not computed at all. None: neither is, the frozen base answers alone.
        """
        if alpha is None:
            active: list[Adapter] = []
        elif isinstance(alpha, torch.Tensor) or 0 < alpha < 1:
            active = list(ADAPTERS)
        else:
            active = ["local"] if alpha else ["global"]
        local = torch.as_tensor(0.0 if alpha is None else alpha, dtype=torch.float32, device=self.device)
        if local.dim():
            local = local.reshape(-1, 1, 1)  # (batch, 1, 1) against (batch, seq_len, ranks)
        shares: dict[Adapter, torch.Tensor] = {"global": 1 - local, "local": local}
        weights: dict[str, torch.Tensor] = {adapter: shares[adapter] * self.scale for adapter in active}
        for layer in self.layers:
            layer.mix(weights)

    def set_trainable(self, adapter: Adapter, trainable: bool) -> None:
        """Freeze or free the parameters of `adapter`. Its branch stays in the graph: gradients still flow through."""
        for parameter in self.parameters[adapter].values():
            parameter.requires_grad_(trainable)

    def initial_state(self, adapter: Adapter, seed: Sequence[int]) -> AdapterState:
        """Fresh weights as PEFT draws them (A: Kaiming uniform, B: zero), a pure function of `seed`.

        Independent of rank count and ZeRO stage: drawn per key on CPU, in fp32.
        """
        return {key: _initial_tensor(key, shape, seed) for key, shape in self.shapes[adapter].items()}

    def peft_config(self, adapter: Adapter) -> peft.LoraConfig:
        """PEFT's own description of `adapter`, for export."""
        config = self.peft_model.peft_config[adapter]
        assert isinstance(config, peft.LoraConfig)
        return config


def _initial_tensor(key: str, shape: Sequence[int], seed: Sequence[int]) -> torch.Tensor:
    if ".lora_B." in key:
        return torch.zeros(shape)
    words = hashlib.sha256(f"{list(seed)} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(words[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_(a=sqrt(5)) with fan-in shape[1]
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def _peft_config(config: LoraConfig, adapter: Adapter) -> peft.LoraConfig:
    rank = config.local_rank if adapter == "local" and config.local_rank else config.rank
    made = peft.LoraConfig(
        r=rank,
        lora_alpha=config.alpha * rank / config.rank,  # type: ignore[arg-type]  # alpha / rank is the scale of both
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return with_mixed_layers(made)


def _adapter_parameters(model: peft.PeftModel, adapter: Adapter) -> dict[str, torch.nn.Parameter]:
    """PEFT saves `...lora_A.weight` for the parameter `...lora_A.<adapter>.weight`."""
    marks = (f".lora_A.{adapter}.", f".lora_B.{adapter}.")
    found = {
        name.replace(f".{adapter}.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if any(mark in name for mark in marks)
    }
    return dict(sorted(found.items()))


def _check_target_modules(base: PreTrainedModel, config: LoraConfig) -> None:
    # PEFT complains only if none of the names matches.
    linear = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"}
    missing = [t for t in config.target_modules if not any(n == t or n.endswith("." + t) for n in linear)]
    if missing:
        available = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ModelError(
            f"lora.target_modules {missing} are not linear layers of {type(base).__name__}; it has {available}"
        )
    widest = int(base.config.get_text_config().hidden_size)
    for key, rank in (("lora.rank", config.rank), ("lora.local_rank", config.local_rank or 1)):
        if rank > widest:
            raise ModelError(f"{key} {rank} is more than the width of the model, {widest}: lower it (8 is usual)")
