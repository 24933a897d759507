"""How right the sizes are that a fit tells before its first step: MiniLM's first layer on real texts.

The first batch, from which they are judged, is of a few examples that differ in length on purpose.
"""

from __future__ import annotations

import logging
import random
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from benchmarks.measure import Row, parser, report
from benchmarks.workload import bytes_below, quiet
from examples.classifier import Classifier, Tokenized
from examples.data import bbc_news, packaged_minilm, sms_spam
from lightning_tracin import Trace, TracInCallback

UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
INNER = "model.bert.encoder.layer.0.attention.self.value"  # which every token goes through
CASES: dict[str, dict[str, Any]] = {
    'cache="checkpoint"': {},
    'cache="training"': {"cache": "training"},
    'cache="on_demand"': {"cache": "on_demand"},
    'dtype="int8", top_words=20': {"dtype": "int8", "top_words": 20},
    "an inner layer, projection=(32, 128)": {"methods": ("tracin-we", INNER), "projection": (32, 128)},
    "an inner layer": {"methods": ("tracin-we", INNER)},
}


class Told(logging.Handler):
    """Keeps the lines that the callback tells."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if record.getMessage().startswith("TracInCallback: "):
            self.lines.append(record.getMessage())


def bytes_told(line: str, part: str) -> float:
    """The bytes of a part that a line tells; 0 where it does not name it."""
    found = re.search(rf"([\d.,]+) (\w+) {part}" if part else r"= ([\d.,]+) (\w+)", line)
    return 0.0 if found is None else float(found[1].replace(",", "")) * UNITS[found[2]]


def measured(line: str, path: Path) -> dict[str, tuple[float, float]]:
    """What a line told and what lies on disk, of the whole trace and of parts of a checkpoint."""
    folder = Trace(path).checkpoints[0].path
    moments = sum(file.stat().st_size for file in folder.glob("second-moments-*"))
    gradients = sum(bytes_below(each) for each in folder.iterdir() if each.is_dir() and each.name != "texts")
    return {
        "": (bytes_told(line, ""), bytes_below(path)),
        "moments": (bytes_told(line, "moments"), moments),
        "gradients": (bytes_told(line, "gradients") if gradients else 0.0, gradients),
    }


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=200)
    arguments.add_argument("--tokens", type=int, default=256, help="longer texts are cut")
    options = arguments.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(packaged_minilm())
    told = Told()
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_utilities"):
        logging.getLogger(name).addHandler(told)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    rows = []
    for data, (texts, labels) in {"articles": bbc_news(), "messages": sms_spam()}.items():
        random.Random(0).shuffle(texts)
        encoded = Tokenized(texts[: options.examples], tokenizer, options.tokens)
        pad = partial(tokenizer.pad, return_tensors="pt")
        loader = DataLoader(encoded, batch_size=16, shuffle=True, collate_fn=pad)
        for name, case in CASES.items():
            pl.seed_everything(0, verbose=False)
            module = Classifier(packaged_minilm(), labels, tokenizer, total_steps=1000, n_layers=1)
            told.lines.clear()
            with tempfile.TemporaryDirectory() as folder:
                quiet(max_epochs=1, callbacks=[TracInCallback(folder, **case)]).fit(module, loader)
                for part, (expected, found) in measured(told.lines[0], Path(folder)).items():
                    if found:
                        details = {
                            "told": expected,
                            "found": found,
                            "reason": f"{expected / 1e6:.1f} / {found / 1e6:.1f} MB",
                        }
                        what = f"   {part} of a checkpoint" if part else f"{data}, {name}"
                        rows.append(Row(what, expected / found, details=details))
    title = f"Sizes told before a fit / on disk after it: {options.examples} texts of at most {options.tokens} tokens"
    report("estimates", title, rows, options.out)


if __name__ == "__main__":
    main()
