"""What crosses a client border, who keeps what, and what plain PEFT reads of the results."""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import adapter_table
from dpa_ds.adapters.state import flatten
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import FederationConfig
from dpa_ds.distributed.topology import Topology
from dpa_ds.federation.aggregation.base import LocalUpdate, ServerState
from dpa_ds.federation.aggregation.pipeline import build_aggregation
from dpa_ds.federation.sampling import sample_clients
from dpa_ds.runs.tracking import read_records
from tests import tiny
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.make_model(folder / "model"), tiny.make_federation(folder / "data")


def train_and_count(job: Any, argv: Sequence[str]) -> list[tuple[int, int]]:
    """Train, and note every call of the process group that joins the leaders: (elements, bytes)."""
    import torch.distributed as dist

    from dpa_ds.cli.session import train

    handed: list[tuple[int, int]] = []

    class Counting:
        def __init__(self, *args: Any) -> None:
            self._group = gloo(*args)

        def __getattr__(self, name: str) -> Any:
            def call(tensors: list[torch.Tensor]) -> Any:
                handed.extend((t.numel(), t.numel() * t.element_size()) for t in tensors)
                return getattr(self._group, name)(tensors)

            return call

    gloo, dist.ProcessGroupGloo = (
        dist.ProcessGroupGloo,
        Counting,
    )  # the rank groups' worlds are made otherwise
    train(load_config(argv), job)
    return handed


