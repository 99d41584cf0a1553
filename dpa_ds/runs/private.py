"""A run in two parts: what all groups may see, and what the clients of a group keep to themselves.

    OUTPUT_DIR/NAME/...                                       the common part: as in `folder.py`, without `local/`
    PRIVATE_DIR/NAME/rounds/round_000003/local/client_02/...  a client as it was saved in round 3
                     rounds/round_000004/progress/client_02/  how far it has come in round 4
                     evaluations/.../answers/                 its answers
                     config.yaml                              the run that this belongs to
    PRIVATE_DIR/tokens/...                                    tokenised data

Whether a round counts is the common part's alone to say. There `meta.json` of a complete round names for each client
the round that it was last saved in (`last_saved`), so a client that is absent stays where it is, and only its group
touches it. A copy that no complete round names was left by a job that ended before its round counted: it is not read,
and is replaced or deleted.
"""

import contextlib
import glob
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import peft

from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.paths import expand
from dpa_ds.errors import CheckpointError, ConfigError, storage_errors
from dpa_ds.runs.folder import (
    LAST_SAVED,
    PROGRESS,
    RunFolder,
    SavedAdapter,
    client_name,
    clients_below,
    local_folder,
    round_name,
    round_number,
)
from dpa_ds.runs.storage import fsync, is_whole, make_folder, well_formed

GROUP = "{group}"
"""Stands in `private_dir` for the number of a rank group."""
_NUMBER = re.compile("[0-9]{1,9}")


def open_run_folder(run_dir: Path, private_dir: str | None, group: int | None) -> RunFolder:
    """The folder of a run: in one part, or with `private_dir` in two.

    Args:
        private_dir: of the recipe.
        group: of this process; None: it belongs to no group, and reads what can be seen here of all of them.

    Raises:
        ConfigError: a variable of `private_dir` is not set here, or it lies in the common part.
    """
    if private_dir is None:
        return RunFolder(run_dir)
    template = str(expand(private_dir, "private_dir"))
    places = [place / run_dir.name for place in _visible(template)]
    places = [place for place in places if os.access(place, os.R_OK | os.X_OK)]
    own = None
    if group is not None or GROUP not in template:
        own = Path(template.replace(GROUP, str(group))) / run_dir.name
        places = [own, *(place for place in places if place != own)]
    for place in places:
        if place.resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(f"private_dir: {place} lies in the common folder {run_dir}: choose another folder")
    return SplitRunFolder(run_dir, template, own, places)


def _visible(template: str) -> list[Path]:
    """The folders that are there, by the number of their group."""
    if GROUP not in template:
        return [Path(template)]
    before, _, after = template.partition(GROUP)
    found = {}
    for path in glob.glob(glob.escape(before) + "*" + glob.escape(after)):
        number = path[len(before) : len(path) - len(after)]
        if _NUMBER.fullmatch(number):
            found[int(number)] = Path(path)
    return [found[number] for number in sorted(found)]


