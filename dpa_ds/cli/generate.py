"""Entry point of launch/generate.py: answers of one client's model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dpa_ds.cli.args import option, parse
from dpa_ds.cli.bootstrap import Work, run_job
from dpa_ds.cli.memory import generation_remedy, memory_errors
from dpa_ds.cli.trained_run import RunOptions, load_run_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """Answers as one client of a trained run would, and shows alpha, the weight of its local adapter for this prompt.

    The global adapter gets the rest. Without --prompt and --input it answers what you type, until an empty line.
    Answers stream token by token with one beam, the default here. --SECTION.FIELD VALUE as for launch/evaluate.py.

    examples
      python launch/generate.py --run runs/demo --client 0 --prompt "Is this review positive or negative? A delight."
      python launch/generate.py --run runs/demo --client 6 --weighting local
      python launch/generate.py --run runs/demo --client 3 --input questions.txt > answers.jsonl
      python launch/generate.py --run runs/chat --client sarcasm --chat --temperature 0.7 --top_p 0.9
    """

    client: str = option("N", missing="--client must be the id or name of a client such as 0, got 'nothing'")
    """Whose model answers: the client's id or name."""
    prompt: str | None = option("TEXT", None)
    """The instruction; the run's prompt template is put around it."""
    input: str | None = option("FILE", None)
    """Prompts, one a line, or a table (.json, .jsonl, .csv, .parquet) with the run's instruction and input columns or
    with conversations; prints one JSON object a line: prompt, alpha, answer."""
    chat: bool = option("true", False)
    """What you type continues the conversation, instead of being a question by itself; needs a run that was trained
    with the model's chat template (data.template)."""
    system: str | None = option("TEXT", None)
    """The system's turn, which every conversation begins with."""
    beams: str | None = option("N", "1", sets="generation.num_beams")
    """Beams; 1: greedy."""


def main(argv: Sequence[str] | None = None) -> int:
    """Answer in one process, without a launcher; the exit status."""
    run_job(argv, prepare)
    return 0


def prepare(argv: Sequence[str]) -> tuple[RunConfig, Work]:
    """The run's recipe with what the command line changes, and the generation.

    Raises:
        ConfigError: as `load_run_config`, or both --prompt and --input.
    """
    options, overrides = parse(argv, GenerateOptions, "python launch/generate.py")
    config = load_run_config(options, overrides)
    if options.prompt is not None and options.input is not None:
        raise ConfigError("--prompt and --input exclude one another: leave one out")
    if options.chat and (options.prompt is not None or options.input is not None):
        raise ConfigError("--chat is for what you type: leave it out, or leave --prompt and --input out")

    def work(job: JobStore) -> None:
        answers = sys.stdout
        if options.input is not None:  # before libraries are imported that log to stdout: it is to be JSON lines alone
            sys.stdout = sys.stderr
        from dpa_ds.inference.console import Wanted, generate  # imports torch: only once config and ranks are in order

        wanted = Wanted(options.client, options.prompt, options.input, options.chat, options.system)
        with memory_errors(generation_remedy(config.generation)):
            generate(config, job, wanted, answers)

    return config, work


if __name__ == "__main__":
    sys.exit(main())
