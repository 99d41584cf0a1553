"""The clients of this rank group: their data read and tokenised, their local adapters restored or drawn fresh."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.adapters.state import AdapterState, check_tensors, optimizer_shapes
from dpa_ds.config.paths import has_client_files
from dpa_ds.config.schema import DataConfig, EvaluationConfig, GenerationConfig, TrainConfig, WeightingConfig
from dpa_ds.data.formats import ExampleFormat
from dpa_ds.data.limits import ModelLimits, check_examples, check_prompts
from dpa_ds.data.quality import DataQuality
from dpa_ds.data.references import REPRESENTATIONS, References, draw_references
from dpa_ds.data.sources import ClientData, Example, list_clients, pool_clients, read_clients, tasks_of
from dpa_ds.data.tokenize import TokenizedExamples, load_or_tokenize
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.world import World
from dpa_ds.errors import DataError, list_some
from dpa_ds.federation.aggregation.base import LeaderState
from dpa_ds.federation.progress import ClientState, checked, steps_from_json
from dpa_ds.inference.embedding import embed
from dpa_ds.runs.folder import RunFolder, SavedAdapter, local_folder
from dpa_ds.runs.storage import well_formed
from dpa_ds.runs.tracking import logger

LOCAL_SEED = 1
"""Word of the seed of fresh local adapters; the global one's is another, so that they differ."""


@dataclass
class HostedClient:
    """What a client keeps to itself, in the memory of its rank group."""

    client_id: int
    label: str
    tasks: tuple[str, ...]
    """Tasks that it trains on, sorted; empty where the data names none."""
    examples: TokenizedExamples
    held_out: TokenizedExamples | None
    state: ClientState
    references: References | None
    """Prompts that a test prompt is compared with, where the method weights by instance."""

    @property
    def folder(self) -> str:
        """Where a round keeps this client's adapter."""
        return local_folder(self.client_id)


def client_names(data: DataConfig, seed: int, pooled: bool) -> list[str]:
    """Names of all clients, in the order of their ids.

    Args:
        pooled: all clients' data form a single client.
    """
    return ["centralized"] if pooled else list_clients(data, seed)


def agree_on_client_names(data: DataConfig, seed: int, pooled: bool, job: JobStore) -> list[str]:
    """The names of all clients, after a comparison where each host lists files of its own. Collective: all ranks.

    Raises:
        DataError: ranks find different clients.
    """
    names = client_names(data, seed, pooled)
    if has_client_files(data.path) and data.clients is None:
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        if job.broadcast_from_rank_zero("client_names", lambda: digest) != digest:
            raise DataError(
                f"{data.path}: {job.launch.hostname} has files of {list_some(names)}, and the host of rank 0 those of "
                "other clients: give all hosts the same files, or name all clients in data.clients"
            )
    return names


@dataclass(frozen=True)
class ClientTokens:
    """The data of one client, read and tokenised: all that is known of it before there is a model."""

    client_id: int
    label: str
    tasks: tuple[str, ...]
    examples: TokenizedExamples
    held_out: TokenizedExamples | None
    quality: DataQuality | None = None


def read_hosted(data: DataConfig, seed: int, pooled: bool, world: World) -> list[ClientData]:
    """The data of the clients that this rank group hosts.

    Args:
        pooled: all clients' data form a single client.

    Raises:
        DataError: a file, a row or a column is not as it should be.
    """
    if pooled:
        everyone = range(len(list_clients(data, seed)))
        return [pool_clients(read_clients(data, seed, everyone))]
    # Only those of this group: with `format: feddpa` no other client's training file is opened.
    return read_clients(data, seed, world.topology.clients_of_group(world.group))


@dataclass(frozen=True)
class ClientTokenizer:
    """Tokenises clients' data, and refuses what the model cannot read or answer."""

    data: DataConfig
    example_format: ExampleFormat
    limits: ModelLimits
    max_new_tokens: int | None
    """Longest answer to a held-out prompt; None: nobody will ask for one."""

    def tokenize(self, client: ClientData) -> ClientTokens:
        """The client's tokens.

        Raises:
            DataError: no example fits `data.max_length`, or one does not fit the model.
        """
        examples = self._tokenize(client.train, client.name)
        held_out = None
        if client.held_out:
            held_out = self._tokenize(client.held_out, f"{client.name} (held out)")
            if self.max_new_tokens is not None:
                questions = [example.question for example in client.held_out if not example.is_plain_text]
                check_prompts(questions, self.example_format, self.limits, self.max_new_tokens)
        return ClientTokens(client.client_id, _label(client), _tasks(client), examples, held_out, client.quality)

    def _tokenize(self, examples: Sequence[Example], owner: str) -> TokenizedExamples:
        tokenized = load_or_tokenize(examples, self.example_format, self.data, owner)
        check_examples(tokenized, examples, self.example_format, self.data.max_length, self.limits)
        return tokenized


def build_client_tokenizer(
    data: DataConfig,
    evaluation: EvaluationConfig,
    generation: GenerationConfig,
    example_format: ExampleFormat,
    limits: ModelLimits,
) -> ClientTokenizer:
    """How a run tokenises its clients' data."""
    longest_answer = None
    # Test rows that are a client's own are checked here, as nobody else sees them.
    if evaluation.split == "held_out" or has_client_files(data.test_path):
        longest_answer = generation.max_new_tokens
    return ClientTokenizer(data, example_format, limits, longest_answer)


