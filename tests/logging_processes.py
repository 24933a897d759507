"""A script that test_logging_of_two.py runs in two processes: fits whose validations are logged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from processes_apart import Normed, error_of
from pytorch_lightning.loggers import CSVLogger
from toy import Toy, leave, loader, quiet, texts

from lightning_tracin import TracInCallback

TWO = {"strategy": "ddp", "devices": 2}


def validation_texts():
    """An odd number: one process is given one of them a second time."""
    return texts(7, seed=1)


class Validated(Toy):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.influence_loss(batch).mean(), sync_dist=True)


class NormedValidated(Normed):
    def validation_step(self, batch, batch_idx):
        pass


class Broken(Validated):
    """The losses of the second process cannot be computed in the second validation."""

    def influence_loss(self, batch):
        if self.trainer.validating and self.trainer.global_rank == 1 and self.current_epoch == 1:
            raise ValueError("no losses here")
        return super().influence_loss(batch)

    def validation_step(self, batch, batch_idx):
        pass


def fit(folder, kind, **options):
    pl.seed_everything(0, verbose=False)
    callbacks = [TracInCallback(folder / "trace", dtype="float32", on_error="raise", **options)] if options else []
    trainer = quiet(callbacks=callbacks, logger=CSVLogger(folder), log_every_n_steps=1, **TWO)
    module = kind()
    trainer.fit(module, loader(shuffle=True), loader(validation_texts(), batch_size=2))
    return {f"{folder.name} {name}": value for name, value in module.state_dict().items()}


def main(folder):
    torch.set_num_threads(1)
    left = {}
    for name, kind, options in (
        ("highest", Validated, {"log_examples": 3}),
        ("all", Validated, {"log_examples": 50, "cache": "training"}),
        ("given", Validated, {"log_examples": [6, 0, 1]}),
        ("without", Validated, {}),
        ("normed", NormedValidated, {"log_examples": 3, "every_n_train_steps": 2}),
        ("normed without", NormedValidated, {}),
    ):
        left |= fit(folder / name, kind, **options)
    error = error_of(fit, folder / "broken", Broken, log_examples=3)
    rank = torch.distributed.get_rank()
    (folder / f"error-{rank}.txt").write_text(error)
    torch.save(left, folder / f"weights-{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
