"""Where processes listen, also those in a network namespace of their own."""

import ipaddress
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""


def listening(processes: Iterable[psutil.Process]) -> set[tuple[str, int]]:
    """Addresses and ports at which they listen, over TCP."""
    found: set[tuple[str, int]] = set()
    for process in processes:
        with suppress(OSError):  # ended meanwhile
            found |= _of(Path(f"/proc/{process.pid}"))
    return found


def _of(folder: Path) -> set[tuple[str, int]]:
    own = set()
    for link in (folder / "fd").iterdir():
        with suppress(OSError):
            own.add(str(link.readlink()))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in (folder / "net" / name).read_text().splitlines()[1:]:
            _, local, _, state, *fields = line.split()
            inode = fields[5]
            if state == LISTENING and f"socket:[{inode}]" in own:
                address, _, port = local.partition(":")
                found.add((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    """From hexadecimal words in the byte order of this machine."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
