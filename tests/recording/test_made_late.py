"""What a hook of training makes, but a look before training needs: the message says where to make it."""

from __future__ import annotations

import pytest
from torch import nn
from toy import Toy, fitted, loader, quiet, test_texts
from variants import Plain


class Criterion(Toy):
    def on_train_start(self):
        self.criterion = nn.CrossEntropyLoss(reduction="none")

    def influence_loss(self, batch):
        return self.criterion(self(batch[0]), batch[1])


class Early(Criterion):
    def __init__(self):
        super().__init__()
        self.on_train_start()


def remembering(kind):
    class Remembering(kind):
        def on_train_epoch_start(self):
            self.outs = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.outs.append(batch_idx)
            return loss

    return Remembering()


def test_a_criterion_that_training_makes(tmp_path):
    with pytest.raises(
        ValueError, match=r"influence_loss of Criterion failed: .*Make self.criterion in __init__: before"
    ):
        fitted(tmp_path / "trace", Criterion())
    assert not (tmp_path / "trace").exists()
    trainer = fitted(tmp_path / "trace", Early())
    with pytest.raises(ValueError, match=r"Make self.criterion in __init__"):
        quiet().influence(loader(test_texts()), Renamed(), trace=tmp_path / "trace")
    assert trainer.influence(loader(test_texts())).scores.any()


class Renamed(Criterion):
    """The same layers, and no criterion yet."""


def test_a_list_that_training_makes(tmp_path):
    plain = r"'Remembering' object has no attribute 'outs'. Make self.outs in __init__: .* Or put TracInMixin before"
    with pytest.raises(ValueError, match=plain):
        fitted(tmp_path / "trace", remembering(Plain))
    with pytest.raises(
        ValueError, match=r"Make self.outs in __init__: .* cache=\"checkpoint\" does without"
    ) as refused:
        fitted(tmp_path / "trace", remembering(Toy), cache="training")
    assert "TracInMixin" not in str(refused.value)
    assert fitted(tmp_path / "trace", remembering(Toy)).influence(loader(test_texts())).scores.any()


def test_an_attribute_of_something_else_stays_its_own_error(tmp_path):
    class Wrong(Toy):
        def influence_loss(self, batch):
            return batch[0].no_such_thing

    with pytest.raises(AttributeError, match="no_such_thing"):
        fitted(tmp_path / "trace", Wrong())
