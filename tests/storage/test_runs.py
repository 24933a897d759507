"""What waits to be written, and what is arranged out of runs, against tables that are filled in one by one."""

from __future__ import annotations

import pytest
import torch
from random_gradients import dense, random_linear, random_words
from stored_files import bytes_of_tensors

from lightning_tracin.gradients.texts import Texts
from lightning_tracin.storage import runs
from lightning_tracin.storage.row_buffer import RowBuffer
from lightning_tracin.storage.runs import Runs


def test_blocks_that_wait_are_joined_in_memory_that_is_used_again():
    waiting = RowBuffer()
    blocks = [random_words(n_examples) for n_examples in (3, 1, 6)]
    table = torch.cat([of_block for _, of_block in blocks])
    places = set()
    for _ in range(3):
        for block, _ in blocks:
            waiting.add(block)
        torch.testing.assert_close(dense(waiting.block(), 30), table, rtol=1e-5, atol=1e-6)
        assert waiting.nbytes == sum(len(block.tokens) for block, _ in blocks) * (8 + 8 + 4 + 6 * 4)
        places.add(waiting.block().directions.data_ptr())
        waiting.clear()
        assert waiting.nbytes == 0
    assert len(places) == 1


@pytest.mark.parametrize("run_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize("shard_examples", [1, 5, 40])
def test_of_an_example_that_came_again_the_last_record_is_arranged(tmp_path, monkeypatch, run_bytes, shard_examples):
    """Random batches of 23 examples, some of which never come, and some several times, also in one run."""
    monkeypatch.setattr(runs, "_RUN_BYTES", run_bytes)
    came = Runs(tmp_path / "runs", 23, dtype="float32")
    table = torch.zeros(23, 30, 6, dtype=torch.float64)
    norms = torch.zeros(23)
    said: dict[int, tuple[list[int], float]] = {}
    for when in range(12):
        indices = torch.randperm(20)[:4]
        words, of_words = random_words(4)
        linear, of_linear = random_linear(4, 2)
        ids, labels = torch.randint(30, (4, 3)), torch.randn(4, dtype=torch.float64)
        texts = Texts(4, torch.arange(4).repeat_interleave(3), ids.flatten(), labels)
        came.add(indices, {"words": words, "linear": linear, "texts": texts}, when)
        table[indices], norms[indices] = of_words, of_linear.flatten(1).norm(dim=1).float()
        said.update(zip(indices.tolist(), zip(ids.tolist(), labels.tolist(), strict=True), strict=True))
    assert came.count() == len(said)
    found_words = [dense(block, 30) for block in came.arranged("words", shard_examples)]
    torch.testing.assert_close(torch.cat(found_words), table, rtol=1e-5, atol=1e-6)
    found_norms = [type(block).cat([block]).example_norms() for block in came.arranged("linear", shard_examples)]
    torch.testing.assert_close(torch.cat(found_norms), norms)
    for number, block in enumerate(came.arranged("texts", shard_examples)):
        for example in range(block.n_examples):
            ids, label = said.get(number * shard_examples + example, ([], None))
            assert (block.ids_of(example), block.label_of(example)) == (ids, label)
    came.clear()
    assert not (tmp_path / "runs").exists()


def test_runs_without_an_example_cannot_be_arranged(tmp_path):
    with pytest.raises(ValueError, match="no training batch has given gradients that are finite"):
        list(Runs(tmp_path / "runs", 23, dtype="float32").arranged("words", 2))


N_MANY = 400
DRAWS = {
    "each once an epoch": lambda: torch.randperm(N_MANY),
    "some of them seldom": lambda: torch.multinomial(torch.logspace(-3, 0, N_MANY), N_MANY, replacement=True),
    "a quarter of them an epoch": lambda: torch.randperm(N_MANY)[: N_MANY // 4],  # as one of four processes
}


@pytest.mark.parametrize("draw", DRAWS)
def test_however_often_examples_come_little_more_lies_there_than_counts(tmp_path, monkeypatch, draw):
    monkeypatch.setattr(runs, "_RUN_BYTES", 9000)  # some 85 examples
    if draw == "each once an epoch":
        monkeypatch.delattr(runs._Run, "compacted")  # no run is compacted
    came = Runs(tmp_path / "runs", N_MANY, dtype="float32")
    norms, peak = torch.zeros(N_MANY), 0
    batches = (batch for _ in range(30) for batch in DRAWS[draw]().split(20))
    for when, indices in enumerate(batches):
        block, table = random_linear(len(indices), positions=2)
        came.add(indices, {"linear": block}, when)
        for index, norm in zip(indices.tolist(), table.flatten(1).norm(dim=1).tolist(), strict=True):
            norms[index] = norm
        peak = max(peak, bytes_of_tensors(tmp_path))
    one_pass = N_MANY * 2 * 4 * (3 + 5 + 4)  # at each of two positions: example and two norms, input, delta
    assert one_pass < peak < runs.max_run_bytes(one_pass, 30, 1)
    assert came.count() == int((norms > 0).sum())
    found = [type(block).cat([block]).example_norms() for block in came.arranged("linear", 64)]
    torch.testing.assert_close(torch.cat(found), norms)
