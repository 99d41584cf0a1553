"""State of a run on disk, after each round and inside the current one, in PEFT's own format.

    runs/NAME/rounds/round_000003/global/{adapter_model.safetensors, adapter_config.json, state.json}
                                  local/client_02/{..., references.safetensors, optimizer.safetensors}
                                  meta.json               written last: the round is complete; checksums of all
                                  state.json
    runs/NAME/rounds/round_000004.tmp/progress/client_02/000017/...        how far a client has come in round 4
    runs/NAME/adapters -> rounds/round_000003

Every leader writes its clients; the coordinator the rest. All hosts see the folder (a shared file system). The
frozen base is never written. Folders that are named otherwise are somebody else's: they are not read, and not deleted.

Only the owner may read what a client keeps to itself (`local/client_02`, `progress/client_02`); for the rest the umask
decides. With `private_dir` it lies in another folder: `private.py`.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import peft

from dpa_ds import __version__
from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.adapters.state import AdapterState
from dpa_ds.errors import CheckpointError, ConfigError, list_some, storage_errors
from dpa_ds.runs.storage import (
    STATE,
    UNREADABLE,
    SavedFolder,
    check_finite,
    copy_folder,
    fsync,
    is_whole,
    make_folder,
    read_folder,
    read_info,
    sha256_of,
    well_formed,
    write_folder,
    write_text,
)

META, MODEL = "meta.json", "model.json"
LAST_SAVED = "last_saved"
"""Key of `meta.json` where clients' parts lie elsewhere: the round that each was last saved in, 0 for never."""
WEIGHTS, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"
_ALWAYS_WRITTEN = ("base_model_name_or_path", "bias", "lora_alpha", "lora_dropout", "peft_type", "r", "task_type")
"""Fields of PEFT's LoraConfig that every version knows, and that say what the adapter is."""
PROGRESS = "progress"
LINK = "adapters"
PACKAGES = ("torch", "deepspeed", "transformers", "peft")
_NUMBER = re.compile("[0-9]{1,9}")
_ROUND = re.compile(r"round_([0-9]{6,})(\.tmp)?")
_CLIENT = re.compile(r"client_([0-9]{2,})")
_HALF_WRITTEN = re.compile(r"(config\.yaml|[a-z_]+\.jsonl?)\..+\.\d+\.tmp")
"""Names of files in the run folder whose writer ended before they were whole (`storage.write_file`)."""


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter as it lies on disk."""

    weights: AdapterState
    extras: dict[str, AdapterState]
    """Further tensors by name, such as `optimizer` and `references`."""
    info: dict[str, Any]
    """What the saver added, such as the number of steps taken."""


def local_folder(client_id: int) -> str:
    """Name of a client's adapter in a round: `local/client_02`."""
    return f"{LOCAL}/{client_name(client_id)}"


def describe_adapter(config: peft.LoraConfig) -> str:
    """Content of `adapter_config.json`: of the fields that PEFT has by default only those with another value.

    PEFT 0.11 and 0.13 refuse a file with a field that is newer than they are.
    """
    usual = asdict(type(config)())
    content = {}
    for name, value in asdict(config).items():
        if isinstance(value, set):
            value = sorted(value)
        if name in _ALWAYS_WRITTEN or (name != "peft_version" and value != usual[name]):
            content[name] = value
    return json.dumps(content, indent=2, sort_keys=True)


def round_number(path: Path) -> int | None:
    """Number of a complete round, by its folder; None: it is not named as one."""
    match = _ROUND.fullmatch(path.name)
    if match is None or path.name != round_name(int(match[1])):
        return None
    return int(match[1])


def client_name(client_id: int) -> str:
    """Name of a client's folders: `client_02`."""
    return f"client_{client_id:02d}"


def round_name(server_round: int) -> str:
    """Name of a complete round's folder: `round_000003`."""
    return f"round_{server_round:06d}"


def _numbered(folder: Path) -> list[Path]:
    """What lies in `folder` under a number, in the order of the numbers; what else a user may have put there is left
    alone."""
    return sorted((path for path in folder.glob("*") if _NUMBER.fullmatch(path.name)), key=lambda path: int(path.name))