def test_only_the_global_adapter_the_reference_mean_and_the_metrics_cross(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    argv = tiny.recipe(*inputs, tmp_path / "runs", cluster__ranks_per_group=2)
    per_rank = run_on_ranks(train_and_count, 4, tmp_path, argv)
    run_dir = tmp_path / "runs" / "tiny"
    parameters = sum(t.numel() for t in load_file(run_dir / "adapters/global/adapter_model.safetensors").values())
    update = (parameters + 1, 4 * (parameters + 1))  # fp32 parameters, and the sum of the weights
    # The mean embedding of reference prompts, in two representations of hidden size 32, the sum of the weights,
    # and whose they are.
    references = (2 * 32 + 1 + 4, 4 * (2 * 32 + 1 + 4))
    metrics = (4 * 15, 4 * 15 * 8)  # 4 clients x 15 columns of fp64
    leader = [
        metrics,
        update,
        references,
        metrics,
        update,
        references,
        metrics,
    ]  # before training, round 1, round 2
    assert per_rank == [leader, [], leader, []]
    rounds = [r for r in read_records(run_dir / "metrics.jsonl") if r["kind"] == "round"]
    assert [r.get("bytes_handed/update", 0) for r in rounds] == [0, update[1], update[1]]
    assert [r.get("bytes_handed/references", 0) for r in rounds] == [
        0,
        references[1],
        references[1],
    ]
    assert [r["bytes_handed/metrics"] for r in rounds] == [metrics[1]] * 3


def train_and_hold_the_update_back(job: Any, argv: Sequence[str]) -> list[str]:
    """Train; the update travels only once this group's local phases are done. What happened, in order."""
    from dpa_ds.cli.session import train
    from dpa_ds.distributed.leaders import StaticGroup
    from dpa_ds.federation.trainer import Trainer

    happened: list[str] = []
    all_reduce, run_later_stage = StaticGroup.all_reduce_, Trainer._run_later_stage
    locals_are_done = threading.Event()

    def held_back(group: Any, buffer: torch.Tensor, purpose: str) -> None:
        if purpose == "update":
            happened.append("update handed in")
            assert locals_are_done.wait(60), "nothing was trained meanwhile"
            locals_are_done.clear()
        all_reduce(group, buffer, purpose)

    def noted(trainer: Any, client: Any, stage: Any, shared: Any, server_round: int) -> None:
        run_later_stage(trainer, client, stage, shared, server_round)
        if stage == "overlap":
            happened.append(f"{client.label} trained its local adapter")
            if client.client_id >= 2:  # the second of its group
                locals_are_done.set()

    StaticGroup.all_reduce_, Trainer._run_later_stage = held_back, noted  # type: ignore[method-assign]
    train(load_config(argv), job)
    return happened


def test_the_update_travels_while_local_adapters_train(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Were one to wait for the other, this would not end; and the result is the same to the bit."""
    run_on_ranks(train_on_rank, 2, tmp_path, tiny.recipe(*inputs, tmp_path / "plain"))
    argv = tiny.recipe(*inputs, tmp_path / "held")
    for group, happened in enumerate(run_on_ranks(train_and_hold_the_update_back, 2, tmp_path, argv)):
        labels = [("client_0 colour0", "client_2 animal2"), ("client_1 count1", "client_3 verb3")][group]
        locals_trained = [f"{label} trained its local adapter" for label in labels]
        assert sorted(happened) == sorted(["update handed in", *locals_trained] * 2)
    for name in ("global", *(f"local/client_{client:02d}" for client in range(4))):
        plain, held = (adapter(tmp_path / folder / "tiny", 2, name) for folder in ("plain", "held"))
        assert all(torch.equal(plain[key], held[key]) for key in plain), name


def adapter(run_dir: Path, server_round: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"rounds/round_{server_round:06d}" / name / "adapter_model.safetensors")


def test_absent_clients_keep_their_local_adapter(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    argv = tiny.recipe(
        *inputs,
        tmp_path / "runs",
        federation__client_fraction=0.5,
        train__keep_optimizer_state=True,
    )
    run_on_ranks(train_on_rank, 2, tmp_path, argv)
    run_dir = tmp_path / "runs" / "tiny"
    drawn = sample_clients(Topology((1, 1), 4), 0.5, seed=0, server_round=2)
    assert len(drawn) == 2
    for client in range(4):
        before, after = (adapter(run_dir, r, f"local/client_{client:02d}") for r in (1, 2))
        same = all(torch.equal(before[key], after[key]) for key in before)
        assert same == (client not in drawn), client
    participated = {
        (r["round"], r["client"])
        for r in read_records(run_dir / "metrics.jsonl")
        if r["kind"] == "client" and r["participated"]
    }
    assert participated == {
        (r, c) for r in (1, 2) for c in sample_clients(Topology((1, 1), 4), 0.5, seed=0, server_round=r)
    }


def test_the_reference_mean_is_that_of_all_clients_that_took_part_so_far(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each is counted once: a client drawn twice has no more weight, one drawn earlier is not forgotten."""
    argv = tiny.recipe(*inputs, tmp_path / "runs", federation__client_fraction=0.5, federation__num_rounds=3)
    run_on_ranks(train_on_rank, 2, tmp_path, argv)
    run_dir = tmp_path / "runs" / "tiny"
    drawn = [sample_clients(Topology((1, 1), 4), 0.5, seed=0, server_round=r) for r in (1, 2, 3)]
    for server_round in (2, 3):
        folder = run_dir / f"rounds/round_{server_round:06d}"
        participated = sorted({client for of_round in drawn[:server_round] for client in of_round})
        references = [
            load_file(folder / f"local/client_{client:02d}/references.safetensors") for client in participated
        ]
        expected = [
            torch.stack([r[f"embeddings.{name}"].mean(0) for r in references]).mean(0)
            for name in ("last_token", "mean")
        ]
        saved = load_file(folder / "global/reference_mean.safetensors")
        assert float(saved["weight"]) == len(participated)
        torch.testing.assert_close(saved["reference_mean"], torch.stack(expected))
    assert len({client for of_round in drawn for client in of_round}) > len(set(drawn[2])), "no one to forget"


def test_kept_optimizer_state_is_durable(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    argv = tiny.recipe(*inputs, tmp_path / "runs", train__keep_optimizer_state=True)
    run_on_ranks(train_on_rank, 2, tmp_path, argv)
    folder = tmp_path / "runs/tiny/adapters/local/client_02"
    state = load_file(folder / "optimizer.safetensors")
    steps = json.loads((folder / "state.json").read_text())["info"]["steps_taken"]
    assert steps == {"global": 6, "local": 6}  # 9 examples, batch 4: 3 steps, 2 rounds
    assert float(state["step"]) == 6.0
    weights = load_file(folder / "adapter_model.safetensors")
    assert {key.removeprefix("exp_avg.") for key in state if key.startswith("exp_avg.")} == weights.keys()


def aggregate(updates: Sequence[LocalUpdate], state: ServerState, group: Any, **words: Any) -> ServerState:
    """One round of the leaders: the state after it. Collective: all leaders."""
    aggregation = build_aggregation(FederationConfig(**words), seed=0)
    accumulator = aggregation.accumulator(state)
    for update in updates:
        accumulator.add(update)
    return aggregation.step(state, accumulator.reduce(group), server_round=1)


def aggregate_identical(job: Any) -> tuple[float, bool]:
    from dpa_ds.distributed.leaders import StaticGroup

    group = StaticGroup(job.store, job.launch.global_rank, job.launch.job_world_size, 30.0)
    adapter = {
        "b": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "a": torch.ones(2),
    }
    rank = job.launch.global_rank
    state = ServerState(adapter, torch.full((2, 3), 0.3), reference_weight=2.0, references_counted=torch.zeros(3))
    update = LocalUpdate(rank, 5 + rank, adapter, state.reference_mean)
    mine = [update] if rank != 1 else []
    same = aggregate(mine, state, group, aggregation_weights="num_examples")
    before = same.flatten()
    doubled = [replace(one, adapter={key: 2 * t for key, t in adapter.items()}) for one in mine]
    aggregate(doubled, same, group, aggregation_weights="num_examples")
    assert torch.equal(same.flatten(), before), "an average changes with the next one"
    nobody = aggregate([], state, group)
    assert same.reference_weight == 2.0 + 5 + 7  # leaders 0 and 2 have one client each
    assert same.references_counted.tolist() == [1.0, 0.0, 1.0]
    again = aggregate(mine, same, group, aggregation_weights="num_examples")
    assert again.reference_weight == same.reference_weight, "each client is counted once"
    error = max(float((same.adapter[key] - adapter[key]).abs().max()) for key in adapter)
    error = max(error, float((same.reference_mean - state.reference_mean).abs().max()))
    return error, torch.equal(nobody.flatten(), state.flatten())


def test_averaging_identical_clients_changes_nothing(tmp_path: Path) -> None:
    """Three leaders, one of which hosts nobody that was drawn; then a round in which nobody was."""
    for error, unchanged in run_on_ranks(aggregate_identical, 3, tmp_path):
        assert error < 1e-6
        assert unchanged


@pytest.mark.parametrize(("precision", "stage"), [("fp32", "zero1"), ("fp32", "zero3"), ("bf16", "zero2")])
def test_plain_peft_loads_the_results(inputs: tuple[Path, Path], tmp_path: Path, precision: str, stage: str) -> None:
    """`PeftModel.from_pretrained` and `load_adapter` give the held-out loss that the run recorded."""
    argv = tiny.recipe(
        *inputs,
        tmp_path / "runs",
        model__precision=precision,
        engine__deepspeed_config=f"ds_configs/{stage}.json",
        lora__local_rank=2,
    )
    run_on_ranks(train_on_rank, 2, tmp_path, argv)
    run_dir = tmp_path / "runs" / "tiny"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(inputs[0], dtype=dtype)
    model = peft.PeftModel.from_pretrained(
        base, run_dir / "adapters/global", adapter_name="global", autocast_adapter_dtype=False
    )
    model.load_adapter(run_dir / "adapters/local/client_01", adapter_name="local", autocast_adapter_dtype=False)
    model.base_model.set_adapter(["global", "local"])
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            assert layer.r == {"global": 4, "local": 2}
            layer.scaling = {"global": 0.5 * 2.0, "local": 0.5 * 2.0}
    tokenizer = tiny.make_tokenizer()
    total, count = 0.0, 0
    rows = [json.loads(line) for line in (inputs[1] / "test.jsonl").read_text().splitlines()]
    for row in (row for row in rows if row["task"] == "count1"):
        prompt = tokenizer(f"{row['instruction']} = ").input_ids
        answer = [*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    recorded = [
        r["held_out_loss"]
        for r in read_records(run_dir / "metrics.jsonl")
        if r["kind"] == "client" and r["client"] == 1 and r["round"] == 2
    ]
    assert recorded == [pytest.approx(total / count, rel=1e-6 if precision == "fp32" else 1e-2)]


def train_expecting_divergence(job: Any, argv: Sequence[str]) -> str:
    from dpa_ds.errors import TrainingError

    try:
        train_on_rank(job, argv)
    except TrainingError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3"])
def test_a_diverging_client_is_named_and_never_averaged(inputs: tuple[Path, Path], tmp_path: Path, stage: str) -> None:
    argv = tiny.recipe(
        *inputs,
        tmp_path / "runs",
        train__learning_rate=1e30,
        train__local_epochs=3.0,
        engine__deepspeed_config=f"ds_configs/{stage}.json",
        federation__on_bad_update="stop",
    )
    (reported,) = run_on_ranks(train_expecting_divergence, 1, tmp_path, argv)
    assert reported.startswith("client_0 colour0 diverged in round 1")
    assert "lower train.learning_rate" in reported
    assert not list((tmp_path / "runs/tiny").glob("rounds/round_??????"))


def test_a_run_in_which_nobody_trains_stops(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    argv = tiny.recipe(*inputs, tmp_path / "runs", train__learning_rate=1e30, train__local_epochs=3.0)
    reported = run_on_ranks(
        train_expecting_divergence,
        2,
        tmp_path,
        [*argv, "--engine.deepspeed_config=ds_configs/zero0.json"],
    )
    assert [one[:35] for one in reported] == ["every client of round 1 diverged or"] * 2


def train_with_bad_client(job: Any, argv: Sequence[str], bad: int, kind: str) -> list[list[float]]:
    """Train; the update of client `bad` in round 1 gets a NaN (kind `nan`). The update of every client, flat;
    [] if none."""
    from dpa_ds.cli.session import train
    from dpa_ds.engine.engine import AdapterEngine
    from dpa_ds.federation.trainer import Trainer

    updates: dict[int, list[float]] = {}
    original, read_state = Trainer.local_update, AdapterEngine.read_state

    def local_update(trainer: Any, client: Any, shared: Any, server_round: int) -> Any:
        if kind == "nan" and (client.client_id, server_round) == (bad, 1):

            def poisoned(engine: Any, adapter: Any) -> Any:
                state = read_state(engine, adapter)
                next(iter(state.values())).view(-1)[3] = float("nan")
                return state

            AdapterEngine.read_state = poisoned  # type: ignore[method-assign]
        update = original(trainer, client, shared, server_round)
        AdapterEngine.read_state = read_state  # type: ignore[method-assign]
        if server_round == 1:
            updates[client.client_id] = [] if update is None else flatten(update.adapter).tolist()
        return update

    Trainer.local_update = local_update  # type: ignore[method-assign]
    train(load_config(argv), job)
    return [updates[client] for client in sorted(updates)]


@pytest.mark.parametrize("kind", ["nan", "norm"])
def test_a_bad_update_never_enters_the_average(inputs: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    """The others' average is exact, and the client keeps its last good state."""
    recipe = {"federation__num_rounds": 1}
    argv = tiny.recipe(*inputs, tmp_path / "all", **recipe)
    (updates,) = run_on_ranks(train_with_bad_client, 1, tmp_path, argv, 0, "none")
    start = torch.tensor(flat_initial_adapter(argv))
    norms = [float((torch.tensor(update) - start).norm()) for update in updates]
    bad = norms.index(max(norms))
    bound = (sorted(norms)[-1] + sorted(norms)[-2]) / 2 if kind == "norm" else None

    argv = tiny.recipe(*inputs, tmp_path / "runs", **recipe, federation__max_update_norm=bound)
    (counted,) = run_on_ranks(train_with_bad_client, 1, tmp_path, argv, bad, kind)
    assert [bool(update) for update in counted] == [client != bad for client in range(4)]
    run_dir = tmp_path / "runs" / "tiny"
    averaged = flatten(load_file(run_dir / "adapters/global/adapter_model.safetensors"))
    others = torch.tensor([update for client, update in enumerate(updates) if client != bad])
    torch.testing.assert_close(averaged, others.mean(dim=0), rtol=1e-5, atol=1e-7)
    # Its round is undone: the local adapter is as it was drawn, with B zero, and no step of it counts.
    folder = run_dir / f"adapters/local/client_{bad:02d}"
    local = load_file(folder / "adapter_model.safetensors")
    assert all(float(tensor.abs().max()) == 0 for key, tensor in local.items() if ".lora_B." in key)
    assert json.loads((folder / "state.json").read_text())["info"]["steps_taken"] == {
        "global": 0,
        "local": 0,
    }
    records = read_records(run_dir / "metrics.jsonl")
    rejected = {r["client"]: r["rejected"] for r in records if r["kind"] == "client" and r["round"] == 1}
    assert rejected == {client: float(client == bad) for client in range(4)}


def train_with_bad_local_phases(job: Any, argv: Sequence[str], bad: Sequence[int]) -> str:
    """Train; in round 1 the local adapters of the clients `bad` get a NaN. The error, if there is one."""
    from dpa_ds.cli.session import train
    from dpa_ds.engine.engine import AdapterEngine
    from dpa_ds.errors import TrainingError
    from dpa_ds.federation.trainer import Trainer

    original, read_state = Trainer._run_later_stage, AdapterEngine.read_state

    def run_stage(trainer: Any, client: Any, stage: Any, shared: Any, server_round: int) -> None:
        def poisoned(engine: Any, adapter: Any) -> Any:
            return {key: tensor * float("nan") for key, tensor in read_state(engine, adapter).items()}

        if server_round == 1 and client.client_id in bad:
            AdapterEngine.read_state = poisoned  # type: ignore[method-assign]
        original(trainer, client, stage, shared, server_round)
        AdapterEngine.read_state = read_state  # type: ignore[method-assign]

    Trainer._run_later_stage = run_stage  # type: ignore[method-assign]
    try:
        train(load_config(argv), job)
    except TrainingError as error:
        return str(error)
    return ""


def test_a_local_phase_that_diverges_while_the_update_travels_is_undone_alone(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    argv = [tiny.recipe(*inputs, tmp_path / name, federation__num_rounds=1) for name in ("plain", "bad")]
    run_on_ranks(train_on_rank, 2, tmp_path, argv[0])
    assert run_on_ranks(train_with_bad_local_phases, 2, tmp_path, argv[1], [2]) == ["", ""]
    for name in ("global", *(f"local/client_{client:02d}" for client in range(4))):
        plain, found = (adapter(tmp_path / folder / "tiny", 1, name) for folder in ("plain", "bad"))
        if name == "local/client_02":
            assert all(float(tensor.abs().max()) == 0 for key, tensor in found.items() if ".lora_B." in key)
        else:
            assert all(torch.equal(plain[key], found[key]) for key in plain), name
    info = json.loads((tmp_path / "bad/tiny/adapters/local/client_02/state.json").read_text())["info"]
    assert info["steps_taken"] == {"global": 3, "local": 0}

    everybody = tiny.recipe(*inputs, tmp_path / "all_bad", federation__num_rounds=1)
    for reported in run_on_ranks(train_with_bad_local_phases, 2, tmp_path, everybody, range(4)):
        assert reported.startswith("every client of round 1 diverged or changed the global adapter too much")
        assert "lower train.learning_rate" in reported


def flat_initial_adapter(argv: Sequence[str]) -> list[float]:
    from dpa_ds.cli.session import GLOBAL_SEED

    config = load_config(argv)
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    adapters = AdapterModel(base, adapter_table(config.lora), config.lora)
    state = adapters.initial_state("global", (config.seed, GLOBAL_SEED))
    return list(flatten(state).tolist())


def test_a_client_without_local_training_is_scored_with_the_global_adapter(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """At alpha 0.5 an untrained local adapter would halve the global one."""
    losses = {}
    for alpha in (0.25, 0.5):
        argv = tiny.recipe(
            *inputs,
            tmp_path / f"runs{alpha}",
            federation__client_fraction=0.25,
            federation__num_rounds=1,
            method__alpha=alpha,
        )
        run_on_ranks(train_on_rank, 1, tmp_path, argv)
        records = read_records(tmp_path / f"runs{alpha}" / "tiny" / "metrics.jsonl")
        losses[alpha] = {r["client"]: r["held_out_loss"] for r in records if r["kind"] == "client" and r["round"] == 1}
    (drawn,) = sample_clients(Topology((1,), 4), 0.25, seed=0, server_round=1)
    for client in range(4):
        assert (losses[0.25][client] == losses[0.5][client]) == (client != drawn), client


def scales_of_phases(job: Any, argv: Sequence[str]) -> list[tuple[int, float]]:
    """Train with a loss scale that halves in every step; (client, scale) at the first step of each phase."""
    from dpa_ds.cli.session import build_session, run

    session = build_session(load_config(argv), job)
    engine = session.trainer.engine
    # A stand-in for fp16's: DeepSpeed has none in fp32, and this CPU computes no fp16.
    engine._scaler = SimpleNamespace(cur_scale=65536.0, cur_iter=0)
    engine._fresh_scaler = engine.read_scaler()
    found: list[tuple[int, float]] = []
    take_steps, train_step = session.trainer._take_steps, engine.train_step

    def noted(phase_run: Any) -> None:
        found.append((phase_run.client.client_id, engine._scaler.cur_scale))
        take_steps(phase_run)

    def halving(*args: Any) -> Any:
        engine._scaler.cur_scale /= 2
        return train_step(*args)

    session.trainer._take_steps, engine.train_step = noted, halving  # type: ignore[method-assign]
    run(session)
    return found


def test_a_client_keeps_its_loss_scale_and_no_other_gets_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Over the phases of a round, the rounds, and a resume between them."""
    scale = dict.fromkeys(range(4), 65536.0)
    for num_rounds in (1, 2):
        argv = tiny.recipe(*inputs, tmp_path / "runs", federation__num_rounds=num_rounds, train__max_steps=2)
        (found,) = run_on_ranks(scales_of_phases, 1, tmp_path, argv)
        assert len(found) == 8, "four clients, two phases"
        for client_id, at_first_step in found:
            assert at_first_step == scale[client_id], (num_rounds, client_id)
            scale[client_id] /= 4


def numbers_kept(job: Any, argv: Sequence[str]) -> dict[str, int]:
    """Elements of adapter states that this rank holds after the run, beside what is in its engine."""
    from dpa_ds.cli.session import build_session, logger, run

    warnings: list[str] = []
    logger.warning = warnings.append  # type: ignore[assignment]
    session = build_session(load_config(argv), job)
    run(session)
    kept = {"server": session.round_state.server_state.adapter}
    for client in session.clients:
        kept[f"local {client.client_id}"] = client.state.local_adapter
        kept[f"optimizer {client.client_id}"] = client.state.local_optimizer or {}
    numbers = {name: sum(tensor.numel() for tensor in state.values()) for name, state in kept.items()}
    return numbers | {"warnings": sum("of one private prompt" in text for text in warnings)}


def test_adapter_states_are_kept_by_leaders_alone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """And the coordinator alone warns of a mean of one reference."""
    argv = tiny.recipe(
        *inputs,
        tmp_path / "runs",
        cluster__ranks_per_group=2,
        train__max_steps=1,
        train__keep_optimizer_state=True,
        federation__num_rounds=1,
    )
    argv.append("--weighting.num_references=1")
    leader, other = run_on_ranks(numbers_kept, 2, tmp_path, argv)
    assert all(leader.values()), leader
    assert len(leader) == 10, "the server's, two of each of four clients, and the warning"
    assert other == dict.fromkeys(leader, 0)
