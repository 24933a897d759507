"""docs/past_runs.md: its examples run, one after the other, as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from toy import Toy, fitted, loader, quiet, test_texts, texts
from trainer_runs import N_TEST, N_TRAIN, batches, model, trained

from lightning_tracin import Trace

PAGE = Path(__file__).parents[2] / "docs" / "past_runs.md"

pytestmark = pytest.mark.filterwarnings("ignore")


def test_examples_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pl.seed_everything(0, verbose=False)
    quiet(enable_checkpointing=True, callbacks=[ModelCheckpoint("runs", save_top_k=-1)]).fit(Toy(), loader())
    trained("output")
    known = {
        "model": Toy(),
        "train_loader": loader(),
        "test_loader": loader(test_texts()),
        "hf_model": model(),
        "hf_train_loader": batches(N_TRAIN, 0),
        "hf_test_loader": batches(N_TEST, 1),
        "pool_loader": loader(texts(9, seed=3)),
        "trace_of_run": fitted("trace-of-run").callbacks[0].trace,
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        if "best.ckpt" in block:
            Path("runs/epoch=1-step=10.ckpt").rename("runs/best.ckpt")
        exec(block, known)
    assert Trace("trace").header.notes == Trace("trace-of-trainer").header.notes == ()
    assert known["result"].candidates
    assert len(known["chosen"]) == 2
