"""A script that test_fsdp.py runs in two processes, which spread the weights: ``fsdp_processes.py FOLDER [all]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from processes_apart import BrokenTest, Normed, Still, error_of
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Subset
from toy import CLASSES, RATE, Toy, leave, loader, quiet, texts
from variants import Reproducible, Stepping

from lightning_tracin import TracInCallback, TracInLayer, TracInMixin, TracInSum, TracInWE

CACHES = ("checkpoint", "on_demand", "training")
AT_LAYERS = {
    "layer": TracInLayer("hidden"),
    "sum": TracInSum((TracInWE(), TracInLayer("hidden", normalize="cosine"))),
}
UNEVEN = 17  # training examples: one process has a batch more than the other
TESTS = 5
LENGTH = 5  # so that Tied is called on as many positions as a batch has examples


class OnCPU(FSDPStrategy):
    """FSDP on the CPU, which Lightning refuses to set up, but PyTorch does not."""

    def setup_environment(self):
        mesh = self.kwargs.pop("device_mesh", None)
        super().setup_environment()
        if mesh is not None:
            self.kwargs["device_mesh"] = init_device_mesh("cpu", mesh)

    def _setup_model(self, model):
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            return model
        own = {"sharding_strategy": self.sharding_strategy, "mixed_precision": self.mixed_precision_config}
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **own, **self.kwargs)
        if self._activation_checkpointing_kwargs:
            apply_activation_checkpointing(model, **self._activation_checkpointing_kwargs)
        return model


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


class Held(Toy):
    """Keeps its embedding as it is."""

    def __init__(self):
        super().__init__()
        self.embedding.requires_grad_(False)


class Recomputing(Held):
    """Computes its forward pass again in the backward pass."""

    def forward(self, ids):
        return checkpoint(super().forward, ids, use_reentrant=False)


class Broken(Toy):
    """The last training example, which the second process stores, has no finite loss after the first epoch."""

    def influence_loss(self, batch):
        losses = super().influence_loss(batch)
        broken = self.trainer.global_rank == 1 and not self.training and self.trainer.global_step > 3
        return losses * torch.nan if broken else losses


WRAPPED = {"auto_wrap_policy": {nn.Linear, nn.Embedding}}
RECOMPUTED = {"activation_checkpointing_policy": {nn.Linear, nn.Embedding}, **WRAPPED}
BFLOAT16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
HALF = {  # fits that compute in 16 bits
    "bfloat16": (Toy, {"mixed_precision": BFLOAT16, "sharding_strategy": "SHARD_GRAD_OP", **WRAPPED}, {}),
    "mixed": (Toy, WRAPPED, {"precision": "bf16-mixed"}),
    "mixed training": (Toy, WRAPPED, {"precision": "bf16-mixed", "cache": "training"}),
    "mixed plain": (Plain, WRAPPED, {"precision": "bf16-mixed"}),
    "mixed plain training": (Plain, WRAPPED, {"precision": "bf16-mixed", "cache": "training"}),
    "mixed normed": (Normed, {}, {"precision": "bf16-mixed"}),
    "true": (Toy, WRAPPED, {"precision": "bf16-true", "cache": "on_demand"}),
    "true training": (Toy, WRAPPED, {"precision": "bf16-true", "cache": "training"}),
}
if torch.__version__ < (2, 5):
    del HALF["mixed normed"]  # a batch norm that has 16 bits in and 32 inside needs a GPU there, with or without us
FITS = {
    "whole": (Toy, {}, {}),
    "wrapped": (Toy, WRAPPED, {}),
    "gradients": (Toy, {"sharding_strategy": "SHARD_GRAD_OP", **WRAPPED}, {}),
    "hybrid": (Toy, {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (1, 2), **WRAPPED}, {}),
    "recomputed": (Toy, RECOMPUTED, {}),
    "recomputing": (Recomputing, {}, {}),
    "wrapping": (Wrapping, {}, {}),
    "plain": (Plain, WRAPPED, {}),
    "tied": (Tied, {}, {}),
    "normed": (Normed, {}, {}),
    "on_demand": (Toy, WRAPPED, {"cache": "on_demand"}),
    "training": (Toy, WRAPPED, {"cache": "training"}),
    "recomputed training": (Toy, RECOMPUTED, {"cache": "training"}),
    "recomputing training": (Recomputing, WRAPPED, {"cache": "training"}),
    "still checkpoint": (Still, WRAPPED, {"every_n_train_steps": 3}),
    "still training": (Still, WRAPPED, {"every_n_train_steps": 3, "cache": "training"}),
}
SELDOM = {  # fits of tests that are slow for their number alone: each is near another one, which is not left out
    *("gradients", "hybrid", "recomputed", "recomputing", "recomputed training", "bfloat16"),
    *("mixed plain", "mixed plain training", "mixed normed", "true", "true training"),
}


def fit(path, kind, sharding, *, epochs=2, ckpt_path=None, data=None, precision="32-true", **options):
    """What a fit of both processes learned, and its trainer; without a path, it has no callback."""
    pl.seed_everything(0, verbose=False)
    callbacks = [] if path is None else [TracInCallback(path, **{"dtype": "float32", "on_error": "raise", **options})]
    strategy = "ddp" if sharding is None else OnCPU(process_group_backend="gloo", **sharding)
    trainer = quiet(strategy=strategy, devices=2, callbacks=callbacks, max_epochs=epochs, precision=precision)
    uneven = loader(texts(UNEVEN, length=LENGTH), shuffle=True, drop_last=True)
    trainer.fit(kind(), uneven if data is None else data, ckpt_path=ckpt_path)
    own = {name: value.detach().clone() for name, value in trainer.lightning_module.named_parameters()}
    return own, trainer


def queried(trainer, *arguments, **options):
    """What the processes of a trainer find."""
    scores = trainer.influence(loader(texts(TESTS, seed=1, length=LENGTH)), *arguments, **options).scores
    return scores.tolist()


def main(folder, seldom):
    found = {}
    for cache in ("checkpoint", "training"):
        fit(folder / f"ddp held {cache}", Held, None, cache=cache)
        _, whole = fit(folder / f"ddp {cache}", Toy, None, cache=cache)
    for name, (kind, sharding, options) in (HALF | FITS).items():
        if name in SELDOM and not seldom:
            continue
        with_callback, trainer = fit(folder / name, kind, sharding, **options)
        found |= {f"{name} {method}": queried(trainer, method=method) for method in ("tracin-we", "tracin-last")}
        after = dict(trainer.lightning_module.named_parameters())
        found[f"{name} kept"] = all(torch.equal(after[each], value) for each, value in with_callback.items())
        without, _ = fit(None, kind, sharding, **options)
        assert with_callback.keys() == without.keys()
        found[f"{name} untouched"] = all(torch.equal(with_callback[each], value) for each, value in without.items())
    for cache in CACHES:
        methods = ("tracin-we", "tracin-last", "hid*")
        _, layered = fit(folder / f"layers {cache}", Toy, WRAPPED, cache=cache, methods=methods)
        for name, method in AT_LAYERS.items():
            found[f"layers {cache} {name}"] = queried(layered, method=method)
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
    alone = {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 1)}
    found["one to a group"] = error_of(fit, folder / "alone", Toy, alone)
    found["manual"] = error_of(fit, folder / "manual", Stepping, WRAPPED)
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
    results = main(Path(sys.argv[1]), seldom="all" in sys.argv[2:])
    rank = torch.distributed.get_rank()
    (Path(sys.argv[1]) / f"found-{rank}.json").write_text(json.dumps(results))
    leave()
