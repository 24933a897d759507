"""K-FAC against its definition, by dense gradients, dense second moments and matrix roots in double precision."""

from __future__ import annotations

import functools
from dataclasses import replace

import msgspec
import pytest
import pytorch_lightning as pl
import torch
from brute_force import relative_error
from families import FAMILIES, N_TRAIN
from kfac_by_hand import example_at, kfac_scores
from random_gradients import random_linear
from toy import Toy, fitted, loader, quiet, test_texts
from variants import Reproducible

from lightning_tracin import Trace, TracInCallback, TracInLast, TracInLayer, TracInSum, TracInWE
from lightning_tracin.gradients.components import Components
from lightning_tracin.gradients.kronecker import KroneckerSums
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.scoring import kfac
from lightning_tracin.scoring.kfac import Kfac
from lightning_tracin.scoring.naming import described, method_from_json, method_to_json, without_normalizing
from lightning_tracin.scoring.terms import terms_at
from lightning_tracin.storage import files, sampled_moments
from lightning_tracin.storage.encoding import StorageOptions

# A layer of one position, a convolution of a text, a layer of tokens that is called twice, a convolution of images.
LAYERS = {
    "linear": ("cnn", "network.head"),
    "convolution": ("cnn", "network.convolution"),
    "tokens": ("embedding-called-twice", "network.hidden"),
    "images": ("images", "network.convolution"),
}
OPTIONS = [
    {},
    {"normalize": "cosine"},
    {"normalize": "train", "damping": 10.0},
    {"normalize": "cosine", "rank": (3, 2)},
    {"rank": (5, 1), "damping": 0.01},
]


class Case:
    """A family's fit at one layer, in which the layer's gradients are stored as factors."""

    def __init__(self, path, name: str) -> None:
        family_name, self.layer = LAYERS[name]
        self.family = FAMILIES[family_name]
        module = self.family.build()
        self.path, self.trainer = path, quiet(max_epochs=2)
        for dtype in ("float32", "int8"):
            self.trainer.callbacks.append(TracInCallback(path / dtype, dtype=dtype, methods=(self.layer,)))
        pl.seed_everything(3, verbose=False)
        self.trainer.fit(module, self.family.train_loader())
        self.rates = module.mean_rates(self.layer)
        self.test, self.train = [], []
        for checkpoint in Trace(path / "float32").checkpoints:
            module.load_state_dict(checkpoint.weights())
            module.eval()
            layer = module.get_submodule(self.layer)
            for side, batches in ((self.test, self.family.test_loader()), (self.train, self.family.train_loader())):
                side.append([example_at(module, layer, batch) for batch in self.family.singles(batches)])

    def method(self, **options):
        return TracInLayer(self.layer, precondition="kfac", **options)

    def influence(self, dtype="float32", k=None, **options):
        method = self.method(**options)
        return self.trainer.influence(self.family.test_loader(), method=method, trace=self.path / dtype, k=k)

    def expected(self, sample=tuple(range(N_TRAIN)), **options):
        return kfac_scores(self.rates, self.test, self.train, list(sample), **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Each is fitted once, by the first test that asks for it."""

    @functools.cache
    def fit(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StorageOptions, "applied", lambda options, site, size: site)
            return Case(tmp_path_factory.mktemp(name), name)

    return fit


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_scores_are_those_of_the_definition(case, name, options):
    found, expected = case(name).influence(**options).scores, case(name).expected(**options)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_a_full_rank_is_no_rank(case, name):
    whole = case(name).influence(normalize="cosine").scores
    torch.testing.assert_close(case(name).influence(normalize="cosine", rank=(999, 999)).scores, whole)


@pytest.mark.parametrize("name", ["convolution", "tokens"])
def test_directions_in_bytes_score_about_the_same(case, name):
    found = case(name).influence("int8", normalize="cosine").scores
    assert relative_error(found, case(name).expected(normalize="cosine")) < 0.1


def test_the_strongest_are_those_of_all_scores(case):
    scores = case("convolution").influence(normalize="cosine").scores
    best = case("convolution").influence(normalize="cosine", k=3).proponents(3)
    torch.testing.assert_close(best.values, scores.topk(3).values)


@pytest.mark.parametrize("rank", [None, (3, 2)], ids=str)
def test_self_influence_is_the_diagonal(case, rank):
    of = case("convolution")
    own = of.trainer.self_influence(method=of.method(rank=rank), trace=of.path / "float32")
    expected = kfac_scores(of.rates, of.train, of.train, list(range(N_TRAIN)), rank=rank).diagonal()
    assert relative_error(own, expected) < 1e-4


def test_second_moments_are_of_examples_spread_over_the_training_set(case, monkeypatch):
    monkeypatch.setattr(sampled_moments, "N_SAMPLED", 5)
    monkeypatch.setattr(kfac, "_computed", {})
    sample = [index * N_TRAIN // 5 for index in range(5)]
    assert relative_error(case("linear").influence().scores, case("linear").expected(sample)) < 1e-4
    assert relative_error(case("linear").influence().scores, case("linear").expected()) > 1e-2


def test_second_moments_are_computed_once_for_all_blocks_of_test_examples(case, monkeypatch):
    of, calls = KroneckerSums.factors, []
    monkeypatch.setattr(KroneckerSums, "factors", lambda sums, rank: (calls.append(rank), of(sums, rank))[1])
    expected = case("tokens").influence(damping=0.5).scores
    monkeypatch.setattr("lightning_tracin.querying.influence._BLOCK_BYTES", 1)
    calls.clear()
    found = case("tokens").influence(damping=0.5).scores
    assert len(calls) == 2  # one for each checkpoint
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand", "training"])
def test_every_cache(tmp_path, cache):
    """Rates so small that training's gradients are those at the checkpoint; only its scores change, by a factor."""

    class Slow(Reproducible):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-9)

    trainer = fitted(tmp_path / cache, Slow(), cache=cache, methods=("hidden",))
    method = TracInLayer("hidden", normalize="cosine", precondition="kfac", rank=(6, 5))
    found = trainer.influence(loader(test_texts()), method=method).scores
    expected = fitted(tmp_path / "expected", Slow(), methods=("hidden",))
    torch.testing.assert_close(found, expected.influence(loader(test_texts()), method=method).scores)


