"""does_it_matter: what retraining without some examples changes, held against fits by hand; and tail-patch."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import numpy as np
import planted
import pytest
import pytorch_lightning as pl
import torch
from planted import COPIES, EPOCHS, N_TEST, TEST, TRAIN, Learner, build
from rich.console import Console
from torch.utils.data import DataLoader, Subset, TensorDataset
from toy import quiet

from lightning_tracin import InfluenceResult, Trace, TracInCallback, TracInWE
from lightning_tracin.retraining import does_it_matter, tail_patch_gains
from lightning_tracin.retraining.outcomes import Outcome
from lightning_tracin.retraining.removal_effect import RemovalEffect
from lightning_tracin.retraining.removals import Removals
from lightning_tracin.retraining.targets import quantity_of, target_classes, target_name, values_of

SEEDS = 3
T_QUANTILE = 4.302653  # .975, of two degrees of freedom


class Counted:
    """The task's build; counts how often a fit was made of it."""

    def __init__(self):
        self.n = 0

    def __call__(self, indices, seed):
        self.n += 1
        return build(indices, seed)


class Fewer(Counted):
    """The same task with half of the training examples."""

    def __call__(self, indices, seed):
        few = Subset(TRAIN, range(28))
        return Learner(), DataLoader(Subset(few, indices), batch_size=8)