class SplitRunFolder(RunFolder):
    """A run whose clients keep their files in folders of their groups.

    Args:
        template: `private_dir`, of which `{group}` alone is not replaced.
        own: run folder of this process' group; None: it only reads.
        places: run folders of all groups that can be seen here, the own one first.
    """

    def __init__(self, run_dir: Path, template: str, own: Path | None, places: Sequence[Path]) -> None:
        super().__init__(run_dir)
        self._template = template
        self._own = own
        self._places = list(places)

    # ---- which run, which clients -----------------------------------------------------------------------------

    @property
    def own_part(self) -> Path:
        """Run folder of this process' group."""
        assert self._own is not None, "a process of no group does not train"
        return self._own

    @property
    def private_places(self) -> list[Path]:
        """See `RunFolder.private_places`."""
        return self._places

    def describe_parts(self) -> str:
        """See `RunFolder.describe_parts`."""
        return f"what clients keep to themselves goes to {self._template}/{self.run_dir.name}"

    def check_parts(self, server_round: int) -> None:
        """See `RunFolder.check_parts`."""
        if LAST_SAVED not in self.read_meta(server_round):
            raise CheckpointError(
                f"{self.run_dir} was trained without private_dir: it holds what its clients keep to themselves; "
                "leave private_dir out (--private_dir null), or choose another name"
            )

    def clients(self, server_round: int) -> list[int]:
        """See `RunFolder.clients`."""
        return [client for client, saved in enumerate(self._last_saved(server_round)) if saved]

    def clients_here(self, server_round: int) -> list[int]:
        """See `RunFolder.clients_here`."""
        last_saved = self._last_saved(server_round)
        return [client for client in self.clients(server_round) if self._copies(last_saved[client], client)]

    def place_of(self, server_round: int, client: int) -> Path:
        """See `RunFolder.place_of`."""
        folder = self.adapter_dir(server_round, local_folder(client))
        return next(place for place in self._places if folder.is_relative_to(place))

    def adapter_dir(self, server_round: int, name: str) -> Path:
        """See `RunFolder.adapter_dir`."""
        if name == GLOBAL:
            return super().adapter_dir(server_round, name)
        client = _client_of(name)
        folder = self._find(server_round, client)
        if folder is None:
            raise CheckpointError(f"{self.run_dir} has no client {client} after round {server_round}")
        return folder

    def _last_saved(self, server_round: int) -> list[int]:
        """By client, the round whose copy belongs to a complete round; 0 where there is none."""
        meta = self.read_meta(server_round)
        round_dir = self.round_dir(server_round)
        with well_formed(round_dir, f"delete {round_dir} to continue from the round before"):
            return [int(saved) for saved in meta[LAST_SAVED]]

    def _copies(self, server_round: int, client: int) -> list[Path]:
        """Where this client's copy of a round is, the own place first."""
        folders = [place / "rounds" / round_name(server_round) / local_folder(client) for place in self._places]
        return [folder for folder in folders if os.path.isdir(folder)]  # unlike Path.is_dir also where it is closed

    def _find(self, server_round: int, client: int) -> Path | None:
        """The copy of a client that belongs to a complete round; None: there is none, it starts from scratch.

        Raises:
            CheckpointError: there is one, and it cannot be seen here.
        """
        saved = self._last_saved(server_round)[client]
        if saved == 0:
            return self._newest_uncounted(server_round, client)
        copies = self._copies(saved, client)
        if not copies:
            wanted = f"{self._template}/{self.run_dir.name}/rounds/{round_name(saved)}/{local_folder(client)}"
            raise CheckpointError(
                f"the adapter of client {client} after round {server_round} is not at {wanted}: mount or copy the "
                "folder that has it, set private_dir to where it is, or run this as the user who may read it; if it is "
                "lost, delete "
                f"{self.round_dir(server_round)} to continue from the round before"
            )
        for folder in copies:
            if is_whole(folder):
                return folder
        return copies[0]

    def _newest_uncounted(self, last_round: int, client: int) -> Path | None:
        """The newest whole copy of a client that no round has ever counted: the only one there is."""
        for number in reversed(self._private_rounds()):
            if number > last_round:
                continue
            for folder in self._copies(number, client):
                if is_whole(folder):
                    return folder
        return None

    def _private_rounds(self) -> list[int]:
        """Rounds of which some place has something, ascending."""
        numbers = set()
        for place in self._places:
            for path in place.glob("rounds/round_*"):
                number = round_number(path)
                if number is not None:
                    numbers.add(number)
        return sorted(numbers)

    # ---- writing and reading ----------------------------------------------------------------------------------

    def save_adapter(
        self,
        server_round: int,
        name: str,
        weights: AdapterState,
        config: peft.LoraConfig,
        extras: Mapping[str, AdapterState],
        info: Mapping[str, Any],
    ) -> None:
        """See `RunFolder.save_adapter`."""
        if name != GLOBAL:
            # What an earlier process left of this round, which did not count, here or where the client was before.
            for folder in self._copies(server_round, _client_of(name)):
                shutil.rmtree(folder, ignore_errors=True)
            self._make_private(self._saving_dir(server_round, name))
        super().save_adapter(server_round, name, weights, config, extras, info)
        if name != GLOBAL:
            rounds_dir = self.own_part / "rounds"
            with storage_errors(rounds_dir):
                for folder in (rounds_dir / round_name(server_round), rounds_dir):
                    fsync(folder)

    def save_progress(
        self,
        server_round: int,
        client: int,
        tensors: Mapping[str, AdapterState],
        info: Mapping[str, Any],
        kept: Sequence[str] = (),
    ) -> None:
        """See `RunFolder.save_progress`."""
        self._make_private(self._progress(server_round, client))
        super().save_progress(server_round, client, tensors, info, kept)

    def _make_private(self, folder: Path) -> None:
        """Make a folder of the own part, and those above it, all closed to others."""
        with storage_errors(folder):
            for parent in (*reversed(folder.parents), folder):
                if parent.is_relative_to(self.own_part):
                    make_folder(parent, private=True)

    def carry_over(self, server_round: int, clients: Sequence[int]) -> None:
        """An absent client stays where it is: `complete_round` says in which round it was last saved."""

    def complete_round(self, server_round: int, meta: Mapping[str, Any], keep_rounds: int) -> None:
        """See `RunFolder.complete_round`."""
        last_saved = [server_round] * len(meta["clients"])
        earlier = [number for number in self.complete_rounds() if number < server_round]
        for client in meta["absent"]:
            last_saved[client] = self._last_saved(earlier[-1])[client] if earlier else 0
        super().complete_round(server_round, {**meta, LAST_SAVED: last_saved}, keep_rounds)

    def load_newest(self, server_round: int, name: str) -> SavedAdapter | None:
        """See `RunFolder.load_newest`."""
        if name == GLOBAL:
            return super().load_newest(server_round, name)
        while True:
            try:
                folder = self._find(server_round, _client_of(name))
                return None if folder is None else self._load(self.round_dir(server_round), folder)
            except CheckpointError:
                latest = self.latest_round()
                if latest == server_round:
                    raise
                server_round = latest

    def has_progress(self) -> bool:
        """See `RunFolder.has_progress`."""
        return super().has_progress() or any(any(place.glob(f"rounds/*/{PROGRESS}/*/*")) for place in self._places)

    def _saving_dir(self, server_round: int, name: str) -> Path:
        if name == GLOBAL:
            return super()._saving_dir(server_round, name)
        return self.own_part / "rounds" / round_name(server_round) / name

    def _progress(self, server_round: int, client: int) -> Path:
        return self.own_part / "rounds" / round_name(server_round) / PROGRESS / client_name(client)

    def _progress_places(self, server_round: int, client: int) -> list[Path]:
        rounds = [place / "rounds" / round_name(server_round) for place in self._places]
        return [folder / PROGRESS / client_name(client) for folder in rounds]

    # ---- deleting ---------------------------------------------------------------------------------------------

    def remove_private_leftovers(self, clients: Sequence[int], completed: int) -> None:
        """See `RunFolder.remove_private_leftovers`."""
        self.delete_private_rounds()
        for number in self._private_rounds():
            if number > completed + 1:
                for client in clients:
                    shutil.rmtree(self._progress(number, client), ignore_errors=True)

    def delete_private_rounds(self) -> None:
        """See `RunFolder.delete_private_rounds`.

        Copies that a complete round names are kept, and those of rounds that may yet count. A client that was never
        saved in a round that counted keeps its newest copy.
        """
        complete = self.complete_rounds()
        try:
            needed = self._needed_copies(complete)
        except CheckpointError:  # the others deleted a round in this moment: the next round tries again
            return
        for number in self._private_rounds():
            # What is later may yet count.
            if complete and number <= complete[-1]:
                for place in self._places:
                    _delete_all_but(place / "rounds" / round_name(number), needed[number])

    def _needed_copies(self, complete: Sequence[int]) -> dict[int, set[int]]:
        """Round -> the clients whose copies of that round are needed.

        Raises:
            CheckpointError: a round cannot be read.
        """
        needed: dict[int, set[int]] = defaultdict(set)
        for number in complete:
            for client, saved in enumerate(self._last_saved(number)):
                only_copy = None
                if saved == 0:
                    only_copy = self._newest_uncounted(number, client)
                if only_copy is not None:
                    saved = round_number(only_copy.parents[1]) or 0
                needed[saved].add(client)
        return needed


def _delete_all_but(round_dir: Path, needed: Set[int]) -> None:
    """Delete what a private round holds, but for the copies of the clients `needed`."""
    shutil.rmtree(round_dir / PROGRESS, ignore_errors=True)
    for client in clients_below(round_dir):
        if client not in needed:
            shutil.rmtree(round_dir / local_folder(client), ignore_errors=True)
    for folder in (round_dir / LOCAL, round_dir):
        with contextlib.suppress(OSError):
            folder.rmdir()  # only where nothing is left in it


def _client_of(name: str) -> int:
    """Id of the client whose folder `local_folder` names."""
    return int(name.rpartition("_")[2])
