"""Every family of models against brute force: one example at a time, dense gradients, double precision."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from brute_force import AdamMoments, BruteForce, dense_gradients, relative_error, untie
from families import FAMILIES, FIRST, N_TRAIN, Family, Module, ScaledLoss, bert_classifier, classes, labelled_texts
from torch.utils.data import DataLoader
from toy import site_of

from lightning_tracin import Trace, TracInCallback, TracInLast, TracInWE, Trainer

METHODS = ("tracin-we", "tracin-last")
TOLERANCES = {"float32": 1e-5, "float16": 2e-3}
OPTION_FAMILIES = ("bert-classes", "bert-tokens", "cnn")


@dataclass
class Fitted:
    """A family after a fit that recorded it, in both precisions if not told otherwise."""

    family: Family
    path: Path
    scale: float = 1.0
    dtypes: tuple[str, ...] = tuple(TOLERANCES)
    module: Module = field(init=False)
    trainer: Trainer = field(init=False)
    train: DataLoader = field(init=False)
    test: DataLoader = field(init=False)
    moments: AdamMoments = field(init=False, default_factory=AdamMoments)
    _references: dict[str, BruteForce] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.module = self.family.build()
        self.train, self.test = self.family.train_loader(), self.family.test_loader()
        methods = METHODS if self.module.embedding else ("tracin-last",)
        self.trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                *(TracInCallback(self.path / dtype, dtype=dtype, methods=methods) for dtype in self.dtypes),
                self.moments,
            ],
        )
        pl.seed_everything(3, verbose=False)
        self.trainer.fit(self.module, self.train)

    def influence(self, method: Any, dtype: str = "float32", loader: DataLoader | None = None):
        return self.trainer.influence(loader or self.test, method=method, trace=self.path / dtype)

    def layer_of(self, method: Any) -> str:
        at_words = method in ("tracin-we", TracInWE) or isinstance(method, TracInWE)
        return self.module.embedding if at_words else self.module.last

    def reference(self, method: Any) -> BruteForce:
        layer = self.layer_of(method)
        if layer not in self._references:
            rates = self.module.mean_rates(layer)
            test, train = ([self._gradients(layer, at, side) for at in (0, 1)] for side in (self.test, self.train))
            self._references[layer] = BruteForce(rates, test, train)
        return self._references[layer]

    def second_moments(self, method: Any) -> list[tuple[torch.Tensor, float]]:
        layer = self.layer_of(method)
        return self.moments.of(layer, self.module.get_submodule(layer))

    def _gradients(self, layer: str, at: int, side: DataLoader) -> torch.Tensor:
        module = self.family.build()
        module.load_state_dict(Trace(self.path / "float32").checkpoints[at].weights())
        if module.embedding is not None:
            untie(module, module.get_submodule(module.embedding))
        at_layer, singles = module.get_submodule(layer), self.family.singles(side)
        gradients = dense_gradients(module, at_layer, singles, lambda batch: module.loss(batch) * self.scale)
        if layer == module.embedding:
            gradients[:, list(self.family.masked_tokens)] = 0
        return gradients


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Each family is fitted once, by the first test that asks for it."""

    @functools.cache
    def fit_of(name):
        dtypes = tuple(TOLERANCES) if name in OPTION_FAMILIES else ("float32",)
        return Fitted(FAMILIES[name], tmp_path_factory.mktemp(name), dtypes=dtypes)

    return fit_of


@pytest.fixture
def fitted(request, fit):
    return fit(request.param)


def each(*names: str):
    return pytest.mark.parametrize("fitted", names, indirect=True)


every_family_and_method = pytest.mark.parametrize(
    ("fitted", "method"),
    [(name, method) for name in FAMILIES for method in METHODS if (name, method) != ("images", "tracin-we")],
    indirect=["fitted"],
)


@every_family_and_method
def test_scores_are_those_of_brute_force(fitted, method):
    assert relative_error(fitted.influence(method).scores, fitted.reference(method).scores()) < TOLERANCES["float32"]


