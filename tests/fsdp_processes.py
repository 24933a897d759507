"""A script that test_fsdp.py runs in two processes, which spread the weights: ``fsdp_processes.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from processes_apart import BrokenTest, Normed, Still, error_of
from pytorch_lightning.strategies import FSDPStrategy
from test_fit import Reproducible
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional
from torch.utils.data import Subset
from toy import CLASSES, RATE, Toy, leave, loader, quiet, texts

from lightning_tracin import TracInCallback, TracInMixin

UNEVEN = 17  # training examples: one process has a batch more than the other
TESTS = 5
LENGTH = 5  # so that Tied is called on as many positions as a batch has examples


class OnCPU(FSDPStrategy):
    """FSDP on the CPU, which Lightning refuses to set up, but PyTorch does not."""

    def _setup_model(self, model):
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            return model
        options = {"sharding_strategy": self.sharding_strategy, **self.kwargs}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


class Plain(pl.LightningModule):
    """Without the mixin."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, CLASSES)

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        self.log("loss", 1.0)
        return functional.cross_entropy(self.head(self.embedding(ids).sum(1)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Tied(TracInMixin, pl.LightningModule):
    """A language model whose head is its word table; reads time first."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embedding.weight

    def influence_loss(self, batch):
        ids = batch[0].T
        logits = self.head(torch.tanh(self.hidden(self.embedding(ids[:-1]))))
        return functional.cross_entropy(logits.movedim(-1, 1), ids[1:], reduction="none").mean(0)

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=RATE)


class Watching(Toy):
    """Looks at the gradients that the last step has left."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_before_zero_grad(self, optimizer):
        left = [each.grad for each in self.parameters() if each.grad is not None]
        self.seen.append(float(sum(each.abs().sum() for each in left)))


class Wrapping(Toy):
    """Wraps its own layers."""

    def configure_model(self):
        if not isinstance(self.head, FullyShardedDataParallel):
            for name in ("embedding", "hidden", "head"):
                options = {"device_id": torch.device("cpu"), "use_orig_params": True}
                setattr(self, name, FullyShardedDataParallel(getattr(self, name), **options))


class Broken(Toy):
    """The last training example, which the second process stores, has no finite loss after the first epoch."""

    def influence_loss(self, batch):
        losses = super().influence_loss(batch)
        broken = self.trainer.global_rank == 1 and not self.training and self.trainer.global_step > 3
        return losses * torch.nan if broken else losses


WRAPPED = {"auto_wrap_policy": {nn.Linear, nn.Embedding}}
FITS = {
    "whole": (Toy, {}, {}),
    "wrapped": (Toy, WRAPPED, {}),
    "gradients": (Toy, {"sharding_strategy": "SHARD_GRAD_OP", **WRAPPED}, {}),
    "wrapping": (Wrapping, {}, {}),
    "plain": (Plain, WRAPPED, {}),
    "tied": (Tied, {}, {}),
    "normed": (Normed, {}, {}),
    "on_demand": (Toy, WRAPPED, {"cache": "on_demand"}),
    "training": (Toy, WRAPPED, {"cache": "training"}),
    "still checkpoint": (Still, WRAPPED, {"every_n_train_steps": 3}),
    "still training": (Still, WRAPPED, {"every_n_train_steps": 3, "cache": "training"}),
}


def fit(path, kind, sharding, *, epochs=2, ckpt_path=None, data=None, **options):
    """What a fit of both processes learned, and its trainer; without a path, it has no callback."""
    pl.seed_everything(0, verbose=False)
    callbacks = [] if path is None else [TracInCallback(path, **{"dtype": "float32", **options})]
    strategy = "ddp" if sharding is None else OnCPU(process_group_backend="gloo", **sharding)
    trainer = quiet(strategy=strategy, devices=2, callbacks=callbacks, max_epochs=epochs)
    uneven = loader(texts(UNEVEN, length=LENGTH), shuffle=True, drop_last=True)
    trainer.fit(kind(), uneven if data is None else data, ckpt_path=ckpt_path)
    own = {name: value.detach().clone() for name, value in trainer.lightning_module.named_parameters()}
    return own, trainer


def queried(trainer, *arguments, **options):
    """What the processes of a trainer find."""
    scores = trainer.influence(loader(texts(TESTS, seed=1, length=LENGTH)), *arguments, **options).scores
    return scores.tolist()


def main(folder):
    found = {}
    for cache in ("checkpoint", "training"):
        _, whole = fit(folder / f"ddp {cache}", Toy, None, cache=cache)
    for name, (kind, sharding, options) in FITS.items():
        with_callback, trainer = fit(folder / name, kind, sharding, **options)
        found |= {f"{name} {method}": queried(trainer, method=method) for method in ("tracin-we", "tracin-last")}
        after = dict(trainer.lightning_module.named_parameters())
        found[f"{name} kept"] = all(torch.equal(after[each], value) for each, value in with_callback.items())
        without, _ = fit(None, kind, sharding)
        assert with_callback.keys() == without.keys()
        found[f"{name} untouched"] = all(torch.equal(with_callback[each], value) for each, value in without.items())
    found["spread"] = error_of(queried, whole, trainer.lightning_module, trace=folder / "whole")
    fresh = quiet(strategy=OnCPU(process_group_backend="gloo", **WRAPPED), devices=2)
    found["fresh"] = queried(fresh, Toy(), trace=folder / "whole")
    found["fresh own"] = fresh.self_influence(trace=folder / "whole").tolist()
    single = Subset(texts(TESTS, seed=1, length=LENGTH), [3])
    found["a single one"] = fresh.influence(loader(single), trace=folder / "whole").scores.tolist()
    fresh = quiet(strategy=OnCPU(process_group_backend="gloo"), devices=2)
    found["broken test"] = error_of(queried, fresh, BrokenTest(), trace=folder / "whole")
    found["by ddp"] = queried(whole, Toy(), trace=folder / "wrapped")
    seen = [fit(path, Watching, {})[1].lightning_module.seen for path in (folder / "watching", None)]
    found["gradients seen"], found["gradients seen without"] = seen
    found["broken"] = error_of(fit, folder / "broken", Broken, WRAPPED)
    found["replicas"] = error_of(fit, folder / "replicas", Toy, {"sharding_strategy": "NO_SHARD"})
    found["logged"] = error_of(fit, folder / "logged", Toy, {}, log_examples=2)
    found["flat"] = error_of(fit, folder / "flat", Toy, {"use_orig_params": False})
    found["different data"] = error_of(fit, folder / "different", Toy, {}, data=loader(texts(seed=trainer.global_rank)))

    sharding = {"state_dict_type": "sharded", **WRAPPED}
    fit(folder / "straight", Reproducible, sharding)
    _, begun = fit(folder / "resumed", Reproducible, sharding, epochs=1)
    begun.save_checkpoint(folder / "last.ckpt")
    fit(folder / "resumed", Reproducible, sharding, ckpt_path=folder / "last.ckpt")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = main(Path(sys.argv[1]))
    rank = torch.distributed.get_rank()
    (Path(sys.argv[1]) / f"found-{rank}.json").write_text(json.dumps(results))
    leave()
