"""How a file comes to be: it is on the disk before it takes its name."""

from __future__ import annotations

import fcntl
import os

import pytest
import torch

from lightning_tracin.storage import files


@pytest.mark.parametrize(
    "write",
    [lambda path: files.write_json(path, {"a": 1}), lambda path: files.write_tensors(path, {"a": torch.ones(2)})],
)
@pytest.mark.parametrize("mode", [0o755, 0o575], ids=oct)
def test_a_file_is_open_for_writing_when_it_is_synchronised(tmp_path, monkeypatch, write, mode):
    """Windows refuses it of others; the owner may write, whatever the folder's mode says."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=mode)
    folder.chmod(mode)
    synchronised, synchronise = [], os.fsync

    def watched(descriptor):
        synchronised.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        assert os.fstat(descriptor).st_mode & 0o600 == 0o600
        assert not (folder / "file").exists()
        synchronise(descriptor)

    monkeypatch.setattr(files.os, "fsync", watched)
    write(folder / "file")
    assert synchronised == [os.O_RDWR]
    assert (folder / "file").stat().st_size
