"""The clients of this rank group: their data read and tokenised, their local adapters restored or drawn fresh."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import Schedule
from dpa_ds.config.schema import RunConfig
from dpa_ds.data.references import REPRESENTATIONS, References, draw_references
from dpa_ds.data.sources import ClientData, list_clients, pool_clients, read_clients
from dpa_ds.data.tokenize import TokenizedExamples, load_or_tokenize
from dpa_ds.distributed.world import World
from dpa_ds.errors import CheckpointError
from dpa_ds.federation.aggregation.mean import Shared
from dpa_ds.federation.trainer import HostedClient
from dpa_ds.inference.embedding import embed
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.tracking import logger

GLOBAL_SEED, LOCAL_SEED = 0, 1


def client_names(config: RunConfig, schedule: Schedule) -> list[str]:
    """Names of all clients, in the order of their ids."""
    return ["centralized"] if schedule.pooled else list_clients(config.data, config.seed)


def host_clients(
    config: RunConfig,
    schedule: Schedule,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    adapters: AdapterModel,
    completed_rounds: int,
) -> list[HostedClient]:
    """Everything this group keeps for its clients after `completed_rounds`. Collective: all ranks of the group."""
    mine = world.topology.clients_of_group(world.group)
    data = dict(zip(mine, _read(config, schedule, mine), strict=True))
    with world.leader_first():  # the others find the tokens in the cache
        tokens = {client_id: _tokenize(config, data[client_id], tokenizer) for client_id in mine}
    clients = []
    for client_id in mine:
        examples, held_out = tokens[client_id]
        if world.is_leader and examples.num_dropped:
            logger.warning(
                f"{data[client_id].name}: {examples.num_dropped} of {len(examples) + examples.num_dropped} examples are "
                f"longer than data.max_length = {config.data.max_length} tokens and are left out"
            )
        client = HostedClient(
            client_id, _label(data[client_id]), _tasks(data[client_id]), examples, held_out, local_state={}
        )
        _restore_local(client, config, adapters, completed_rounds)
        clients.append(client)
    return clients


def restore_shared(config: RunConfig, schedule: Schedule, adapters: AdapterModel, completed_rounds: int) -> Shared:
    """The global adapter and mean states after `completed_rounds`, or fresh ones; the same on every rank."""
    hidden_size = int(adapters.base_model.config.get_text_config().hidden_size)
    fresh = torch.zeros((len(REPRESENTATIONS), hidden_size) if schedule.weighted_by_instance else (0, 0))
    if completed_rounds == 0:
        return Shared(adapters.initial_state("global", (config.seed, GLOBAL_SEED)), fresh)
    saved = RunFolder(config.run_dir).load_newest(completed_rounds, "global")
    if saved is None:
        raise CheckpointError(
            f"{RunFolder(config.run_dir).round_dir(completed_rounds)} has no global adapter: delete it"
        )
    adapters.check_shapes("global", saved.weights)
    if not schedule.weighted_by_instance:
        return Shared(saved.weights, fresh)
    means = saved.extras["reference_mean"]
    return Shared(saved.weights, means["reference_mean"], float(means["weight"]))


def embed_references(clients: Sequence[HostedClient], config: RunConfig, adapters: AdapterModel, pad_id: int) -> None:
    """Draw and encode the reference prompts of clients that have none yet. Collective: all ranks of the group."""
    for client in clients:
        if client.references is None:
            drawn = draw_references(client.examples, config.weighting.num_references, (config.seed, client.client_id))
            states = embed(adapters, "none", drawn, pad_id, config.train.micro_batch_tokens)
            client.references = References(drawn, states)


def _read(config: RunConfig, schedule: Schedule, mine: Sequence[int]) -> list[ClientData]:
    if not schedule.pooled:
        return read_clients(config.data, config.seed, mine)
    everyone = range(len(list_clients(config.data, config.seed)))
    return [pool_clients(read_clients(config.data, config.seed, everyone))]


def _tokenize(
    config: RunConfig, data: ClientData, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenizedExamples, TokenizedExamples | None]:
    examples = load_or_tokenize(data.train, tokenizer, config.data, data.name)
    held_out = None
    if data.held_out:
        held_out = load_or_tokenize(data.held_out, tokenizer, config.data, f"{data.name} (held out)")
    return examples, held_out


def _label(data: ClientData) -> str:
    """The client's name, with its task where it has only one."""
    tasks = _tasks(data)
    return f"{data.name} {tasks[0]}" if len(tasks) == 1 and tasks != (data.name,) else data.name


def _tasks(data: ClientData) -> tuple[str, ...]:
    return tuple(sorted({example.task for example in data.train} - {""}))


def _restore_local(client: HostedClient, config: RunConfig, adapters: AdapterModel, completed_rounds: int) -> None:
    name, saved = f"local/client_{client.client_id:02d}", None
    if completed_rounds:
        saved = RunFolder(config.run_dir).load_newest(completed_rounds, name)
    if saved is None:  # the beginning, or its group was never there
        client.local_state = adapters.initial_state("local", (config.seed, LOCAL_SEED, client.client_id))
        return
    adapters.check_shapes("local", saved.weights)
    client.local_state, client.local_optimizer = saved.weights, saved.extras.get("optimizer")
    client.carried = saved.extras.get("carried")
    if "references" in saved.extras:
        client.references = References.from_tensors(saved.extras["references"])
    client.steps_taken = saved.info["steps_taken"]
