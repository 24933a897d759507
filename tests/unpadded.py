"""Texts without padding, and batch samplers that know what may be collated together."""

from __future__ import annotations

import random

import torch
from brute_force import BruteForce, dense_gradients
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset
from toy import CLASSES, VOCABULARY, Toy

RATE, BUDGET = 1e-9, 24


class Texts(Dataset):
    """Texts without padding, of four lengths; one of length 9 stands alone."""

    def __init__(self, n: int = 30, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = [9, *(2 + index % 3 for index in range(1, n))]
        self.ids = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
        self.labels = torch.randint(CLASSES, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index], self.labels[index]


class EqualLengths(BatchSampler):
    """Batches of at most four texts of one length: it shuffles its own list in place, and counts epochs."""

    def __init__(self, data: Texts, *, drop: int = 0, ends: bool = True, share: slice = slice(None)) -> None:
        self.data = data
        self.random = random.Random(0)
        self.drop, self.ends, self.epoch, self.share = drop, ends, 0, share
        self.buckets = [[i for i, ids in enumerate(data.ids) if len(ids) == size] for size in {*map(len, data.ids)}]

    def __iter__(self):
        while True:
            self.epoch += 1
            batches = []
            for bucket in self.buckets:
                self.random.shuffle(bucket)
                batches += [bucket[start : start + 4] for start in range(0, len(bucket), 4)]
            self.random.shuffle(batches)
            self.drawn = {index for batch in batches[self.drop :] for index in batch}
            yield from batches[self.drop :][self.share]
            if self.ends:
                return

    def __len__(self) -> int:
        return sum(-(-len(bucket) // 4) for bucket in self.buckets) - self.drop


class TokenBudget:
    """Batches that hold at most so many tokens with their padding; no subclass of torch's."""

    def __init__(self, data: Texts) -> None:
        self.data = data

    def __iter__(self):
        batch: list[int] = []
        for index in sorted(range(len(self.data)), key=lambda index: len(self.data.ids[index])):
            if len(self.data.ids[index]) * (len(batch) + 1) > BUDGET:
                yield batch
                batch = []
            batch.append(index)
        yield batch

    def __len__(self) -> int:
        return sum(1 for _ in self)


def padded(items):
    return pad_sequence([ids for ids, _ in items], batch_first=True), torch.stack([label for _, label in items])


class Still(Toy):
    """Barely moves, so that gradients of the moment are those at the checkpoint; sees how much a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout.p = 0.0
        type(self).held = []  # an attribute of the module would be put back after our passes

    def influence_loss(self, batch):
        self.held.append(batch[0].numel())
        return super().influence_loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def brute_scores(weights, train, test):
    """By the definition, at each checkpoint's weights."""
    sides = []
    for data in (test, train):
        of_side = []
        for state in weights:
            module = Still()
            module.load_state_dict(state)
            singles = DataLoader(data, batch_size=1)
            losses = module.influence_loss
            of_side.append(dense_gradients(module, module.embedding, singles, lambda b, f=losses: f(b).sum()))
        sides.append(of_side)
    return BruteForce([RATE] * len(weights), *sides).scores()
