"""Fits that compute in 16 bits, or multiply in fewer, against brute force in full precision at their weights."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error, untie
from families import FAMILIES
from random_gradients import dense, random_linear, random_words
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from toy import CLASSES, VOCABULARY, Toy, fitted, loader, quiet, site_of, test_texts, texts
from variants import without_dropout

from lightning_tracin import Trace, TracInCallback, TracInLast, TracInLayer, TracInRidge, TracInWE
from lightning_tracin.gradients.precision import full_precision
from lightning_tracin.gradients.rows import projection_matrix
from lightning_tracin.metrics.functional.bootstrap import bootstrap_interval
from lightning_tracin.storage.second_moments import SecondMoments

LAYERS = {"tracin-we": "embedding", "tracin-last": "last"}
ROUNDED = 0.05  # relative error of scores whose gradients went through several layers in numbers of 8 bits
NAMES = (
    "bert-binary",
    "bert-regression",
    "bert-tokens",
    "bert-masked",
    "gpt2-causal",
    "t5",
    "lora",
    "lstm",
    "embedding-called-twice",
    "without-mixin",
)


# Their gradients come as those of the others do; the larger models take the longest.
SLOW = ("t5", "gpt2-causal", "lora", "embedding-called-twice")


def brute_force(family, path, layer):
    """Scores in double precision, of gradients in single precision."""
    module = family.build()
    (checkpoint,) = Trace(path).checkpoints
    module.load_state_dict(checkpoint.weights())
    untie(module, module.get_submodule(module.embedding))
    of_test, of_train = (
        [dense_gradients(module, module.get_submodule(layer), family.singles(side), module.loss)]
        for side in (family.test_loader(), family.train_loader())
    )
    return BruteForce(module.mean_rates(layer, epochs=1), of_test, of_train).scores()


def has_mixed_lstm() -> bool:
    """Whether torch has an LSTM in bfloat16 on this machine's CPU."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(4, 4)(torch.zeros(1, 1, 4))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)
def test_gradients_are_about_those_of_full_precision(tmp_path, monkeypatch, name, precision):
    """With every cache: the weights hardly move."""
    monkeypatch.setattr("families.EMBEDDING_RATE", 1e-12)
    monkeypatch.setattr("families.OTHER_RATE", 1e-12)
    if (name, precision) == ("bert-regression", "bf16-true") and torch.__version__ < (2, 5):
        pytest.skip("torch 2.4 has no mse_loss in bfloat16 on a CPU")
    if (name, precision) == ("lstm", "bf16-mixed") and not has_mixed_lstm():
        pytest.skip("torch has no LSTM in bfloat16 on a CPU without AVX-512")
    family = FAMILIES[name]
    mixes = name == "without-mixin"  # batch norm mixes the examples of a batch in training
    caches = ["checkpoint", "on_demand"] if mixes else ["checkpoint", "on_demand", "training"]
    pl.seed_everything(3, verbose=False)
    trainer = quiet(
        callbacks=[TracInCallback(tmp_path / cache, dtype="float32", cache=cache) for cache in caches],
        max_epochs=1,
        precision=precision,
    )
    trainer.fit(without_dropout(family.build()), family.train_loader())
    for method, layer in LAYERS.items():
        expected = brute_force(family, tmp_path / "checkpoint", getattr(trainer.lightning_module, layer))
        for cache in caches:
            result = trainer.influence(family.test_loader(), trace=tmp_path / cache, method=method)
            assert 0 < relative_error(result.scores, expected) < ROUNDED


class Weighted(Toy):
    """Its loss of a batch is no mean."""

    def training_step(self, batch, batch_idx):
        return (self.influence_loss(batch) * torch.tensor([1.0, 1.5, 1.0, 0.5])).mean()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_loss_that_is_no_mean_is_told_from_one_that_is_rounded(tmp_path, precision):
    options = {"trainer": {"precision": precision}}
    with pytest.raises(ValueError, match="does not return the mean of influence_loss"):
        fitted(tmp_path / "trace", Weighted(), cache="training", **options)
    module = FAMILIES["without-mixin"].build()
    mean = module.loss
    module.loss = lambda batch: mean(batch) * len(batch[0]) ** 0.1
    with pytest.raises(ValueError, match="not a mean of independent losses"):
        fitted(tmp_path / "trace", module, FAMILIES["without-mixin"].train_loader(), **options)


@pytest.fixture
def rounded_products():
    """Float32 products from fewer bits, as far as this processor can: with AMX or AVX512-BF16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_scores_and_norms_are_computed_in_full(rounded_products):
    """Against float64, of matrices that are large enough for the fast instructions."""
    test, of_test = random_words(40, vocabulary=60, length=30, hidden=128)
    train, of_train = random_words(3000, vocabulary=60, length=30, hidden=128)
    method = TracInWE()
    scores = method.dot(method.prepare(test, None, "test"), method.prepare(train, None, "train"), None)
    assert relative_error(scores, of_test.flatten(1) @ of_train.flatten(1).T) < 1e-6
    matrix = projection_matrix(128, 64)
    exact = torch.nn.functional.normalize(dense(train, 60)[train.examples, train.tokens] @ matrix.double())
    assert relative_error(train.projected(64).directions, exact) < 1e-6

    of_last, table = random_linear(40, positions=30, inputs=128, outputs=64)
    moments = SecondMoments(torch.rand(64, 128), None, 1e-8)
    for each, weights in ((None, torch.ones(64, 128)), (moments, moments.weights())):
        weighted = (table * weights.double()).flatten(1)
        expected = weighted @ table.flatten(1).T
        assert relative_error(TracInLast().dot(of_last, of_last, each), expected) < 1e-6
        assert relative_error(of_last.example_norms(each and weights), expected.diagonal().sqrt()) < 1e-6
    assert torch.get_float32_matmul_precision() == "medium"


class Products(TorchDispatchMode):
    """Notes which products of float32 numbers torch may round."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot") and args[0].dtype == torch.float32:
            setting = getattr(torch.backends.mkldnn, "matmul", None)  # before torch 2.9 there is one for all
            if getattr(setting, "fp32_precision", torch.get_float32_matmul_precision()) not in ("ieee", "highest"):
                self.rounded.append(name)
        return function(*args, **(kwargs or {}))


