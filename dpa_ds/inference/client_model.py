"""One loaded model that answers as any client of a run: a weight for each instance, then one batched decoding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import LOCAL
from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.schema import Encoder, GenerationConfig
from dpa_ds.data.formats import ExampleFormat
from dpa_ds.data.references import REPRESENTATIONS, Embeddings, References
from dpa_ds.data.sources import NO_TASK, ClientInfo
from dpa_ds.distributed.world import World
from dpa_ds.errors import CheckpointError
from dpa_ds.inference.decoding_check import Decoding, choose_decoding
from dpa_ds.inference.embedding import embed
from dpa_ds.inference.generation import generate
from dpa_ds.inference.weighting import Weighting, instance_weights
from dpa_ds.runs.folder import RunFolder, local_folder
from dpa_ds.runs.storage import well_formed

Install = Callable[[str, AdapterState], None]
"""Puts an adapter into the model: `AdapterModel.load_state`, or where there is an engine
`AdapterEngine.write_state`."""


@dataclass(frozen=True)
class ClientModel:
    """What makes the common model one client's: its local adapter and its reference prompts."""

    info: ClientInfo
    local_state: AdapterState
    trained: bool
    """The local adapter was trained; one that never was has weight 0."""
    references: References | None


def load_client_model(folder: RunFolder, server_round: int, client: int) -> ClientModel:
    """The client as it was after `server_round`.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is not finite.
    """
    saved = folder.load_adapter(server_round, local_folder(client))
    place = folder.adapter_dir(server_round, local_folder(client))
    round_dir = folder.round_dir(server_round)
    with well_formed(place, f"delete {round_dir} to use the round before, or train again"):
        info = _client_info(client, saved.info)
        references = None
        if "references" in saved.extras:
            references = References.from_tensors(saved.extras["references"])
        return ClientModel(info, saved.weights, saved.info["steps_taken"][LOCAL] > 0, references)


def describe_client(folder: RunFolder, server_round: int, client: int) -> ClientInfo:
    """Label and tasks of a client of the run.

    Raises:
        CheckpointError: its folder cannot be read.
    """
    info = folder.info(server_round, local_folder(client))
    place = folder.adapter_dir(server_round, local_folder(client))
    round_dir = folder.round_dir(server_round)
    with well_formed(place, f"delete {round_dir} to use the round before, or train again"):
        return _client_info(client, info)


class Predictor:
    """The base with both adapters, of which the local one is exchanged from client to client.

    It remembers which client is loaded and how references are embedded until `forget_adapters`, which
    is to be called when the adapters have changed. Every other method is collective: all ranks of the
    group.

    Args:
        reference_mean: (representations, hidden size) of the federation, or empty where the run has none.
        world: its ranks answer together, each its own prompts.
    """

    def __init__(
        self,
        adapters: AdapterModel,
        example_format: ExampleFormat,
        weighting: Weighting,
        generation: GenerationConfig,
        reference_mean: torch.Tensor,
        install: Install,
        world: World,
    ) -> None:
        self.adapters = adapters
        self.tokenizer = example_format.tokenizer
        self.weighting = weighting
        self.generation = generation
        self._reference_mean = reference_mean
        self._install = install
        self._world = world
        self._decoding: Decoding | None = None
        self._loaded: int | None = None
        self._reference_embeddings: dict[int, torch.Tensor] = {}
        self._pad_id = int(self.tokenizer.pad_token_id)
        self._end_ids = example_format.end_ids
        self._answer_prefix = example_format.answer_prefix

    def embed(self, prompts: Sequence[Sequence[int]], encoder: Encoder) -> Embeddings:
        """Embeddings of `prompts`; with `local`, by the adapter of the client that was loaded last."""
        return embed(self.adapters, encoder, prompts, self._pad_id, self.generation.batch_tokens)

    def weights(
        self, client: ClientModel, prompts: Sequence[Sequence[int]], embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weight of `client`'s local adapter for each prompt, (n,).

        Args:
            embeddings: of the prompts, (n, hidden), where they are known already: not with the local
                adapter as the encoder.
        """
        weighting = self.weighting
        self.check_references(client)
        if not client.trained:
            return torch.zeros(len(prompts))
        if weighting.is_constant:
            return torch.full((len(prompts),), weighting.scale)
        if weighting.encoder == LOCAL:
            self.load_client(client)
        if embeddings is None:
            embeddings = self.embed(prompts, weighting.encoder)[weighting.representation]
        reference_mean = torch.zeros(())
        if len(self._reference_mean):
            reference_mean = self._reference_mean[REPRESENTATIONS.index(weighting.representation)]
        return instance_weights(weighting, embeddings, self._references(client), reference_mean)

    def answer(
        self, client: ClientModel | None, prompts: Sequence[Sequence[int]], alphas: torch.Tensor, streamer: Any = None
    ) -> list[str]:
        """Answers to one batch of prompts with these weights; `client` None: the global adapter alone answers."""
        if client is not None:
            self.load_client(client)
        if self._decoding is None:  # now that there are adapters to mix
            in_step = self._world.world_size > 1
            self._decoding = choose_decoding(self.adapters, self._pad_id, in_step)
        tokens = generate(
            self.adapters,
            prompts,
            alphas,
            self.generation,
            self._pad_id,
            self._end_ids,
            self._world,
            streamer,
            self._decoding,
        )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip().removeprefix(self._answer_prefix).strip() for text in texts]

    def forget_adapters(self, reference_mean: torch.Tensor) -> None:
        """The adapters in the model are others now; `reference_mean` is that of the federation from now on."""
        self._reference_mean = reference_mean
        self._loaded = None
        self._reference_embeddings.clear()

    def load_client(self, client: ClientModel) -> None:
        """Install the client's local adapter, unless it is there already."""
        if self._loaded != client.info.client:
            self._install(LOCAL, client.local_state)
            self._loaded = client.info.client

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
        """Embeddings of the client's references, (S, hidden).

        Those of the frozen base are kept with the client's adapter; others are computed once.
        """
        weighting, references = self.weighting, client.references
        assert references is not None, "check_references"
        if weighting.encoder == "none":
            return references.embeddings[weighting.representation]
        number = client.info.client
        if number not in self._reference_embeddings:
            embeddings = self.embed(references.prompts, weighting.encoder)
            self._reference_embeddings[number] = embeddings[weighting.representation]
        return self._reference_embeddings[number]


def _client_info(client: int, info: Mapping[str, Any]) -> ClientInfo:
    label, tasks = info["label"], info["tasks"]
    if not isinstance(label, str) or not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise ValueError("label and tasks are no names")
    return ClientInfo(client, label, tuple(tasks) or (NO_TASK,))
