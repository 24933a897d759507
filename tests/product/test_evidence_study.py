"""The study's own parts, on a task of a few made-up texts and a network that fits in a blink."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from lightning_utilities.core import rank_zero
from torch import nn

from benchmarks.evidence import networks, page, ratings
from benchmarks.evidence.__main__ import _command, lds_part
from benchmarks.evidence.answers import batches, network_with
from benchmarks.evidence.deletion import SAME_LABEL, Deletion, changes_of, deletion_table, with_seed
from benchmarks.evidence.examples import Examples, Rows, trimmed
from benchmarks.evidence.fitting import fitted, right_and_balanced
from benchmarks.evidence.halves import Halves, halves_of
from benchmarks.evidence.lds import lds_table
from benchmarks.evidence.maxima import maxima
from benchmarks.evidence.mislabel import flipped, mislabel_table
from benchmarks.evidence.networks import Network, UnrecordedConvolutional
from benchmarks.evidence.ours import ours
from benchmarks.evidence.scored import kept_scores
from benchmarks.evidence.task import Recipe, Task
from benchmarks.evidence.tasks import TASKS, _divided, _of_each_class, in_float32
from benchmarks.evidence.texts import Text
from lightning_tracin import TracInWE
from lightning_tracin.retraining import random_halves

VOCABULARY = SimpleNamespace(convert_ids_to_tokens=lambda ids: [f"w{each}" for each in ids], all_special_ids=[])


class Bag(Network):
    """The mean of word embeddings, a hidden and a last layer."""

    def __init__(self, vocabulary, label_names):
        super().__init__(vocabulary, label_names)
        self.embedding = nn.Embedding(30, 8, padding_idx=0)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, len(label_names))

    def forward(self, batch):
        means = self.embedding(batch["input_ids"]).sum(1) / batch["attention_mask"].sum(1, keepdim=True)
        return self.head(self.hidden(means).tanh())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def examples(n, seed):
    """Texts of two classes, each with words of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    ids = torch.randint(1, 16, (n, 6), generator=generator) + 14 * labels[:, None]
    ids[::3, 4:] = 0
    return Examples(ids, (ids > 0).long(), torch.zeros_like(ids), labels, tuple(str(each) for each in range(n)))


def first_of(examples, n):
    """The first n of some examples."""
    columns = (examples.ids, examples.mask, examples.types, examples.labels, examples.texts)
    return Examples(*(each[:n] for each in columns))


@pytest.fixture(scope="module")
def task():
    recipe = Recipe(Bag, epochs=2, batch_size=8, layers=("hidden",))
    return Task("bags", "Bags", examples(40, 0), examples(10, 1), ("low", "high"), VOCABULARY, recipe)


@pytest.fixture(autouse=True)
def loud():
    """Reading MiniLM makes Lightning say no more, in the tests that come later, too."""
    level = rank_zero.log.level
    yield
    rank_zero.log.setLevel(level)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


