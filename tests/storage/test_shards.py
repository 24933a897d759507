from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_gradients import dense, random_linear, random_words
from safetensors import SafetensorError
from safetensors.torch import load_file
from stored_files import encoded_bytes, flipped, truncated

from lightning_tracin.gradients.texts import Texts
from lightning_tracin.storage import files
from lightning_tracin.storage.shards import Shards, ShardWriter


def written(folder, block, *, batch=4, dtype="float32", shard_examples=100):
    with ShardWriter(folder, dtype=dtype, shard_examples=shard_examples, examples=range(block.n_examples)) as writer:
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
        torch.testing.assert_close(dense(shards.read_examples([example]), 30)[0], table[example], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2)])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-20])
def test_the_error_of_a_row_does_not_depend_on_its_size(tmp_path, dtype, tolerance, scale):
    words, table = random_words(10, scale=scale)
    stored = written(tmp_path, words, dtype=dtype).read(0)
    assert (dense(stored, 30) - table).norm() <= tolerance * table.norm()
    torch.testing.assert_close(stored.example_norms(), words.example_norms(), rtol=1e-6, atol=0)  # norms are exact


def test_linear_factors_come_back(tmp_path):
    linear, _ = random_linear(9, 3)
    shards = written(tmp_path, linear, shard_examples=4)
    norms = torch.cat([shards.read(shard).example_norms() for shard in range(len(shards))])
    torch.testing.assert_close(norms, linear.example_norms())
    torch.testing.assert_close(shards.read_examples([5]).example_norms()[0], linear.example_norms()[5])


def test_texts_come_back(tmp_path):
    texts = Texts(3, torch.tensor([0, 0, 2]), torch.tensor([5, 6, 7]), torch.tensor([1.0, torch.nan, 0.0]).double())
    shards = written(tmp_path, texts.__class__.cat([texts]), shard_examples=2)
    assert [shards.read_examples([i]).ids_of(0) for i in range(3)] == [[5, 6], [], [7]]
    assert [shards.read_examples([i]).label_of(0) for i in range(3)] == [1.0, None, 0.0]


@pytest.mark.parametrize("batch", [1, 4, 17])
@pytest.mark.parametrize("shard_examples", [3, 5, 17, 100])
def test_the_order_in_which_the_examples_of_a_shard_come_does_not_matter(tmp_path, batch, shard_examples):
    """Shards are the same, byte for byte; they may begin with a later one, where other processes write the others."""
    start = 2 * shard_examples
    shards = torch.arange(start, start + 17).split(shard_examples)
    order = torch.cat([shard[torch.randperm(len(shard))] for shard in shards]).tolist()
    texts = Texts(17, torch.arange(17).repeat_interleave(3), torch.randint(9, (51,)), torch.rand(17).double())
    for name, block in {"words": random_words(17)[0], "linear": random_linear(17, 3)[0], "texts": texts}.items():
        came = type(block).cat([block.slice(number - start, number - start + 1) for number in order])
        (tmp_path / name / "other").mkdir(parents=True)
        expected = written(tmp_path / name, block, dtype="float16", shard_examples=shard_examples)
        with ShardWriter(
            tmp_path / name / "other",
            dtype="float16",
            shard_examples=shard_examples,
            examples=range(start, start + 17),
            order=order,
        ) as writer:
            for begin in range(0, 17, batch):
                writer.add(came.slice(begin, min(begin + batch, 17)))
            writer.close()
        files = sorted((tmp_path / name / "other").glob("*.safetensors"))
        assert [file.read_bytes() for file in files] == [file.read_bytes() for file, _ in expected.files]


@pytest.mark.parametrize("shard_examples", [1, 2, 5, 17])
def test_examples_that_are_left_out_have_no_rows_and_shards_of_them_alone_no_file(tmp_path, shard_examples):
    """What is read of those that were stored is what was written, in whatever order they are asked for."""
    kept = [3, 2, 11, 12, 10, 14]  # those of a shard together, for every size
    kept = sorted(kept, key=lambda index: index // shard_examples)
    words, table = random_words(17)
    texts = Texts(17, torch.arange(17).repeat_interleave(3), torch.randint(9, (51,)), torch.rand(17).double())
    expected = torch.zeros_like(table)
    expected[kept] = table[kept]
    read = {}
    for name, block in {"words": words, "texts": texts}.items():
        (tmp_path / name).mkdir()
        with ShardWriter(
            tmp_path / name, dtype="float32", shard_examples=shard_examples, examples=range(17), order=kept
        ) as writer:
            for index in kept:
                writer.add(block.slice(index, index + 1))
            writer.close()
        read[name] = Shards.open(tmp_path / name)
        files_of = {index // shard_examples for index in kept}
        assert [read[name].holds(shard) for shard in range(len(read[name]))] == [
            shard in files_of for shard in range(-(-17 // shard_examples))
        ]
    for asked in ([0], [14, 2], [16, 3, 0, 12, 11], list(range(17))):
        torch.testing.assert_close(dense(read["words"].read_examples(asked), 30), expected[asked], rtol=1e-5, atol=1e-6)
        found = read["texts"].read_examples(asked)
        assert found.ids_by_example() == [texts.ids_of(index) if index in kept else [] for index in asked]
        assert torch.isnan(found.labels).tolist() == [index not in kept for index in asked]


def test_stored_rows_stay_on_disk_until_they_are_used(tmp_path):
    words, _ = random_words(12)
    read = written(tmp_path, words).read(0)
    path = str(tmp_path / "00000.safetensors")
    mapped = [line.split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
    address = read.sorted().without([3]).scaled(torch.ones(12)).directions.data_ptr()
    assert any(int(start, 16) <= address < int(stop.split()[0], 16) for start, stop, *_ in mapped)


def test_encoded_bytes_is_what_lies_on_disk(tmp_path):
    words, _ = random_words(12)
    written(tmp_path, words, dtype="float16")
    stored = load_file(tmp_path / "00000.safetensors")
    assert encoded_bytes(words, "float16") == sum(tensor.nbytes for tensor in stored.values())


def test_a_folder_without_an_index_cannot_be_opened(tmp_path):
    with ShardWriter(tmp_path, dtype="float32", shard_examples=2, examples=range(4)) as writer:
        writer.add(random_words(4)[0])
    assert (tmp_path / "00000.safetensors").exists()
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        Shards.open(tmp_path)


def test_a_file_whose_writing_fails_does_not_appear(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_written_is_an_error_of_the_writer(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with ShardWriter(tmp_path, dtype="float32", shard_examples=2, examples=range(2)) as writer:
        writer.add(random_words(2)[0])
        with pytest.raises(OSError, match=r"00000\.safetensors could not be written.*No space left"):
            writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", [lambda path: flipped(path, 8 * path.stat().st_size - 5), lambda path: flipped(path, 70)]
)
@pytest.mark.parametrize("shorter", [None, 0, 7, 300])
def test_a_damaged_shard_is_named(tmp_path, damage, shorter):
    words, _ = random_words(12)
    shards = written(tmp_path, words, shard_examples=5)
    path = tmp_path / "00001.safetensors"
    shards.read(1)
    if shorter is None:
        damage(path)
    else:
        truncated(path, shorter)
    with pytest.raises(ValueError, match=r"00001\.safetensors is damaged"):
        shards.read(1)
    shards.read(0)
    shards.read(2)