def tokenize_hosted(clients: Sequence[ClientData], tokenizer: ClientTokenizer, world: World) -> list[ClientTokens]:
    """The tokens of what `read_hosted` read. Collective: all ranks of the group.

    Raises:
        DataError: as `ClientTokenizer.tokenize`.
    """
    with world.leader_first():  # the others find the tokens in the cache
        tokens = [tokenizer.tokenize(client) for client in clients]
    for client, of_client in zip(clients, tokens, strict=True):
        num_dropped = of_client.examples.num_dropped
        if world.is_leader and num_dropped:
            logger.warning(
                f"{client.name}: {num_dropped} of {len(of_client.examples) + num_dropped} examples are longer than "
                f"data.max_length = {tokenizer.data.max_length} tokens and are left out"
            )
    return tokens


@dataclass(frozen=True)
class ClientBuilder:
    """Makes the clients that this rank group hosts, of their data and of what a run holds of them."""

    seed: int
    world: World
    adapters: AdapterModel
    run_folder: RunFolder

    def build(self, tokens: Sequence[ClientTokens], completed_rounds: int) -> tuple[list[HostedClient], LeaderState]:
        """Everything that this group keeps for its clients after `completed_rounds`, and what its leader keeps."""
        clients, leader_states = [], []
        for data in tokens:
            saved = self._restore(data.client_id, completed_rounds)
            clients.append(
                HostedClient(
                    client_id=data.client_id,
                    label=data.label,
                    tasks=data.tasks,
                    examples=data.examples,
                    held_out=data.held_out,
                    state=saved.state,
                    references=saved.references,
                )
            )
            leader_states.append(LeaderState(saved.residual))
        return clients, LeaderState.sum_of(leader_states)

    def _restore(self, client_id: int, completed_rounds: int) -> "_Restored":
        """The client as it was saved, or a fresh one. Only its leader keeps the tensors."""
        saved = None
        if completed_rounds:
            saved = self.run_folder.load_newest(completed_rounds, local_folder(client_id))
        if saved is None:  # the beginning, or its group was never there
            return self._fresh(client_id)
        self.adapters.check_shapes(LOCAL, saved.weights)
        round_dir = self.run_folder.round_dir(completed_rounds)
        with well_formed(f"the state of client {client_id}", f"delete {round_dir} to continue from the round before"):
            self._check_tensors(saved)
            return _Restored.of(saved, self.world.is_leader)

    def _check_tensors(self, saved: SavedAdapter) -> None:
        """Raise ValueError if what was saved beside a local adapter does not fit it, or this model."""
        if "optimizer" in saved.extras:
            check_tensors(saved.extras["optimizer"], optimizer_shapes(self.adapters.shapes[LOCAL]))
        if "leader_state" in saved.extras:
            check_tensors(saved.extras["leader_state"], self.adapters.shapes[GLOBAL])
        if "references" in saved.extras:
            tensors = saved.extras["references"]
            shape = (len(tensors["lengths"]), self.adapters.hidden_size)
            for name in REPRESENTATIONS:
                check_tensors({name: tensors[f"embeddings.{name}"]}, {name: shape})

    def _fresh(self, client_id: int) -> "_Restored":
        adapter: AdapterState = {}
        if self.world.is_leader:
            adapter = self.adapters.initial_state(LOCAL, (self.seed, LOCAL_SEED, client_id))
        return _Restored(ClientState(adapter, num_steps={GLOBAL: 0, LOCAL: 0}), references=None, residual={})


@dataclass(frozen=True)
class _Restored:
    """What a complete round holds of a client."""

    state: ClientState
    references: References | None
    residual: AdapterState
    """Of the leader whose first client this was."""

    @classmethod
    def of(cls, saved: SavedAdapter, is_leader: bool) -> "_Restored":
        """Ranks that are no leaders keep no tensors but the references."""
        optimizer = saved.extras.get("optimizer")
        references = saved.extras.get("references")
        state = ClientState(
            local_adapter=saved.weights if is_leader else {},
            num_steps=steps_from_json(saved.info["steps_taken"]),
            local_optimizer=optimizer if is_leader or optimizer is None else {},
            loss_scale=checked(saved.info["loss_scale"], dict[str, float], "loss_scale"),
        )
        return cls(
            state=state,
            references=None if references is None else References.from_tensors(references),
            residual=saved.extras.get("leader_state", {}) if is_leader else {},
        )


def embed_references(
    clients: Sequence[HostedClient],
    adapters: AdapterModel,
    weighting: WeightingConfig,
    seed: int,
    pad_id: int,
    train: TrainConfig,
) -> None:
    """Draw and embed the reference prompts of clients that have none yet. Collective: all ranks of the group."""
    for client in clients:
        if client.references is None:
            prompts = draw_references(client.examples, weighting.num_references, (seed, client.client_id))
            client.references = References(prompts, embed(adapters, "none", prompts, pad_id, train.micro_batch_tokens))


def _label(data: ClientData) -> str:
    """The client's name, with its task where it has only one."""
    tasks = _tasks(data)
    return f"{data.name} {tasks[0]}" if len(tasks) == 1 and tasks != (data.name,) else data.name


def _tasks(data: ClientData) -> tuple[str, ...]:
    return tuple(sorted(tasks_of(data.train) - {""}))
