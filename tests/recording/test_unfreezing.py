"""Steps that did not move a layer count with rate 0 at its site."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from toy import N_TRAIN, RATE, Toy, loader, quiet, site_of, test_texts

from lightning_tracin import Trace, TracInCallback

PER_EPOCH = 5


class Unfreezing(Toy):
    """The embedding is frozen until so many steps are done; one rate throughout."""

    def __init__(self, until: int, *, late_group: bool = False) -> None:
        super().__init__()
        self.until, self.late_group = until, late_group
        self.embedding.requires_grad_(until == 0)

    def configure_optimizers(self):
        left_out = {id(self.embedding.weight)} if self.late_group else set()
        return torch.optim.Adam([each for each in self.parameters() if id(each) not in left_out], lr=RATE)

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == self.until and self.until:
            self.embedding.requires_grad_()
            if self.late_group:
                self.optimizers().optimizer.add_param_group({"params": [self.embedding.weight], "lr": 3 * RATE})


def fitted(path, module, cache="checkpoint"):
    trainer = quiet(callbacks=[TracInCallback(path, dtype="float32", cache=cache, on_error="raise")], max_epochs=3)
    pl.seed_everything(0, verbose=False)
    trainer.fit(module, loader())
    return trainer


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
@pytest.mark.parametrize(
    ("until", "late_group", "rates"),
    [
        (0, False, [RATE, RATE, RATE]),
        (5, False, [0, RATE, RATE]),
        (7, False, [0, 3 / 5 * RATE, RATE]),
        (7, True, [0, 3 / 5 * 3 * RATE, 3 * RATE]),
        (99, False, [RATE, RATE, RATE]),  # frozen for the whole fit
    ],
)
def test_rates_of_a_layer_that_is_unfrozen(tmp_path, until, late_group, rates, cache):
    trainer = fitted(tmp_path / "trace", Unfreezing(until, late_group=late_group), cache)
    checkpoints = Trace(tmp_path / "trace").checkpoints
    words = [each.learning_rate_of(site_of(each, "tracin-we")) for each in checkpoints]
    assert words == pytest.approx(rates)
    assert [each.learning_rate_of(site_of(each, "tracin-last")) for each in checkpoints] == pytest.approx([RATE] * 3)
    sides = []
    for data in (test_texts(), loader().dataset):
        of_side = []
        for checkpoint in checkpoints:
            module = Toy()
            module.load_state_dict(checkpoint.weights())
            singles = loader(data, batch_size=1)
            of_side.append(
                dense_gradients(module, module.embedding, singles, lambda b, m=module: m.influence_loss(b).sum())
            )
        sides.append(of_side)
    scores = trainer.influence(loader(test_texts())).scores
    assert scores.shape[1] == N_TRAIN
    assert relative_error(scores, BruteForce(rates, *sides).scores()) < 1e-5
