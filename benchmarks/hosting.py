"""What a hosted client costs: rounds of few and of many clients on one rank group, whose work is the same for each.

    python benchmarks/hosting.py --clients 20 200

Real runs of launch/run.py, one rank, on a tiny random Llama with the demo's tokenizer and table (make demo): one step a
phase, so that what is not training shows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from planner import Setting, write_model
from table import spread, where_and_when
from transformers import AutoTokenizer

from dpa_ds.experiments.scaling_study import read_point

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / ".cache" / "demo"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--rounds", type=int, default=4, help="the first one warms up")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    print(where_and_when())
    seconds: dict[int, list[float]] = {clients: [] for clients in args.clients}
    peaks: dict[int, list[float]] = {clients: [] for clients in args.clients}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "SmolLM2-135M-Instruct")
        model = write_model(Path(folder) / "model", Setting(64, 172, 2, vocab_size=len(tokenizer)))
        tokenizer.save_pretrained(model)
        for repeat in range(args.repeats):
            for clients in args.clients:
                run_dir = Path(folder) / "runs" / f"{clients}_{repeat}"
                peaks[clients].append(run(model, run_dir, clients, args.rounds) / 1e6)
                seconds[clients].append(read_point(run_dir, 1, 1).seconds)
    print("\n| clients | s a round | ms a client | to the first | peak memory, MB |\n|---|---|---|---|---|")
    fewest = args.clients[0]
    for clients in args.clients:
        milliseconds, ratios = [], []
        for whole, whole_of_fewest in zip(seconds[clients], seconds[fewest], strict=True):
            milliseconds.append(1e3 * whole / clients)
            ratios.append((whole / clients) / (whole_of_fewest / fewest))  # within a repeat
        cells = [str(clients), spread(seconds[clients]), spread(milliseconds, ".0f"), spread(ratios)]
        print(f"| {' | '.join([*cells, spread(peaks[clients], '.0f')])} |")


def run(model: Path, run_dir: Path, num_clients: int, num_rounds: int) -> float:
    """Train; the highest resident memory of the process, in bytes."""
    words = {
        "name": run_dir.name,
        "output_dir": run_dir.parent,
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
    argv = ["--config=launch/recipes/demo.yaml", *(f"--{key}={value}" for key, value in words.items())]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "launch" / "run.py"), *argv], stdout=subprocess.DEVNULL, cwd=REPOSITORY
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the run of {num_clients} clients failed")
    return usage.ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