def test_a_network_is_made_by_its_seed_alone(task):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    (first, loader), (second, _) = task.build(range(40), 3), task.build(range(40), 3)
    other, _ = task.build(range(40), 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert len(loader.dataset) == 40


@pytest.mark.parametrize("width", [1, 3, 5])
def test_maxima_are_those_of_the_convolution_and_so_are_their_gradients(width):
    torch.manual_seed(0)
    convolution = nn.Conv1d(6, 7, width, padding=width // 2).double()
    words = torch.randn(5, 9, 6, dtype=torch.float64)
    padded = torch.arange(9) >= torch.tensor([[9], [4], [1], [0], [9]])
    cotangent = torch.randn(5, 7, dtype=torch.float64)

    def dense(words):
        return convolution(words.transpose(1, 2)).relu().masked_fill(padded[:, None], 0).amax(2)

    found = []
    for largest in (dense, lambda words: maxima(convolution, words, padded)):
        given = [words.clone().requires_grad_(), convolution.weight, convolution.bias]
        outputs = largest(given[0])
        found.append([outputs, *torch.autograd.grad(outputs, given, cotangent)])
    assert 0 < int((found[0][0] > 0).sum()) < found[0][0].numel()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_the_network_that_is_fitted_faster_is_the_one_that_is_recorded():
    task = TASKS["sms-cnn"]()
    networks._pretrained.cache_clear()  # reading it draws random numbers: the first network must not depend on that
    weights = []
    for build in (task.build, task.rebuild):
        pl.seed_everything(0, verbose=False)
        module, loader = build(range(128), 1)
        first = module.convolutions[1].weight.detach().clone()
        task.trainer(max_epochs=2).fit(module.double(), loader)
        weights.append({name: each.detach() for name, each in module.named_parameters()})
    assert type(module) is UnrecordedConvolutional
    assert not torch.allclose(weights[0]["convolutions.1.weight"], first.double(), atol=1e-3)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-12)


def test_ratings_are_weighed_by_errors_and_stand_in_a_table(folder):
    whole = ratings.ratings_cnn()
    task = replace(whole, train=first_of(whole.train, 64), test=first_of(whole.test, 6))
    fit = fitted(replace(task, recipe=replace(task.recipe, epochs=2)), folder)
    known = dict(ratings.ours())
    names = [f"TracIn-WE, cosine, {weights}" for weights in ("equal", "residual")]
    scores = {name: known[name](fit) for name in names}
    alike = TracInWE(normalize="cosine", weights="equal")
    parts = [fit.scores(alike, checkpoints=each.step) for each in fit.trace.checkpoints]
    residuals = []
    for checkpoint in fit.trace.checkpoints:
        network = network_with(fit.module, dict(checkpoint.weights()))
        said = torch.cat([network(batch)[:, 0].detach() for batch in batches(task.train)])
        residuals.append(2 * (said - task.train.labels).abs().mean())
    torch.testing.assert_close(scores[names[0]], parts[0] + parts[1])
    by_hand = residuals[0].sqrt() * parts[0] + residuals[1].sqrt() * parts[1]
    torch.testing.assert_close(scores[names[1]], by_hand, rtol=1e-3, atol=1e-4)  # gradients are stored in float16

    scores["agreement of ratings"] = ratings.agreement(fit)
    halves = Halves(random_halves(64, 12), torch.randn(12, 2, 6))
    above = (task.train.labels > task.train.labels.mean()).long()
    table = lds_table(task, halves, scores, ratings.BASELINES, classes=above)
    lines = list(page.ratings([table | {"ceiling": 0.5, "correlation": ratings.correlation(fit)}]))
    assert lines[0].startswith("**Movie ratings, CNN, squared error** (correlation of predictions ")
    assert lines[0].endswith("12 halves with 2 seeds; at most 0.50")
    assert {line.split(" | ")[0].strip("| ") for line in lines[4:7]} == scores.keys()


def test_float32_is_another_task_only_where_fits_were_not_in_it(task):
    mixed = replace(task, recipe=replace(task.recipe, precision="bf16-mixed"))
    assert in_float32(mixed).name == "bags-float32"
    assert in_float32(mixed).recipe.precision == "32-true"
    assert in_float32(task) is task


def test_batches_are_as_long_as_their_longest_text(task):
    batch = next(iter(task.build([0, 3, 6], 0)[1]))
    assert batch["input_ids"].shape == (3, 4)
    assert batch["labels"].shape == (3,)


def test_scores_are_computed_once_and_tables_hold_all_methods(task, folder):
    fit = fitted(task, folder)
    again = fitted(task, folder)
    assert all(torch.equal(a, b) for a, b in zip(fit.module.parameters(), again.module.parameters(), strict=True))
    known = {name: each for name, each in ours(task).items() if "no common" not in name}  # all words are common here
    scores = {name: kept_scores(folder, name, each, fit) for name, each in known.items()}
    assert torch.equal(
        kept_scores(folder, "WE cosine", lambda _: pytest.fail("computed anew"), fit), scores["WE cosine"]
    )
    halves = halves_of(task, folder, folder / "halves", 12, (0, 1))
    same_label = (task.test.labels[:, None] == task.train.labels).float()
    table = lds_table(task, halves, {**scores, "same label": same_label}, ["same label", "random"])
    assert table["halves"] == 12
    assert {row["method"] for row in table["rows"]} == {*scores, "same label"}
    assert [row["lds"] for row in table["rows"]] == sorted((row["lds"] for row in table["rows"]), reverse=True)
    by_name = {row["method"]: row for row in table["rows"]}
    assert by_name["same label"]["above_reference"] == 0
    words = {"WE cosine": scores["WE cosine"]}
    one_by_one = [
        lds_table(task, Halves(halves.subsets, halves.outputs[:, [seed]]), words, words)["rows"][0] for seed in (0, 1)
    ]
    one_seed = sum(row["lds"] for row in one_by_one) / 2
    assert by_name["WE cosine"]["one_seed_lds"] == pytest.approx(one_seed, abs=1e-4)
    lines = list(page.lds([table | {"accuracy": 0.9}]))
    assert any(line.startswith("| WE cosine | ") for line in lines)


def test_without_a_baseline_no_halves_are_fitted(task, tmp_path):
    with pytest.raises(SystemExit, match="none is scored yet: run without --methods first"):
        lds_part(task, Namespace(folder=tmp_path, methods=[], peers=False))


def test_what_halves_say_is_kept_and_added_to(task, folder, tmp_path, monkeypatch):
    first = halves_of(task, folder, tmp_path, 4, (0,))
    more = halves_of(task, folder, tmp_path, 6, (0, 1))
    assert more.outputs.shape == (6, 2, 10)
    assert torch.equal(more.outputs[:4, :1], first.outputs)
    module, loader = task.build(more.subsets[5].nonzero()[:, 0].tolist(), 1)
    pl.seed_everything(1, verbose=False)
    task.trainer().fit(module, loader)
    batch = trimmed(list(Rows(task.test, range(10))))
    assert torch.allclose(more.outputs[5, 1], -module.influence_loss(batch), atol=1e-5)
    monkeypatch.setattr(Network, "training_step", lambda *_: pytest.fail("fitted anew"))
    assert torch.equal(halves_of(task, folder / "elsewhere", tmp_path, 5, (1,)).outputs, more.outputs[:5, 1:])
    with pytest.raises(SystemExit, match="of other examples or halves"):
        halves_of(task.with_train_labels(1 - task.train.labels), folder, tmp_path, 4, (0,))


def test_a_method_that_is_not_run_again_keeps_its_row_as_long_as_the_halves_are_the_same(task, folder):
    halves = halves_of(task, folder, folder / "halves", 12, (0, 1))
    scores = {"same label": (task.test.labels[:, None] == task.train.labels).float()}
    both = lds_table(task, halves, scores | {"other label": -scores["same label"]}, ["same label"])
    assert lds_table(task, halves, scores, ["same label"], former=both)["rows"] == both["rows"]
    fewer = Halves(halves.subsets, halves.outputs[:, :1])
    assert len(lds_table(task, fewer, scores, ["same label"], former=both)["rows"]) == 1


def test_deletion_removes_the_strongest_and_says_by_how_much(task, folder):
    fit = fitted(task, folder)
    tests = right_and_balanced(fit.probabilities(), task.test.labels, 4)
    deletion = Deletion(task, folder, tests)
    same = (task.test.labels[:, None] == task.train.labels).float()
    scores = {"same label": same, "other label": -same}
    once = with_seed([], deletion, scores, [15, 18], 0)
    table = deletion_table(deletion, with_seed(once, deletion, scores, [18], 1))
    rows = {(row["method"], row["k"]): row for row in table["rows"]}
    assert set(rows) == {(name, k) for name in (SAME_LABEL, *scores) for k in (15, 18)}
    assert rows["same label", 15]["seeds"] == [0]
    assert rows["same label", 18]["seeds"] == [0, 1]
    assert rows["same label", 18]["p"][0] < rows["other label", 18]["p"][0]
    assert rows["same label", 18]["against"]["other label"]["lower"] == 4
    with_all = deletion.with_all([0, 1]).exp()
    assert with_all.shape == (4, 2)
    assert table["probability_with_all"] == pytest.approx(float(with_all.mean()), abs=1e-4)
    changes = [deletion.without_proponents(same, 18, [seed])[:, 0].exp() - with_all[:, seed] for seed in (0, 1)]
    mean = float(sum(changes).mean()) / 2
    low, high = rows["same label", 18]["p"][1:]
    assert rows["same label", 18]["p"][0] == pytest.approx(mean, abs=1e-4)
    assert low < mean < high
    difference = rows["same label", 18]["against"]["other label"]["p"][0]
    assert difference == pytest.approx(mean - rows["other label", 18]["p"][0], abs=2e-4)
    assert "of 4" in "".join(page.deletion([table]))
    rows["same label", 18]["against"]["other label"]["lower"] = 3  # as if rounded numbers did not tell any more
    later = deletion_table(deletion, with_seed(changes_of(table), deletion, scores, [15], 1), table)
    assert [row for row in later["rows"] if row["k"] == 18] == [row for row in table["rows"] if row["k"] == 18]
    assert all(row["seeds"] == [0, 1] for row in later["rows"])


def test_a_seed_that_comes_later_counts_as_if_it_had_been_there(task, folder):
    deletion = Deletion(task, folder, [1, 4, 7])
    scores = {"same label": (task.test.labels[:, None] == task.train.labels).float()}
    changes = with_seed([], deletion, scores, [18], 0)
    for seed in (1, 2):
        changes = with_seed(changes_of(deletion_table(deletion, changes)), deletion, scores, [18], seed)
    again = with_seed(changes, deletion, scores, [18], 2)
    assert [each.seeds for each in again] == [(0, 1, 2)] * 2
    expected = deletion.without_proponents(scores["same label"], 18, range(3)).exp() - deletion.with_all(range(3)).exp()
    assert torch.allclose(again[1].p, expected.mean(1), atol=2e-4)


def test_flipped_labels_are_found(task, folder):
    changed, wrong = flipped(task, 0.1)
    assert wrong.sum() == 4
    assert changed.name != task.name
    assert torch.equal(changed.train.labels != task.train.labels, wrong)
    table = mislabel_table(changed, folder, wrong, "10% of the labels flipped")
    assert table["n_wrong"] == 4
    assert max(row["auroc"] for row in table["rows"]) > 0.7
    assert table["rows"][0]["found"][-1] == 1
    assert list(page.mislabel([table]))[2].startswith("| Bags, 10% of the labels flipped | ")


def test_those_it_is_right_about_come_from_each_class_in_turn():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    probabilities = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 1, 2]), 3).float()
    chosen = right_and_balanced(probabilities, labels, 5)
    assert 3 not in chosen
    assert labels[chosen].bincount().tolist() == [2, 2, 1]


def test_groups_are_not_split_and_classes_are_counted():
    texts = [Text(f"text {each}", each % 2, group=f"group {each // 4}") for each in range(80)]
    train, test = _divided(texts, 30, 10)
    assert len(train) == 30
    assert len(test) == 10
    assert not {each.group for each in train} & {each.group for each in test}
    assert [each.label for each in _of_each_class(texts, 1)] == [0, 1]


def test_a_command_names_no_folder():
    given = ["--tasks", "sms-cnn", "--folder", "/tmp/a", "--ks", "10", "--out", "/tmp/b"]
    assert _command(given) == "python -m benchmarks.evidence --tasks sms-cnn --ks 10"
