"""A script that test_own_batches.py runs in two processes: ``own_batch_processes.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from fsdp_processes import OnCPU
from torch.utils.data import DataLoader
from toy import leave, quiet
from unpadded import EqualLengths, Still, Texts, TokenBudget, padded

from lightning_tracin import TracInCallback

CACHES = ("checkpoint", "training", "on_demand")


def main(folder: Path) -> dict[str, object]:
    """What this process finds, with batches that hold what both samplers together compose."""
    found: dict[str, object] = {}
    test = Texts(10, seed=1)
    for name in (*CACHES, "fsdp"):
        pl.seed_everything(0, verbose=False)
        fsdp, train = name == "fsdp", Texts()
        callback = TracInCallback(
            folder / name, dtype="float32", on_error="raise", cache=name if name in CACHES else "checkpoint"
        )
        strategy = OnCPU(process_group_backend="gloo") if fsdp else "ddp"
        trainer = quiet(strategy=strategy, devices=2, max_epochs=1, callbacks=[callback], use_distributed_sampler=False)
        share = slice(int(os.environ.get("LOCAL_RANK", 0)), None, 2)
        if fsdp:
            data = DataLoader(train, batch_sampler=TokenBudget(train), collate_fn=padded)
            asked = DataLoader(test, batch_sampler=TokenBudget(test), collate_fn=padded)
        else:
            data = DataLoader(train, batch_sampler=EqualLengths(train, share=share))
            asked = DataLoader(test, batch_sampler=EqualLengths(test, share=share))
        module = Still()
        trainer.fit(module, data)
        found[name] = trainer.influence(asked).scores
        found[f"{name} held"] = max(module.held)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = main(Path(sys.argv[1]))
    torch.save(results, Path(sys.argv[1]) / f"process-{torch.distributed.get_rank()}.pt")
    leave()
