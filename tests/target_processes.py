"""A script that test_targets_of_two.py runs in two processes, whole and with FSDP: ``target_processes.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fsdp_processes import LENGTH, WRAPPED, Plain, fit
from processes_apart import error_of
from torch.utils.data import TensorDataset
from toy import Toy, leave, loader, texts

TESTS = 5  # one process has an example more than the other
TARGETS = {"prediction": "prediction", "class": 1, "pair": (2, 0)}
FITS = {"ddp": (Toy, None), "fsdp": (Toy, WRAPPED), "fsdp plain": (Plain, WRAPPED)}


def main(folder):
    found = {}
    examples = texts(TESTS, seed=1, length=LENGTH)
    tests = {"": loader(examples), " unlabelled": loader(TensorDataset(examples.tensors[0]))}
    for name, (kind, sharding) in FITS.items():
        _, trainer = fit(folder / name, kind, sharding)
        for target, asked in TARGETS.items():
            for labelled, data in tests.items():
                result = trainer.influence(data, target=asked)
                found[f"{name} {target}{labelled}"] = result.scores.tolist(), result.target_names, result.target_classes
        found[f"{name} unknown"] = error_of(trainer.influence, tests[""], target=3)
        found[f"{name} without labels"] = error_of(trainer.influence, tests[" unlabelled"])
    (folder / f"found-{trainer.global_rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
