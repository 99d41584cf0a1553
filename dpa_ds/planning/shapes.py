"""Sizes of a LLaMA-like causal LM, from its config.json or a preset; parameters and FLOPs follow. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpa_ds.config.paths import expand
from dpa_ds.config.validate import read_text
from dpa_ds.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """A decoder with RMS norms, grouped-query attention and a gated MLP or several (Llama, Mistral, Qwen, Mixtral)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    head_dim: int
    tied: bool = False
    """The output head is the embedding."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """q and k of each head have a norm (Qwen3)."""
    experts: int = 0
    """Gated MLPs of a layer, each `intermediate` wide, with a router; 0: one MLP for all tokens."""
    active_experts: int = 0
    """Of these a token takes so many."""

    @property
    def query_width(self) -> int:
        """Outputs of q_proj, and inputs of o_proj."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Outputs of k_proj and of v_proj."""
        return self.kv_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and of an output head that is not tied to it."""
        return self.vocab * self.hidden

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a decoder layer.

        Experts are none: a model keeps those of a layer in one parameter.
        """
        attention = {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.key_width),
            "v_proj": (self.hidden, self.key_width),
            "o_proj": (self.query_width, self.hidden),
        }
        if self.experts:
            return attention
        return attention | {
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of a decoder layer: linear layers, experts and their router, norms, and biases of q, k, v."""
        num = 2 * self.hidden + self.linear_parameters + self.experts * (self.expert_parameters + self.hidden)
        if self.qkv_bias:
            num += self.query_width + 2 * self.key_width
        if self.qk_norm:
            num += 2 * self.head_dim
        return num

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of a decoder layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def active_parameters(self) -> int:
        """Parameters that a token passes through."""
        return self.parameters - self.layers * (self.experts - self.active_experts) * self.expert_parameters

    @property
    def parameters(self) -> int:
        """Parameters of all layers, the embedding, the output head unless it is tied, and the last norm."""
        num = self.layers * self.layer_parameters + self.embedding_parameters + self.hidden
        if not self.tied:
            num += self.embedding_parameters
        return num

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(elements, how many there are) of the tensors that hold the parameters."""
        biases = 0
        if self.qkv_bias:
            biases = self.layers
        found = [
            (self.embedding_parameters, 2 - self.tied),
            (self.hidden, 2 * self.layers + 1),
            (self.query_width, biases),
            (self.key_width, 2 * biases),
        ]
        for inputs, outputs in self.linears.values():
            found.append((inputs * outputs, self.layers))
        if self.qk_norm:
            found.append((self.head_dim, 2 * self.layers))
        if self.experts:
            gate_and_up = 2 * self.hidden * self.intermediate
            found += [(self.experts * size, self.layers) for size in (gate_and_up, gate_and_up // 2, self.hidden)]
        return found

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of a LoRA: rank x (inputs + outputs) for each adapted linear layer.

        Raises:
            ModelError: a name that the model lacks.
        """
        unknown = [name for name in targets if name not in self.linears]
        if unknown:
            raise ModelError(f"lora.target_modules {unknown} are unknown to the planner; it has {sorted(self.linears)}")
        return self.layers * rank * sum(sum(self.linears[name]) for name in targets)


PRESETS = {
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128256, 64, tied=True),
    "llama-7b": Shape(4096, 32, 32, 32, 11008, 32000, 128),
    "llama-13b": Shape(5120, 40, 40, 40, 13824, 32000, 128),
    "llama-70b": Shape(8192, 80, 64, 8, 28672, 32000, 128),
    "llama3-8b": Shape(4096, 32, 32, 8, 14336, 128256, 128),
    "llama3-70b": Shape(8192, 80, 64, 8, 28672, 128256, 128),
    "mistral-7b": Shape(4096, 32, 32, 8, 14336, 32000, 128),
    "mixtral-8x7b": Shape(4096, 32, 32, 8, 14336, 32000, 128, experts=8, active_experts=2),
    "qwen2.5-7b": Shape(3584, 28, 28, 4, 18944, 152064, 128, qkv_bias=True),
    "qwen2.5-32b": Shape(5120, 64, 40, 8, 27648, 152064, 128, qkv_bias=True),
    "qwen3-8b": Shape(4096, 36, 32, 8, 12288, 151936, 128, qk_norm=True),
    "qwen3-32b": Shape(5120, 64, 64, 8, 25600, 151936, 128, qk_norm=True),
    "qwen3-30b-a3b": Shape(2048, 48, 32, 4, 768, 151936, 128, qk_norm=True, experts=128, active_experts=8),
}
"""Published sizes, by the name that --model takes."""


def read_shape(path: str, preset: str | None) -> Shape:
    """The preset, or what `path`/config.json says.

    Raises:
        ModelError: neither is there, or a field is missing.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise ModelError(f"--model {preset}: no such preset: use one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    file = expand(path, "model.path") / "config.json"
    if not file.is_file():
        raise ModelError(f"model.path {path} has no config.json: correct it, or give --model {' | '.join(PRESETS)}")
    try:
        return _shape_of(json.loads(read_text(file, "model.path", "give a model directory")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not a config of a LLaMA-like model ({error}): use a --model preset") from error


def _shape_of(fields: dict[str, Any]) -> Shape:
    """Raises ValueError, KeyError, TypeError or AttributeError where `fields` is no config of such a model."""
    heads, hidden = int(fields["num_attention_heads"]), int(fields["hidden_size"])
    kind = fields.get("model_type")
    # Qwen2 always has these biases, and its config.json does not say so.
    has_bias = fields.get("attention_bias", kind == "qwen2")
    experts, active = 0, 0
    if kind in ("mixtral", "qwen3_moe"):
        experts, active = int(fields.get("num_local_experts") or fields["num_experts"]), fields["num_experts_per_tok"]
        if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
            raise ValueError("not every layer has experts")
    elif fields.get("num_experts") or fields.get("num_local_experts") or fields.get("n_routed_experts"):
        raise ValueError(f"experts of {kind}")
    return Shape(
        hidden=hidden,
        layers=int(fields["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(fields.get("num_key_value_heads") or heads),
        intermediate=int(fields.get("moe_intermediate_size") or fields["intermediate_size"]),
        vocab=int(fields["vocab_size"]),
        head_dim=int(fields.get("head_dim") or hidden // heads),
        tied=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=bool(has_bias),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        experts=experts,
        active_experts=int(active),
    )
