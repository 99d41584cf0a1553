"""Does what an input says to a copy of good files, starts the program, and says what is wrong with how it ended."""

import json
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from dpa_ds.runs.storage import sha256_of
from tests import tiny
from tests.launch.bad_input import Place, checksums
from tests.launch.processes import PYTHON, Forked
from tests.mutations.inputs import RUN, Damage, Input, show

DEADLINE_SECONDS = 30.0
STARTS_OTHERS = ("compare", "scaling_study")
"""Programs that start others, each of which has that time, and imports for a third of it."""
SERVING = "rendezvous for "
"""What launch/rendezvous.py says once nothing is wrong: then it serves until it is stopped."""
REPORT_EVERY = 100
NOT_ITS_OWN = ("cache", "study", "model/archives")
"""Tokens and converted models; the runs of a study, whose launcher is `false`; the folder of the demo's downloads, into
which the message tells the user to put them."""
STATUSES = (2, 3, 4, 5)


@dataclass
class Outcome:
    """How a program took its input."""

    status: int
    problem: str
    """Empty if it is as it should be."""
    output: str
    seconds: float


def turn_into_conversations(path: Path) -> None:
    """Write the rows of a client in the way of chat data, with a column that a conversation may have."""
    conversations = []
    for row in json.loads(path.read_text()):
        turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        conversations.append({"messages": turns, "category": row["category"], "tools": []})
    path.write_text(json.dumps(conversations))


