"""Where ranks meet when nobody has chosen a port: rank 0 serves its store at any free port, and says which at the first free one of
a sequence of ports that every rank knows. Whoever asks there reads one line, `megatronish TOKEN PORT`, and the connection ends.

So a busy port is no failure: rank 0 takes the next, and the others pass over a program that does not answer, answers something
else, or is a rank 0 of another job or of an earlier life of this one, whose token differs."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Sequence

from megatronish.errors import UserError

_MAX_BYTES = 256


def announce(ports: Sequence[int], token: str, store_port: int) -> socket.socket:
    """Say to all who ask that the store is at `store_port`, on a thread, until the socket returned is closed or the process ends.

    UserError if every port is busy."""
    for port in ports:
        try:
            listener = _listen(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"rank 0 cannot listen at port {port}: {error.strerror}; set MASTER_PORT to one that it may use"
                ) from error
            continue
        threading.Thread(target=_answer, args=(listener, _line(token, store_port)), name="meeting", daemon=True).start()
        return listener
    raise UserError(
        f"all ports that the ranks could meet at are busy on this host ({_listed(ports)}): set MASTER_PORT to a free one"
    )


def look_up(host: str, ports: Sequence[int], token: str, *, timeout_seconds: float = 2.0) -> int | None:
    """Ask at every port in turn for the store of the job that `token` names; None if nobody knows it yet. At most `timeout_seconds`
    a port."""
    for port in ports:
        with contextlib.suppress(OSError, UnicodeError):
            line = _read_line(host, port, timeout_seconds)
            word, _, rest = line.rpartition(" ")
            if rest.isdecimal() and line == _line(token, int(rest)):
                return int(rest)
    return None


def _listen(port: int) -> socket.socket:
    # Asked by all ranks at once: a backlog that is too short costs those that do not fit in a second.
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def _answer(listener: socket.socket, line: str) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return  # closed
            continue  # that one has gone again
        # Nothing is read: nobody can hold up the next.
        with contextlib.suppress(OSError), connection:
            connection.setblocking(False)
            connection.send(f"{line}\n".encode())


def _read_line(host: str, port: int, timeout_seconds: float) -> str:
    data = b""
    with socket.create_connection((host, port), timeout=timeout_seconds) as connection:
        while not data.endswith(b"\n") and len(data) < _MAX_BYTES:
            part = connection.recv(_MAX_BYTES)
            if not part:
                break
            data += part
    return data.decode().removesuffix("\n")


def _line(token: str, port: int) -> str:
    return f"megatronish {token} {port}"


def _listed(ports: Sequence[int]) -> str:
    return ", ".join(map(str, ports))