def test_a_part_of_a_sum_beside_words(tmp_path):
    trainer = fitted(tmp_path / "trace", Toy())
    last = TracInLast(normalize="cosine", precondition="kfac")
    method = TracInSum((TracInWE(normalize="cosine"), last), mix=(1, 0.5), scales=(1, 1))
    result = trainer.influence(loader(test_texts()), method=method)
    parts = [trainer.influence(loader(test_texts()), method=part).scores for part in method.parts]
    torch.testing.assert_close(result.scores, parts[0] + 0.5 * parts[1])
    assert sum(term for _, term in result.words(1, 3)) == pytest.approx(float(parts[0][1, 3]), rel=1e-4, abs=1e-8)


def components_of(norms, directions):
    rows = norms[:, None].double() * directions.double()
    return Components.of(rows.T @ rows / len(rows))


@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e30])
def test_whitening_does_not_depend_on_scale(scale):
    """Gradients of 1e-36 have squares that no float32 holds."""
    norms, directions = torch.rand(50) + 0.5, torch.nn.functional.normalize(torch.randn(50, 4))
    plain = components_of(norms, directions).whitened(norms, directions, 0.1)
    found = components_of(norms * scale, directions).whitened(norms * scale, directions, 0.1)
    torch.testing.assert_close(found[0], plain[0])
    torch.testing.assert_close((found[1] @ found[1].T), (plain[1] @ plain[1].T))


def test_whitened_vectors_have_unit_second_moments():
    norms, directions = torch.rand(400) + 0.5, torch.nn.functional.normalize(torch.randn(400, 3))
    lengths, whitened = components_of(norms, directions).whitened(norms, directions, 1e-9)
    rows = whitened * lengths[:, None]
    torch.testing.assert_close(rows.T @ rows / 400, torch.eye(3), rtol=1e-4, atol=1e-4)


def test_without_any_gradient_all_is_zero():
    empty, _ = random_linear(3, 2)
    components = KroneckerSums.of(empty.select(slice(0, 0))).factors(None)
    assert components.deltas.scales(0.1).tolist() == [0.0] * 4
    norms, whitened = components.deltas.whitened(torch.ones(2), torch.ones(2, 4), 0.1)
    assert (norms.tolist(), whitened.any()) == ([0.0, 0.0], False)


