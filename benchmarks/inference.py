"""Instances per second of dynamic weighting: batched, against the one-by-one procedure of the published code.

    python benchmarks/inference.py --run runs/demo

Both run in this process, in turns, with the same adapters, beams, answer length and precision (fp32, CPU). The
sample that is answered one by one must get the same weights (paper's cosine) and the same answers from both before
any number is printed. With --beside bf16, ours answers in that precision, too, in turns with the others.
"""

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is first imported

import torch
from one_by_one import OneByOne
from progress import measuring
from table import processor, spread, where_and_when

from dpa_ds.cli import evaluate
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.launchers import Launch
from dpa_ds.distributed.world import World
from dpa_ds.evaluation.answers import Answer, Instance
from dpa_ds.evaluation.dataset import choose_instances, read_instances, tokenize_instances
from dpa_ds.evaluation.work_items import EvaluationSet, answer_work_item
from dpa_ds.inference.client_model import ClientModel, Predictor, load_client_model
from dpa_ds.inference.loading import PlacedBase, build_predictor, place_base
from dpa_ds.inference.weighting import Weighting, resolve_weighting
from dpa_ds.runs.folder import RunFolder

# cpu: CPU time of this process, which other programs on the machine lengthen far less than wall time.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Batched:
    """Our way: all instances for all clients, and how much of the time went into weights."""

    make_predictor: Callable[[Weighting], Predictor]
    """The model with nothing embedded yet."""
    world: World
    questions: EvaluationSet
    clock: Callable[[], float]

    def run(self, kind: str, config: RunConfig) -> tuple[float, float, list[Answer]]:
        """Seconds, seconds spent on weights, answers."""
        weighting = replace(config.weighting, kind=kind, scale=None, encoder="auto")  # type: ignore[arg-type]
        num_clients = len(self.questions.client_models)
        predictor = self.make_predictor(resolve_weighting(weighting, config.method, num_clients))
        answers: list[Answer] = []
        with _timed(predictor, self.clock) as on_weights:
            started = self.clock()
            for item in self.questions.plan(config.generation, num_groups=1):
                for batch in answer_work_item(item, self.questions, predictor, self.world, frozenset()):
                    answers += batch
            seconds = self.clock() - started
        return seconds, on_weights[0], answers


@contextmanager
def _timed(predictor: Predictor, clock: Callable[[], float]) -> Any:
    """Seconds inside `embed`, and inside `weights` where that does not embed."""
    spent, depth = [0.0], [0]
    originals = {name: getattr(predictor, name) for name in ("embed", "weights")}

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            depth[0] += 1
            started = clock()
            result = function(*args)
            depth[0] -= 1
            spent[0] += (clock() - started) if depth[0] == 0 else 0.0
            return result

        return timed

    for name, function in originals.items():
        setattr(predictor, name, wrap(function))
    yield spent
    for name in originals:
        delattr(predictor, name)


