"""A frozen base with a table of LoRA adapters: which are mixed in with what weight, and which
parameters they have.

    h = W0 x + sum over adapters of mix * s * B A x        s: scale_of(lora)

The mix is a tensor: a weight for each instance, layer and adapter. PEFT is used unforked; its LoRA
layers compute all adapters at once (`mixed_lora.py`).
"""

import copy
import hashlib
import inspect
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpa_ds.adapters.methods import GLOBAL, LOCAL, AdapterSpec, adapter_table
from dpa_ds.adapters.mixed_lora import MixedLora, MixedParameter, with_mixed_layers
from dpa_ds.adapters.state import AdapterState, Shapes, shapes_of
from dpa_ds.config.schema import LoraConfig
from dpa_ds.errors import ModelError
from dpa_ds.model.directory import read_config
from dpa_ds.model.linear_layers import Targets, find_targets, is_named, linear_layers

logger = logging.getLogger(__name__)


class AdapterModel:
    """A PEFT model with every adapter of `table` on every target layer."""

    def __init__(self, base: PreTrainedModel, table: Sequence[AdapterSpec], config: LoraConfig) -> None:
        targets = find_targets(base, config)
        layers = linear_layers(base)
        _check_ranks(base, config)
        base.requires_grad_(False)
        self.base_model = base
        """The causal LM under PEFT."""
        self.table = {spec.name: spec for spec in table}
        """By name; the order is that of the last dimension of a mix."""
        self.peft_model = _add_adapters(base, table, config, targets)
        base.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
        self.layers = [module for module in self.peft_model.modules() if isinstance(module, MixedLora)]
        """The adapted linear layers, in the order of the middle dimension of a mix."""
        self.experts = [
            MixedParameter(module) for module in self.peft_model.modules() if isinstance(module, ParamWrapper)
        ]
        """The adapted parameters of experts, which follow the layers there."""
        if self.experts:
            _check_experts(self.peft_model, targets, layers)
        self.scale = scale_of(config)
        self.parameters: dict[str, dict[str, torch.nn.Parameter]] = {}
        """Per adapter: PEFT's adapter-less key -> parameter, keys sorted."""
        self.shapes: dict[str, Shapes] = {}
        """Full shapes of `parameters`, kept because ZeRO-3 empties the parameters themselves."""
        for spec in table:
            parameters = _adapter_parameters(self.peft_model, spec.name)
            self.parameters[spec.name] = parameters
            self.shapes[spec.name] = shapes_of(parameters)
            # Before DeepSpeed takes over all must require gradients: it only manages what then does.
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        _report_tied(base, self.layers)
        self.one_logit = _one_logit(base)
        """Arguments of a forward pass whose logits nobody needs.

        The output head then runs at one position a row.
        """
        self.set_mix(self.no_mix)

    @property
    def device(self) -> torch.device:
        """Where inputs go (under ZeRO-3 too, where parameters themselves are elsewhere)."""
        return self.base_model.device

    @property
    def hidden_size(self) -> int:
        """Of the base, in the layers that embed a prompt."""
        return int(self.base_model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        """Of the base: its logits are as many."""
        return int(self.base_model.config.get_text_config().vocab_size)

    @property
    def no_mix(self) -> torch.Tensor:
        """The mix in which no adapter takes part: the frozen base answers alone."""
        return torch.zeros(1, 1, len(self.table))

    def set_mix(self, mix: torch.Tensor, compute_all: bool = False) -> None:
        """Weight the adapters of every layer.

        An adapter whose weight is 0 everywhere in `mix` is not computed at all.

        Args:
            mix: fp32 on the CPU, shape (batch or 1, layers or 1, adapters).
            compute_all: compute the adapters of weight 0 too. Needed where the base is partitioned
                and ranks have different weights: they gather the same parameters together.
        """
        _, num_layers, num_adapters = mix.shape
        num_adapted = len(self.layers) + len(self.experts)
        assert num_layers in (1, num_adapted), num_layers
        assert num_adapters == len(self.table), num_adapters
        assert mix.dtype == torch.float32, mix.dtype
        names: list[str] = []
        columns: list[int] = []
        for column, spec in enumerate(self.table.values()):
            if compute_all or mix[..., column].any():
                names.append(spec.name)
                # A column for each rank: the weights then multiply the low-rank product as they are.
                columns += [column] * spec.rank
        # On the CPU up to here, where it costs nothing: one small copy to the device serves all layers.
        weights = (mix * self.scale)[..., columns].to(self.device)
        per_layer = torch.split(weights.expand(-1, num_adapted, -1), 1, dim=1)
        for layer, layer_weights in zip(self.layers, per_layer[: len(self.layers)], strict=True):
            layer.mix(names, layer_weights)
        if self.experts:
            self._mix_experts((mix * self.scale).expand(-1, num_adapted, -1), names)

    def _mix_experts(self, weights: torch.Tensor, names: Sequence[str]) -> None:
        """Weight the adapters of experts; `weights` has a place for each adapted layer, and then for these."""
        columns = {name: column for column, name in enumerate(self.table)}
        for position, experts in enumerate(self.experts, start=len(self.layers)):
            experts.mix({name: weights[:, position, columns[name]] for name in names})

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Freeze `adapter`, or free those of its matrices that the table trains.

        A frozen adapter stays in the graph: gradients still flow through it.
        """
        for key, parameter in self.parameters[adapter].items():
            parameter.requires_grad_(trainable and self.table[adapter].is_trained(key))

    @torch.no_grad()
    def load_state(self, adapter: str, state: AdapterState) -> None:
        """Install `state` in a model without an engine (with one: `AdapterEngine.write_state`).

        Raises:
            ModelError: the state is one of another model.
        """
        self.check_shapes(adapter, state)
        for key, parameter in self.parameters[adapter].items():
            parameter.copy_(state[key])
        self.forget_stacked()

    def forget_stacked(self) -> None:
        """Weights have changed: no layer may use what it has stacked of them."""
        for layer in self.layers:
            layer.forget_stacked()

    def check_shapes(self, adapter: str, state: AdapterState) -> None:
        """Raise ModelError unless `state` has the keys and shapes of `adapter` on this model."""
        expected, found = self.shapes[adapter], shapes_of(state)
        for key in (*expected, *found):
            if expected.get(key) != found.get(key):
                raise ModelError(
                    f"the saved {adapter} adapter does not fit this model: {key} has shape "
                    f"{found.get(key, 'none')}, expected {expected.get(key, 'none')}: set model.path "
                    "and lora.* to what it was trained with"
                )

    def initial_state(self, adapter: str, seed: Sequence[int]) -> AdapterState:
        """Fresh weights as PEFT draws them (A: Kaiming uniform, B: zero), a pure function of `seed`.

        Independent of rank count and ZeRO stage: drawn per key on CPU, in fp32.
        """
        return {key: _initial_tensor(key, shape, seed) for key, shape in self.shapes[adapter].items()}

    def peft_config(self, adapter: str) -> peft.LoraConfig:
        """PEFT's own description of `adapter`, for export."""
        config = self.peft_model.peft_config[adapter]
        assert isinstance(config, peft.LoraConfig)
        return config


def scale_of(config: LoraConfig) -> float:
    """What multiplies B A of every adapter, whatever its own rank: the mix alone weights one against another."""
    match config.scaling:
        case "standard":
            return config.alpha / config.rank
        case "rslora":
            return config.alpha / math.sqrt(config.rank)


def global_local_mix(alpha: float | torch.Tensor) -> torch.Tensor:
    """The mix (1 - alpha, alpha) of the global and the local adapter (`adapter_table`), shape
    (batch or 1, 1, 2).

    alpha weights the LOCAL adapter (FedDPA, section 3; the published code reverses it at
    inference).

    Args:
        alpha: one weight in [0, 1], or one for each instance, shape (batch,), on any device.
    """
    local = torch.as_tensor(alpha, dtype=torch.float32, device="cpu").reshape(-1, 1)
    return torch.stack([1 - local, local], dim=-1)


def count_parameters(directory: Path, config: LoraConfig) -> tuple[int, int, int]:
    """Parameters of the base, of the global adapter, and of a local adapter. Reads no weights.

    Raises:
        ModelError: `config.json` describes no model, or one that cannot have these adapters.
    """
    with torch.device("meta"):  # shapes without memory
        base = AutoModelForCausalLM.from_config(read_config(directory), trust_remote_code=False)
    num_base = sum(parameter.numel() for parameter in base.parameters())
    adapters = AdapterModel(base, adapter_table(config), config)
    sizes = {}
    for name, shapes in adapters.shapes.items():
        sizes[name] = sum(math.prod(shape) for shape in shapes.values())
    return num_base, sizes[GLOBAL], sizes[LOCAL]


def _add_adapters(
    base: PreTrainedModel, table: Sequence[AdapterSpec], config: LoraConfig, targets: Targets
) -> peft.PeftModel:
    first, *others = table
    made = _peft_config(base, config, targets, first.rank)
    # autocast_adapter_dtype=False: DeepSpeed keeps the fp32 master, the working copy has the base's precision.
    try:
        model = peft.PeftModel(base, made, adapter_name=first.name, autocast_adapter_dtype=False)
        resolved: Any = model.peft_config[first.name]
        # PEFT (0.21) doubles alpha with a rank that it doubles, which keeps the scale of alpha / rank only.
        resolved.alpha_pattern = _alphas(config, resolved.rank_pattern)
        for spec in others:
            other = _config_of_rank(config, resolved, spec.rank)
            with warnings.catch_warnings():
                # PEFT looks for the patterns in the names of modules, and these are of parameters.
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
                model.add_adapter(spec.name, other, autocast_adapter_dtype=False)
        _cast_adapters(model, base.dtype)
    except ValueError as error:
        if "ParamWrapper does not work with lora_dropout" in str(error):
            raise ModelError(
                f"lora.target_modules {config.target_modules} name experts that {type(base).__name__} keeps in one "
                "parameter, whose adapters know no dropout: set lora.dropout: 0, or name other layers"
            ) from error
        raise ModelError(f"PEFT refuses lora.target_modules {config.target_modules}: {error}") from error
    return model


def _cast_adapters(model: peft.PeftModel, dtype: torch.dtype) -> None:
    """Have the working copies of adapters in the base's precision: on quantised layers PEFT leaves them in fp32."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _check_experts(model: peft.PeftModel, targets: Targets, layers: Sequence[str]) -> None:
    """Refuse adapters on experts where they cannot be right.

    PEFT (0.21) takes some names of linear layers, such as down_proj in DeepSeek, for those that experts had in
    transformers 4: it adapts the experts, and no longer the layers.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError(
            f"lora.target_modules name experts that {type(model.get_base_model()).__name__} keeps in one parameter, "
            "which ZeRO-3 divides: use a ds_configs/ file below stage 3, or name linear layers alone"
        )
    if isinstance(targets.modules, str):
        return
    adapted = {name.removeprefix("base_model.model.") for name, _ in model.named_modules()}
    for path in layers:
        named = [target for target in targets.modules if is_named(path, target)]
        if named and f"{path}.lora_A" not in adapted:
            raise ModelError(
                f"lora.target_modules {named} mean experts to PEFT, which leaves out the linear layer {path} of the "
                "same name: leave the name out, or write all-linear"
            )


def _peft_config(base: PreTrainedModel, config: LoraConfig, targets: Targets, rank: int) -> peft.LoraConfig:
    made = peft.LoraConfig(
        base_model_name_or_path=base.name_or_path,
        r=rank,
        lora_alpha=_alpha_of_rank(config, rank),  # type: ignore[arg-type]
        use_rslora=config.scaling == "rslora",
        lora_dropout=config.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        exclude_modules=targets.excluded or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return with_mixed_layers(made)


def _config_of_rank(config: LoraConfig, resolved: Any, rank: int) -> peft.LoraConfig:
    """The config of a further adapter on what PEFT found for the first one, at the same scale.

    PEFT resolves all-linear where no adapter is yet, and gives experts that it found a rank of their own.
    """
    made: peft.LoraConfig = copy.deepcopy(resolved)
    made.r = rank
    made.lora_alpha = _alpha_of_rank(config, rank)  # type: ignore[assignment]
    made.rank_pattern = {key: found * rank // resolved.r for key, found in resolved.rank_pattern.items()}
    made.alpha_pattern = _alphas(config, made.rank_pattern)
    return made


def _alpha_of_rank(config: LoraConfig, rank: int) -> float:
    """PEFT's `lora_alpha` of an adapter of `rank`, of which PEFT makes the scale of all."""
    match config.scaling:
        case "standard":
            return config.alpha * rank / config.rank
        case "rslora":
            return config.alpha * math.sqrt(rank / config.rank)


def _alphas(config: LoraConfig, rank_pattern: Mapping[str, int]) -> dict[str, float]:
    """PEFT's `alpha_pattern` where layers have ranks of their own."""
    return {key: _alpha_of_rank(config, rank) for key, rank in rank_pattern.items()}


def _adapter_parameters(model: peft.PeftModel, adapter: str) -> dict[str, torch.nn.Parameter]:
    """PEFT saves `...lora_A.weight` for the parameter `...lora_A.<adapter>.weight`."""
    found = {}
    for name, parameter in model.named_parameters():
        if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name:
            found[name.replace(f".{adapter}.weight", ".weight")] = parameter
    return dict(sorted(found.items()))


def _make_contiguous(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """Pre-hook of the output head. The last token of each row is a slice, (batch, 1, hidden), and of such a slice torch
    (2.13) computes a linear layer row by row, with a copy of the transposed weight: 190 times slower in bf16 on a CPU.
    """
    return (inputs[0].contiguous(),)


def _one_logit(base: PreTrainedModel) -> dict[str, int]:
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return {}
    return {"logits_to_keep": 1}


def _initial_tensor(key: str, shape: Sequence[int], seed: Sequence[int]) -> torch.Tensor:
    if ".lora_B." in key:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{list(seed)} {key}".encode()).digest()
    # 63 bits, because torch's seeds are signed.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_(a=sqrt(5)) with fan-in shape[1]
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def _report_tied(base: PreTrainedModel, layers: Sequence[MixedLora]) -> None:
    """Say which adapted layers share their weight with the embedding: training is right, merging would change both."""
    embedding = base.get_input_embeddings()
    for layer in layers:
        if layer.get_base_layer().weight is getattr(embedding, "weight", None):
            logger.warning(
                "lora.target_modules names the output head, whose weight is the embedding's too: PEFT cannot merge "
                "such an adapter into the base (merge_and_unload); leave it out if you mean to"
            )


def _check_ranks(base: PreTrainedModel, config: LoraConfig) -> None:
    width = int(base.config.get_text_config().hidden_size)
    for key, rank in (("lora.rank", config.rank), ("lora.local_rank", config.local_rank or 1)):
        if rank > width:
            raise ModelError(f"{key} {rank} is more than the width of the model, {width}: lower it (8 is usual)")
