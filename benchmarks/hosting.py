"""What a hosted client costs: rounds of few and of many clients on one rank group, whose work is the same for each.

    python benchmarks/hosting.py --clients 20 200 --ranks 2

Real trainings on a tiny random Llama with the demo's tokenizer and table (make demo): one step a phase, so that what is
not training shows. Memory is what live tensors hold after the last round, on each rank of the group: the
leader keeps the state of every client, the other ranks none of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planner import Setting, _live_storages, write_model
from progress import measuring
from table import spread, where_and_when
from transformers import AutoTokenizer

from dpa_ds.experiments.scaling_study import read_point

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / ".cache" / "demo"


@dataclass(frozen=True)
class Measured:
    """One run."""

    seconds: float
    """Of a round."""
    live_bytes: list[int]
    """Of all tensors after the last round, by rank of the group."""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--ranks", type=int, default=1, help="of the one rank group (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="the first one warms up")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    print(where_and_when())
    measured: dict[int, list[Measured]] = {clients: [] for clients in args.clients}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "SmolLM2-135M-Instruct", trust_remote_code=False)
        model = write_model(Path(folder) / "model", Setting(64, 172, 2, vocab_size=len(tokenizer)))
        tokenizer.save_pretrained(model)
        for repeat in range(args.repeats):
            for clients in args.clients:
                measuring(f"repeat {repeat + 1} of {args.repeats}: {clients} clients")
                run_dir = Path(folder) / "runs" / f"{clients}_{repeat}"
                measured[clients].append(run(model, run_dir, clients, args.rounds, args.ranks))
        (first_client, *_) = sorted((run_dir / "adapters" / "local").glob("client_*"))
        saved = sum(file.stat().st_size for file in first_client.glob("*.safetensors"))
    report_seconds(measured)
    report_memory(measured, args.ranks, saved)


def report_seconds(measured: dict[int, list[Measured]]) -> None:
    """A round's time for each number of clients, and of one client beside that among the fewest."""
    print("\n| clients | s a round | ms a client | to the first |\n|---|---|---|---|")
    fewest = min(measured)
    for clients, runs in measured.items():
        milliseconds, ratios = [], []
        for one, first in zip(runs, measured[fewest], strict=True):
            milliseconds.append(1e3 * one.seconds / clients)
            ratios.append((one.seconds / clients) / (first.seconds / fewest))  # within a repeat
        cells = [str(clients), spread([one.seconds for one in runs]), spread(milliseconds, ".0f"), spread(ratios)]
        print(f"| {' | '.join(cells)} |")


def report_memory(measured: dict[int, list[Measured]], num_ranks: int, saved: int) -> None:
    """What one more client costs on each rank: the slope between the fewest and the most clients."""
    fewest, most = min(measured), max(measured)
    if fewest == most:
        return
    print(f"\na client's saved state: {saved / 1e6:.3f} MB\n\n| rank of the group | MB a hosted client |\n|---|---|")
    for rank in range(num_ranks):
        slopes = []
        for many, few in zip(measured[most], measured[fewest], strict=True):
            slopes.append((many.live_bytes[rank] - few.live_bytes[rank]) / (most - fewest) / 1e6)
        print(f"| {rank} | {spread(slopes, '.3f')} |")


def run(model: Path, run_dir: Path, num_clients: int, num_rounds: int, num_ranks: int) -> Measured:
    """Train on one group of `num_ranks` ranks."""
    words = {
        "name": run_dir.name,
        "output_dir": run_dir.parent,
        "cluster.ranks_per_group": num_ranks,
        "model.path": model,
        "data.cache_dir": run_dir.parent / "cache",
        "data.format": "table",
        "data.path": DEMO / "federation" / "test.jsonl",
        "data.partition.kind": "iid",
        "data.partition.num_clients": num_clients,
        "federation.num_rounds": num_rounds,
        "train.max_steps": 1,
        "evaluation.every_rounds": 0,
        "tracking.tensorboard": "false",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    argv = ["--config=launch/recipes/demo.yaml", *(f"--{key}={value}" for key, value in words.items())]
    ended = subprocess.run([*launcher, __file__, "--train", *argv], stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    if ended.returncode:
        sys.exit(f"the run of {num_clients} clients failed")
    live = [json.loads((run_dir / f"live_{rank}.json").read_text()) for rank in range(num_ranks)]
    return Measured(read_point(run_dir, num_ranks, 1).seconds, live)


def train(argv: Sequence[str]) -> None:
    """What each rank does: train, and note what is alive while the session still is."""
    import gc

    from dpa_ds.cli.bootstrap import Work, run_job
    from dpa_ds.config.load import load_config
    from dpa_ds.config.schema import RunConfig
    from dpa_ds.distributed.job_store import JobStore

    def prepare(words: Sequence[str]) -> tuple[RunConfig, Work]:
        config = load_config(words)

        def work(job: JobStore) -> None:
            from dpa_ds.cli.session import build_session
            from dpa_ds.federation.loop import run_rounds

            session = build_session(config, job)
            with session.writer:
                run_rounds(session)
            gc.collect()
            live = sum(_live_storages().values())
            (config.run_dir / f"live_{job.launch.global_rank}.json").write_text(json.dumps(live))
            session.world.close()

        return config, work

    run_job(argv, prepare)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
    else:
        main()
