"""Two hosts for launchers that go over ssh: our own server on each of two loopback addresses, and an `ssh` that knows only them.

The second server has a host name of its own (a UTS namespace): Open MPI names the shared memory of its local ranks after the host,
and ranks of two hosts by one name would write into each other's.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatronish.parallel.launchers import free_port
from tests.small_run import wait_until

ADDRESSES = ("127.0.0.1", "127.0.0.2")
SERVER = """\
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
MaxStartups 100
"""
CLIENT = """\
Host first
    HostName 127.0.0.1
Host second
    HostName 127.0.0.2
Host nobody
    HostName 127.0.0.3
Host *
    Port {port}
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
"""


@dataclass(frozen=True)
class SshHosts:
    """Hosts `first` and `second`; at `nobody` nobody answers."""

    folder: Path

    def environment(self) -> dict[str, str]:
        """What makes `ssh` and everything that calls it go to these hosts."""
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}


@contextmanager
def serve_ssh(folder: Path) -> Iterator[SshHosts]:
    """Start the server in `folder`, which must be new; it ends with the context. Skips where there is no sshd, or no root."""
    sshd, ssh = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin"), shutil.which("ssh")
    if sshd is None or ssh is None:
        pytest.skip("no sshd: tests/install_tools.sh installs openssh-server as root")
    if os.geteuid() != 0:
        pytest.skip("sshd lets a user in only when root has started it")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, empty
    port = free_port()
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "server").write_text(SERVER.format(port=port, folder=folder))
    (folder / "client").write_text(CLIENT.format(port=port, folder=folder))
    wrapper = folder / "bin/ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {folder}/client "$@"\n')
    wrapper.chmod(0o755)
    own_name = ["unshare", "--uts", "sh", "-c", 'hostname second && exec "$@"', "sh"]
    with ExitStack() as servers:
        for address, prefix in zip(ADDRESSES, ([], own_name), strict=True):
            log = servers.enter_context(open(folder / f"server-{address}.log", "wb"))
            # By its full path: it starts itself anew for each connection.
            command = [*prefix, sshd, "-D", "-e", "-f", str(folder / "server"), "-o", f"ListenAddress={address}"]
            server = servers.enter_context(subprocess.Popen(command, stderr=log))
            servers.callback(server.terminate)
        wait_until(lambda: all(_answers(address, port) for address in ADDRESSES), seconds=20, what="an answer of sshd")
        yield SshHosts(folder)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True
