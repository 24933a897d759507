"""Forks itself for each process that it is asked for, so that none of them imports torch and Lightning anew.

What is asked comes through a socket, which is its standard input (`Forks` in launched.py is the other side): arguments
as those of Python, a folder, and for each process to be started its environment; with two descriptors, for what they
print. It answers with the numbers of the processes, and when all have ended with how each did. It has one thread, as a
fork has no other, and ends when nobody can ask any more.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import socket
import sys

import torch.distributed.fsdp
import toy
from lightning_utilities.core.rank_zero import rank_zero_only

import lightning_tracin.cli.command

IMPORTED = (torch.distributed.fsdp, toy, lightning_tracin.cli.command)


def serve(asked: socket.socket) -> list[str]:
    """Returns in a process that was asked for: its arguments."""
    while True:
        message, printed, *_ = socket.recv_fds(asked, 1 << 20, 2)
        if not message:
            sys.exit()
        arguments, folder, environments = json.loads(message)
        children = []
        for environment in environments:
            child = os.fork()
            if child == 0:
                asked.close()
                become(folder, environment, printed)
                return arguments
            children.append(child)
        for descriptor in printed:
            os.close(descriptor)
        asked.sendall(json.dumps(children).encode())
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        asked.sendall(json.dumps(ended).encode())


def become(folder: str, environment: dict[str, str], printed: list[int]) -> None:
    """What a process is when it starts."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, given in enumerate(printed, 1):
        os.dup2(given, descriptor)
        os.close(given)
    # Those of the server know whether it can seek in what it prints to.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # Lightning looks when it is imported


def run(first: str, *others: str) -> None:
    if first == "-m":
        sys.argv[:] = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = first, *others[1:]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:] = first, *others
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    run(*serve(socket.socket(fileno=os.dup(0))))
