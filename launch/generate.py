"""Ask one client's model: `python launch/generate.py --run runs/NAME --client 3 [--prompt TEXT]`."""

import os
import sys

USAGE = """\
usage: python launch/generate.py --run runs/NAME --client N [--prompt TEXT | --input FILE] [--option VALUE ...]

Answers as one client of a trained run would, and shows alpha, the weight that its local adapter got for this prompt (the
global adapter gets the rest). Without --prompt and --input it asks you; an empty line ends. Answers stream token by token
with one beam, the default here.

  --run FOLDER          the run, as launch/run.py wrote it
  --client N            whose model
  --prompt TEXT         the instruction; the run's prompt template is put around it
  --input FILE          prompts, one a line, or a table (.json, .jsonl, .csv, .parquet) with the run's instruction column;
                        prints one JSON object a line: prompt, alpha, answer
  --weighting KIND, --lambda X, --alpha X, --beams N, --max_new_tokens N, --SECTION.FIELD VALUE    as for launch/evaluate.py

examples
  python launch/generate.py --run runs/demo --client 0 --prompt "Is this film review positive or negative? A delight."
  python launch/generate.py --run runs/demo --client 6 --weighting local
  python launch/generate.py --run runs/demo --client 3 --input questions.txt > answers.jsonl
"""


def main() -> None:
    """One process, without a launcher."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported; see run.py
    from dpa_ds.cli.args import load_run_config, take_options
    from dpa_ds.cli.bootstrap import run_job
    from dpa_ds.errors import ConfigError

    own: dict[str, str] = {}

    def load(argv):  # type: ignore[no-untyped-def]
        taken, others = take_options(argv, ("client", "prompt", "input"))
        own.update(taken)
        config = load_run_config(["--beams=1", *others], USAGE)
        if not own.get("client", "").isdecimal():
            raise ConfigError(f"--client must be the id of a client such as 0, got {own.get('client', 'nothing')!r}")
        if "prompt" in own and "input" in own:
            raise ConfigError("--prompt and --input exclude one another: leave one out")
        return config

    def work(config, job):  # type: ignore[no-untyped-def]
        out = sys.stdout
        if "input" in own:  # before libraries are imported that log to stdout: it is to be JSON lines and nothing else
            sys.stdout = sys.stderr
        from dpa_ds.cli.generate import ask

        ask(config, job, int(own["client"]), own.get("prompt"), own.get("input"), out)
        out.flush()

    run_job(sys.argv[1:], work, load=load)


if __name__ == "__main__":
    main()
