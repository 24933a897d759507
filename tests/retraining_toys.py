"""A training set whose parts the toy is fitted to, and what counts how often that was done."""

from __future__ import annotations

from torch.utils.data import DataLoader, Subset
from toy import Toy, loader, test_texts, texts

from lightning_tracin.retraining import Retrainings

N_TRAIN, EPOCHS = 20, 1


class Build:
    """``build(indices, seed)``; notes what it was asked for, and stops at a number of fits."""

    def __init__(self, data=None, module=Toy, stop_at: int | None = None) -> None:
        self.data = texts() if data is None else data
        self.module = module
        self.stop_at = stop_at
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def __call__(self, indices, seed):
        if self.stop_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append((tuple(indices), seed))
        return self.module(), DataLoader(Subset(self.data, indices), batch_size=4, shuffle=True)


def retrainings(folder, build=None, test=None, **options) -> Retrainings:
    held_out = loader(test_texts()) if test is None else test
    settings = {"n_train": N_TRAIN, "trainer": EPOCHS, **options}
    return Retrainings(folder, Build() if build is None else build, held_out, **settings)