@each(*OPTION_FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_scores_of_rounded_gradients_are_about_those_of_brute_force(fitted, method):
    """How a gradient is rounded does not depend on the family."""
    scores = fitted.influence(method, "float16").scores
    assert relative_error(scores, fitted.reference(method).scores()) < TOLERANCES["float16"]


@every_family_and_method
def test_recorded_rates_are_means_over_the_steps_since_the_checkpoint_before(fitted, method):
    checkpoints = Trace(fitted.path / "float32").checkpoints
    recorded = [each.learning_rate_of(site_of(each, method)) for each in checkpoints]
    assert recorded == pytest.approx(fitted.module.mean_rates(fitted.layer_of(method)))


@every_family_and_method
def test_self_influence_is_the_diagonal_of_the_training_sets_influence_on_itself(fitted, method):
    scores = fitted.influence(method, loader=fitted.train).scores
    own = fitted.trainer.self_influence(method=method, trace=fitted.path / "float32")
    assert own.shape == (N_TRAIN,)
    torch.testing.assert_close(own, scores.diagonal(), rtol=1e-4, atol=1e-6 * float(own.max()))


@each(*(name for name in FAMILIES if name != "images"))
def test_word_terms_are_those_of_brute_force_and_add_up_to_the_score(fitted):
    result = fitted.influence("tracin-we")
    for test_index, train_index in [(0, 0), (1, 5), (4, 16)]:
        named = result.words(test_index, train_index)
        terms = fitted.reference("tracin-we").terms(test_index, train_index)
        largest = float(terms.abs().max())
        found = torch.zeros_like(terms)
        for word, term in named:
            found[int(word)] = term
        torch.testing.assert_close(found, terms, rtol=1e-4, atol=1e-5 * largest)
        score = float(result.scores[test_index, train_index])
        assert sum(term for _, term in named) == pytest.approx(score, rel=1e-4, abs=1e-6 * largest)
        magnitudes = [abs(term) for _, term in named]
        assert magnitudes == sorted(magnitudes, reverse=True)


@each(*FAMILIES)
def test_influence_leaves_the_trained_weights_and_flags_as_they_were(fitted):
    before = {name: value.clone() for name, value in fitted.module.state_dict().items()}
    fitted.module.train()
    fitted.influence("tracin-last")
    assert fitted.module.training
    assert all(torch.equal(value, before[name]) for name, value in fitted.module.state_dict().items())


@each(*OPTION_FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "train"},
        {"normalize": "cosine"},
        {"exclude_tokens": (FIRST, 7)},
        {"top_words": 1},
        {"top_words": 3},
        {"top_words": 3, "exclude_tokens": (FIRST,), "normalize": "cosine"},
    ],
    ids=str,
)
def test_word_options_are_those_of_brute_force(fitted, dtype, options):
    scores = fitted.influence(TracInWE(**options), dtype).scores
    assert relative_error(scores, fitted.reference("tracin-we").scores(**options)) < TOLERANCES[dtype]


@each(*OPTION_FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("normalize", ["train", "cosine"])
def test_normalized_last_layer_is_that_of_brute_force(fitted, dtype, normalize):
    scores = fitted.influence(TracInLast(normalize=normalize), dtype).scores
    assert relative_error(scores, fitted.reference("tracin-last").scores(normalize=normalize)) < TOLERANCES[dtype]


@each(*OPTION_FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("normalize", [None, "train", "cosine"])
@pytest.mark.parametrize("kind", [TracInWE, TracInLast])
def test_adam_preconditioning_is_that_of_brute_force(fitted, dtype, normalize, kind):
    method = kind(normalize=normalize, precondition="adam")
    expected = fitted.reference(method).scores(normalize=normalize, second_moments=fitted.second_moments(method))
    assert relative_error(fitted.influence(method, dtype).scores, expected) < TOLERANCES[dtype]


@each(*OPTION_FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{"normalize": "cosine"}, {"exclude_tokens": (FIRST,), "top_words": 3}, {"precondition": "adam"}],
    ids=str,
)
def test_word_terms_add_up_to_the_score_under_options(fitted, options):
    result = fitted.influence(TracInWE(**options))
    for train_index in range(N_TRAIN):
        terms = [term for _, term in result.words(2, train_index)]
        score = float(result.scores[2, train_index])
        assert sum(terms) == pytest.approx(score, rel=1e-4, abs=1e-6 * max(map(abs, terms), default=0.0))


@each(*OPTION_FAMILIES)
@pytest.mark.parametrize("kind", [TracInWE, TracInLast])
@pytest.mark.parametrize("options", [{"normalize": "train"}, {"normalize": "train", "precondition": "adam"}], ids=str)
def test_self_influence_is_the_diagonal_under_options(fitted, kind, options):
    method = kind(**options)
    own = fitted.trainer.self_influence(method=method, trace=fitted.path / "float32")
    torch.testing.assert_close(own, fitted.influence(method, loader=fitted.train).scores.diagonal(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-9, 1e-15])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("method", METHODS)
def test_tiny_gradients_do_not_underflow(tiny, scale, dtype, method):
    fitted = tiny[scale]
    scores = fitted.influence(method, dtype).scores
    assert relative_error(scores, fitted.reference(method).scores()) < TOLERANCES[dtype]


@pytest.mark.parametrize("scale", [1e-9, 1e-15])
@pytest.mark.parametrize("kind", [TracInWE, TracInLast])
def test_cosines_of_tiny_gradients_do_not_underflow(tiny, scale, kind):
    fitted = tiny[scale]
    scores = fitted.influence(kind(normalize="cosine"), "float16").scores
    assert relative_error(scores, fitted.reference(kind).scores(normalize="cosine")) < TOLERANCES["float16"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Fits whose influence losses are so much smaller than what was trained on."""

    def scaled(scale: float) -> Fitted:
        def build():
            module = bert_classifier(num_labels=3, module=ScaledLoss)
            module.scale = scale
            return module

        with pytest.warns(UserWarning, match="Scores are of influence_loss"):
            return Fitted(Family(build, labelled_texts(classes)), tmp_path_factory.mktemp(f"{scale}"), scale)

    return {scale: scaled(scale) for scale in (1e-9, 1e-15)}


def test_top_words_of_the_callback_are_those_of_the_method(tmp_path):
    family = FAMILIES["bert-classes"]
    scores = []
    for top_words, method in ((3, TracInWE()), (None, TracInWE(top_words=3))):
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[TracInCallback(tmp_path / f"{top_words}", dtype="float32", top_words=top_words)],
        )
        pl.seed_everything(3, verbose=False)
        trainer.fit(family.build(), family.train_loader())
        scores.append(trainer.influence(family.test_loader(), method=method).scores)
    torch.testing.assert_close(*scores)
