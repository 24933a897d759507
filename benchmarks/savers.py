"""What saves space, and what it costs: MiniLM-L6 on BBC News, one fit that stores its gradients in every way.

At the word embedding table, and at a linear layer that is applied to every token: by its two factors at each position,
or projected at random on both sides to one matrix for each example.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, parser, report
from benchmarks.workload import Texts, bytes_below, quiet
from lightning_tracin import Trace, TracInCallback, TracInLayer, TracInWE

KEPT: dict[str, dict[str, Any]] = {
    'dtype="float32"': {"dtype": "float32"},
    'dtype="float16"': {"dtype": "float16"},
    'dtype="int8"': {"dtype": "int8"},
    "projection=128": {"projection": 128},
    "projection=32": {"projection": 32},
    'projection=128, dtype="int8"': {"projection": 128, "dtype": "int8"},
    "top_words=20": {"top_words": 20},
    "top_words=10": {"top_words": 10},
}
# The feed-forward layer of the last block but one, whose output every token of a [CLS] classifier's last block reads.
LAYER = "model.bert.encoder.layer.4.output.dense"
LAYER_KEPT: dict[str, dict[str, Any]] = {
    'layer, dtype="float32"': {"dtype": "float32"},
    'layer, dtype="float16"': {},
    'layer, dtype="int8"': {"dtype": "int8"},
    "layer, projection=(64, 256)": {"projection": (64, 256)},
    "layer, projection=(32, 128)": {"projection": (32, 128)},
    "layer, projection=(16, 64)": {"projection": (16, 64)},
}


def recall(found: Tensor, exact: Tensor, k: int = 10) -> float:
    """The share of the k strongest proponents that both have."""
    pairs = zip(*(scores.topk(k, dim=1).indices.tolist() for scores in (found, exact)), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / (k * len(exact))


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=400)
    arguments.add_argument("--tests", type=int, default=50)
    options = arguments.parse_args()
    texts = Texts(options.examples, options.tests)
    of_words = {"": TracInWE(), ", cosine": TracInWE(normalize="cosine")}
    of_layer = {"": TracInLayer(LAYER), ", cosine": TracInLayer(LAYER, normalize="cosine")}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        every = {**KEPT, **LAYER_KEPT}
        paths = {name: Path(folder) / str(number) for number, name in enumerate(every)}
        callbacks = [
            TracInCallback(paths[name], methods=("tracin-we",) if name in KEPT else (LAYER,), **kept)
            for name, kept in every.items()
        ]
        trainer = quiet(max_epochs=1, callbacks=callbacks)
        trainer.fit(texts.module(), texts.loader("train", shuffle=True))
        exact: dict[str, Tensor] = {}
        for name, path in paths.items():
            (site,) = Trace(path).sites
            size = bytes_below(Trace(path).checkpoints[0].path / site.key) / options.examples / 1e3
            rows.append(Row(name if site.has_words else f"{name} (as {site.shape})", size, "KB each"))
            if name == next(iter(LAYER_KEPT)):
                exact = {}
            for kind, method in (of_words if site.has_words else of_layer).items():
                scores = trainer.influence(texts.loader("test"), trace=path, method=method).scores
                assert scores is not None
                exact.setdefault(kind, scores)
                error = float((scores - exact[kind]).norm() / exact[kind].norm())
                correlation = float(torch.corrcoef(torch.stack([scores.flatten(), exact[kind].flatten()]))[0, 1])
                details = {"correlation": correlation}
                rows.append(Row(f"   error of the scores{kind}", error, "", details=details))
                rows.append(Row(f"   recall of the 10 strongest proponents{kind}", recall(scores, exact[kind]), ""))
    title = f"Space and fidelity against float32: {options.examples} articles, {options.tests} test articles"
    report("savers", title, rows, options.out)


if __name__ == "__main__":
    main()
