"""Runs scripts of this folder, and others, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from lightning_fabric.plugins.environments.lightning import find_free_network_port
from toy import environment

HERE = Path(__file__).parent


def alone() -> dict[str, str]:
    """The environment of a process that none of several has started."""
    variables = environment(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")
    for name in ("MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "PL_GLOBAL_SEED"):
        variables.pop(name, None)
    return variables


def run(folder, *arguments, script="two_processes.py", launcher=(), timeout=600):
    """A script that starts, by Lightning or a launcher, the other processes; all import what they need anew."""
    return subprocess.run(
        [sys.executable, *launcher, str(HERE / script), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=alone(),
        check=False,
    )


class Forks:
    """Processes that are forks of one that has imported torch and Lightning, which takes seconds (fork_server.py)."""

    def __enter__(self) -> Forks:
        self._server, theirs = socket.socketpair()
        variables = {**alone(), "HF_HUB_OFFLINE": "1"}
        with theirs:
            self._process = subprocess.Popen([sys.executable, HERE / "fork_server.py"], stdin=theirs, env=variables)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._process.wait(timeout=60)

    def run(
        self,
        *arguments: Any,
        cwd: Any = ".",
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        timeout: float = 600,
        environments: list[dict[str, str]] | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """What ``subprocess.run`` gives for Python with these arguments.

        Args:
            arguments: what comes after ``python``, without options but -m or -c.
            cwd: where it runs.
            stdout: a file or descriptor; without one, what is printed is captured.
            stderr: likewise.
            timeout: in seconds.
            environments: of each of several processes, which share what they print.
            variables: beside those of this process.
        """
        environments = environments or [environment(**variables)]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            printed = [each if isinstance(each, int) else each.fileno() for each in (stdout or out, stderr or err)]
            request = [[*map(str, arguments)], str(Path(cwd).resolve()), environments]
            socket.send_fds(self._server, [json.dumps(request).encode()], printed)
            processes = json.loads(self._server.recv(1000))
            self._server.settimeout(timeout)
            try:
                ended = json.loads(self._server.recv(1000))
            except TimeoutError:
                for process in processes:
                    os.kill(process, signal.SIGKILL)
                self._server.settimeout(None)
                self._server.recv(1000)
                raise
            told = []
            for file in (out, err):
                file.seek(0)
                told.append(file.read().decode())
        return subprocess.CompletedProcess(arguments, max(ended, key=abs), *told)

    def run_two(self, folder: Path, *arguments: str, script: str) -> subprocess.CompletedProcess[str]:
        """A script of this folder in two processes that find each other, as a launcher starts them."""
        shared = {**alone(), "MASTER_PORT": str(find_free_network_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
        ranks = [{**shared, "LOCAL_RANK": str(rank)} for rank in range(2)]
        return self.run(HERE / script, folder, *arguments, environments=ranks)
