"""One loaded model that answers as any client of a run: weights of instances, then one batched decoding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import LOCAL
from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.schema import Encoder, GenerationConfig
from dpa_ds.data.references import REPRESENTATIONS, Embeddings, References
from dpa_ds.data.sources import NO_TASK, ClientInfo
from dpa_ds.errors import CheckpointError, DataError
from dpa_ds.inference.embedding import embed
from dpa_ds.inference.generation import generate
from dpa_ds.inference.weighting import Weighting, instance_weights
from dpa_ds.runs.folder import RunFolder

Install = Callable[[str, AdapterState], None]
"""Puts an adapter into the model: `AdapterModel.load_state`, or `AdapterEngine.write_state` where there is an engine."""


@dataclass(frozen=True)
class ClientModel:
    """What makes the common model one client's: its local adapter and its reference prompts."""

    info: ClientInfo
    local_state: AdapterState
    trained: bool
    """The local adapter was trained; one that never was has weight 0."""
    references: References | None


def load_client_model(folder: RunFolder, server_round: int, client: int) -> ClientModel:
    """A client as it was after `server_round`.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is not finite.
    """
    saved = folder.load_adapter(server_round, f"local/client_{client:02d}")
    info = _client_info(client, saved.info)
    references = References.from_tensors(saved.extras["references"]) if "references" in saved.extras else None
    return ClientModel(info, saved.weights, saved.info["steps_taken"][LOCAL] > 0, references)


def describe_client(folder: RunFolder, server_round: int, client: int) -> ClientInfo:
    """Label and tasks of a client of the run.

    Raises:
        CheckpointError: its folder cannot be read.
    """
    return _client_info(client, folder.info(server_round, f"local/client_{client:02d}"))


def _client_info(client: int, info: Mapping[str, Any]) -> ClientInfo:
    return ClientInfo(client, info["label"], tuple(info["tasks"]) or (NO_TASK,))


class Predictor:
    """The base with both adapters, of which the local one is swapped from client to client.

    Every method is collective where the base is partitioned (ZeRO-3): all ranks of the group.
    """

    def __init__(
        self,
        adapters: AdapterModel,
        tokenizer: PreTrainedTokenizerBase,
        weighting: Weighting,
        generation: GenerationConfig,
        reference_mean: torch.Tensor,
        install: Install,
        partitioned: bool = False,
    ) -> None:
        self.adapters, self.tokenizer, self.weighting, self.generation = adapters, tokenizer, weighting, generation
        self.partitioned = partitioned
        """Every rank of the group takes part in every call."""
        self._mean_states, self._install = reference_mean, install
        self._installed: int | None = None
        self._encoded_references: dict[int, torch.Tensor] = {}
        self._pad_id, self._eos_id = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)

    def embed(self, prompts: Sequence[Sequence[int]], encoder: Encoder) -> Embeddings:
        """Embeddings of `prompts`; with `local`, by the adapter of the client that was installed last."""
        return embed(self.adapters, encoder, prompts, self._pad_id, self.generation.batch_tokens)

    def weights(
        self, client: ClientModel, prompts: Sequence[Sequence[int]], states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weight of `client`'s local adapter for each prompt, (n,).

        Args:
            states: of the prompts, (n, hidden), where the encoder is not the local adapter and they are known already.
        """
        self.check_references(client)
        if not client.trained:
            return torch.zeros(len(prompts))
        weighting = self.weighting
        if weighting.is_constant:
            return torch.full((len(prompts),), weighting.scale)
        if weighting.encoder == LOCAL:
            self.load_client(client)
        if states is None:
            states = self.embed(prompts, weighting.encoder)[weighting.representation]
        position = REPRESENTATIONS.index(weighting.representation)
        reference_mean = self._mean_states[position] if len(self._mean_states) else torch.zeros(())
        return instance_weights(weighting, states, self._references(client), reference_mean)

    def answer(
        self, client: ClientModel | None, prompts: Sequence[Sequence[int]], alphas: torch.Tensor, streamer: Any = None
    ) -> list[str]:
        """Answers to one batch of prompts with these weights; `client` None: the global adapter alone answers."""
        if client is not None:
            self.load_client(client)
        tokens = generate(
            self.adapters,
            prompts,
            alphas,
            self.generation,
            self._pad_id,
            self._eos_id,
            partitioned=self.partitioned,
            streamer=streamer,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def check_context(self, num_tokens: int, what: str) -> None:
        """Refuse a prompt of so many tokens that it and its answer do not fit the model's context.

        Raises:
            DataError: so it is; the message calls the prompt `what`.
        """
        context = getattr(self.adapters.base_model.config.get_text_config(), "max_position_embeddings", None)
        longest = self.generation.max_new_tokens
        if context is not None and num_tokens + longest > context:
            raise DataError(
                f"{what} has {num_tokens} tokens: with generation.max_new_tokens {longest} that is more than the model's "
                f"context of {context}: lower generation.max_new_tokens, or shorten or remove it"
            )

    def forget(self) -> None:
        """Forget what was installed and encoded: adapters have changed, or `weighting` has."""
        self._installed = None
        self._encoded_references.clear()

    def load_client(self, client: ClientModel) -> None:
        """Install the client's local adapter, unless it is there already."""
        if self._installed != client.info.client:
            self._install(LOCAL, client.local_state)
            self._installed = client.info.client

    def check_references(self, client: ClientModel) -> None:
        """Refuse a weighting that compares prompts with references where the run kept none.

        Raises:
            CheckpointError: so it is for `client`.
        """
        if not self.weighting.is_constant and client.references is None:
            raise CheckpointError(
                f"weighting.kind {self.weighting.kind} compares a prompt with reference prompts, but the run kept none "
                f"for {client.info.label}, because its method does not weight by instance: use weighting.kind global, "
                "local or fixed"
            )

    def _references(self, client: ClientModel) -> torch.Tensor:
        """Embeddings of the client's references: kept with its adapter for the frozen base, else encoded once."""
        weighting, references = self.weighting, client.references
        assert references is not None, "check_references"
        if weighting.encoder == "none":
            return references.states[weighting.representation]
        if client.info.client not in self._encoded_references:
            states = self.embed(references.prompts, weighting.encoder)
            self._encoded_references[client.info.client] = states[weighting.representation]
        return self._encoded_references[client.info.client]
