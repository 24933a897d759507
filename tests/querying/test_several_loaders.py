"""Test examples in several loaders: one result, in which each is named by its loader and its index there."""

from __future__ import annotations

import io
import json

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from toy import N_TEST, N_TRAIN, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import InfluenceResult, TracInLast, TracInSum, TracInWE
from lightning_tracin.querying import influence as influence_module
from lightning_tracin.storage.files import hash_of_tensors

NAMES = ("news", "sport")


def first(**options):
    return loader(test_texts(), **options)


def second(**options):
    return loader(texts(3, seed=2), batch_size=2, **options)


def both(**options):
    return dict(zip(NAMES, (first(**options), second(**options)), strict=True))


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)

    def test_dataloader(self):
        return [first(), second()]


@pytest.fixture(scope="module")
def result(toy):
    return toy.influence(both())


@pytest.mark.parametrize("method", [TracInWE(), TracInWE(normalize="cosine"), TracInLast()], ids=str)
@pytest.mark.parametrize("k", [None, 4])
def test_rows_are_those_of_each_loader_by_itself(toy, method, k):
    together = toy.influence(both(shuffle=True), method=method, k=k)
    apart = [toy.influence(each, method=method, k=k) for each in (first(), second())]
    assert together.test_indices.tolist() == [*range(N_TEST), *range(3)]
    assert together.test_loaders.tolist() == [0] * N_TEST + [1] * 3
    assert together.test_loader_names == NAMES
    for name in ("proponents", "opponents"):
        expected = torch.cat([getattr(each, name)(4).values for each in apart])
        torch.testing.assert_close(getattr(together, name)(4).values, expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(together.totals, torch.cat([each.totals for each in apart]), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(together.predictions, torch.cat([each.predictions for each in apart]))
    if method != TracInLast():
        assert dict(together.words(N_TEST + 1, 5)) == pytest.approx(dict(apart[1].words(1, 5)), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("block_bytes", [influence_module._BLOCK_BYTES, 1])
def test_sums_are_divided_by_what_all_loaders_say_in_whatever_order(trace, monkeypatch, block_bytes):
    """Of blocks of one example each, by what the first of each loader says."""
    monkeypatch.setattr(influence_module, "_BLOCK_BYTES", block_bytes)
    parts = TracInWE(), TracInLast()
    first_of = {name: slice(None if block_bytes > 1 else 1) for name in NAMES}
    apart = [[ask(trace, each, part).scores[first_of[name]] for name, each in both().items()] for part in parts]
    deviations = [float(torch.cat(scores).double().std(correction=0)) for scores in apart]
    for loaders in (both(), dict(reversed(both().items()))):
        found = ask(trace, loaders, TracInSum(parts))
        assert found.method.scales == pytest.approx(deviations, rel=1e-5)
        each = [ask(trace, loaders, part).scores / scale for part, scale in zip(parts, deviations, strict=True)]
        torch.testing.assert_close(found.scores, sum(each), rtol=1e-4, atol=1e-5)


def ask(trace, loaders, method):
    return quiet().influence(loaders, Toy(), trace=trace, method=method)


def test_scores_are_bit_for_bit_those_of_each_loader(toy, result):
    assert torch.equal(result.scores, torch.cat([toy.influence(each).scores for each in (first(), second())]))


def test_blocks_do_not_matter(trace, monkeypatch, result):
    monkeypatch.setattr(influence_module, "_BLOCK_BYTES", 1)  # one example each
    blocks = quiet().influence(both(), Toy(), trace=trace)
    assert len(blocks.test_gradients) == N_TEST + 3
    torch.testing.assert_close(blocks.scores, result.scores, rtol=1e-5, atol=1e-9)
    assert blocks.test_loaders.tolist() == result.test_loaders.tolist()


@pytest.mark.parametrize(
    "given",
    [
        lambda: [first(), second()],
        lambda: (first(), second()),
        lambda: CombinedLoader([first(), second()], "sequential"),
        lambda: [test_texts(), texts(3, seed=2)],
        Data,
    ],
    ids=["list", "tuple", "CombinedLoader", "data sets", "datamodule"],
)
def test_without_names_loaders_are_numbered(toy, result, given):
    found = toy.influence(given())
    torch.testing.assert_close(found.scores, result.scores, rtol=1e-5, atol=1e-9)
    assert found.test_loader_names == ("0", "1")


def test_nothing_is_passed(tmp_path, result):
    """The test examples are then those of the fit's own datamodule."""
    fit = fitted(tmp_path, data=Data())
    found = fit.influence()
    assert torch.equal(found.scores, fit.influence(Data()).scores)
    assert found.test_loader_names == ("0", "1")


@pytest.mark.parametrize("given", [lambda: {"news": first()}, lambda: [first()]])
def test_one_loader_in_a_list_needs_no_name(toy, result, given):
    found = toy.influence(given())
    assert found.test_loaders is None
    assert found.test_loader_names == ()
    assert torch.equal(found.scores, result.scores[:N_TEST])
    assert "test_loader" not in found.rows()[0]


def test_they_are_named_wherever_examples_are_shown(result, tmp_path):
    rows = result.rows(2)
    assert {row["test_loader"] for row in rows} == set(NAMES)
    assert all(row["test_loader"] == NAMES[row["test_row"] >= N_TEST] for row in rows)
    assert all(row["test_index"] == row["test_row"] % N_TEST for row in rows)
    console = Console(width=80, record=True, file=io.StringIO())
    result.show(N_TEST + 2, console=console)
    assert "Test example 2 of sport, label" in console.export_text()
    page = result.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('"loader":"news"') == N_TEST
    assert page.count('"loader":"sport"') == 3


def test_texts_are_given_by_loader(result):
    class Fast:
        is_fast = True

    named = result.with_texts(test={"sport": ["a", "b", "c"]}, tokenizer=Fast())
    assert named.raw_test == {"sport": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=r"test\['sport'\] must have a text for each of 3 examples, but has 2"):
        result.with_texts(test={"sport": ["a", "b"]}, tokenizer=Fast())
    for wrong in (["a"] * 9, {"weather": ["a"]}):
        with pytest.raises(ValueError, match=r"test must map names of \('news', 'sport'\) to texts"):
            result.with_texts(test=wrong, tokenizer=Fast())


def test_a_saved_result_has_them(result, tmp_path):
    loaded = InfluenceResult.load(result.save(tmp_path / "result.safetensors"))
    assert torch.equal(loaded.test_loaders, result.test_loaders)
    assert loaded.test_loader_names == NAMES
    assert loaded.rows(2) == result.rows(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: tensors.update(test_loaders=tensors["test_loaders"].flip(0)),
        lambda tensors, header: tensors.update(test_loaders=tensors["test_loaders"] * 2),
        lambda tensors, header: tensors.update(test_loaders=tensors["test_loaders"] - 1),
        lambda tensors, header: tensors.update(test_loaders=tensors["test_loaders"][1:].clone()),
        lambda tensors, header: tensors.update(test_indices=tensors["test_indices"].flip(0)),
        lambda tensors, header: tensors.pop("test_loaders"),
        lambda tensors, header: header.update(test_loader_names=["news"]),
        lambda tensors, header: header.update(test_loader_names=["news", "news"]),
        lambda tensors, header: header.pop("test_loader_names"),
    ],
)
def test_a_file_whose_loaders_do_not_fit_its_examples_is_refused(result, tmp_path, change):
    path = result.save(tmp_path / "result.safetensors")
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["lightning_tracin.result"])
    change(tensors, header)
    text = json.dumps(header)
    metadata = {"lightning_tracin.result": text, "lightning_tracin.checksum": hash_of_tensors(tensors, text)}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged"):
        InfluenceResult.load(path)


def test_a_file_from_before_there_were_several(toy, tmp_path):
    path = toy.influence(first(), k=3).save(tmp_path / "result.safetensors")
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["lightning_tracin.result"])
    del header["test_loader_names"]
    text = json.dumps(header)
    metadata = {"lightning_tracin.result": text, "lightning_tracin.checksum": hash_of_tensors(tensors, text)}
    save_file(tensors, path, metadata=metadata)
    assert InfluenceResult.load(path).test_loaders is None


def test_names_that_print_alike_are_refused(toy):
    with pytest.raises(ValueError, match=r"must differ in print, but got \[1, '1'\]"):
        toy.influence({1: first(), "1": second()})


def test_an_empty_one_among_them_is_named(toy):
    with pytest.raises(ValueError, match="test loader 'none' is empty"):
        toy.influence({"news": first(), "none": loader([])})
    assert toy.influence(first()).scores.shape == (N_TEST, N_TRAIN)