class Single(Toy):
    """A single logit."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 1)

    def influence_loss(self, batch):
        outputs = self(batch[0])[:, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, batch[1].float(), reduction="none")


@pytest.mark.parametrize("kind", [Toy, Single])
def test_what_a_trace_says_by_itself_is_computed_in_full(tmp_path, kind, rounded_products):
    train, test = (TensorDataset(each.tensors[0], each.tensors[1].clamp(max=1)) for each in (texts(), test_texts()))
    fit = fitted(tmp_path, kind(), loader(train), methods=("tracin-we", "tracin-last", "hidden"))
    result = fit.influence(loader(test))
    ridge, kfac = TracInRidge(TracInLast(normalize="cosine")), TracInLayer("hidden", precondition="kfac")
    for ask in (
        fit.label_issues,
        *(partial(fit.self_influence, method=method) for method in ("tracin-we", "tracin-last", kfac, ridge)),
        partial(result.words, 0, 0),
        result.word_table,
        partial(bootstrap_interval, torch.rand(8, 1)),
    ):
        with Products() as products:
            ask()
        assert products.rounded == [], ask
    with Products() as products:
        torch.rand(2, 2) @ torch.rand(2, 2)
    assert products.rounded == ["mm"]


def settings():
    """Of every operation; None before torch 2.9."""
    owners = (torch.backends.mkldnn, torch.backends.cudnn, torch.backends.cuda)
    parts = [getattr(owner, name, None) for owner in owners for name in ("matmul", "conv", "rnn")]
    return [getattr(part, "fp32_precision", None) for part in parts]


def test_products_are_rounded_again_after_an_error(rounded_products):
    before = settings()
    with pytest.raises(KeyError), full_precision():
        {}["nothing"]
    assert settings() == before
    assert torch.get_float32_matmul_precision() == "medium"


class Wide(pl.LightningModule):
    """Large enough for products of a batch, and too small for those of one example, to be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 256)
        self.hidden = torch.nn.Linear(256, 256)
        self.head = torch.nn.Linear(256, CLASSES)
        torch.nn.init.normal_(self.head.weight)

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        hidden = torch.relu(self.hidden(self.embedding(ids).sum(1)))
        return torch.nn.functional.cross_entropy(self.head(hidden), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has one setting for all")
def test_a_setting_for_all_operations_is_inherited_again(forks):
    """In a process of its own: what one operation was told cannot be taken back."""
    code = """
import torch
from lightning_tracin.gradients.precision import full_precision
torch.backends.fp32_precision = "bf16"
x = torch.rand(256, 256)
with full_precision():
    inside = x @ x
assert (inside - x.double() @ x.double()).abs().max() < 1e-3
torch.backends.fp32_precision = "ieee"
assert torch.backends.mkldnn.matmul.fp32_precision == "ieee", torch.backends.mkldnn.matmul.fp32_precision
"""
    done = forks.run("-c", code)
    assert done.returncode == 0, done.stderr


class Grown(Wide):
    """Its loss grows a little with the batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + 0.002 * len(batch[0]))


def test_a_loss_that_is_no_mean_is_told_beside_rounded_products(tmp_path, rounded_products):
    with pytest.raises(ValueError, match="not a mean of independent losses"):
        fitted(tmp_path, Grown(), loader(texts(64), batch_size=32))


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_autocast_does_not_round_projections(tmp_path, monkeypatch, cache):
    """Those of the training side are those of the test side, to the precision of float32."""
    monkeypatch.setattr("toy.RATE", 1e-12)  # the weights do not move
    trainer = fitted(tmp_path, without_dropout(Toy()), cache=cache, projection=4, trainer={"precision": "bf16-mixed"})
    (checkpoint, *_) = trainer.callbacks[0].trace.checkpoints
    shards = checkpoint.gradients(site_of(checkpoint, "tracin-we"))
    lengths = shards.read(0).directions.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0)
    diagonal = trainer.influence(loader(), method=TracInWE(normalize="cosine")).scores.diagonal()
    rate = sum(each.learning_rate for each in trainer.callbacks[0].trace.checkpoints)
    torch.testing.assert_close(diagonal, torch.full_like(diagonal, rate), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_a_fit_in_double_precision(tmp_path, cache):
    family = FAMILIES["bert-binary"]
    trainer = quiet(callbacks=[TracInCallback(tmp_path, cache=cache)], max_epochs=1, precision="64-true")
    trainer.fit(family.build(), family.train_loader())
    assert torch.isfinite(trainer.influence(family.test_loader()).scores).all()


def test_rounded_products_are_taken_for_no_fault_of_a_loss(tmp_path, rounded_products):
    pl.seed_everything(0, verbose=False)
    trainer = quiet(callbacks=[TracInCallback(tmp_path, dtype="float32")], max_epochs=1)
    trainer.fit(Wide(), loader(texts(64), batch_size=32))
    found = trainer.influence(loader(test_texts())).scores
    with full_precision():
        expected = trainer.influence(loader(test_texts())).scores
    assert relative_error(found, expected) < ROUNDED
