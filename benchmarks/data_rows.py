"""What a million rows cost before training: `python benchmarks/data_rows.py --rows 1000000`.

Reading a JSONL file, tokenising and keeping the tokens, and the same again from the cache; against `datasets`, which
loads the file and maps the same tokenizer over it in batches, and again from its cache. Each in a process of its own:
seconds, and peak resident memory above that of a process that has imported all and read a small file. Half of the
rows' growth is measured as well, so that memory and time per row can be seen to be flat.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from progress import measuring

MODEL = Path(__file__).parents[1] / ".cache/demo/SmolLM2-135M-Instruct"
TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:\n"
TEXT = "the of and to in is that for it as was with be by on not he his but at are this have from or had an they"
WORDS = TEXT.split()
SMALL = 1000
SIDES = ("ours", "datasets")


def main() -> None:
    """Print a table: side by number of rows, first and from the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of a tokenizer (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the tokenizer (%(default)s)")
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "FILE", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        side, file, cache = args.measure
        print(json.dumps(measure(side, Path(file), Path(cache), args.model)))
        return
    from table import where_and_when

    print(where_and_when())
    print("| rows | side | s | us a row | peak MB above a small file | bytes a row | tokens | again: s | again: MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = {}
        for num_rows in (SMALL, args.rows // 2, args.rows):
            file = write_rows(Path(folder, f"{num_rows}.jsonl"), num_rows)
            for side in SIDES:
                cache = Path(folder, f"{side}-{num_rows}")
                measuring(f"{side}, {num_rows} rows")
                first = in_own_process(side, file, cache, args)
                again = in_own_process(side, file, cache, args)
                if num_rows == SMALL:
                    base[side] = first["peak"], again["peak"]
                    continue
                above = first["peak"] - base[side][0]
                print(
                    f"| {num_rows:,} | {side} | {first['seconds']:.1f} | {1e6 * first['seconds'] / num_rows:.0f} | "
                    f"{above / 1e6:.0f} | {above / num_rows:.0f} | {first['tokens']:,} | {again['seconds']:.1f} | "
                    f"{(again['peak'] - base[side][1]) / 1e6:.0f} |",
                    flush=True,
                )


def write_rows(path: Path, num_rows: int) -> Path:
    """Instructions of 10 to 60 words and answers of 5 to 40, from a generator of their own."""
    generator = random.Random(0)
    with path.open("w") as file:
        for number in range(num_rows):
            asked = " ".join(generator.choices(WORDS, k=generator.randint(10, 60)))
            answer = " ".join(generator.choices(WORDS, k=generator.randint(5, 40)))
            file.write(json.dumps({"instruction": f"{number}: {asked}", "output": answer, "category": "a"}) + "\n")
    return path


def in_own_process(side: str, file: Path, cache: Path, args: argparse.Namespace) -> dict[str, float]:
    """What `measure` found in a process that nothing else has grown."""
    command = [sys.executable, __file__, "--model", str(args.model), "--measure", side, str(file), str(cache)]
    threads = str(args.threads)
    environment = os.environ | {
        "RAYON_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    numbers: dict[str, float] = json.loads(found.splitlines()[-1])
    return numbers


def measure(side: str, file: Path, cache: Path, model: Path) -> dict[str, float]:
    """Seconds of one side without its imports, peak memory of the process in bytes, and the number of tokens."""
    import datasets  # noqa: F401
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    tokenizer("warm up")
    work = {"ours": read_ours, "datasets": read_with_datasets}[side]
    started = time.perf_counter()
    num_tokens = work(file, cache, tokenizer)
    seconds = time.perf_counter() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak, "tokens": num_tokens}


def read_ours(file: Path, cache: Path, tokenizer: object) -> int:
    """As a run does: the table, one client's examples, their tokens."""
    from dpa_ds.config.schema import DataConfig, PartitionConfig
    from dpa_ds.data.formats import build_format
    from dpa_ds.data.sources import read_client
    from dpa_ds.data.tokenize import load_or_tokenize

    partition = PartitionConfig("iid", None, 1)
    data = DataConfig(
        format="table",
        path=str(file),
        partition=partition,
        template=TEMPLATE,
        cache_dir=str(cache),
        held_out_fraction=0.0,
    )
    client = read_client(data, 0, 0)
    read = time.perf_counter()
    tokens = load_or_tokenize(client.train, build_format(tokenizer, data), data, client.name)  # type: ignore[arg-type]
    sys.stderr.write(f"         tokens in {time.perf_counter() - read:.1f} s\n")
    return len(tokens.tokens)


def read_with_datasets(file: Path, cache: Path, tokenizer: object) -> int:
    """`datasets` with its usual batches: prompt and answer apart, end token, prompt length, no example above 512."""
    import datasets

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[object]]:
        texts = [TEMPLATE.replace("{instruction}", text) for text in rows["instruction"]]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        answers = tokenizer(rows["output"], add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        eos = tokenizer.eos_token_id  # type: ignore[attr-defined]
        ids = [[*prompt, *answer, eos] for prompt, answer in zip(prompts, answers, strict=True)]
        return {"input_ids": ids, "prompt_length": [len(prompt) for prompt in prompts]}

    loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    mapped = loaded.map(tokenize, batched=True, remove_columns=loaded.column_names)
    return sum(len(chunk.flatten()) for chunk in mapped.data.column("input_ids").chunks)


if __name__ == "__main__":
    main()
