"""K-FAC on the convolutions of a classifier of BBC News: space, time, memory and fidelity of each way to have it.

Words of MiniLM, convolutions of width 3 and 5 with 100 channels each, and a hidden layer; one epoch, one checkpoint.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from benchmarks.measure import Row, in_own_process, parser, peak_megabytes, report
from benchmarks.savers import recall
from benchmarks.workload import Texts, bytes_below, quiet
from examples.data import packaged_minilm
from lightning_tracin import Trace, TracInCallback, TracInLayer, TracInMixin, TracInSum

LAYERS = ("convolutions.0", "convolutions.1")
TOKENS, CHANNELS = 48, 100
# How gradients are stored, and asked for.
STORED: dict[str, dict[str, Any]] = {
    "whole": {},
    "rank=(128, 32)": {"rank": (128, 32)},
    "rank=(128, 5)": {"rank": (128, 5)},
    'rank=(128, 32), dtype="int8"': {"rank": (128, 32), "dtype": "int8"},
}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "whole, kfac": ("whole", {"precondition": "kfac"}),
    "whole, no kfac": ("whole", {}),
    "whole, kfac, rank=(128, 32)": ("whole", {"precondition": "kfac", "rank": (128, 32)}),
    **{f"{stored}, kfac": (stored, {"precondition": "kfac"}) for stored in list(STORED)[1:]},
}


class Convolutional(TracInMixin, pl.LightningModule):
    """Two convolutions, the largest value of each channel, and a hidden layer."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        table = AutoModel.from_pretrained(packaged_minilm()).get_input_embeddings().weight
        self.embedding = nn.Embedding(table.shape[0], table.shape[1], padding_idx=0)
        self.embedding.weight = nn.Parameter(table.detach().clone())
        width = self.embedding.embedding_dim
        self.convolutions = nn.ModuleList(nn.Conv1d(width, CHANNELS, size, padding=size // 2) for size in (3, 5))
        self.dropout = nn.Dropout(0.2)
        self.hidden, self.head = nn.Linear(2 * CHANNELS, CHANNELS), nn.Linear(CHANNELS, n_classes)

    def influence_loss(self, batch: Any) -> Tensor:
        """One loss for each article."""
        ids = batch["input_ids"][:, :TOKENS]
        rows, padding = self.embedding(ids).mT, (ids == 0)[:, None]
        found = [layer(rows).relu().masked_fill(padding, 0).amax(2) for layer in self.convolutions]
        features = self.dropout(self.hidden(self.dropout(torch.cat(found, 1))).relu())
        return functional.cross_entropy(self.head(features), batch["labels"], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Their mean."""
        return self.influence_loss(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3)


def ask(folder: Path, name: str, texts: Texts) -> None:
    """Ask once, write the scores, and print what it took as JSON."""
    stored, options = ASKED[name]
    method = TracInSum([TracInLayer(layer, normalize="cosine", **options) for layer in LAYERS])
    began = time.process_time()
    result = quiet().influence(
        texts.loader("test"), Convolutional(len(texts.topics)), trace=folder / stored, method=method
    )
    torch.save(result.scores, folder / "scores.pt")
    print(json.dumps({"seconds": time.process_time() - began, "megabytes": peak_megabytes()}))  # noqa: T201


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=1600)
    arguments.add_argument("--tests", type=int, default=120)
    arguments.add_argument("--ask", nargs=2, help="used by itself: the folder of the traces, and how to ask")
    options = arguments.parse_args()
    texts = Texts(options.examples, options.tests)
    if options.ask:
        ask(Path(options.ask[0]), options.ask[1], texts)
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        callbacks = [TracInCallback(folder / name, methods=LAYERS, **kept) for name, kept in STORED.items()]
        trainer = quiet(max_epochs=1, callbacks=callbacks)
        trainer.fit(Convolutional(len(texts.topics)), texts.loader("train", shuffle=True))
        for name in STORED:
            (checkpoint,) = Trace(folder / name).checkpoints
            size = sum(bytes_below(checkpoint.path / site.key) for site in checkpoint.sites) / options.examples
            rows.append(Row(f"{name} (as {checkpoint.sites[0].shape})", size / 1e3, "KB each"))
        exact = None
        for name in ASKED:
            sizes = ("--examples", str(options.examples), "--tests", str(options.tests))
            taken = in_own_process("benchmarks.kfac", *sizes, "--ask", place, name)
            scores = torch.load(folder / "scores.pt", weights_only=True)
            exact = scores if exact is None else exact
            rows.append(Row(name, taken["seconds"], "CPU s", details=taken))
            rows.append(Row("   memory", taken["megabytes"], "MB"))
            rows.append(Row("   error of the scores", float((scores - exact).norm() / exact.norm()), ""))
            rows.append(Row("   recall of the 10 strongest proponents", recall(scores, exact), ""))
    title = f"K-FAC at two convolutions: {options.examples} articles, {options.tests} test articles, one checkpoint"
    report("kfac", title, rows, options.out)


if __name__ == "__main__":
    main()
