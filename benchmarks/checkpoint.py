"""Share of a round in which training waits for checkpoints: snapshots inside phases, and the writer at the end.

    python benchmarks/checkpoint.py --config launch/recipes/demo.yaml --steps 20 --every_steps 5

Runs the recipe, two rounds of it, on one rank, and reads the times from its metrics.jsonl. The bytes written per round
stand beside them.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from progress import measuring
from table import where_and_when

from dpa_ds.runs.tracking import read_records

REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    """Entry point."""
    args = _parse()
    with tempfile.TemporaryDirectory(prefix="checkpoint_") as folder:
        command = [sys.executable, "launch/run.py", "--config", args.config, "--name", "run", "--output_dir", folder]
        command += ["--federation.num_rounds", "2", "--train.max_steps", str(args.steps)]
        if args.every_steps:
            command += ["--checkpoint.every_steps", str(args.every_steps)]
        measuring(f"two rounds of {args.config}")
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        records = read_records(Path(folder) / "run" / "metrics.jsonl")
        rounds = [record for record in records if record["kind"] == "round" and record["round"] > 0]
        files = [path for path in (Path(folder) / "run/rounds/round_000002").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
    print(where_and_when())
    saved = f"saved every {args.every_steps or 'phase'}; {size:.1f} MB a round"
    print(f"{args.config}, {args.steps} steps a phase, {saved}")
    print(f"{'round':>6}{'s in all':>12}{'s in phases waiting':>22}{'s at the end waiting':>22}{'share':>10}")
    for record in rounds:
        parts = {name: value for name, value in record.items() if name.startswith("seconds/")}
        inside, end = parts.pop("seconds/save_inside_phases"), parts["seconds/save"]
        whole = sum(parts.values())
        print(f"{record['round']:>6}{whole:>12.1f}{inside:>22.3f}{end:>22.3f}{(inside + end) / whole:>10.2%}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="launch/recipes/demo.yaml", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps a phase; the paper has 50 (%(default)s)")
    parser.add_argument("--every_steps", type=int, help="save inside phases, too, every so many steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
