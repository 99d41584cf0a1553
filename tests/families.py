"""Tiny random models of the families that users have, with the tokenizer of tests/tiny.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 192,
    "initializer_range": 0.3,
}
"""Of every family that has the field."""
ATTENTION = ("q_proj", "v_proj", "o_proj")
"""Names of the adapted layers in most families."""


@dataclass(frozen=True)
class Family:
    """One row of the matrix."""

    config: dict[str, Any] = field(default_factory=dict)
    """What differs from COMMON."""
    targets: tuple[str, ...] = ATTENTION
    """`lora.target_modules`."""
    attention: str = "sdpa"
    """What `model.attention: auto` takes."""
    rows: Literal["packed", "padded", "single"] = "packed"
    """How examples are placed: the first way that changes none of them."""
    remark: str = ""
    """For docs/models.md."""
    refuses: tuple[str, ...] = ()
    """Fields of COMMON that its config does not take."""


_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 192, "n_inner": 64}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
_LATENT = {  # DeepSeek's attention
    **_MOE,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT_TARGETS = ("q_proj", "kv_b_proj", "o_proj")
_FUSED = ("query_key_value", "dense")
_ALL_EXPERTS = "all-linear has experts and routers in it"
_EXPERTS = "experts by name: experts.down_proj"
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 8}),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": Family(
        {"sliding_window": 8, "query_pre_attn_scalar": 8}, attention="eager", remark="sdpa has no soft-capping"
    ),
    "gemma3_text": Family({"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3n_text": Family(
        {
            "layer_types": ["full_attention"] * 2,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 258,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 2,
            "intermediate_size": [64] * 2,
        },
        remark="text part alone; its checkpoints for pictures and sound are refused",
    ),
    "phi": Family(targets=("q_proj", "v_proj", "dense")),
    "phi3": Family(targets=("qkv_proj", "o_proj")),
    "gpt_neox": Family(targets=_FUSED),
    "gptj": Family({**_GPT, "rotary_dim": 4}, ("q_proj", "v_proj", "out_proj")),
    "codegen": Family({**_GPT, "rotary_dim": 4}, ("qkv_proj", "out_proj")),
    "gpt2": Family(_GPT, ("c_attn", "c_proj"), remark="its own dropout is off"),
    "gpt_neo": Family(
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        ("q_proj", "v_proj", "out_proj"),
        "eager",
        rows="padded",
    ),
    "opt": Family({"ffn_dim": 64, "word_embed_proj_dim": 32}, ("q_proj", "v_proj", "out_proj")),
    "xglm": Family(
        {
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "init_std": 0.3,
            "max_position_embeddings": 300,
        },
        ("q_proj", "v_proj", "out_proj"),
        "eager",
        rows="padded",
    ),
    "bloom": Family({"n_layer": 2, "n_head": 4}, _FUSED, "eager", rows="padded", refuses=("max_position_embeddings",)),
    "falcon": Family(
        {"num_kv_heads": 2, "new_decoder_architecture": True}, _FUSED, refuses=("head_dim",), rows="padded"
    ),
    "mpt": Family(
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, ("Wqkv", "out_proj"), "eager", rows="padded"
    ),
    "stablelm": Family(rows="padded"),
    "nemotron": Family(rows="padded"),
    "mixtral": Family(_MOE, remark=_ALL_EXPERTS),
    "qwen2_moe": Family(_MOE, remark=_EXPERTS),
    "qwen3_moe": Family(_MOE, remark=_ALL_EXPERTS),
    "olmo2": Family(),
    "olmo3": Family({"sliding_window": 8}),
    "olmoe": Family(_MOE, remark=_ALL_EXPERTS),
    "granite": Family(),
    "granitemoe": Family(_MOE, remark=_EXPERTS),
    "smollm3": Family(),
    "starcoder2": Family({"sliding_window": None}),
    "cohere": Family(),
    "cohere2": Family({"sliding_window": 8}),
    "glm4": Family(),
    "exaone4": Family({"sliding_window": 8}),
    "arcee": Family(),
    "persimmon": Family(targets=_FUSED),
    "helium": Family(),
    "seed_oss": Family({"attention_dropout": 0.1, "residual_dropout": 0.1}, remark="its own dropout is off"),
    "llama4_text": Family(
        {**_MOE, "attention_chunk_size": 16, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
        rows="padded",
        remark=_EXPERTS,
    ),
    "deepseek_v2": Family({**_LATENT, "topk_method": "greedy"}, _LATENT_TARGETS, remark=_ALL_EXPERTS),
    "deepseek_v3": Family(_LATENT, _LATENT_TARGETS, remark=_ALL_EXPERTS),
    "gpt_oss": Family({**_MOE, "sliding_window": 8}, attention="eager", rows="padded", remark=_EXPERTS),
    "lfm2": Family({"layer_types": ["conv", "full_attention"]}, ("q_proj", "v_proj", "in_proj"), rows="padded"),
    "granitemoehybrid": Family(
        {**_MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0}, rows="padded"
    ),
    "recurrent_gemma": Family(
        {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
        rows="padded",
        remark="prompts are answered one by one",
    ),
    "minimax": Family(
        {**_MOE, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
        rows="padded",
        remark=_ALL_EXPERTS,
    ),
    "falcon_h1": Family(_MAMBA, rows="padded", remark="all-linear leaves out out_proj, which PEFT refuses"),
    "bamba": Family({**_MAMBA, "attn_layer_indices": [1]}, rows="padded"),
    "jamba": Family(
        {**_MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        rows="padded",
        remark=_EXPERTS,
    ),
    "mamba": Family(
        {"state_size": 8},
        ("in_proj", "x_proj"),
        "eager",
        rows="padded",
        remark="all-linear leaves out out_proj, which PEFT refuses",
    ),
    # Its layers repeat: with larger weights fp32 and fp64 are 90 % apart after a round, so these are 6e-7.
    "hrm_text": Family({"initializer_range": 0.1}),
    "olmo_hybrid": Family(rows="padded"),
    "kimi_linear": Family(rows="padded", remark="loads; not compared, without a GPU's kernels it takes minutes"),
    "qwen3_next": Family(
        {
            **_MOE,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        rows="padded",
        remark=_ALL_EXPERTS,
    ),
}
"""By transformers' model_type."""


def make_family(folder: Path, model_type: str, seed: int = 0, **changes: Any) -> Path:
    """A random model of a family, saved to `folder` with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tiny.make_tokenizer()
    family = FAMILIES[model_type]
    settings = {
        **{name: value for name, value in COMMON.items() if name not in family.refuses},
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **family.config,
        **changes,
    }
    config = AutoConfig.for_model(model_type, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table() -> str:
    """The table of docs/models.md."""
    lines = ["| model_type | attention | rows | remarks |", "|---|---|---|---|"]
    for name, family in sorted(FAMILIES.items()):
        lines.append(f"| {name} | {family.attention} | {family.rows} | {family.remark} |")
    return "\n".join(lines) + "\n"