def main() -> None:
    """Entry point."""
    args = _parse()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    result = measure(args)
    print(render(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Load the run twice, check that both ways agree on the sample, and time them in turns."""
    options = [f"--run={args.run}", f"--beams={args.beams}", f"--max_new_tokens={args.max_new_tokens}"]
    options += [f"--instances={args.instances}", f"--generation.batch_tokens={args.batch_tokens}"]
    config = evaluate.load([*options, "--model.precision=fp32"])
    clock = CLOCKS[args.clock]
    folder = RunFolder(config.run_dir)
    server_round = folder.hold_trained_round()

    def make_predictor(base: PlacedBase, weighting: Weighting) -> Predictor:
        return build_predictor(base, config.lora, config.generation, weighting, folder, server_round)

    base = _place_whole(JobStore(Launch("single", 0, 1, 0, "127.0.0.1", 0)), config, len(folder.clients(server_round)))

    clients = {client: load_client_model(folder, server_round, client) for client in folder.clients(server_round)}
    instances = choose_instances(read_instances(config.data, config.seed, config.evaluation.split), config.evaluation)
    prompts = tokenize_instances(instances, base.example_format, base.limits, config.generation.max_new_tokens)

    ours = Batched(partial(make_predictor, base), base.world, EvaluationSet(instances, prompts, clients), clock)
    variants = {kind: (ours, kind) for kind in args.kinds}
    if args.beside:
        # The decision where the base is has been made: a job makes it once.
        other = replace(base, config=replace(config.model, precision=args.beside))
        variants[f"{args.kinds[0]}, {args.beside}"] = (
            replace(ours, make_predictor=partial(make_predictor, other)),
            args.kinds[0],
        )
    theirs = OneByOne(base.directory, config.run_dir / "adapters", args.beams, args.max_new_tokens)
    first = [i for i, instance in enumerate(instances) if instance.row == 0]
    some = dict(list(clients.items())[: args.sample_clients])
    sample = [(client, i) for client in some for i in first]
    asked = EvaluationSet([instances[i] for i in first], [prompts[i] for i in first], some)
    check = replace(ours, questions=asked)
    _, _, expected = check.run("cosine", config)

    seconds: dict[str, list[float]] = {**{name: [] for name in variants}, "one by one": []}
    shares: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(1, args.repeats + 1):
        for name, (batched, kind) in variants.items():
            measuring(f"repeat {repeat} of {args.repeats}: {name}")
            total, on_weights, answers = batched.run(kind, config)
            seconds[name].append(total)
            shares[name].append(on_weights / total)
        measuring(f"repeat {repeat} of {args.repeats}: one by one")
        seconds["one by one"].append(_run_one_by_one(theirs, sample, clients, prompts, clock, expected, instances))
    num = {**dict.fromkeys(variants, len(answers)), "one by one": len(sample)}
    rates = {name: [num[name] / s for s in of_runs] for name, of_runs in seconds.items()}
    return {
        "where": where_and_when(
            f"{processor()}, {args.threads} thread(s), {args.clock} time", ("torch", "transformers", "peft")
        ),
        "setting": f"{config.name}, round {server_round}: {len(clients)} clients x {len(instances)} instances, "
        f"{args.beams} beams, at most {args.max_new_tokens} tokens, S = {config.weighting.num_references}",
        "sample": f"{len(sample)} of them one by one: same weights to 1e-4, same answers",
        "instances_per_second": rates,
        "ratio": {name: [a / b for a, b in zip(rates[name], rates["one by one"], strict=True)] for name in shares},
        "share_of_time_on_weights": shares,
    }


def _place_whole(job: JobStore, config: RunConfig, num_clients: int) -> PlacedBase:
    """The base of the run, all of it on this rank."""
    timeout_seconds = config.federation.timeout_seconds
    return place_base(job, config.model, config.data, "never", config.cluster, timeout_seconds, num_clients)


def _run_one_by_one(
    theirs: OneByOne,
    sample: Sequence[tuple[int, int]],
    clients: dict[int, ClientModel],
    prompts: Sequence[Sequence[int]],
    clock: Callable[[], float],
    expected: Sequence[Answer],
    instances: Sequence[Instance],
) -> float:
    """Seconds for the sample; loading adapters is not counted. SystemExit if a weight or an answer is another one."""
    known = {answer.key: answer for answer in expected}
    seconds, installed = 0.0, None
    for client, i in sample:
        if client != installed:
            theirs.load_client(client)
            installed = client
        references = clients[client].references
        assert references is not None
        started = clock()
        alpha = theirs.alpha(prompts[i], references.prompts, scale=0.5)
        text = theirs.answer(prompts[i], alpha)
        seconds += clock() - started
        ours = known[client, instances[i].task, instances[i].row]
        if abs(ours.alpha - alpha) > 1e-4 or ours.text != text:
            raise SystemExit(f"not the same work: {ours} against alpha {alpha}, {text!r}")
    return seconds


def render(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        result["where"],
        f"{result['setting']}; {result['sample']}",
        "",
        f"{'':20}{'instances/s':>26}{'times one by one':>24}{'share on weights':>24}",
    ]
    for name, rates in result["instances_per_second"].items():
        ratio, share = result["ratio"].get(name), result["share_of_time_on_weights"].get(name)
        lines.append(
            f"{name:20}{spread(rates, '.3f'):>26}{spread(ratio, '.1f') if ratio else '':>24}"
            f"{spread(share, '.1%') if share else '':>24}"
        )
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a trained run of feddpa_t or feddpa_f in fp32")
    parser.add_argument("--instances", type=int, default=16, help="test instances of each task (%(default)s)")
    parser.add_argument("--sample_clients", type=int, default=2, help="clients whose first instances go one by one")
    parser.add_argument("--kinds", nargs="+", default=["centred_cosine", "cosine"], help="weightings (%(default)s)")
    parser.add_argument("--beside", choices=("bf16",), help="answer in this precision, too, with the first weighting")
    parser.add_argument("--batch_tokens", type=int, default=16384, help="generation.batch_tokens (%(default)s)")
    parser.add_argument("--beams", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=80, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu: CPU time of this process (%(default)s)")
    parser.add_argument("--json", help="write the numbers here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
