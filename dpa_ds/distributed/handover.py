"""What a leader that is behind receives from one that is not: a fixed schema, and nothing that could run code.

torchft's own transport unpickles what any address sends it. This one has both sides prove the job's secret, and carries
one safetensors file: two vectors, and a few numbers in its header. Sizes are checked before memory is taken.
"""

import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import safetensors
import safetensors.torch
import torch

from dpa_ds.distributed.launchers import ANY_PORT
from dpa_ds.distributed.secret import Refused, prove_as_client, prove_as_server, receive_exactly
from dpa_ds.distributed.tunnel import listen

logger = logging.getLogger(__name__)

NUMBERS = ("step", "batches_committed", "completed_rounds")
"""Whole numbers of a handover, the first two torchft's own."""
TENSORS = ("shared", "result")
DTYPES = (torch.float32, torch.float64, torch.int16, torch.int32, torch.int64)
LARGEST_NUMBER = 2**53
SIZE_BYTES = 8
HEADER_KEY = "handover"

State = dict[str, Any]
"""What torchft hands over: its own numbers, and ours (`elastic._Handover.to_dict`)."""


class HandoverTransport:
    """A `CheckpointTransport` of torchft (0.2.0), by its methods: nothing of that class is used.

    Args:
        host: address of this host where the others reach it.
        secret: of the job.
        most_bytes: what a handover may have, at most.
    """

    def __init__(self, host: str, secret: bytes, most_bytes: Callable[[], int], timeout_seconds: float) -> None:
        self._secret = secret
        self._most_bytes = most_bytes
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        self._step = -1
        self._file = b""
        self._listener = listen(host, port=ANY_PORT)
        self._address = f"{host}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, name="handover", daemon=True).start()

    # ---- called by torchft ------------------------------------------------------------------------------------

    def metadata(self) -> str:
        """Where the others find this leader's state: host:port."""
        return self._address

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: State, timeout: timedelta) -> None:
        """Have the state ready for whoever is behind and comes for `step`."""
        with self._changed:
            self._file = encode(state_dict)
            self._step = step
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """From now on the state may change: nobody gets it who has not come yet."""
        with self._changed:
            self._step = -1
            self._file = b""

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> State:
        """The state of the leader at the address `metadata`.

        Raises:
            Refused, OSError: it does not know the secret, sends something else, or does not answer.
        """
        try:
            return self._receive(metadata, step, timeout.total_seconds())
        except (Refused, OSError) as error:
            logger.warning("refused the state that %.100r offers: %s", metadata, error)
            raise

    def shutdown(self, wait: bool = True) -> None:
        """Answer nobody any more."""
        self._listener.close()

    # ---- one connection ---------------------------------------------------------------------------------------

    def _receive(self, address: str, step: int, timeout_seconds: float) -> State:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise Refused("that is no host:port")
        with socket.create_connection((host, int(port)), timeout_seconds) as connection:
            prove_as_client(connection, self._secret)
            connection.settimeout(timeout_seconds)
            connection.sendall(_packed(step))
            num_bytes = _unpacked(receive_exactly(connection, SIZE_BYTES))
            if not 0 < num_bytes <= self._most_bytes():
                raise Refused(f"it has {num_bytes} bytes, expected 1 to {self._most_bytes()}")
            return decode(receive_exactly(connection, num_bytes))

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            peer = connection.getpeername()[0]
            try:
                prove_as_server(connection, self._secret)
                step = _unpacked(receive_exactly(connection, SIZE_BYTES))
                with self._changed:
                    self._changed.wait_for(lambda: self._step == step, self._timeout_seconds)
                    file = self._file if self._step == step else b""
                connection.settimeout(self._timeout_seconds)
                connection.sendall(_packed(len(file)))
                connection.sendall(file)
            except Refused as error:
                logger.warning("refused %s, which asks for this leader's state: %s", peer, error)
            except OSError:  # it hung up; it will come again
                return


def encode(state: State) -> bytes:
    """A safetensors file of what torchft hands over."""
    (user,) = state["user"].values()
    numbers = {**state["torchft"], "completed_rounds": user["completed_rounds"]}
    header = {name: int(numbers[name]) for name in NUMBERS} | {"membership": user["membership"]}
    tensors = {"shared": user["shared"].contiguous(), "result": user["result"].clone()}  # in memory of their own
    return safetensors.torch.save(tensors, metadata={HEADER_KEY: json.dumps(header)})


def decode(file: bytes) -> State:
    """Inverse of `encode`.

    Raises:
        Refused: the file is of another schema.
    """
    try:
        tensors = safetensors.torch.load(file)
        length = int.from_bytes(file[:SIZE_BYTES], "little")
        header = json.loads(json.loads(file[SIZE_BYTES : SIZE_BYTES + length])["__metadata__"][HEADER_KEY])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"it is no handover ({type(error).__name__})") from error
    _check_header(header)
    if sorted(tensors) != sorted(TENSORS):
        raise Refused(f"it has the tensors {sorted(tensors)[:8]}, expected {sorted(TENSORS)}")
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or tensor.dtype not in DTYPES:
            raise Refused(f"its tensor {name} is no vector of numbers")
    user = {"completed_rounds": header["completed_rounds"], "membership": header["membership"], **tensors}
    own = {name: header[name] for name in ("step", "batches_committed")}
    return {"user": {"default": user}, "torchft": own}


def _check_header(header: Any) -> None:
    if not isinstance(header, Mapping) or set(header) != {*NUMBERS, "membership"}:
        raise Refused("its header has other fields")
    for name in NUMBERS:
        if type(header[name]) is not int or not 0 <= header[name] < LARGEST_NUMBER:
            raise Refused(f"its {name} is {str(header[name])[:40]!r}, expected a whole number")
    if not isinstance(header["membership"], str):
        raise Refused("its membership is no name")


def _packed(number: int) -> bytes:
    return number.to_bytes(SIZE_BYTES, "little")


def _unpacked(text: bytes) -> int:
    return int.from_bytes(text, "little")