class RunFolder:
    """The rounds of one run on disk, with all that its clients keep to themselves.

    Where a client's files lie is known to a few methods alone, which `private.SplitRunFolder` answers in another way.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.rounds_dir = run_dir / "rounds"
        self._held: IO[bytes] | None = None

    # ---- which run, which round -------------------------------------------------------------------------------

    def check_model(self, fingerprint: str) -> None:
        """Refuse a base model other than the one that this run was trained over, wherever it lies now.

        Raises:
            CheckpointError: `model.json` of the run names another fingerprint, or cannot be read.
        """
        path = self.run_dir / MODEL
        try:
            recorded = json.loads(path.read_text())["fingerprint"] if path.exists() else fingerprint
        except UNREADABLE as error:
            raise CheckpointError(
                f"{path} cannot be read ({repr(error)[:200]}): restore it; or delete it, if you are sure that "
                "model.path is the base that this run was trained over"
            ) from error
        if recorded != fingerprint:
            raise CheckpointError(
                f"the base model, or its chat template, differs from the one that {self.run_dir} was trained over (see "
                f"{path}): its adapters mean nothing on another; set model.path to the right one"
            )

    def latest_round(self) -> int:
        """Last complete round, 0 if there is none."""
        return max(self.complete_rounds(), default=0)

    def complete_rounds(self) -> list[int]:
        """All complete rounds, in their order."""
        return [number for number in self._numbers(self.round_dir) if self.is_complete(number)]

    def unfinished_rounds(self) -> list[int]:
        """All rounds that were begun and are not complete, in their order."""
        return self._numbers(self._unfinished)

    def is_complete(self, server_round: int) -> bool:
        """Whether the round counts."""
        return (self.round_dir(server_round) / META).exists()

    def _numbers(self, place: Callable[[int], Path]) -> list[int]:
        """Numbers of the rounds whose folder is `place(number)`, ascending."""
        numbers = []
        for path in self.rounds_dir.glob("round_*"):
            match = _ROUND.fullmatch(path.name)
            if match and place(int(match[1])) == path:
                numbers.append(int(match[1]))
        return sorted(numbers)

    def hold_trained_round(self) -> int:
        """The last complete round, which no training deletes as long as this object lives.

        Held by a shared lock of its `meta.json`; on a file system without locks it is not held.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        while True:
            server_round = self.latest_round()
            if server_round == 0:
                raise CheckpointError(f"{self.run_dir} has no complete round yet: train it with launch/run.py first")
            path = self.round_dir(server_round) / META
            try:
                self._held = path.open("rb")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read ({error}): make it readable") from error
            with contextlib.suppress(OSError):  # no locks on this file system
                fcntl.flock(self._held, fcntl.LOCK_SH)
            # It may have been deleted between the look and the lock: then there is a later one.
            if path.exists():
                self.check_parts(server_round)
                return server_round

    def round_dir(self, server_round: int) -> Path:
        """Where a complete round lies."""
        return self.rounds_dir / round_name(server_round)

    def read_meta(self, server_round: int) -> dict[str, Any]:
        """`meta.json` of a complete round.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = self.round_dir(server_round) / META
        try:
            return dict(json.loads(path.read_text()))
        except UNREADABLE as error:
            raise CheckpointError(f"{path} cannot be read ({error}): restore it") from error

    # ---- where a client's files lie ---------------------------------------------------------------------------

    @property
    def own_part(self) -> Path:
        """Run folder of what the clients of this process' group keep to themselves."""
        return self.run_dir

    def describe_parts(self) -> str:
        """A line for the start of a run."""
        return f"what clients keep to themselves goes to the common folder {self.run_dir} (private_dir is null)"

    @property
    def private_places(self) -> list[Path]:
        """Run folders that hold what clients keep to themselves, as far as they can be seen here."""
        return [self.run_dir]

    def check_parts(self, server_round: int) -> None:
        """Refuse a complete round that was saved in one part where two are asked for, or the reverse.

        Raises:
            CheckpointError: so it is.
        """
        if LAST_SAVED in self.read_meta(server_round):
            raise CheckpointError(
                f"{self.run_dir} was trained with private_dir: what its clients keep to themselves is not in it; "
                "set private_dir to where it is"
            )

    def clients(self, server_round: int) -> list[int]:
        """Ids of the clients whose local adapters belong to a complete round."""
        return clients_below(self.round_dir(server_round))

    def find_clients(self, wanted: Sequence[int | str], server_round: int) -> list[int]:
        """Ids of the clients that are given by their ids or names, ascending and each once.

        A name is a client's label, or that part of it, its own name or its task, that no other label has.

        Raises:
            ConfigError: the complete round has no such client, or several.
        """
        round_dir = self.round_dir(server_round)
        with well_formed(round_dir, f"delete {round_dir} to use the round before"):
            names = self.read_meta(server_round)["clients"]
            labels = {client: str(names[client]) for client in self.clients(server_round)}
        found = set()
        for one in wanted:
            matches = _find_label(one, labels)
            if len(matches) != 1:
                problem = "has no client" if not matches else "has several clients"
                known = list_some([f"{client} ({label})" for client, label in labels.items()])
                raise ConfigError(f"{self.run_dir} {problem} {one}: its clients are {known}")
            found.add(matches[0])
        return sorted(found)

    def clients_here(self, server_round: int) -> list[int]:
        """Of `clients` those whose files can be seen here."""
        return self.clients(server_round)

    def place_of(self, server_round: int, client: int) -> Path:
        """Run folder of all that a client keeps to itself after a complete round.

        Raises:
            CheckpointError: it cannot be seen here.
        """
        return self.run_dir

    def adapter_dir(self, server_round: int, name: str) -> Path:
        """Where an adapter of a complete round lies.

        Raises:
            CheckpointError: it cannot be seen here.
        """
        return self.round_dir(server_round) / name

    def remove_private_leftovers(self, clients: Sequence[int], completed: int) -> None:
        """Before the first round: delete of these clients what cannot be of use after round `completed`. Leaders."""

    def delete_private_rounds(self) -> None:
        """After a round counts: delete what no complete round needs. Leaders."""

    def _saving_dir(self, server_round: int, name: str) -> Path:
        """Where an adapter of a round is written that does not count yet."""
        return self._unfinished(server_round) / name

    def _progress(self, server_round: int, client: int) -> Path:
        """Where it is written how far a client has come in a round."""
        return self._unfinished(server_round) / PROGRESS / client_name(client)

    def _progress_places(self, server_round: int, client: int) -> list[Path]:
        """Where it may have been written."""
        return [self._progress(server_round, client)]

    # ---- a round ----------------------------------------------------------------------------------------------

    def digest(self, server_round: int) -> str:
        """Which adapters a complete round holds, from the checksums that were saved with them: 16 hex digits."""
        states = sorted(self.round_dir(server_round).glob(f"**/{STATE}"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in states)).hexdigest()[:16]

    def save_adapter(
        self,
        server_round: int,
        name: str,
        weights: AdapterState,
        config: peft.LoraConfig,
        extras: Mapping[str, AdapterState],
        info: Mapping[str, Any],
    ) -> None:
        """Write one adapter ("global", "local/client_02") of a round that is not yet complete. Leaders only."""
        folder, private = self._saving_dir(server_round, name), name != GLOBAL
        with storage_errors(folder):
            make_folder(folder, private)
            write_text(folder / ADAPTER_CONFIG, describe_adapter(config))
        write_folder(folder, {WEIGHTS: weights, **extras}, info, private)

    def carry_over(self, server_round: int, clients: Sequence[int]) -> None:
        """Give a round that is not yet complete the local adapters of `clients` as they were before it.

        Where no earlier round has one, what a leader wrote whole before it was lost stays.
        """
        for client in clients:
            name = local_folder(client)
            old, new = self.newest_round_with(server_round - 1, name), self._unfinished(server_round) / name
            if old is not None:
                copy_folder(old / name, new)
            elif not is_whole(new):
                shutil.rmtree(new, ignore_errors=True)

    def newest_round_with(self, last_round: int, name: str) -> Path | None:
        """The folder of the newest round up to `last_round` that has an adapter whole: of the complete rounds, then of
        those that were written and never completed."""
        complete = [self.round_dir(number) for number in self.complete_rounds() if number <= last_round]
        abandoned = [self._unfinished(number) for number in self.unfinished_rounds() if number <= last_round]
        for round_dir in (*reversed(complete), *reversed(abandoned)):
            if is_whole(round_dir / name):
                return round_dir
        return None

    def complete_round(self, server_round: int, meta: Mapping[str, Any], keep_rounds: int) -> None:
        """Make the round count: coordinator, after all leaders have saved. Keeps the last `keep_rounds` rounds.

        May be called again by the next coordinator, wherever the first one was lost.
        """
        final = self.round_dir(server_round)
        with storage_errors(final):
            if not self.is_complete(server_round):
                self._write_manifest(server_round, meta)
                if final.exists():  # what is left of a round of that number
                    shutil.rmtree(final)
                self._unfinished(server_round).rename(final)
                fsync(self.rounds_dir)
            self.repair_link(server_round)
        # The new round counts, whatever becomes of old ones.
        shutil.rmtree(final / PROGRESS, ignore_errors=True)
        self._delete_old_rounds(keep_rounds)

    def _write_manifest(self, server_round: int, meta: Mapping[str, Any]) -> None:
        unfinished = self._unfinished(server_round)
        paths = [*unfinished.glob(f"global/{STATE}"), *unfinished.glob(f"local/*/{STATE}")]
        states = {str(path.relative_to(unfinished)): sha256_of(path) for path in sorted(paths)}
        # Our own is not asked of the metadata: a checkout that was never installed has none.
        versions = {"dpa_ds": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
        manifest = {"round": server_round, **meta, "versions": versions, "states": states}
        write_text(unfinished / META, json.dumps(manifest, indent=1))
        fsync(unfinished)

    def _delete_old_rounds(self, keep_rounds: int) -> None:
        """Delete all complete rounds but the last `keep_rounds`, the last copy of a client, and what somebody reads."""
        rounds = self.complete_rounds()
        covered: set[int] = set()
        for number in rounds[-keep_rounds:]:
            covered.update(clients_below(self.round_dir(number)))
        for number in reversed(rounds[:-keep_rounds]):
            clients = clients_below(self.round_dir(number))
            if covered.issuperset(clients):
                self._delete_round(number)
            covered.update(clients)

    def _delete_round(self, server_round: int) -> None:
        """Delete a complete round, unless somebody holds it: then a later round tries again."""
        meta = self.round_dir(server_round) / META
        try:
            with meta.open("r+b") as file:  # some file systems lock what may be written only
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                except OSError:  # no locks on this file system
                    pass
                meta.unlink()  # first: what is deleted halfway is not a round
        except OSError:
            return
        shutil.rmtree(meta.parent, ignore_errors=True)

    # ---- the link to the last round ---------------------------------------------------------------------------

    def check_link(self) -> None:
        """Refuse a folder or file in the place of the link to the last round.

        Raises:
            CheckpointError: so it is.
        """
        link = self.run_dir / LINK
        if link.exists() and not link.is_symlink():
            raise CheckpointError(
                f"{link} is no link, which training sets to the last round (a run that was copied with its links "
                "followed?): delete it, or give it another name, and run the same command again"
            )

    def repair_link(self, server_round: int) -> None:
        """Make `adapters` point to a complete round. Coordinator.

        Raises:
            CheckpointError: the file system refuses.
        """
        link, target = self.run_dir / LINK, self.round_dir(server_round).relative_to(self.run_dir)
        if link.is_symlink() and link.readlink() == target:
            return
        with storage_errors(link):
            temporary = link.with_name(f"{LINK}.tmp")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            temporary.replace(link)
            fsync(self.run_dir)

    # ---- reading a round --------------------------------------------------------------------------------------

    def load_adapter(self, server_round: int, name: str) -> SavedAdapter:
        """Read one adapter of a complete round, checking its checksums.

        Raises:
            CheckpointError: a file is missing or damaged, or the adapter has NaN or infinity.
        """
        return self._load(self.round_dir(server_round), self.adapter_dir(server_round, name))

    def _load(self, round_dir: Path, folder: Path) -> SavedAdapter:
        """Read an adapter that belongs to a complete round: whoever deletes that does without the adapter."""
        remedy = f"delete {round_dir} to continue from the round before"
        saved = read_folder(folder, remedy)
        if WEIGHTS not in saved.tensors:
            raise CheckpointError(f"{folder} has no {WEIGHTS}.safetensors: {remedy}")
        remedy = f"delete {round_dir} to use the round before, or train again"
        check_finite(folder, saved.tensors[WEIGHTS], remedy)
        extras = {key: tensors for key, tensors in saved.tensors.items() if key != WEIGHTS}
        return SavedAdapter(saved.tensors[WEIGHTS], extras, saved.info)

    def load_newest(self, server_round: int, name: str) -> SavedAdapter | None:
        """`load_adapter`, of a later round if this one is gone: other groups continue, and delete, while one starts.

        The local adapters of clients that are not there are the same in all rounds that they miss. A client that the
        last round lacks is read where it was last written.

        Returns:
            None if no round has such an adapter.

        Raises:
            CheckpointError: as `load_adapter`.
        """
        while True:
            try:
                if (self.round_dir(server_round) / name).is_dir():
                    return self.load_adapter(server_round, name)
            except CheckpointError:
                if self.latest_round() == server_round:
                    raise
            latest = self.latest_round()
            if latest == server_round:
                break
            server_round = latest
        if name == GLOBAL:  # an older one is the state of another round
            return None
        older = self.newest_round_with(server_round, name)
        return None if older is None else self._load(older, older / name)

    def info(self, server_round: int, name: str) -> dict[str, Any]:
        """What the saver added to an adapter of a complete round, without reading its tensors.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return read_info(self.adapter_dir(server_round, name), "restore it, or delete that round")

    # ---- inside a round ---------------------------------------------------------------------------------------

    def save_progress(
        self,
        server_round: int,
        client: int,
        tensors: Mapping[str, AdapterState],
        info: Mapping[str, Any],
        kept: Sequence[str] = (),
    ) -> None:
        """Write how far a client has come in a round; what was there before is deleted afterwards. Its leader only.

        Of no use, and not an error, once other groups have completed the round without this one, and closed its folder.

        Args:
            kept: names of tensors that stay as they were saved before.
        """
        folder = self._progress(server_round, client)
        older = _numbered(folder)
        number = int(older[-1].name) + 1 if older else 0
        new = folder / f"{number:06d}"
        try:
            with storage_errors(new):
                make_folder(folder, private=True)
                make_folder(new, private=True)
                for name in kept:
                    file = older[-1] / f"{name}.safetensors"
                    if file.exists():  # a method without a global phase has no update
                        shutil.copyfile(file, new / file.name)
            write_folder(new, tensors, info, private=True)
        except CheckpointError:
            if self.latest_round() < server_round:
                raise
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    def load_progress(
        self, server_round: int, client: int, on_damage: Callable[[CheckpointError], None]
    ) -> SavedFolder | None:
        """The newest whole progress of a client in a round, if there is one; `on_damage` is reported what was
        passed over."""
        for place in self._progress_places(server_round, client):
            for folder in reversed(_numbered(place)):
                if (folder / STATE).exists():  # else the write was interrupted
                    try:
                        return read_folder(folder, "what came before it is used")
                    except CheckpointError as error:
                        on_damage(error)
        return None

    def has_progress(self) -> bool:
        """Whether some round was begun and is not complete."""
        return bool(self.unfinished_rounds())

    def remove_leftovers(self, completed: int) -> None:
        """Delete what cannot be of use after round `completed`. Coordinator, before any round starts."""
        covered: set[int] = set()
        for number in self.complete_rounds():
            covered.update(clients_below(self.round_dir(number)))
            shutil.rmtree(self.round_dir(number) / PROGRESS, ignore_errors=True)
        for number in reversed(self.unfinished_rounds()):
            if number == completed + 1:
                self._remove_all_but_progress(number)
            elif number > completed or covered.issuperset(self._saved_clients(number)):
                shutil.rmtree(self._unfinished(number), ignore_errors=True)
            else:  # the last copy of a client, of a round that never counted
                covered.update(self._saved_clients(number))
        for number in self._numbers(self.round_dir):
            if number <= completed and not self.is_complete(number):  # its deletion was interrupted
                shutil.rmtree(self.round_dir(number), ignore_errors=True)
        for path in self.run_dir.glob("*.tmp"):
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _remove_all_but_progress(self, server_round: int) -> None:
        for path in self._unfinished(server_round).iterdir():
            if path.name == PROGRESS:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _saved_clients(self, server_round: int) -> list[int]:
        """Ids of the clients whose local adapters a round that is not complete has whole."""
        unfinished = self._unfinished(server_round)
        return [client for client in clients_below(unfinished) if is_whole(unfinished / local_folder(client))]

    def _unfinished(self, server_round: int) -> Path:
        return self.rounds_dir / f"{round_name(server_round)}.tmp"


def _find_label(wanted: int | str, labels: Mapping[int, str]) -> list[int]:
    """Ids of the clients that `wanted` may mean; an id, or a whole label, means no other."""
    for client in labels:
        if str(wanted) == str(client):
            return [client]
    for client, label in labels.items():
        if wanted == label:
            return [client]
    found = []
    for client, label in labels.items():
        if label.startswith(f"{wanted} ") or label.endswith(f" {wanted}"):
            found.append(client)
    return found


def clients_below(round_dir: Path) -> list[int]:
    """Ids of the clients that a round has a folder of, ascending."""
    matches = [_CLIENT.fullmatch(path.name) for path in (round_dir / LOCAL).glob("client_*")]
    return sorted(int(match[1]) for match in matches if match)
