"""Reference prompts: what a test prompt is compared with to decide how much of the local adapter it gets.

They are prompts (without answers) of a client's own training data, drawn once per run. They and
their embeddings stay with the client's local adapter; only the mean of the embeddings crosses a
client border.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dpa_ds.data.tokenize import TokenizedExamples

Representation = Literal["last_token", "mean"]
REPRESENTATIONS: tuple[Representation, Representation] = ("last_token", "mean")
Embeddings = dict[Representation, torch.Tensor]
"""Representation -> (number of prompts, hidden size), fp32 on CPU."""

# Second word of the seed, as in partition.py: the draw of references has its own random stream.
_REFERENCE_TAG = 104


@dataclass(frozen=True)
class References:
    """A client's reference prompts, and their embeddings by the frozen base alone."""

    prompts: list[list[int]]
    """Tokens of each prompt."""
    embeddings: Embeddings

    @property
    def reference_mean(self) -> torch.Tensor:
        """(number of representations, hidden size): what the client adds to the federation's mean."""
        return torch.stack([self.embeddings[name].mean(dim=0) for name in REPRESENTATIONS])

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """For a safetensors file; inverse of `from_tensors`."""
        tensors = {
            "tokens": torch.tensor([token for prompt in self.prompts for token in prompt], dtype=torch.int32),
            "lengths": torch.tensor([len(prompt) for prompt in self.prompts], dtype=torch.int32),
        }
        for name in REPRESENTATIONS:
            tensors[f"embeddings.{name}"] = self.embeddings[name].contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "References":
        """Inverse of `to_tensors`.

        LookupError, ValueError or RuntimeError: tensors that it did not write.
        """
        lengths: list[int] = tensors["lengths"].tolist()
        prompts = [prompt.tolist() for prompt in torch.split(tensors["tokens"], lengths)]
        embeddings: Embeddings = {}
        for name in REPRESENTATIONS:
            embeddings[name] = tensors[f"embeddings.{name}"]
            shape = embeddings[name].shape
            if len(shape) != 2 or shape[0] != len(prompts) or not embeddings[name].isfinite().all():
                raise ValueError(f"embeddings.{name} of shape {tuple(shape)} are not those of {len(prompts)} prompts")
        if not prompts or not all(prompts) or tensors["tokens"].is_floating_point() or tensors["tokens"].min() < 0:
            raise ValueError("a prompt without tokens")
        return cls(prompts, embeddings)


def draw_references(examples: TokenizedExamples, num_references: int, seed: Sequence[int]) -> list[list[int]]:
    """Prompts of `num_references` different examples (of all, where there are fewer); a pure function of `seed`."""
    generator = np.random.Generator(np.random.PCG64([*seed, _REFERENCE_TAG]))
    chosen = generator.permutation(len(examples))[:num_references]
    return [examples.prompt(int(i)).tolist() for i in chosen]
