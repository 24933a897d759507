"""Recording in K-FAC's components: scores of the definition, space, what is refused, and files that are damaged."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from brute_force import relative_error
from families import FAMILIES, N_TRAIN
from kfac_by_hand import example_at, kfac_scores
from mutated_files import rehash
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from toy import Toy, fitted, loader, quiet, test_texts

from lightning_tracin import Trace, TracInCallback, TracInLast, TracInLayer
from lightning_tracin.scoring.naming import method_at
from lightning_tracin.storage import files, sampled_moments
from lightning_tracin.storage.encoding import StorageOptions
from lightning_tracin.storage.sizes import LayerSize
from lightning_tracin.storage.verification import verify

LAYERS = {"cnn": "network.convolution", "embedding-called-twice": "network.hidden"}
RANK = (6, 4)
RUNS = {
    "checkpoint": {},
    "on_demand": {"cache": "on_demand"},
    "float16": {"dtype": "float16"},
}
TOLERANCES = {"checkpoint": 1e-4, "on_demand": 1e-4, "float16": 5e-3, "past": 5e-3}
OPTIONS = [{}, {"normalize": "cosine", "damping": 2.0}, {"normalize": "train", "rank": (3, 2)}]


class Case:
    """A family's fit at one layer, of which components are stored, in several ways."""

    def __init__(self, path: Path, name: str) -> None:
        self.layer, self.family, self.path = LAYERS[name], FAMILIES[name], path
        callbacks = [
            TracInCallback(path / run, **{"dtype": "float32", "methods": (self.layer,), "rank": RANK, **options})
            for run, options in RUNS.items()
        ]
        self.trainer, self.module = quiet(max_epochs=2, callbacks=callbacks), self.family.build()
        pl.seed_everything(3, verbose=False)
        self.trainer.fit(self.module, self.family.train_loader())
        options = {"methods": (self.layer,), "rank": RANK}
        Trace.from_checkpoints(
            path / "past", Trace(path / "on_demand"), self.module, self.family.train_loader(), **options
        )
        self.rates = self.module.mean_rates(self.layer)
        self.test, self.train = [], []
        for checkpoint in Trace(path / "checkpoint").checkpoints:
            module = self.family.build()
            module.load_state_dict(checkpoint.weights())
            module.eval()
            layer = module.get_submodule(self.layer)
            for side, batches in ((self.test, self.family.test_loader()), (self.train, self.family.train_loader())):
                side.append([example_at(module, layer, batch) for batch in self.family.singles(batches)])

    def influence(self, run, k=None, **options):
        method = TracInLayer(self.layer, precondition="kfac", **options)
        asked = {"trace": self.path / run, "train_dataloaders": self.family.train_loader(), "method": method}
        return self.trainer.influence(self.family.test_loader(), self.module, k=k, **asked)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Each is fitted once, by the first test that asks for it; the sample is smaller than the training set."""

    @functools.cache
    def fit(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampled_moments, "N_SAMPLED", 7)
            return Case(tmp_path_factory.mktemp(name), name)

    return fit


@pytest.fixture(autouse=True)
def few_sampled(monkeypatch):
    monkeypatch.setattr(sampled_moments, "N_SAMPLED", 7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("run", [*RUNS, "past"])
@pytest.mark.parametrize("name", LAYERS)
def test_scores_are_those_of_the_definition(case, name, run, options):
    of = case(name)
    assert {site.rank for site in Trace(of.path / run).sites} == {RANK}
    sample = [index * N_TRAIN // 7 for index in range(7)]
    expected = kfac_scores(of.rates, of.test, of.train, sample, **{"rank": RANK, **options})
    assert relative_error(of.influence(run, **options).scores, expected) < TOLERANCES[run]


def test_the_strongest_and_self_influence(case):
    of, method = case("cnn"), TracInLayer(LAYERS["cnn"], precondition="kfac")
    scores = of.influence("checkpoint").scores
    torch.testing.assert_close(of.influence("checkpoint", k=3).proponents(3).values, scores.topk(3).values)
    own = quiet().self_influence(trace=of.path / "checkpoint", method=method)
    asked = {"trace": of.path / "checkpoint", "method": method}
    on_train = quiet().influence(of.family.train_loader(), of.module, **asked).scores
    torch.testing.assert_close(own, on_train.diagonal())


def test_each_layer_is_stored_in_the_smallest_form_that_kfac_takes():
    """Where an example has one position, that is its two factors, also at a head of one output."""
    options = StorageOptions("float32", rank=(128, 32))
    assert options.components(LayerSize([50.0, 1.0], (300, 768))) == 128 * (4 * 768 + 8) + 32 * (4 * 300 + 8)
    assert options.nbytes(LayerSize([50.0, 1.0], (300, 768))) == 8 + 4 * 128 * 32
    for size in (LayerSize([1.0], (1, 500)), LayerSize([1.0, 0.0], (5, 768)), LayerSize([2.0], (400, 400))):
        assert options.components(size) == 0
        assert options.nbytes(size) == size.factors("float32")


def test_trace_is_verified(case):
    assert not any(problem for _, problem in verify(Trace(case("cnn").path / "checkpoint")))


@pytest.fixture
def copied(case, tmp_path):
    return Path(shutil.copytree(case("cnn").path / "checkpoint", tmp_path / "copied"))


def ask(case, trace):
    of = case("cnn")
    method = TracInLayer(of.layer, precondition="kfac")
    return quiet().influence(of.family.test_loader(), of.module, trace=trace, method=method)


def of_first(trace) -> Path:
    return Trace(trace).checkpoints[0].path / "linear-0/components.safetensors"


def test_a_missing_file_is_named(case, copied):
    path = of_first(copied)
    path.unlink()
    assert [problem for _, problem in verify(Trace(copied)) if problem] == [f"{path} is missing."]
    with pytest.raises(FileNotFoundError, match=rf"{path} is missing"):
        ask(case, copied)


def test_a_changed_file_is_named(case, copied):
    path = of_first(copied)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (problem,) = [problem for _, problem in verify(Trace(copied)) if problem]
    assert str(path) in problem
    with pytest.raises(ValueError, match=str(path)):
        ask(case, copied)


def test_an_index_that_names_no_components(case, copied):
    index = of_first(copied).with_name("index.json")
    files.write_json(index, {**files.read_json(index), "components": None})
    assert any("names no components" in problem for _, problem in verify(Trace(copied)) if problem)
    with pytest.raises(ValueError, match=r"index.json is damaged: it names no components of 'network.convolution'"):
        ask(case, copied)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("inputs_basis", lambda basis: basis * torch.nan, "inputs_basis holds NaN"),
        ("inputs_basis", lambda basis: basis * 1e30, "inputs_basis holds NaN, or numbers above 1"),
        ("inputs_basis", lambda basis: basis[:, :2], "inputs_values is .* but should be"),
        ("inputs_basis", lambda basis: basis[:7], "one of them is of another model"),
        ("deltas_values", lambda values: -values, "deltas_values holds numbers from"),
        ("deltas_values", lambda values: values.float(), "deltas_values is torch.float32"),
        ("deltas_mean", lambda mean: "nan", "deltas_mean is 'nan'"),
        ("deltas_mean", lambda mean: "-1", "deltas_mean is '-1'"),
    ],
    ids=range(8),
)
def test_components_of_a_stranger(case, copied, name, change, problem):
    path = of_first(copied)
    tensors, metadata = load_file(path), files.open_tensors(path)[1]
    (tensors if name in tensors else metadata)[name] = change((tensors if name in tensors else metadata)[name])
    save_file({key: each.contiguous() for key, each in tensors.items()}, path, metadata)
    rehash(copied)
    with pytest.raises(ValueError, match=rf"{path}.* is damaged: .*{problem}"):
        ask(case, copied)


def test_other_methods_are_refused(case):
    of = case("cnn")
    asked = {"trace": of.path / "checkpoint", "model": of.module}
    for options in ({}, {"normalize": "cosine"}, {"precondition": "adam"}):
        with pytest.raises(ValueError, match=r"keeps 6 x 4 components of .* for precondition=\"kfac\" alone"):
            quiet().influence(of.family.test_loader(), method=TracInLayer(of.layer, **options), **asked)
    with pytest.raises(ValueError, match=r"keeps \(6, 4\) components .* asks for more"):
        of.influence("checkpoint", rank=(7, 4))
    assert method_at(Trace(of.path / "checkpoint").sites[0]) == TracInLayer(of.layer, precondition="kfac")


class Stream(IterableDataset):
    def __len__(self):
        return len(test_texts())

    def __iter__(self):
        return iter(test_texts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, r"rank must be a pair of whole numbers of at least 1, .* but got 8"),
        ({"rank": (8, 0)}, r"rank must be a pair of whole numbers of at least 1, .* but got \(8, 0\)"),
        ({"rank": (8, 2.0)}, r"rank must be a pair of whole numbers of at least 1, .* but got \(8, 2.0\)"),
        ({"rank": (8, 2), "projection": (4, 4)}, r"rank=\(8, 2\) and projection=\(4, 4\) both make"),
        ({"rank": (8, 2), "cache": "training"}, 'cache="training" takes gradients as training goes on'),
    ],
    ids=str,
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TracInCallback("trace", **options)


def test_fits_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rank=\(8, 2\) is for linear layers, but methods=\('tracin-we',\)"):
        fitted(tmp_path / "words", methods=("tracin-we",), rank=(8, 2))
    with pytest.raises(ValueError, match="this one is a stream, which is read in one order"):
        fitted(tmp_path / "stream", data=loader(Stream()), rank=(8, 2))


def test_a_resumed_fit_goes_on_with_its_rank(tmp_path):
    family, layer = FAMILIES["cnn"], LAYERS["cnn"]

    def fit(epochs, rank, **options):
        callback = TracInCallback(tmp_path / "trace", methods=(layer,), rank=rank)
        trainer = quiet(max_epochs=epochs, callbacks=[callback])
        trainer.fit(family.build(), family.train_loader(), **options)
        return trainer

    fit(1, RANK).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"\(rank=\(6, 4\)\), but .* .*rank=\(5, 4\).* Resume with the same"):
        fit(2, (5, 4), ckpt_path=tmp_path / "last.ckpt")
    trainer = fit(2, RANK, ckpt_path=tmp_path / "last.ckpt")
    assert len(Trace(tmp_path / "trace").checkpoints) == 2
    method = TracInLayer(layer, precondition="kfac")
    assert trainer.influence(family.test_loader(), method=method).scores.any()


def test_a_layer_with_one_position_stays_as_it_is(tmp_path):
    trainer = fitted(tmp_path / "trace", rank=(2, 2))
    assert [(site.shape, site.rank) for site in Trace(tmp_path / "trace").sites][1] == ("factors", None)
    whole = fitted(tmp_path / "whole")
    for method in (TracInLast(), TracInLast(precondition="kfac", rank=(2, 2))):
        found, expected = (each.influence(loader(test_texts()), method=method).scores for each in (trainer, whole))
        torch.testing.assert_close(found, expected)


class OfTokens(Toy):
    """Its hidden layer reads each token."""

    def forward(self, ids):
        is_token = (ids != 0)[..., None]
        hidden = torch.tanh(self.hidden(self.embedding(ids))) * is_token
        return self.head(hidden.sum(1) / is_token.sum(1))


def test_components_are_the_same_in_a_fit_in_mixed_precision_and_after_it(tmp_path):
    """Training computes in bfloat16; what is done with its gradients is not."""
    options = {"methods": ("hidden",), "dtype": "float32", "on_error": "raise", "rank": (4, 4)}
    callbacks = [TracInCallback(tmp_path / each, cache=each, **options) for each in ("checkpoint", "on_demand")]
    trainer = quiet(max_epochs=2, callbacks=callbacks, precision="bf16-mixed")
    trainer.fit(OfTokens(), loader())
    method = TracInLayer("hidden", precondition="kfac")
    inside, after = (
        trainer.influence(loader(test_texts()), method=method, trace=each.trace.path).scores for each in callbacks
    )
    assert relative_error(inside, after) < 1e-4
