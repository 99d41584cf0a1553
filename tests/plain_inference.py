"""Inference once more, written plainly: one client, one prompt at a time, from the files of a run.

Transformers and PEFT as README.md shows; no code of dpa_ds, no DeepSpeed, no batches.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.plain import computes_as_in_training, load_base

REPRESENTATIONS = ("last_token", "mean")


class PlainClient:
    """The base, a run's adapters with one client's local one, and what the client keeps of its own prompts."""

    def __init__(
        self, model_dir: Path, adapters: Path, client: int, attention: str = "sdpa", quantization: str = "none"
    ) -> None:
        def base() -> Any:
            return load_base(model_dir, quantization, attention).eval()

        local_dir = adapters / "local" / f"client_{client:02d}"
        load = partial(peft.PeftModel.from_pretrained, autocast_adapter_dtype=False)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.encoders = {"none": base(), "local": load(base(), local_dir).eval()}
        self.model = load(base(), adapters / "global", adapter_name="global").eval()
        self.model.load_adapter(local_dir, adapter_name="local", autocast_adapter_dtype=False)
        self.model.base_model.set_adapter(["global", "local"])
        if quantization != "none":
            for model in (self.model, *self.encoders.values()):
                computes_as_in_training(model)
        stored = load_file(local_dir / "references.safetensors")
        self.references = [part.tolist() for part in stored["tokens"].split(stored["lengths"].tolist())]
        self.stored_embeddings = torch.stack([stored[f"embeddings.{name}"] for name in REPRESENTATIONS])
        """(representations, references, hidden size)."""
        self.reference_mean = load_file(adapters / "global" / "reference_mean.safetensors")["reference_mean"]
        """(representations, hidden size)."""

    def tokens(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"])

    @torch.no_grad()
    def embed(self, tokens: Sequence[int], encoder: str) -> torch.Tensor:
        """(representations, hidden size): at the last token, and the mean over tokens."""
        model, ids = self.encoders[encoder], torch.tensor([list(tokens)])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        if states.dim() == 4:  # Gemma 3n has several streams, whose mean the output head gets
            inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
            states = inner.model(input_ids=ids).last_hidden_state
        hidden = states[0]
        return torch.stack([hidden[-1], hidden.mean(dim=0)])

    def alpha(self, prompt: str, kind: str, scale: float, representation: str) -> float:
        """Weight of the local adapter: cosine by the local adapter, centred_cosine by the base."""
        encoder, row = ("local" if kind == "cosine" else "none"), REPRESENTATIONS.index(representation)
        centre = self.reference_mean[row] if kind == "centred_cosine" else 0.0
        embedding = self.embed(self.tokens(prompt), encoder)[row] - centre
        cosines = [
            float(torch.cosine_similarity(embedding, self.embed(tokens, encoder)[row] - centre, dim=0))
            for tokens in self.references
        ]
        return min(max(scale * sum(cosines) / len(cosines), 0.0), 1.0)

    @torch.no_grad()
    def answer(self, prompt: str, alpha: float, beams: int, new_tokens: int) -> str:
        """With both adapters in the graph whatever alpha is."""
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                for name, weight in (("global", 1 - alpha), ("local", alpha)):
                    layer.set_scale(name, weight)  # of what adapter_config.json says
        ids = torch.tensor([self.tokens(prompt)])
        settings = {"max_new_tokens": new_tokens, "num_beams": beams, "do_sample": False}
        tokens = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return str(self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)).strip()
