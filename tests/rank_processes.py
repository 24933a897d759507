"""A script that test_rank_of_two.py runs in two processes, whole and with FSDP: ``rank_processes.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from fsdp_processes import LENGTH, WRAPPED, fit
from toy import Toy, leave, loader, texts

from lightning_tracin import TracInLayer

TESTS = 5  # one process has an example more than the other
METHOD = TracInLayer("hidden", normalize="cosine", precondition="kfac", damping=0.5)
FITS = {"ddp": (None, "checkpoint"), "ddp on demand": (None, "on_demand"), "fsdp": (WRAPPED, "checkpoint")}


class Reading(Toy):
    """Its hidden layer reads every token."""

    def forward(self, ids):
        words = (ids != 0).sum(1, keepdim=True)
        return self.head(self.dropout(torch.tanh(self.hidden(self.embedding(ids))).sum(1) / words))


def main(folder):
    found = {}
    for name, (sharding, cache) in FITS.items():
        _, trainer = fit(folder / name, Reading, sharding, cache=cache, methods=("tracin-we", "hidden"), rank=(4, 3))
        result = trainer.influence(loader(texts(TESTS, seed=1, length=LENGTH)), method=METHOD)
        found[name] = result.scores.tolist()
    (folder / f"found-{trainer.global_rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