def by_hand(left_out, seed: int):
    """(n_test, 2) what the fit says that knows nothing of some training examples."""
    pl.seed_everything(seed, verbose=False)
    module, loader = build([at for at in range(len(TRAIN)) if at not in left_out], seed)
    quiet(pl.Trainer, max_epochs=EPOCHS).fit(module, loader)
    with torch.no_grad():
        return module.eval()(TEST.tensors[0]).softmax(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("retrainings")


@pytest.fixture(scope="module")
def effect(planted_result, folder):
    return does_it_matter(planted_result, build, planted.test_loader(), k=COPIES, seeds=SEEDS, folder=folder)


def test_changes_are_those_of_fits_by_hand(effect, planted_result):
    row, seed = 1, 1
    label = int(TEST.tensors[1][row])
    before = by_hand((), seed)[row, label]
    proponents = planted_result.proponents(COPIES).indices[row].tolist()
    assert sorted(proponents) == [4, 5, 6, 7]  # what is planted
    after = by_hand(proponents, seed)[row, label]
    assert effect.quantity == "probability"
    assert torch.allclose(effect.before[row, seed], before, atol=1e-6)
    assert torch.allclose(effect.changes["proponents"][row, seed], after - before, atol=1e-6)


def test_planted_causes_matter_and_random_ones_do_not(effect):
    mean, _, high = effect.mean_change()
    assert high < -0.1
    for harmless in ("random", "same label"):
        assert abs(effect.mean_change(harmless).mean) < 0.15
        difference = effect.mean_change("proponents", harmless)
        assert difference.high < 0
        assert difference.mean == pytest.approx(mean - effect.mean_change(harmless).mean, abs=1e-5)
    assert torch.equal(effect.changes["tf-idf"], effect.changes["proponents"])  # the copies, again
    assert not effect.beats("tf-idf").any()


def test_intervals_are_those_of_student(effect):
    values = effect.changes["proponents"][0].tolist()
    mean = sum(values) / SEEDS
    deviation = (sum((each - mean) ** 2 for each in values) / (SEEDS - 1)) ** 0.5
    change = effect.change(0)
    assert change.mean == pytest.approx(mean, abs=1e-6)
    assert change.high - change.mean == pytest.approx(T_QUANTILE * deviation / SEEDS**0.5, rel=1e-4)
    paired = (effect.changes["proponents"] - effect.changes["random"])[0]
    sure = float(paired.mean() + T_QUANTILE * paired.std() / SEEDS**0.5) < 0
    assert bool(effect.beats()[0]) == sure


@pytest.mark.parametrize(("n_test", "shared"), [(1, 0.0), (2, 0.0), (20, 0.0), (20, 0.5)])
def test_where_nothing_matters_that_is_said_in_nineteen_of_twenty_cases(n_test, shared):
    """Half of the noise may be that of a retraining which all test examples of one seed share."""
    torch.manual_seed(0)
    told = 0
    for _ in range(400):
        proponents, others = torch.randn(n_test, 5), shared**0.5 * torch.randn(1, 5).expand(n_test, 5)
        changes = {"proponents": proponents, "random": others + (1 - shared) ** 0.5 * torch.randn(n_test, 5)}
        of = RemovalEffect(
            2, tuple(range(5)), "probability", torch.arange(n_test), ["yes"] * n_test, torch.rand(n_test, 5), changes
        )
        told += "cannot be told from 2 random ones" not in of.summary()
    assert 0.01 * 400 <= told <= 0.09 * 400


def test_the_mean_counts_each_seed_once(effect):
    of_seeds = (effect.changes["proponents"] - effect.changes["random"]).mean(0)
    found = effect.mean_change("proponents", "random")
    width = T_QUANTILE * float(of_seeds.std()) / SEEDS**0.5
    assert found == pytest.approx(
        (float(of_seeds.mean()), *(float(of_seeds.mean()) + each for each in (-width, width)))
    )
    one = RemovalEffect(
        effect.k,
        effect.seeds,
        effect.quantity,
        effect.test_indices[:1],
        effect.targets[:1],
        effect.before[:1],
        {name: each[:1] for name, each in effect.changes.items()},
    )
    assert one.mean_change() == one.change(0)  # of one test example the two say the same


def test_test_examples_that_were_not_compared_do_not_count(effect):
    values, nan = torch.tensor([[-0.5, -0.51, -0.52]]).expand(N_TEST, -1), torch.full((N_TEST - 2, SEEDS), torch.nan)
    of_label = torch.cat([nan, torch.tensor([[-0.01, 0.0, 0.01], [-0.5, -0.51, -0.52]])])
    fixed = replace(effect, changes={"proponents": values, "same label": of_label})
    assert "they matter more for 1 of 2 test examples by themselves" in fixed.summary()


def test_it_is_said_in_words(effect):
    text = str(effect)
    assert f"{N_TEST} test examples, {COPIES} training examples removed, {SEEDS} seeds" in text
    assert "Proponents matter more than 4 random ones: difference -0." in text
    assert effect.sentence(1).startswith(
        "Test example 1: removing its 4 proponents lowers the probability of yes by 0."
    )
    assert "4 random ones" in effect.sentence(1)
    assert repr(effect) == f"RemovalEffect(n_test={N_TEST}, k={COPIES}, seeds={SEEDS})"


def test_each_removal_has_its_own_verb(effect):
    changes = {"proponents": -0.5, "random": 0.25, "same label": -0.125, "tf-idf": 0.0625}
    fixed = replace(effect, changes={name: torch.full((N_TEST, SEEDS), value) for name, value in changes.items()})
    assert fixed.sentence(1) == (
        "Test example 1: removing its 4 proponents lowers the probability of yes by 0.50 ± 0.00; 4 random ones raise "
        "it by 0.25 ± 0.00; 4 random ones of the same label lower it by 0.12 ± 0.00; the 4 nearest by TF-IDF raise it "
        "by 0.06 ± 0.00"
    )


def test_tables_and_charts(effect):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib").use("Agg")
    table = effect.to_pandas()
    assert len(table) == 4 * N_TEST * SEEDS
    means = table[table.removed == "proponents"].groupby("test_index").change.mean()
    assert means[2] == pytest.approx(effect.change(2).mean, abs=1e-6)
    _, ax = effect.plot()
    assert [each.get_text() for each in ax.get_yticklabels()][:2] == ["0: no", "1: yes"]
    assert len(ax.get_legend().get_texts()) == 4


def few_tests() -> DataLoader:
    """Test examples 1 and 3, which are rows 0 and 1 of their result."""
    return DataLoader(TEST, batch_size=2, sampler=[3, 1])


@pytest.fixture(scope="module")
def result_of_few(planted_fit):
    return planted_fit.influence(few_tests(), method=TracInWE(normalize="cosine"))


def test_tables_of_some_test_examples_join(result_of_few, effect, tmp_path):
    """By the row, by the index in the data set, and by all columns that both have; each pair is of one test example."""
    pd = pytest.importorskip("pandas")
    options = {"against": ["random"], "folder": tmp_path}
    pairs = result_of_few.to_pandas(COPIES)
    of_both = does_it_matter(result_of_few, build, few_tests(), COPIES, SEEDS, **options).to_pandas()
    of_second = does_it_matter(result_of_few, build, few_tests(), COPIES, SEEDS, test_indices=[1], **options)
    for keys in (["test_row", "test_index"], ["test_row"], ["test_index"], None):
        joined = pd.merge(pairs, of_both, on=keys)
        assert len(joined) == len(pairs) * 2 * SEEDS  # each pair with what was left out, and each seed
        joined = pd.merge(pairs, of_second.to_pandas(), on=["test_row", "test_index"] if keys is None else keys)
        assert len(joined) == (pairs.test_row == 1).sum() * 2 * SEEDS
        target = joined["target" if "target" in joined else "target_y"]
        assert set(joined.test_label) == set(target) == {"yes"}  # the label of test example 3
        before = joined[joined.seed == 1].before.unique()
        assert before == pytest.approx([float(effect.before[3, 1])], abs=1e-6)  # of the result of all test examples
    assert set(zip(of_both.test_row, of_both.test_index, strict=True)) == {(0, 1), (1, 3)}
    assert set(zip(pairs.test_row, pairs.test_index, strict=True)) == {(0, 1), (1, 3)}


def test_rows_that_there_are_not_are_told_with_the_test_examples(result_of_few, effect):
    there = r"rows 0 to 1 \(test examples 1, 3 of the data set\), but got 3"
    words, explanations = (lambda row: result_of_few.words(row, 0)), (lambda row: result_of_few.explanations([row]))
    for ask in (result_of_few.show, words, explanations):
        with pytest.raises(IndexError, match=there):
            ask(3)
    for ask in (does_it_matter, tail_patch_gains):
        with pytest.raises(ValueError, match=rf"test_indices must be rows of the result\. There are {there}"):
            ask(result_of_few, build, few_tests(), 2, test_indices=[1, 3])
    for ask in (effect.sentence, effect.change):
        with pytest.raises(IndexError, match=r"rows 0 to 3 \(test examples 0 to 3 of the data set\), but got 4"):
            ask(4)


def test_other_test_examples_are_told_by_index_and_row(result_of_few):
    others = DataLoader(TensorDataset(TEST.tensors[0], 1 - TEST.tensors[1]), sampler=[1, 3])
    with pytest.raises(ValueError, match=r"test example 1 \(row 0 of the result\) has the label 0 here, and 1 there"):
        does_it_matter(result_of_few, build, others, 2, 2)


def test_numbers_of_numpy_are_as_good(planted_result, effect, folder):
    counted = Counted()
    rows = np.array([2])
    options = {"test_indices": rows, "against": ["random"], "trainer": np.int64(EPOCHS), "folder": folder}
    again = does_it_matter(planted_result, counted, planted.test_loader(), np.int64(COPIES), np.int64(SEEDS), **options)
    assert counted.n == 2  # to look at: the fits are those of plain numbers
    assert torch.equal(again.changes["random"], effect.changes["random"][[2]])
    assert (repr(again.k), repr(again.seeds)) == (str(COPIES), str(tuple(range(SEEDS))))


def test_what_was_run_is_not_run_again(effect, planted_result, folder):
    counted = Counted()
    again = does_it_matter(
        planted_result,
        counted,
        planted.test_loader(),
        COPIES,
        SEEDS,
        folder=folder,
        test_indices=[2],
        against=["random"],
    )
    assert counted.n == 2  # to look at a few training examples, and at all
    assert torch.equal(again.changes["random"], effect.changes["random"][[2]])
    assert again.test_indices.tolist() == [2]


def test_random_removals_are_shared_and_of_the_label(planted_result):
    labels = TRAIN.tensors[1]
    removals = Removals(planted_result, torch.tensor([0, 1, 2]), 5, 3, ("random", "same label"))
    random, same = removals.chosen["random"], removals.chosen["same label"]
    assert random.shape == same.shape == (3, 3, 5)
    assert torch.equal(random[0], random[1])
    assert torch.equal(same[0], same[2])
    assert (labels[same] == TEST.tensors[1][:3, None, None]).all()
    assert len(random[0].unique(dim=0)) == len(same[0].unique(dim=0)) == 3
    assert all(len(each.unique()) == 5 for each in (*random.flatten(0, 1), *same.flatten(0, 1)))
    kept = removals.without(random[0, 0], 1).kept
    assert (~kept).nonzero().flatten().tolist() == sorted(random[0, 0].tolist())


def test_what_was_never_drawn_is_left_out(planted_result):
    result = replace(planted_result, undrawn=torch.arange(20, 56))
    removals = Removals(result, torch.tensor([0]), 3, 4, ("random", "same label", "tf-idf"))
    assert all(int(each.max()) < 20 for each in removals.chosen.values())
    assert removals.drawn.sum() == 20


def test_too_few_of_a_label_are_told(planted_result):
    rows = torch.arange(N_TEST)
    removals = Removals(planted_result, rows, 30, 2, ("same label",))
    assert "same label" not in removals.chosen
    assert removals.notes[0].startswith("4 test examples have no label, or fewer than 30 training examples share it")
    without_trace = Removals(replace(planted_result, trace=None), rows, 3, 2, ("random", "tf-idf"))
    assert set(without_trace.chosen) == {"proponents", "random"}
    assert "no comparison with 'tf-idf'" in without_trace.notes[0]


def test_a_value_is_no_class_that_its_whole_part_numbers(planted_result):
    texts = replace(planted_result.test_texts, labels=torch.full((N_TEST,), 1.7, dtype=torch.float64))
    rated = replace(planted_result, target_names=(), test_texts=texts)
    assert target_name(rated, 0) == "1.7"
    assert target_name(replace(rated, test_texts=planted_result.test_texts), 0) in planted_result.label_names.values()


def test_other_targets_have_other_classes(planted_fit, planted_result, folder):
    assert target_classes(planted_result).flatten().tolist() == TEST.tensors[1].tolist()
    said = replace(planted_result, target="prediction")
    assert target_classes(said).flatten().tolist() == planted_result.predictions[:, 0].long().tolist()
    assert target_classes(replace(planted_result, target="yes")).flatten().tolist() == [1] * N_TEST
    pair = planted_fit.influence(planted.test_loader(), target=("yes", "no"))
    assert target_classes(pair).tolist() == [[1, 0]] * N_TEST
    options = {"k": COPIES, "seeds": SEEDS, "test_indices": [1], "against": ["random"], "folder": folder}
    of_pair = does_it_matter(pair, build, planted.test_loader(), **options)
    said_by_hand = by_hand((), 0)[1]  # there is a third class
    assert torch.allclose(of_pair.before[0, 0], said_by_hand[1] / said_by_hand[:2].sum(), atol=1e-6)
    assert of_pair.targets == ["yes, not no"]


class Rated(Learner):
    """Names of classes that hold what stands between the two of a pair, and one that is another's number."""

    def influence_label_names(self):
        return {0: "good", 1: "good, not great", 2: "0"}


@pytest.mark.parametrize(
    ("target", "classes"),
    [
        ("good, not great", [1]),
        (("good", "good, not great"), [0, 1]),
        (("good, not great", "good"), [1, 0]),
        (("good, not great", "0"), [1, 2]),
        (("good, not great", 0), [1, 0]),
        (0, [0]),
        ("0", [2]),
    ],
    ids=str,
)
def test_names_of_classes_may_be_anything(planted_fit, tmp_path, target, classes):
    result = planted_fit.influence(planted.test_loader(), Rated(), target=target)
    loaded = InfluenceResult.load(result.save(tmp_path / "result.safetensors", k=0))
    for each in (result, loaded):
        assert target_classes(each).tolist() == [classes] * N_TEST


def test_an_older_result_tells_its_classes_where_its_target_does(planted_result):
    def of(target, names):
        older = replace(planted_result, target=target, label_names=names)
        return target_classes(older)[0].tolist()

    assert of("good, not bad", {0: "good", 1: "bad"}) == [0, 1]
    assert of("good, not 1", {0: "good", 1: "bad"}) == [0, 1]
    assert of("good, not great", {1: "good, not great", 2: "bad"}) == [1]
    assert of("bad, not good, not great", {1: "good, not great", 2: "bad"}) == [2, 1]
    with pytest.raises(ValueError, match=r"may be \['good, not great'\] or \['good', 'great'\].*Ask trainer.influence"):
        of("good, not great", {0: "good", 1: "good, not great", 2: "great"})
    with pytest.raises(ValueError, match="There is no class 'good, not dull'"):
        of("good, not dull", {0: "good"})


class Value(Learner):
    """Says a value, not a class."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 1)

    def influence_loss(self, batch):
        return (self(batch[0])[:, 0] - batch[1].float()) ** 2


def build_value(indices, seed):
    return Value(), build(indices, seed)[1]


def test_where_no_class_is_said_the_loss_is_measured(tmp_path):
    pl.seed_everything(0, verbose=False)
    module, loader = build_value(range(len(TRAIN)), 0)
    callback = TracInCallback(tmp_path / "trace", dtype="float32", methods=("tracin-we",))
    trainer = quiet(max_epochs=2, callbacks=[callback])
    trainer.fit(module, loader)
    result = trainer.influence(planted.test_loader())
    effect = does_it_matter(
        result, build_value, planted.test_loader(), COPIES, 2, test_indices=[1], against=["random"], folder=tmp_path
    )
    with torch.no_grad():
        losses = module.eval().influence_loss(TEST.tensors)
    assert effect.quantity == "loss"
    assert torch.allclose(effect.before[0, 0], losses[1], atol=1e-5)  # the fit again
    assert ("raises" if effect.change(0).mean > 0 else "lowers") in effect.sentence(0)
    assert "Mean change of the target's loss" in effect.summary()
    other = trainer.influence(planted.test_loader(), target="prediction")
    with pytest.raises(ValueError, match="these modules say no class"):
        does_it_matter(other, build_value, planted.test_loader(), 2, 2, folder=tmp_path / "other", against=[])
    assert len([*(tmp_path / "other").glob("*.safetensors")]) == 1  # after one fit, not after ten


class Hinge(Value):
    """Says one of two classes by a single number, whose losses are no log probabilities."""

    def influence_loss(self, batch):
        return (1 - (2 * batch[1].float() - 1) * self(batch[0])[:, 0]).clamp(min=0)


def build_hinge(indices, seed):
    return Hinge(), build(indices, seed)[1]


def losses_by_hand(left_out, seed: int, epochs: int):
    """(n_test,) hinge losses of the fit that knows nothing of some training examples."""
    pl.seed_everything(seed, verbose=False)
    module, loader = build_hinge([at for at in range(len(TRAIN)) if at not in left_out], seed)
    quiet(pl.Trainer, max_epochs=epochs).fit(module, loader)
    with torch.no_grad():
        return module.eval().influence_loss(TEST.tensors)


def test_of_a_hinge_the_changes_are_those_of_losses(tmp_path):
    """Where a fit has learnt all of its test examples, all of its losses are 0."""
    pl.seed_everything(0, verbose=False)
    callback = TracInCallback(tmp_path / "trace", dtype="float32", methods=("tracin-we",))
    trainer = quiet(max_epochs=15, callbacks=[callback])
    trainer.fit(*build_hinge(range(len(TRAIN)), 0))
    rows = [0, 2, 3]  # of the last one's label there is no other
    test = DataLoader(Subset(TEST, rows), batch_size=3)
    result = trainer.influence(test, method=TracInWE(weights="equal"))
    effect = does_it_matter(result, build_hinge, test, COPIES, 2, against=[])
    assert effect.quantity == "loss"
    for seed in (0, 1):
        before = losses_by_hand((), seed, 15)[rows]
        assert torch.allclose(effect.before[:, seed], before, atol=1e-5)
        after = losses_by_hand(result.proponents(COPIES).indices[0].tolist(), seed, 15)[rows]
        assert torch.allclose(effect.changes["proponents"][0, seed], (after - before)[0], atol=1e-5)


def test_what_is_measured_is_the_same_for_all_modules(planted_result):
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    with_classes, without = (
        Outcome(torch.full((4,), 0.25), logits.log_softmax(1)),
        Outcome(torch.full((4,), 0.75), None),
    )
    rows = torch.arange(N_TEST)
    assert quantity_of(planted_result, [with_classes]) == "probability"
    assert quantity_of(planted_result, [with_classes, without]) == "loss"
    assert values_of(planted_result, rows, with_classes, "loss").tolist() == [0.25] * 4
    own = logits.softmax(1)[rows, TEST.tensors[1]]
    assert torch.allclose(values_of(planted_result, rows, with_classes, "probability"), own)
    with pytest.raises(ValueError, match="these modules say no class"):
        quantity_of(replace(planted_result, target="prediction"), [with_classes, without])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": len(TRAIN)}, "k must be a whole number from 1 to 55, as 56 examples were trained on"),
        ({"k": 0}, "k must be a whole number from 1"),
        ({"k": 2.5}, "k must be a whole number from 1 to 55, as 56 examples were trained on, but got 2.5"),
        ({"seeds": 2.5}, "seeds must be a whole number of at least 2, .* but got 2.5"),
        ({"trainer": 0}, "trainer must be a number of epochs of at least 1, but got 0"),
        ({"test_indices": [1.5]}, r"rows of the result. .* but got 1\.5"),
        ({"test_indices": [True]}, "rows of the result. .* but got True"),
        ({"seeds": 1}, "seeds must be a whole number of at least 2, as one says nothing of chance"),
        ({"against": ["nothing"]}, "against must be of 'random'"),
        (
            {"test_indices": [9]},
            r"rows of the result. .* 0 to 3 \(test examples 0 to 3 .*\), but got 9",
        ),
        ({"test_indices": []}, "test_indices is empty"),
        ({"test": DataLoader(Subset(TEST, [0, 1]))}, "test has 2 examples"),
        (
            {"test": DataLoader(TensorDataset(TEST.tensors[0], TEST.tensors[1].roll(1)))},
            "test example 0 has the label 1 here, and 0 there",
        ),
    ],
    ids=[
        *("all", "none", "part", "half-seed", "no-epochs", "half-row", "truth", "one-seed"),
        *("against", "row", "no-row", "fewer-tests", "other-tests"),
    ],
)
def test_wrong_questions_are_refused(planted_result, options, message):
    test = options.pop("test", planted.test_loader())
    with pytest.raises(ValueError, match=message):
        does_it_matter(planted_result, build, test, **{"k": 2, **options})


def test_another_test_set_of_the_same_labels_is_told(planted_result):
    ids, labels = TEST.tensors
    others = DataLoader(TensorDataset(torch.where(torch.arange(len(ids))[:, None] == 2, ids + 1, ids), labels))
    with pytest.warns(UserWarning, match="Test example 2 has other tokens here than in the result"):
        tail_patch_gains(planted_result, build, others, k=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other tokens")
        tail_patch_gains(planted_result, build, planted.test_loader(), k=2)


def test_another_training_set_is_told(planted_result, tmp_path):
    def other(indices, seed):
        return Learner(), DataLoader(Subset(shifted, indices), batch_size=8)

    shifted = TensorDataset(TRAIN.tensors[0].roll(1, 0), TRAIN.tensors[1].roll(1, 0))
    with pytest.warns(UserWarning, match="other training examples than those of the trace"):
        does_it_matter(
            planted_result, other, planted.test_loader(), 2, 2, test_indices=[0], against=[], folder=tmp_path
        )
    with pytest.raises(ValueError, match="The scores are of 56 training examples, but build gives no such number"):
        does_it_matter(planted_result, Fewer(), planted.test_loader(), 2, 2, test_indices=[0], against=[])


def test_without_a_trace_the_epochs_must_be_given(planted_result):
    with pytest.raises(ValueError, match="not known how long the fit trained"):
        does_it_matter(replace(planted_result, trace=None), build, planted.test_loader(), 2)


def test_tail_patch_is_one_step_of_the_own_optimizer(planted_fit, planted_result):
    trace: Trace = planted_result.trace
    gains = tail_patch_gains(planted_result, build, planted.test_loader(), k=3)
    row, rank = 2, 1
    proponent = int(planted_result.proponents(3).indices[row, rank])
    module = Learner()
    module.load_state_dict(trace.checkpoints[-1].weights())
    label = int(TEST.tensors[1][row])

    def log_probability():
        return module(TEST.tensors[0][row : row + 1]).log_softmax(1)[0, label]

    before = log_probability().detach()
    rate = sum(each.learning_rate for each in trace.checkpoints) / len(trace.checkpoints)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    module.influence_loss(tuple(each[proponent : proponent + 1] for each in TRAIN.tensors)).sum().backward()
    optimizer.step()
    assert gains.shape == (N_TEST, 3)
    assert torch.allclose(gains[row, rank], log_probability().detach() - before, atol=1e-5)
    assert (gains.mean(1) > 0).all()
    others = torch.arange(16, 56).reshape(N_TEST, 10)
    assert (
        tail_patch_gains(planted_result, build, planted.test_loader(), train_indices=others).mean(1) < gains.mean(1)
    ).all()


@pytest.mark.parametrize("target", ["prediction", 1, (0, 1)])
def test_the_control_of_another_target_has_its_label(planted_fit, target):
    result = planted_fit.influence(planted.test_loader(), target=target)
    result = replace(result, predictions=torch.tensor([[1.0, 0.9], [0, 0.9], [1, 0.9], [0, 0.9]]))
    chosen = Removals(result, torch.arange(N_TEST), 3, 2, ("same label",)).chosen["same label"]
    expected = {"prediction": [1, 0, 1, 0], 1: [1] * 4, (0, 1): [0] * 4}[target]
    for of_test, label in zip(chosen, expected, strict=True):
        assert set(TRAIN.tensors[1][of_test.flatten()].tolist()) == {label}


class InGroups(Learner):
    """Words learn slowly, as where a pretrained model is fine-tuned layer by layer."""

    def configure_optimizers(self):
        words = [*self.embedding.parameters()]
        others = [each for name, each in self.named_parameters() if not name.startswith("embedding")]
        return torch.optim.SGD([{"params": words, "lr": 1e-3}, {"params": others, "lr": 0.5}])


def test_tail_patch_takes_each_group_s_own_rate(tmp_path):
    fit = quiet(max_epochs=2, callbacks=[TracInCallback(tmp_path / "trace")])
    fit.fit(InGroups(), build(list(range(len(TRAIN))), 0)[1])
    result = fit.influence(planted.test_loader())
    gains = tail_patch_gains(result, lambda *asked: (InGroups(), build(*asked)[1]), planted.test_loader(), k=2)
    ids, labels = TEST.tensors
    for row, chosen in enumerate(result.proponents(2).indices.tolist()):
        module = InGroups()
        module.load_state_dict(result.trace.checkpoints[-1].weights())
        before = module(ids)[row].log_softmax(0)[labels[row]].item()
        optimizer = module.configure_optimizers()
        module.influence_loss(tuple(each[chosen[0] : chosen[0] + 1] for each in TRAIN.tensors)).sum().backward()
        optimizer.step()
        assert float(gains[row, 0]) == pytest.approx(
            module(ids)[row].log_softmax(0)[labels[row]].item() - before, abs=1e-5
        )


class Bare(pl.LightningModule):
    """The task's network without the mixin: it says nothing of influence."""

    def __init__(self):
        super().__init__()
        for name, layer in Learner().named_children():
            self.add_module(name, layer)

    forward = Learner.forward

    def training_step(self, batch, batch_idx):
        assert self.automatic_optimization
        self.log("loss", 1.0)
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class WithMixin(Learner):
    configure_optimizers = Bare.configure_optimizers


class Manual(Bare):
    """Makes its own steps."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def test_tail_patch_takes_the_same_step_with_and_without_the_mixin(planted_result):
    modules = {kind: kind() for kind in (Bare, WithMixin, Manual)}

    def gains(kind):
        def made(indices, seed):
            return modules[kind], build(indices, seed)[1]

        return tail_patch_gains(planted_result, made, planted.test_loader(), k=2, learning_rate=0.3)

    found = gains(Bare)
    assert torch.allclose(found, gains(WithMixin), atol=1e-6)
    ids, labels = TEST.tensors
    weights = planted_result.trace.checkpoints[-1].weights()
    for row, chosen in enumerate(planted_result.proponents(2).indices.tolist()):
        for rank, proponent in enumerate(chosen):
            module = Bare()
            module.load_state_dict(weights)
            said = [module(ids)[row].log_softmax(0)[labels[row]]]
            one, label = (each[proponent : proponent + 1] for each in TRAIN.tensors)
            torch.nn.functional.cross_entropy(module(one), label).backward()
            with torch.no_grad():
                for each in module.parameters():
                    each -= 0.3 * each.grad
            said.append(module(ids)[row].log_softmax(0)[labels[row]])
            assert float(found[row, rank]) == pytest.approx((said[1] - said[0]).item(), abs=1e-5)
    assert "training_step" not in vars(modules[Bare])  # the module is as it was
    assert modules[Bare].automatic_optimization
    with pytest.raises(ValueError, match="Manual optimizes manually in training_step"):  # this one does
        gains(Manual)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (torch.full((N_TEST, 2), 99), ValueError, "from 0 to 55, but got 99"),
        (torch.full((N_TEST, 2), -1), ValueError, "from 0 to 55, but got -1"),
        ([[0, 1]] * N_TEST, TypeError, "must be a tensor of shape .n, k., but got list"),
        (torch.zeros(N_TEST, 2), ValueError, "whole numbers of shape .n, k., but got torch.float32"),
        (torch.ones(N_TEST, len(TRAIN)).bool(), ValueError, "but got torch.bool"),
        (torch.arange(N_TEST), ValueError, "but got torch.int64 of shape .4,."),
        (torch.zeros(N_TEST, 0).long(), ValueError, "of shape .4, 0."),
        (torch.zeros(2, 2).long(), ValueError, "a row for each of 4 test examples, but has 2"),
    ],
    ids=["beyond", "negative", "list", "float", "mask", "row", "none", "other-tests"],
)
def test_tail_patch_refuses_what_are_no_training_examples(planted_result, asked, error, message):
    with pytest.raises(error, match=message):
        tail_patch_gains(planted_result, build, planted.test_loader(), train_indices=asked)


def test_tail_patch_needs_the_weights(planted_result):
    with pytest.raises(ValueError, match="The trace that the result was computed from is not there"):
        tail_patch_gains(replace(planted_result, trace=None), build, planted.test_loader())
    for rate in ("high", float("nan"), True):
        with pytest.raises(ValueError, match=f"learning_rate must be a finite number, but got {rate!r}"):
            tail_patch_gains(planted_result, build, planted.test_loader(), learning_rate=rate)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_every_number_whole_and_of_a_long_target_what_fits(width):
    changes = {name: torch.full((2, 3), -0.25) for name in ("proponents", "random", "same label", "tf-idf")}
    targets = ["tech", "a class of many words, whose name is longer than what is left of a line of eighty characters"]
    before = torch.full((2, 3), 0.5)
    effect = RemovalEffect(5, (0, 1, 2), "probability", torch.tensor([3, 1002]), targets, before, changes)
    console = Console(width=width, file=io.StringIO())
    console.print(effect)
    lines = console.file.getvalue().splitlines()
    head = next(line for line in lines if line.startswith(" test"))
    assert head.split() == ["test", "target", "before", "proponents", "random", "same", "label", "tf-idf"]
    rows = [line for line in lines if line.lstrip().startswith(("3  ", "1002  "))]
    assert [line.count("-0.25 ± 0.00") for line in rows] == [4, 4]
    assert "a class" in rows[1]
    assert "…" in rows[1]
    assert max(map(len, lines)) <= width
