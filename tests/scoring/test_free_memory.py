"""What is free on a machine, and what a container or a job may take of it: by files as Linux writes them."""

from __future__ import annotations

import pytest

from lightning_tracin.scoring import free_memory as module
from lightning_tracin.scoring.free_memory import free_memory


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files below a root of its own; there are 6,000 bytes free on the machine."""

    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    for name, place in {"_MEMINFO": "meminfo", "_OWN_GROUPS": "own", "_GROUPS": "groups"}.items():
        monkeypatch.setattr(module, name, tmp_path / place)
    write({"meminfo": "MemTotal: 9 kB\nMemAvailable:      6 kB\n"})
    return write


def group(folder, limit, used, cache=0):
    return {
        f"groups/{folder}/memory.max": f"{limit}\n",
        f"groups/{folder}/memory.current": f"{used}\n",
        f"groups/{folder}/memory.stat": f"anon 7\ninactive_file {cache}\n",
    }


def test_a_machine_without_groups(system):
    assert free_memory() == 6 * 1024


def test_the_limit_of_a_job_of_a_scheduler_may_be_of_a_group_around_the_process(system):
    system({"own": "0::/slurm/job_1/task_0\n"})
    system(group("slurm/job_1", 4000, 3500, cache=300) | group("slurm/job_1/task_0", "max", 100))
    assert free_memory() == 4000 - 3500 + 300


def test_a_limit_beyond_the_machine_is_none(system):
    system({"own": "0::/\n"} | group(".", 10**9, 0))
    assert free_memory() == 6 * 1024


def test_a_container_sees_its_own_group_at_the_top(system):
    """As Docker mounts the first version: the path is that of the host, and is not there."""
    system(
        {
            "own": "9:name=systemd:/docker/abc\n4:cpu,memory:/docker/abc\n0::/\n",
            "groups/memory/memory.limit_in_bytes": "3000\n",
            "groups/memory/memory.usage_in_bytes": "2900\n",
            "groups/memory/memory.stat": "cache 1\ntotal_inactive_file 50\n",
        }
    )
    assert free_memory() == 150


def test_this_machine_tells():
    free = free_memory()
    assert free is None or free >= 0
