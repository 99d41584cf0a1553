"""Models that are no causal LM of text are refused by name; the text part of those that have one is loaded alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from dpa_ds.config.schema import ModelConfig
from dpa_ds.errors import ModelError
from dpa_ds.model.base import load_base
from dpa_ds.model.directory import read_config
from tests import families

VISION = "which reads more than text (vision_config); use the text-only model of its family, whose config.json has no"
NO_CAUSAL_LM = "which is no causal LM; adapters are trained on causal LMs of text, such as Llama"
KINDS = {
    ("llava", "LlavaForConditionalGeneration"): VISION,
    ("qwen2_vl", "Qwen2VLForConditionalGeneration"): VISION,
    ("gemma3", "Gemma3ForConditionalGeneration"): VISION,
    ("gemma3n", "Gemma3nForConditionalGeneration"): "reads more than text (vision_config and audio_config)",
    ("idefics3", "Idefics3ForConditionalGeneration"): VISION,
    ("qwen2_audio", "Qwen2AudioForConditionalGeneration"): "reads more than text (audio_config); use the text-only",
    ("t5", "T5ForConditionalGeneration"): "an encoder-decoder; adapters are trained on causal LMs of text",
    ("bart", "BartForConditionalGeneration"): "an encoder-decoder",
    ("whisper", "WhisperForConditionalGeneration"): "an encoder-decoder",
    ("bert", "BertForMaskedLM"): NO_CAUSAL_LM,
    ("roberta", "RobertaForMaskedLM"): NO_CAUSAL_LM,
    ("modernbert", "ModernBertForMaskedLM"): NO_CAUSAL_LM,
    ("vit", "ViTForImageClassification"): NO_CAUSAL_LM,
}
"""(model_type, architecture) of a config.json -> what is said of it."""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 258,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VISION_SIZES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


@pytest.mark.parametrize(("kind", "reported"), KINDS.items(), ids=lambda value: str(value)[:40])
def test_a_model_of_another_kind_is_refused_by_name(kind: tuple[str, str], reported: str, tmp_path: Path) -> None:
    model_type, architecture = kind
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    with pytest.raises(ModelError) as raised:
        read_config(tmp_path)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/config.json describes {architecture}, ")
    assert reported in message
    assert "\n" not in message


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_every_family_is_a_causal_lm(name: str, tmp_path: Path) -> None:
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    read_config(tmp_path)


def test_the_table_of_families_is_that_of_the_matrix() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text(encoding="utf-8").endswith(f"\n\n{families.table()}"), families.table()


def test_the_text_part_of_a_checkpoint_is_loaded_where_transformers_has_it(tmp_path: Path) -> None:
    """Qwen3.5 has one checkpoint for pictures and text."""
    torch.manual_seed(0)
    config: Any = AutoConfig.for_model("qwen3_5", text_config=TEXT, vision_config=VISION_SIZES)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    read_config(tmp_path)
    base = load_base(ModelConfig(path=str(tmp_path), precision="fp32"), tmp_path, {}, torch.device("cpu"))
    assert type(base).__name__ == "Qwen3_5ForCausalLM"
    ids = torch.randint(0, 250, (1, 9))
    with torch.no_grad():
        assert torch.equal(base.eval()(input_ids=ids).logits, whole(input_ids=ids).logits)
