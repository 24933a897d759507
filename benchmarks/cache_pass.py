"""The pass of cache="checkpoint", writing included, against a training epoch and against its own two passes alone.

All three are timed in each epoch of one fit of MiniLM-L6 (64 tokens, batches of 32). The two passes alone are a forward
pass and a backward pass to the embedding layer's output, over the training set in its own order, in plain PyTorch.

The first epoch warms up and stands by itself. With --short, texts are short messages in batches that are padded to
their longest, of which the pass takes those of about one length together.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import Row, median_ratio, parser, report
from benchmarks.workload import Texts, quiet
from lightning_tracin import TracInCallback


class Timer(pl.Callback):
    """Stands before and after TracInCallback, and times what is between, and the two passes alone."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.seconds: dict[str, list[float]] = {"epoch": [], "pass": [], "alone": []}
        self._began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch begins."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch is over; the pass begins when this is done."""
        self.seconds["epoch"].append(time.perf_counter() - self._began)
        began = time.perf_counter()
        _two_passes(pl_module, self.loader)
        self.seconds["alone"].append(time.perf_counter() - began)
        self._began = time.perf_counter()

    def after_pass(self) -> None:
        """The pass is over."""
        self.seconds["pass"].append(time.perf_counter() - self._began)


class After(pl.Callback):
    """Tells the timer that the callbacks before it are done."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The pass is over."""
        self.timer.after_pass()


def _two_passes(module: Any, loader: DataLoader[Any]) -> None:
    """Forward, and backward to the embedding layer's output; nothing is kept."""
    layer = module.model.get_input_embeddings()
    outputs: list[Tensor] = []

    def cut(_: Any, __: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    hook = layer.register_forward_hook(cut)
    module.eval()
    with torch.random.fork_rng(), torch.enable_grad():
        for batch in loader:
            batch = batch.to(module.device)
            loss = module.model(**batch).loss * len(batch["labels"])
            torch.autograd.grad(loss, [outputs.pop()])
    module.train()
    hook.remove()


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=640)
    arguments.add_argument("--repeats", type=int, default=3, help="epochs")
    arguments.add_argument("--short", action="store_true", help="short messages, each batch padded to its longest")
    options = arguments.parse_args()
    texts = Texts(options.examples, 0, short=options.short)
    timer = Timer(texts.loader("train"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet(max_epochs=options.repeats + 1, callbacks=[timer, TracInCallback(folder), After(timer)])
        trainer.fit(texts.module(), texts.loader("train", shuffle=True))
    counted = {name: each[1:] for name, each in timer.seconds.items()}
    what, name = ("short messages", "cache-pass-short") if options.short else ("articles", "cache-pass")
    report(
        name,
        f"{options.examples} {what}: the pass at a checkpoint, weights and gradients written",
        [
            Row("pass / training epoch", median_ratio(counted["pass"], counted["epoch"]), limit="<= 0.55"),
            Row("pass / forward and backward alone", median_ratio(counted["pass"], counted["alone"]), limit="<= 1.15"),
            Row("first pass / its epoch, which warms up", timer.seconds["pass"][0] / timer.seconds["epoch"][0]),
            Row("training epoch", statistics.median(counted["epoch"]), "s", details=counted),
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