def test_the_smaller_form_is_multiplied(case):
    of = case("convolution")
    (checkpoint, _) = Trace(of.path / "float32").checkpoints
    block = checkpoint.gradients(checkpoint.sites[0]).read(0)
    narrow, whole = (terms_at(checkpoint, of.method(rank=rank))[0].prepared(block, "train") for rank in ((2, 2), None))
    assert isinstance(narrow, MatrixGradients)
    assert whole.KIND == "factors"
    assert sum(whole.widths) * len(whole.examples) < len(narrow.examples) * whole.widths[0] * whole.widths[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, "damping must be a finite number above 0, but got 0"),
        ({"damping": float("nan")}, "damping must be a finite number above 0, but got nan"),
        ({"damping": float("inf")}, "damping must be a finite number above 0, but got inf"),
        ({"damping": "high"}, "damping must be a finite number above 0, but got 'high'"),
        ({"rank": 8}, "rank must be a pair of whole numbers of at least 1"),
        ({"rank": (8, 0)}, "rank must be a pair of whole numbers of at least 1"),
        ({"rank": (8, 1.5)}, "rank must be a pair of whole numbers of at least 1"),
        ({"rank": (8, True)}, "rank must be a pair of whole numbers of at least 1"),
        ({"rank": (8, 2, 2)}, "rank must be a pair of whole numbers of at least 1"),
        ({"precondition": None, "rank": (8, 2)}, 'rank must be None without precondition="kfac"'),
        ({"precondition": "adam", "damping": 1.0}, 'damping must be 0.1 without precondition="kfac", but got 1.0'),
        ({"precondition": "k-fac"}, "precondition must be None, 'adam' or 'kfac', but got 'k-fac'"),
    ],
    ids=str,
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        TracInLast(**{"precondition": "kfac", **options})


def test_words_have_no_kfac():
    with pytest.raises(ValueError, match="precondition must be None or 'adam', but got 'kfac'"):
        TracInWE(precondition="kfac")


@pytest.mark.parametrize(
    "method",
    [
        TracInLast(precondition="kfac"),
        TracInLayer("a.b", normalize="cosine", precondition="kfac", damping=2, rank=[128, 32]),
        TracInSum((TracInWE(), TracInLast(precondition="kfac", rank=(4, 4)))),
    ],
    ids=str,
)
def test_methods_are_stored(method):
    assert method_from_json(method_to_json(method)) == method
    assert "K-FAC" in described(method)
    assert "K-FAC" in described(without_normalizing(method))


def test_methods_of_earlier_results_have_the_defaults():
    stored = {"method": "TracInLayer", "name": "a", "normalize": None, "precondition": "adam"}
    assert method_from_json(stored) == TracInLayer("a", precondition="adam")


def test_matrices_cannot_be_whitened(tmp_path):
    family = FAMILIES["bert-tokens"]
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", methods=("tracin-last",))])
    trainer.fit(family.build(), family.train_loader())
    assert Trace(tmp_path / "trace").sites[0].shape == "matrix"
    with pytest.raises(ValueError, match=r"keeps matrices at 'model.classifier', .* needs the factors"):
        trainer.influence(family.test_loader(), method=TracInLast(precondition="kfac"))


def test_a_trace_that_does_not_tell_of_a_bias(case):
    checkpoint = Trace(case("linear").path / "float32").checkpoints[0]
    (site,) = checkpoint.sites
    old = replace(checkpoint, header=msgspec.structs.replace(checkpoint.header, sites=(replace(site, has_bias=None),)))
    with pytest.raises(ValueError, match=r"earlier version, .* whether 'network.head' has a bias.*from_checkpoints"):
        terms_at(old, case("linear").method())


def test_a_bias_that_is_not_there(tmp_path):
    """A header may be a stranger's: where it says that there is a bias, another input is left out, but never all."""

    class Narrow(Toy):
        def __init__(self):
            super().__init__()
            self.narrow = torch.nn.Linear(1, 4, bias=False)
            self.head = torch.nn.Linear(4, 3)

        def forward(self, ids):
            return self.head(self.narrow(self.embedding(ids).mean((1, 2))[:, None]).tanh())

    fitted(tmp_path / "trace", Narrow(), methods=("narrow",))
    header = files.read_json(tmp_path / "trace/trace.json")
    header["sites"][0] |= {"has_bias": True, "shape": "factors"}
    files.write_json(tmp_path / "trace/trace.json", header)
    with pytest.raises(ValueError, match="linear-0 is damaged: its gradients have no inputs, but for a bias"):
        quiet().self_influence(trace=tmp_path / "trace", method=TracInLayer("narrow", precondition="kfac"))


def test_gradients_of_another_layer(case):
    checkpoint = Trace(case("linear").path / "float32").checkpoints[0]
    by = Kfac(checkpoint, checkpoint.sites[0], 0.1, None)
    factors, _ = random_linear(3, 1, inputs=9)
    with pytest.raises(ValueError, match="one of them is of another model, or damaged"):
        by.applied(factors)
