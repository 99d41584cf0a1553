"""The procedure of FedDPA's published code, on plain transformers and PEFT: one instance at a time.

For every instance S references and the prompt are encoded again with the local adapter, with all hidden states
kept; then the one weight is set in every layer, and the prompt is decoded alone. Of its faults (see
docs/architecture.md) only those
that cost time are kept: the references are fixed, and the weight is that of the local adapter, so that answers
can be compared.
"""

from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


class OneByOne:
    """A base with the adapters of one run, as plain PEFT loads them."""

    def __init__(self, model_dir: Path, adapters_dir: Path, num_beams: int, max_new_tokens: int) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False)
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left", trust_remote_code=False)
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._adapters_dir = adapters_dir
        self._model = peft.PeftModel.from_pretrained(self._base, adapters_dir / "global", adapter_name="global")
        self._decoding = GenerationConfig(
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )

    def load_client(self, client: int) -> None:
        """Load the client's local adapter."""
        if "local" in self._model.peft_config:
            self._model.delete_adapter("local")
        self._model.load_adapter(self._adapters_dir / f"local/client_{client:02d}", adapter_name="local")
        self._model.base_model.set_adapter(["global", "local"])
        self._model.eval()

    @torch.no_grad()
    def alpha(self, prompt: Sequence[int], references: Sequence[Sequence[int]], scale: float) -> float:
        """scale x mean cosine of the last token's state with those of the references, by the local adapter alone."""
        self._mix(1.0)
        batch = self._tokenizer.pad({"input_ids": [*references, prompt]}, return_tensors="pt")
        states = self._model(**batch, output_hidden_states=True).hidden_states[-1][:, -1]
        cosines = [torch.cosine_similarity(states[-1], state, dim=0) for state in states[:-1]]
        return min(max(scale * float(sum(cosines)) / len(cosines), 0.0), 1.0)

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], alpha: float) -> str:
        """The answer to one prompt with one weight of the local adapter."""
        self._mix(alpha)
        ids = torch.tensor([list(prompt)])
        tokens = self._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self._decoding
        )
        return str(self._tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)).strip()

    def _mix(self, alpha: float) -> None:
        for layer in self._model.modules():
            if isinstance(layer, LoraLayer):
                for name, weight in (("global", 1 - alpha), ("local", alpha)):
                    layer.set_scale(name, weight)
