"""What reading a data set for its fingerprint leaves as it was."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_tracin.bridge.fingerprint import hash_of
from lightning_tracin.bridge.training_set import TrainingSet


class Augmented(Dataset):
    """Texts with a token that is drawn anew each time."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.cat([torch.tensor([index]), torch.randint(1000, (3,))])


def test_devices_keep_their_random_numbers(monkeypatch):
    """Ours are drawn on the CPU; of MPS and of a CUDA that nobody has begun to use, nobody would put them back."""
    seeded = []
    for device in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(device, name, seeded.append, raising=False)
    before = torch.get_rng_state()
    found = [TrainingSet(DataLoader(Augmented(), batch_size=2)).fingerprint() for _ in range(2)]
    assert found[0] == found[1]  # by what the examples hold: their random tokens are those of one seed
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mapping_that_iterates_over_its_rows_counts_by_its_names():
    class Rows(dict):  # as TensorDict does
        def __iter__(self):
            return iter([torch.zeros(2)])

    one, other = Rows(ids=torch.ones(2), labels=torch.zeros(1)), Rows(ids=torch.ones(2), labels=torch.ones(1))
    assert hash_of(one) == hash_of(Rows(one.items())) != hash_of(other)
