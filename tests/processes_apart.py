"""A script that test_processes.py runs in several processes, in which these differ: ``processes_apart.py FOLDER N``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import Subset, SubsetRandomSampler
from toy import Toy, leave, loader, quiet, test_texts, texts
from variants import Reproducible

from lightning_tracin import TracInCallback
from lightning_tracin.storage import shards
from lightning_tracin.storage.lock import locked


class Normed(Toy):
    """Batch norm, whose statistics each process takes from its own examples."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids):
        return self.head(self.norm(self.hidden(self.embedding(ids).mean(1))))


class Still(Toy):
    """Learns next to nothing, so that the gradients of training are those at the checkpoint."""

    def __init__(self):
        super().__init__()
        self.dropout.p = 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


class Broken(Toy):
    """The losses of the second process are not finite after the first epoch, in eval mode."""

    def influence_loss(self, batch):
        losses = super().influence_loss(batch)
        broken = self.trainer.global_rank == 1 and not self.training and self.trainer.global_step > 4
        return losses * torch.nan if broken else losses


class BrokenInTraining(Toy):
    """Training itself breaks in the second process, in the second epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.trainer.global_rank == 1 and self.current_epoch == 1 else loss


class BrokenTest(Toy):
    """A test example of the second process has no finite loss."""

    def influence_loss(self, batch):
        losses = super().influence_loss(batch)
        return losses * torch.nan if self.trainer.global_rank == 1 else losses


def fit(path, kind, *, data=None, logger=False, epochs=2, ckpt_path=None, trainer=None, recorded=True, **options):
    """A trainer of all processes that has fitted a module."""
    pl.seed_everything(0, verbose=False)
    callback = TracInCallback(path, **{"dtype": "float32", "on_error": "raise", **options})
    fitting = quiet(**ALL, callbacks=[callback] * recorded, logger=logger, max_epochs=epochs, **(trainer or {}))
    fitting.fit(kind(), loader(shuffle=True) if data is None else data, ckpt_path=ckpt_path)
    return fitting


class Reloaded(pl.LightningDataModule):
    """After the first epoch the data set is another, in one of the processes."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def train_dataloader(self):
        return loader(texts(seed=self.seed if self.trainer.current_epoch else 0))


def by_first_word(rows):
    return torch.utils.data.default_collate(sorted(rows, key=lambda row: int(row[0][0])))


def error_of(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except (ValueError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def in_two(folder, found):
    own = quiet(**ALL)  # starts the second process
    found["filled first"] = own.self_influence(Toy(), trace=folder / "empty", train_dataloaders=loader()).tolist()
    rank = own.global_rank

    fitting = fit(folder / "trace", Toy)
    del os.environ["PL_GLOBAL_SEED"]  # so that the processes shuffle differently
    torch.manual_seed(rank)
    result = fitting.influence(loader(texts(7, seed=1), shuffle=True))
    found["shuffled"] = [result.test_indices.tolist(), result.scores.tolist()]
    result = fitting.influence(loader(Subset(texts(7, seed=1), [3])), k=2)
    found["a single one"] = result.proponents(2).values.tolist()
    found["broken test"] = error_of(fitting.influence, loader(test_texts()), BrokenTest())
    found["reordered test"] = error_of(
        fitting.influence, loader(test_texts(), collate_fn=by_first_word if rank else None)
    )
    found["different test"] = error_of(fitting.influence, loader(texts(7, seed=rank)))

    if rank == 0:
        shutil.copytree(folder / "trace", folder / "damaged")
        for gradients in (folder / "damaged").glob("checkpoints/*/words"):
            shutil.rmtree(gradients)
        *_, last = sorted((folder / "damaged" / "texts").glob("*.safetensors"))
        content = last.read_bytes()
        last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    torch.distributed.barrier()
    again = {"trace": folder / "damaged", "train_dataloaders": loader()}
    found["damaged"] = error_of(fitting.influence, loader(test_texts()), Toy(), **again)

    found["broken"] = error_of(fit, folder / "broken", Broken)
    found["broken in training"] = error_of(fit, folder / "broken in training", BrokenInTraining, cache="training")
    reloading = {"reload_dataloaders_every_n_epochs": 1}
    found["reloaded"] = error_of(fit, folder / "reloaded", Toy, data=Reloaded(seed=rank), trainer=reloading)
    found["different data"] = error_of(fit, folder / "different", Toy, data=loader(texts(seed=rank)))
    write = shards.write_tensors

    def full(path, *arguments):
        if rank == 1:
            raise OSError(28, f"{path} could not be written")
        return write(path, *arguments)

    shards.write_tensors = full
    found["full"] = error_of(fit, folder / "full", Toy)
    going_on = fit(folder / "going on", Toy, on_error="warn").lightning_module
    shards.write_tensors = write
    plain = fit(None, Toy, recorded=False).lightning_module
    found["going on"] = all(map(torch.equal, going_on.parameters(), plain.parameters()))

    for cache in ("checkpoint", "training", "on_demand"):  # no example of the second process's shard, and one of ten
        held_back = loader(sampler=SubsetRandomSampler([0, 1, 2, 4, 5, 6, 7, 9]))
        held = fit(folder / f"held back {cache}", Toy, data=held_back, cache=cache, epochs=1)
        if cache == "on_demand" and rank == 0:
            shutil.copytree(folder / f"held back {cache}", folder / "held back, not filled")
        torch.distributed.barrier()
        all_scores = held.influence(loader(test_texts()))
        strongest = held.influence(loader(test_texts()), k=9)
        found[f"held back {cache}"] = [all_scores.scores.tolist(), strongest.proponents(8).indices.tolist()]

    fit(folder / "normed", Normed)
    for cache in ("checkpoint", "training"):
        options = {"cache": cache, "every_n_train_steps": 3}
        fit(folder / f"still {cache}", Still, trainer={"accumulate_grad_batches": 2}, epochs=6, **options)

    fit(folder / "straight", Reproducible)
    begun = fit(folder / "resumed", Reproducible, epochs=1)
    begun.save_checkpoint(folder / "last.ckpt")
    fit(folder / "resumed", Reproducible, ckpt_path=folder / "last.ckpt")
    fit(folder / "broken", Toy, epochs=1, overwrite=True)

    logged = fit(None, Toy, logger=CSVLogger(folder / "logs"))
    found["logged"] = str(logged.callbacks[0].trace.path)
    found["refused"] = error_of(fit, folder / "trace", Toy)
    with locked(folder / "trace") if rank == 0 else nullcontext():
        found["locked"] = error_of(fit, folder / "trace", Toy, overwrite=True)


def in_three(folder, found):
    """Fewer training examples and test examples than processes."""
    fitting = fit(folder / "few", Toy, data=loader(texts(2), batch_size=1), top_words=2, dtype="int8")
    found["few"] = fitting.influence(loader(texts(2, seed=1)), method="tracin-last").scores.tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    n_processes = int(sys.argv[2])
    ALL = {"strategy": "ddp", "devices": n_processes}
    results: dict[str, object] = {}
    (in_two if n_processes == 2 else in_three)(Path(sys.argv[1]), results)
    rank = torch.distributed.get_rank()
    (Path(sys.argv[1]) / f"found-{rank}.json").write_text(json.dumps(results))
    leave()
