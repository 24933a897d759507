"""Runs the scripts of this folder in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from toy import environment


def run(folder, *arguments, script="two_processes.py", launcher=(), timeout=240):
    variables = environment(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")
    for name in ("MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "PL_GLOBAL_SEED"):
        variables.pop(name, None)
    return subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name(script)), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=variables,
        check=False,
    )
