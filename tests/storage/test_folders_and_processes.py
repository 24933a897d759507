"""A trace and its results stay what they are, wherever the process goes and whatever others write meanwhile."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from toy import Toy, fitted, loader, test_texts, texts

from lightning_tracin import InfluenceResult, Trace
from lightning_tracin.storage import files
from lightning_tracin.storage.schemas import CheckpointFile, write


def test_a_result_is_saved_whole_from_another_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fitted("trace").influence(loader(test_texts()))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    expected = list(result.explanations())
    result.save("result.safetensors")
    loaded = InfluenceResult.load("result.safetensors")
    assert loaded.trace.path == tmp_path / "trace"
    assert loaded.excerpt is not None
    assert list(loaded.explanations()) == expected
    shutil.rmtree(tmp_path / "trace")
    result.save("scores.safetensors", k=0)
    with pytest.warns(UserWarning, match=r"result.safetensors holds scores alone: .*trace, is not at hand"):
        result.save("result.safetensors")
    assert torch.equal(InfluenceResult.load("result.safetensors").scores, result.scores)


def test_the_home_folder_is_that_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fitted("~/my trace")
    assert Trace("~/my trace").path == tmp_path / "my trace"
    assert not os.path.lexists("~")


def test_words_that_another_process_has_added_stay(tmp_path):
    fitted(tmp_path / "trace")
    one, other = Trace(tmp_path / "trace"), Trace(tmp_path / "trace")
    before = dict(one.vocabulary)
    other.add_words({1001: "theirs"})
    assert one.vocabulary[1001] == "theirs"
    one.add_words({1002: "ours"})
    assert Trace(tmp_path / "trace").vocabulary == {**before, 1001: "theirs", 1002: "ours"}


@pytest.mark.parametrize("change", ["other numbers", "cut short"])
def test_a_loaded_result_is_not_changed_by_what_is_written_into_its_file(toy, tmp_path, change):
    result = toy.influence(loader(test_texts()))
    result.save(tmp_path / "a.safetensors")
    loaded = InfluenceResult.load(tmp_path / "a.safetensors")
    with (tmp_path / "a.safetensors").open("r+b") as opened:  # in place, as cp and rsync --inplace do
        if change == "cut short":
            opened.truncate(100)
        else:
            opened.seek(-result.scores.nbytes, os.SEEK_END)
            opened.write(bytes(result.scores.nbytes))
    assert torch.equal(loaded.scores, result.scores)
    assert list(loaded.explanations()) == list(result.explanations())


def test_what_could_not_be_read_again_is_not_written(toy, tmp_path, monkeypatch):
    result = toy.influence(loader(test_texts()))
    monkeypatch.setattr(files, "_JSON_VALUES", 100)
    with pytest.raises(ValueError, match=r"Example 0, of \d tokens, is too long .* With save\(path, k=0\)"):
        result.save(tmp_path / "result.safetensors")
    monkeypatch.setattr(files, "_JSON_VALUES", 2000)
    steps = [(step, 0, [0.01, 0.02], ["linear-1"]) for step in range(500)]
    content = CheckpointFile(
        id="0" * 32, step=500, epoch=0, previous=None, steps=steps, groups=[[[]]], checksums={}, keeps_weights=False
    )
    with pytest.raises(ValueError, match=r"checkpoint.json was not written: .* take checkpoints more often"):
        write(tmp_path / "checkpoint.json", content)
    assert not [*tmp_path.iterdir()]


class Soft(Toy):
    """Learns probabilities of classes."""

    def influence_loss(self, batch):
        return -(batch[1] * self(batch[0]).log_softmax(-1)).sum(-1)


def test_equal_texts_with_labels_that_are_not_one_number_are_listed_each(tmp_path):
    ids = texts().tensors[0]
    ids[:3] = ids[0]
    soft = torch.rand(len(ids), 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    soft[:3] = torch.tensor([[0.9, 0.05, 0.05], [0.6, 0.2, 0.2], [0.05, 0.05, 0.9]])
    data = torch.utils.data.TensorDataset(ids, soft)
    result = fitted(tmp_path / "trace", Soft(), loader(data)).influence(loader(data))
    assert len({float(each) for each in result.scores[0, :3]}) == 3
    result.save(tmp_path / "a.safetensors")
    loaded = InfluenceResult.load(tmp_path / "a.safetensors")
    for shown in (result, loaded):
        (explanation,) = shown.explanations([0], k=len(ids))
        listed = [*explanation.proponents, *explanation.opponents]
        assert {0, 1, 2} <= {each.example.index for each in listed}
        assert all(not each.equal and each.score == float(result.scores[0, each.example.index]) for each in listed)


def test_a_saved_result_is_as_readable_as_other_new_files_and_a_link_stays_one(toy, tmp_path):
    result = toy.influence(loader(test_texts()))
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    (shared / "other").touch()
    result.save(shared / "link.safetensors")
    assert (shared / "link.safetensors").is_symlink()
    assert InfluenceResult.load(tmp_path / "real.safetensors").test_indices.tolist() == result.test_indices.tolist()
    result.save(shared / "result.safetensors")
    assert (shared / "result.safetensors").stat().st_mode == (shared / "other").stat().st_mode


def test_gradients_whose_index_is_gone_are_computed_again(tmp_path):
    fit = fitted(tmp_path / "trace", dtype="float32")
    expected = fit.influence(loader(test_texts())).scores
    for index in (tmp_path / "trace").glob("checkpoints/*/words/index.json"):
        index.unlink()
    torch.testing.assert_close(fit.influence(loader(test_texts())).scores, expected, rtol=1e-5, atol=1e-9)


class Halved(Toy):
    """Says half of a character for a token."""

    def influence_words(self, batch):
        return [[f"\ud83d{token}" for token in row] for row in batch[0].tolist()]

    def influence_label_names(self):
        return {0: "a\udc00", 1: "\ud83d\ude00", 2: "c"}


def test_halves_of_characters_in_words_and_names_of_labels_are_shown_as_such(tmp_path):
    trainer = fitted(tmp_path / "trace", Halved())
    result = trainer.influence(loader(test_texts()))
    assert result.label_names == {0: "a\ufffd", 1: "\N{GRINNING FACE}", 2: "c"}
    for name in ("a\udc00", "a\ufffd"):  # as the module calls it, and as it is shown
        asked = trainer.influence(loader(test_texts()), target=name)
        assert asked.target == "a\ufffd"
        assert torch.equal(asked.scores, trainer.influence(loader(test_texts()), target=0).scores)
        f"{asked}{list(asked.explanations())}{asked.rows(1)}".encode()
    assert all("\ufffd" in row["test_text"] for row in result.rows(1))
    result.save(tmp_path / "result.safetensors")
    assert str(InfluenceResult.load(tmp_path / "result.safetensors")) == str(result)
