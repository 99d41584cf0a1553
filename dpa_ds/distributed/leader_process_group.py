"""torchft's process group, formed through the store behind the rendezvous' gate. Imports torchft, which takes long."""

from datetime import timedelta
from typing import Any

from torchft import ProcessGroupGloo

from dpa_ds.distributed.launchers import LOOPBACK


class LeaderProcessGroup(ProcessGroupGloo):  # type: ignore[misc]  # torchft has no types
    """gloo between the leaders that are present.

    torchft has all leaders meet at a store of the first one, which anybody could write to.

    Args:
        store_port: port of this host's loopback interface that leads to the store of all leaders.
    """

    def __init__(self, store_port: int, timeout: timedelta) -> None:
        super().__init__(timeout=timeout)
        self._store_port = store_port

    def configure(self, store_addr: str, *args: Any, **kwargs: Any) -> None:
        """Form the group once more.

        Args:
            store_addr: host:port/prefix, where torchft would meet; all of it is the prefix here, so that it is unique.
        """
        super().configure(f"{LOOPBACK}:{self._store_port}/{store_addr}", *args, **kwargs)
