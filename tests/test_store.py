from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_gradients import dense, random_linear, random_words

from lightning_tracin import store
from lightning_tracin.gradients import Texts
from lightning_tracin.store import Shards, ShardWriter, encoded_bytes


def written(folder, block, *, batch=4, **options):
    writer = ShardWriter(folder, **options)
    for start in range(0, block.n_examples, batch):
        writer.add(block.slice(start, min(start + batch, block.n_examples)))
    writer.close()
    return Shards.open(folder)


@pytest.mark.parametrize("shard_examples", [1, 3, 4, 5, 8, 17, 18, 100])
def test_every_example_comes_back_from_its_shard(tmp_path, shard_examples):
    words, table = random_words(17)
    shards = written(tmp_path, words, shard_examples=shard_examples)
    assert len(shards) == -(-17 // shard_examples)
    for shard in range(len(shards)):
        start, stop = shards.bounds(shard)
        torch.testing.assert_close(dense(shards.read(shard), 30), table[start:stop], rtol=1e-5, atol=1e-6)
    for example in (0, 7, 16):
        torch.testing.assert_close(dense(shards.read_example(example), 30)[0], table[example], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-20])
def test_the_error_of_a_row_does_not_depend_on_its_size(tmp_path, dtype, tolerance, scale):
    words, table = random_words(10, scale=scale)
    read = dense(written(tmp_path, words, dtype=dtype).read(0), 30)
    assert (read - table).norm() <= tolerance * table.norm()


def test_linear_factors_come_back(tmp_path):
    linear, _ = random_linear(9, 3)
    shards = written(tmp_path, linear, shard_examples=4)
    norms = torch.cat([shards.read(shard).example_norms() for shard in range(len(shards))])
    torch.testing.assert_close(norms, linear.example_norms())
    torch.testing.assert_close(shards.read_example(5).example_norms()[0], linear.example_norms()[5])


def test_texts_come_back(tmp_path):
    texts = Texts(3, torch.tensor([0, 0, 2]), torch.tensor([5, 6, 7]), torch.tensor([1.0, torch.nan, 0.0]))
    shards = written(tmp_path, texts.__class__.cat([texts]), shard_examples=2)
    assert [shards.read_example(i).ids_of(0) for i in range(3)] == [[5, 6], [], [7]]
    assert [shards.read_example(i).label_of(0) for i in range(3)] == [1.0, None, 0.0]


def test_only_rows_of_the_wanted_words_are_read(tmp_path):
    words, table = random_words(12)
    read = written(tmp_path, words).read(0, tokens=torch.tensor([2, 3, 29]))
    assert set(read.tokens.tolist()) <= {2, 3, 29}
    torch.testing.assert_close(dense(read, 30)[:, [2, 3, 29]], table[:, [2, 3, 29]], rtol=1e-5, atol=1e-6)


def test_encoded_bytes_is_what_lies_on_disk(tmp_path):
    words, _ = random_words(12)
    written(tmp_path, words, dtype="float16")
    stored = load_file(tmp_path / "00000.safetensors")
    assert encoded_bytes(words, "float16") == sum(tensor.nbytes for tensor in stored.values())


def test_a_folder_without_an_index_cannot_be_opened(tmp_path):
    writer = ShardWriter(tmp_path, shard_examples=2)
    writer.add(random_words(4)[0])
    assert (tmp_path / "00000.safetensors").exists()
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        Shards.open(tmp_path)


def test_a_file_whose_writing_fails_does_not_appear(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []
