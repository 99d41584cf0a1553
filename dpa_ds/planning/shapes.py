"""Sizes of a LLaMA-like causal LM, from its config.json or a preset; parameters and FLOPs follow. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpa_ds.config.validate import read_text
from dpa_ds.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """A decoder with RMS norms, grouped-query attention and a gated MLP (Llama, Mistral, Qwen2)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    head_dim: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a decoder layer."""
        h, q, kv, f = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }

    @property
    def layer_parameters(self) -> int:
        """Linear layers, two norms, and the biases of q, k, v where there are any."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return sum(i * o for i, o in self.linears.values()) + 2 * self.hidden + bias

    @property
    def parameters(self) -> int:
        """Layers, embedding, output head unless it is tied to the embedding, last norm."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """rank x (inputs + outputs) for each adapted linear layer. ModelError: a name that the model lacks."""
        unknown = [name for name in targets if name not in self.linears]
        if unknown:
            raise ModelError(f"lora.target_modules {unknown} are unknown to the planner; it has {sorted(self.linears)}")
        return self.layers * sum(rank * sum(self.linears[name]) for name in targets)


PRESETS = {
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128256, 64, tied=True),
    "llama-7b": Shape(4096, 32, 32, 32, 11008, 32000, 128),
    "llama-13b": Shape(5120, 40, 40, 40, 13824, 32000, 128),
    "llama-70b": Shape(8192, 80, 64, 8, 28672, 32000, 128),
    "qwen2.5-7b": Shape(3584, 28, 28, 4, 18944, 152064, 128, qkv_bias=True),
    "qwen2.5-32b": Shape(5120, 64, 40, 8, 27648, 152064, 128, qkv_bias=True),
}
"""Published sizes, by the name that --model takes."""


def read_shape(path: str, preset: str | None) -> Shape:
    """The preset, or what `path`/config.json says. ModelError: neither is there, or a field is missing."""
    if preset is not None:
        if preset not in PRESETS:
            raise ModelError(f"--model {preset}: no such preset: use one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        raise ModelError(f"model.path {path} has no config.json: correct it, or give --model {' | '.join(PRESETS)}")
    try:
        fields = json.loads(read_text(file, "model.path", "give a model directory"))
        heads = int(fields["num_attention_heads"])
        hidden = int(fields["hidden_size"])
        return Shape(
            hidden=hidden,
            layers=int(fields["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(fields.get("num_key_value_heads") or heads),
            intermediate=int(fields["intermediate_size"]),
            vocab=int(fields["vocab_size"]),
            head_dim=int(fields.get("head_dim") or hidden // heads),
            tied=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=bool(fields.get("attention_bias", fields.get("model_type") == "qwen2")),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not a config of a LLaMA-like model ({error}): use a --model preset") from error