class Places:
    """Good files, and copies of them to spoil."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._good = Place(folder / "good")
        tiny.make_model(self._good.model)
        tiny.make_federation(self._good.data, sizes=(7, 5))
        turn_into_conversations(self._good.data / "2" / "local_training_1.json")
        tiny.recipe(
            self._good.model,
            self._good.data,
            self._good.runs,
            data__cache_dir=self._good.root / "cache",
            federation__num_rounds=3,
            train__max_steps=2,
            train__keep_optimizer_state=True,
            checkpoint__every_steps=1,
            checkpoint__grace_seconds=2,
            cluster__timeout_seconds=10,
            generation__max_new_tokens=2,
            generation__num_beams=1,
            evaluation__max_examples=2,
        )
        (self._good.root / "ds.json").write_text(Path("ds_configs/zero2.json").read_text())
        argv = [PYTHON, "tests/faults/observed.py", "--config", str(self._good.recipe)]
        with Forked(argv, DS_ACCELERATOR="cpu", FAULT_STEP="stepped 3") as running:
            ended = running.wait(120.0)
        assert ended.returncode == -9, ended.output
        shutil.rmtree(self._good.root / "cache")

    def copy(self, name: str, has_run: bool) -> Place:
        """Fresh files, in a folder of this name."""
        place = Place(self._folder / name)
        shutil.rmtree(place.root, ignore_errors=True)
        shutil.copytree(self._good.root, place.root, symlinks=True)
        if not has_run:
            shutil.rmtree(place.runs)
        for path in (place.recipe, place.run / "config.yaml"):
            if path.exists():
                path.write_text(path.read_text().replace(str(self._good.root), str(place.root)))
        return place


def try_input(places: Places, name: str, one: Input) -> Outcome:
    """Give the input to its program."""
    place = places.copy(name, one.has_run)
    for damage in one.damages:
        harm(place.root, damage)
    before = checksums(place.root)
    words = [place.fill(word).encode(errors="surrogateescape").decode(errors="surrogateescape") for word in one.words]
    started = time.monotonic()
    deadline = started + DEADLINE_SECONDS * (2 if one.program in STARTS_OTHERS else 1)
    command = [PYTHON, f"launch/{one.program}.py", *words]
    with Forked(command, DS_ACCELERATOR="cpu", PIP_NO_INDEX="1") as running:
        while running.process.poll() is None and time.monotonic() < deadline:
            if SERVING in running.output():
                break
            time.sleep(0.02)
        status, output = running.process.poll(), running.output()
    seconds = time.monotonic() - started
    if status is None:
        is_busy = SERVING in output or "round 0" in output or "round 2" in output
        return Outcome(0, "" if is_busy else f"hung for {seconds:.0f} s", output, seconds)
    for folder in NOT_ITS_OWN:
        shutil.rmtree(place.root / folder, ignore_errors=True)
    return Outcome(status, problem_with(status, output, before, checksums(place.root)), output, seconds)


def problem_with(status: int, output: str, before: dict[str, str], after: dict[str, str]) -> str:
    """What is wrong with how a program ended; empty if nothing is."""
    if "Traceback (most recent call last)" in output:
        return "a traceback"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if status == 0:
        return "an error with status 0" if errors else ""
    if status not in STATUSES and "(see above)" not in output:  # the status of a program that this one started
        return f"exit status {status}"
    # A program that starts others names the one that failed, below what that one said.
    own = [line for line in errors if "(see above)" not in line]
    if len(own) > 1 or not errors:
        return f"{len(errors)} error lines"
    if len(errors[0]) > 2000:
        return "an error that nobody reads"
    # What a training had done before it failed stays.
    changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    if changed and "round 0" not in output and "continues after round" not in output:
        return f"refused, and yet changed {changed[:4]}"
    return ""


def try_all(folder: Path, inputs: Mapping[int, Input], num_workers: int) -> list[Outcome]:
    """Every input by its number, `num_workers` at a time; a line for each that went wrong."""
    places = Places(folder)
    names = threading.local()

    def try_one(numbered: tuple[int, Input]) -> Outcome:
        number, one = numbered
        if not hasattr(names, "own"):
            names.own = f"worker_{threading.get_ident()}"
        outcome = try_input(places, names.own, one)
        if outcome.problem:
            last = outcome.output[-3000:] if "traceback" in outcome.problem else outcome.output[-600:]
            print(f"{number} {show(one)}: {outcome.problem}\n{last}\n", flush=True)
        if number % REPORT_EVERY == 0:
            print(f"at input {number}", flush=True)
        return outcome

    with ThreadPoolExecutor(num_workers) as workers:
        return list(workers.map(try_one, inputs.items()))


# ---- harm ------------------------------------------------------------------------------------------------------


def harm(root: Path, damage: Damage) -> None:
    """Do to a file what `damage` says; nothing where there is no such file."""
    found = sorted(root.glob(damage.file)) if "*" in damage.file else [root / damage.file]
    if not found or not (found[-1].exists() or found[-1].is_symlink()):
        return
    if damage.is_sealed and not found[-1].with_name("state.json").exists():  # being written as the run was killed
        return
    path = found[-1]
    match damage.kind:
        case "cut" | "change" | "put" | "take":
            if path.is_file():
                path.write_bytes(spoilt(path.read_bytes(), damage))
        case "remove" | "folder":
            remove(path)
            if damage.kind == "folder":
                path.mkdir()
        case "swap":
            other = sorted(root.glob(damage.value))
            if other and other[-1].is_file() and path.is_file():
                content = path.read_bytes()
                path.write_bytes(other[-1].read_bytes())
                other[-1].write_bytes(content)
        case "value":
            change_value(path, damage)
        case _:
            save_file(other_tensors(load_file(path), damage), path, metadata={"format": "pt"})
    if damage.is_sealed:
        seal(path.parent, root / RUN)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def spoilt(content: bytes, damage: Damage) -> bytes:
    """Bytes cut off, put in, taken out or replaced."""
    at, value = int(damage.at * len(content)), damage.value
    match damage.kind:
        case "cut":
            return content[:at]
        case "put":
            return content[:at] + value + content[at:]
        case "take":
            return content[:at] + content[at + 16 :]
    return content[:at] + value + content[at + len(value) :]


def change_value(path: Path, damage: Damage) -> None:
    """Set one value of a JSON, JSONL or YAML file; of a recipe the field that the damage names."""
    text = path.read_text()
    if path.suffix == ".yaml":
        tree = yaml.safe_load(text)
        if isinstance(damage.value, list) and len(damage.value) == 2 and isinstance(damage.value[0], str):
            tree[damage.value[0]] = damage.value[1]
            path.write_text(yaml.safe_dump(tree))
        else:
            path.write_text(yaml.safe_dump(replaced(tree, damage.at, damage.value)))
        return
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        number = int(damage.at * len(lines))
        lines[number] = json.dumps(replaced(json.loads(lines[number]), damage.at, damage.value))
        path.write_text("\n".join(lines) + "\n")
        return
    tree = json.loads(text)
    if damage.is_sealed:
        tree["info"] = replaced(tree["info"], damage.at, damage.value)
    elif isinstance(damage.value, list) and len(damage.value) == 2 and path.name == "ds.json":
        tree[damage.value[0]] = damage.value[1]
    else:
        tree = replaced(tree, damage.at, damage.value)
    path.write_text(json.dumps(tree))


def replaced(tree: Any, at: float, value: Any) -> Any:
    """`tree` with the value at a share of all its places replaced."""
    places = list(places_of(tree))
    if not places:
        return value
    container, key = places[int(at * len(places))]
    container[key] = value
    return tree


def places_of(tree: Any) -> Any:
    """(container, key) of every value in a tree."""
    keys = range(len(tree)) if isinstance(tree, list) else list(tree) if isinstance(tree, dict) else []
    for key in keys:
        yield tree, key
        yield from places_of(tree[key])


def other_tensors(tensors: dict[str, torch.Tensor], damage: Damage) -> dict[str, torch.Tensor]:
    """A tensor of another shape, kind or value, or under another name."""
    if not tensors:
        return {"x": torch.zeros(1)}
    name = sorted(tensors)[int(damage.at * len(tensors))]
    tensor = tensors[name]
    match damage.kind:
        case "shape":
            shapes = [tensor.flatten(), tensor.unsqueeze(0), torch.cat([tensor, tensor]), tensor[:0]]
            tensors[name] = shapes[damage.value].contiguous()
        case "tensor":
            fills = [float("nan"), float("inf"), 1e38, -1.0]
            tensors[name] = torch.full_like(tensor.float(), fills[damage.value]).to(tensor.dtype)
        case "dtype":
            kinds = [torch.float16, torch.int64, torch.bool, torch.float64]
            tensors[name] = tensor.to(kinds[damage.value])
        case "key":
            del tensors[name]
            if damage.value:
                tensors["x" * damage.value] = tensor
    return tensors


def seal(folder: Path, run: Path) -> None:
    """Make all checksums right: of the folder's files, and of the round's folders."""
    from dpa_ds.runs.storage import _digest

    state = folder / "state.json"
    content = json.loads(state.read_text())
    content["sha256"] = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != state.name}
    if isinstance(content.get("info"), dict):
        content["info_sha256"] = _digest(content["info"])
    state.write_text(json.dumps(content))
    for meta in run.glob("rounds/round_??????/meta.json"):
        manifest = json.loads(meta.read_text())
        manifest["states"] = {name: sha256_of(meta.parent / name) for name in manifest["states"]}
        meta.write_text(json.dumps(manifest))
