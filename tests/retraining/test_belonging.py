"""What does not belong together is told: builds, modules, test examples, scores, arguments of retrainings."""

from __future__ import annotations

import warnings
from dataclasses import replace

import planted
import pytest
import pytorch_lightning as pl
import torch
from families import BATCH_SIZE, FAMILIES, N_TRAIN
from planted import COPIES, EPOCHS, N_TEST, TRAIN, Learner, build
from retraining_toys import Build, retrainings
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from toy import Toy, loader, quiet, test_texts

from lightning_tracin import TracInCallback, TracInWE
from lightning_tracin.retraining import Retrainings, does_it_matter, random_halves, recommend, tail_patch_gains, without
from lightning_tracin.retraining.checks import (
    _other_row,
    checked_rows,
    epochs_of,
    require_proponents,
    warn_of_other_steps,
)
from lightning_tracin.retraining.distinct_fits import DistinctFits
from lightning_tracin.retraining.folder import Retraining
from lightning_tracin.retraining.held_out import held_out
from lightning_tracin.retraining.outcomes import Outcome

NOTHING = TracInWE(exclude_tokens=tuple(range(40)))  # of the planted task: all scores are 0


def first_ones(indices, seed):
    """As many training examples as there are indices, but always the first."""
    return build(range(len(indices)), seed)


def of_one_seed(indices, seed):
    pl.seed_everything(42, verbose=False)
    return build(indices, seed)


@pytest.mark.filterwarnings("ignore:.*test examples are looked at")  # that they are few
def test_a_build_that_ignores_its_indices_is_refused_where_the_first_fit_is_on_all(planted_fit, planted_result):
    test = planted.test_loader()
    with pytest.raises(ValueError, match=r"\(52 and 52 of 56\) ended with the very same weights"):
        does_it_matter(planted_result, first_ones, test, COPIES, 2, against="random", trainer=1)
    trace, options = planted_fit.callbacks[0].trace, {"methods": TracInWE(normalize="cosine"), "k": 4, "trainer": 1}
    with pytest.raises(ValueError, match="does not depend on its indices"):
        recommend(trace, first_ones, test, "explain", N_TEST, **options)


def test_a_fit_is_compared_with_those_of_an_earlier_run(tmp_path):
    def two(indices, seed):
        return Build()(range(len(indices)), seed)

    halves = random_halves(20, 2)
    retrainings(tmp_path, two).run(halves[:1])
    with pytest.raises(ValueError, match=r"\(10 and 10 of 20\)"):
        retrainings(tmp_path, two).run(halves)
    runs = retrainings(tmp_path / "one-by-one", two)
    runs.run(halves[:1])
    with pytest.raises(ValueError, match=r"\(10 and 10 of 20\)"):
        runs.run(halves[1:])


def test_a_build_that_ignores_its_seed_is_told(planted_result, tmp_path):
    options = {"test_indices": [0], "against": [], "folder": tmp_path, "trainer": 1}
    with pytest.warns(UserWarning, match="same 56 training examples, with the seeds 0 and 1, ended with the very same"):
        effect = does_it_matter(planted_result, of_one_seed, planted.test_loader(), COPIES, 2, **options)
    assert effect.change(0).low == effect.change(0).high
    assert "Fits with different seeds are the same, bit for bit" in str(effect)
    again = does_it_matter(planted_result, of_one_seed, planted.test_loader(), COPIES, 2, **options)
    assert again.notes == effect.notes  # nothing is fitted now

    runs = Retrainings(tmp_path / "halves", of_one_seed, planted.test_loader(), n_train=len(TRAIN), trainer=1)
    with pytest.warns(UserWarning, match="does not depend on its seed") as told:
        found = runs.run(random_halves(len(TRAIN), 2), seeds=(3, 7))
    assert torch.equal(found.losses[:, 0], found.losses[:, 1])
    assert sum("seeds 3 and 7" in str(each.message) for each in told) == 1


def test_files_of_an_earlier_version_are_not_compared(tmp_path):
    kept = without(20, [3])
    runs = retrainings(tmp_path)
    runs.folder.claim({"n_train": 20, "n_test": 6})
    runs.folder.write(Retraining(kept, 0), Outcome(torch.zeros(6), None))
    stored = runs.folder.read(Retraining(kept, 0))
    assert stored.weights is None
    seen = DistinctFits()
    assert seen.add(Retraining(kept, 0), stored) is None
    assert seen.add(Retraining(without(20, [4]), 0), stored) is None


class Renamed(Learner):
    def __init__(self):
        super().__init__()
        self.words = self.embedding


class Wide(Learner):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(40, 64, padding_idx=0), nn.Linear(8, 64), nn.Linear(64, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embedding(ids)[..., :8].mean(1))))


class Late(Learner):
    """Has its last layer when Lightning asks for it."""

    def __init__(self):
        super().__init__()
        self.head = None

    def configure_model(self):
        self.head = self.head or nn.Linear(8, 3)


def building(module):
    return lambda indices, seed: (module(), build(indices, seed)[1])


@pytest.mark.parametrize("ask", [does_it_matter, tail_patch_gains])
@pytest.mark.parametrize(("module", "differing"), [(Renamed, "1 parameters"), (Wide, "4 parameters")])
def test_another_module_than_the_traces_is_refused(planted_result, ask, module, differing):
    with pytest.raises(ValueError, match=rf"of another model \(Learner\) than {module.__name__}: {differing} differ"):
        ask(planted_result, building(module), planted.test_loader(), 2)


def test_layers_may_be_built_late(planted_result):
    own = tail_patch_gains(planted_result, build, planted.test_loader(), k=1)
    assert torch.allclose(tail_patch_gains(planted_result, building(Late), planted.test_loader(), k=1), own, atol=1e-6)


@pytest.mark.parametrize("ask", [does_it_matter, tail_patch_gains])
def test_scores_that_are_all_the_same_are_refused(planted_fit, ask):
    result = planted_fit.influence(planted.test_loader(), method=NOTHING)
    with pytest.raises(ValueError, match=r"4 of 4 test examples have no proponents: by TracInWE.*\(all 0 for test ex"):
        ask(result, build, planted.test_loader(), 2)


@pytest.mark.filterwarnings("ignore:.*test examples are looked at")  # that they are few
def test_a_candidate_whose_scores_are_all_the_same_is_refused(planted_fit):
    methods = {"words": TracInWE(), "none": NOTHING}
    with pytest.raises(ValueError, match="test examples have no proponents: by TracInWE"):
        recommend(planted_fit.callbacks[0].trace, build, planted.test_loader(), "explain", 4, methods=methods, k=2)


def test_of_some_scores_that_are_all_the_same_there_is_a_warning(planted_fit, planted_result):
    alike = planted_result.scores.clone()
    alike[1] = 0.25  # proponents by no difference
    alike[2] = -planted_result.scores[2].abs()
    alike[2, 10:] = 0  # nothing pushes it up
    alike[3, :10] = 7.0  # copies of one example
    result, rows = replace(planted_result, scores=alike), torch.arange(N_TEST)
    with pytest.warns(UserWarning, match=r"2 of 4 test examples have no proponents.*\(all 0.25 for test example 1\)"):
        require_proponents(result, rows, 4)
    require_proponents(result, rows[[0, 3]], 4)
    with pytest.raises(ValueError, match=r"1 of 1 .* \(all 0 for test example 2\)"):
        require_proponents(result, rows[[2]], 4)
    with pytest.warns(UserWarning, match="1 of 2 test examples have no proponents"):
        tail_patch_gains(result, build, planted.test_loader(), k=2, test_indices=[0, 1])
    kept = planted_fit.influence(planted.test_loader(), method=TracInWE(), k=2)
    require_proponents(kept, rows, 2)  # of results that keep the strongest alone


def family_of(name: str):
    """A family's build, and its test examples."""
    family = FAMILIES[name]

    def build_family(indices, seed):
        data = Subset(family.examples[:N_TRAIN], indices)
        return family.build(), DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, collate_fn=family.collate)

    return build_family, family.examples[N_TRAIN:], family.collate


@pytest.mark.parametrize("name", ["t5", "bart", "preferences", "preferences-interleaved", "lstm-time-first"])
def test_the_very_same_test_examples_are_taken_as_such(tmp_path, name):
    build_family, examples, collate = family_of(name)
    trainer = quiet(max_epochs=1, callbacks=[TracInCallback(tmp_path, dtype="float32")])
    trainer.fit(*build_family(range(N_TRAIN), 0))
    test = DataLoader(examples, batch_size=2, collate_fn=collate)
    result = trainer.influence(test)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other tokens")
        assert tail_patch_gains(result, build_family, test, k=1).isfinite().all()
    if name != "lstm-time-first":  # which has labels that would tell
        turned = DataLoader(examples[::-1], batch_size=2, collate_fn=collate)
        with pytest.warns(UserWarning, match="Test example 0 has other tokens here than in the result"):
            tail_patch_gains(result, build_family, turned, k=1)


def test_other_tokens_are_told_by_those_that_not_all_examples_have():
    begin = 2  # in no batch
    known, found = [{begin, 5, 6}, {begin, 7}], [{5, 6, 0}, {7, 1}]
    assert _other_row(known, found) is None
    assert _other_row(known, [found[0], {8, 1}]) == 1
    assert _other_row(known, [set(), set()]) is None  # batches without token ids
    assert _other_row(known[:1], found[:1]) is None
    assert _other_row(known[:1], found[1:]) == 0


def losses_of(folder, name: str, test=None):
    """(2, 5) the losses of test examples after a fit of a family on each of two halves."""
    build_family, examples, collate = family_of(name)
    test = DataLoader(examples, batch_size=2, collate_fn=collate) if test is None else test
    runs = Retrainings(folder / name, build_family, test, n_train=N_TRAIN, trainer=1)
    return runs.run(random_halves(N_TRAIN, 2)).losses[:, 0]


@pytest.mark.parametrize(("name", "usual"), [("lstm-time-first", "lstm"), ("bag-in-one-row", "bag-mean")])
def test_any_layout_of_batches_serves(tmp_path, name, usual):
    expected = losses_of(tmp_path, usual)
    assert torch.allclose(losses_of(tmp_path, name), expected, atol=1e-5)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(examples)

    _, examples, collate = family_of(name)
    stream = DataLoader(Stream(), batch_size=2, collate_fn=collate)
    assert torch.allclose(losses_of(tmp_path / "stream", name, stream), expected, atol=1e-5)


def test_a_collate_function_that_drops_examples_is_refused(tmp_path):
    def first_alone(items):
        return tuple(torch.stack(each)[:1] for each in zip(*items, strict=True))

    with pytest.raises(ValueError, match=r"tensors of the shapes \(1, 7\), \(1,\) out of 4 examples: its collate"):
        held_out(loader(test_texts(), 4, collate_fn=first_alone), loader)

    class Halved(Toy):
        def influence_loss(self, batch):
            return super().influence_loss(batch)[::2]

    with pytest.raises(ValueError, match="A batch of 4 test examples has 2 losses"):
        retrainings(tmp_path, Build(module=Halved)).run(random_halves(20, 1))


def test_a_trainer_that_leaves_test_batches_out_is_refused(tmp_path):
    runs = retrainings(tmp_path, trainer=lambda: quiet(pl.Trainer, max_epochs=1, limit_predict_batches=1))
    with pytest.raises(ValueError, match="looked at 1 of 2 batches of test examples"):
        runs.run(random_halves(20, 1))


def test_an_example_without_a_label_matters_where_it_is_asked_for(planted_result):
    labels = planted_result.test_texts.labels.clone()
    labels[3] = torch.nan
    result = replace(planted_result, test_texts=replace(planted_result.test_texts, labels=labels))
    assert checked_rows(result, [0, 2]).tolist() == [0, 2]
    with pytest.raises(ValueError, match="Test example 3 has no label"):
        checked_rows(result, [0, 3])
    gains = tail_patch_gains(result, build, planted.test_loader(), k=2, test_indices=[0])
    assert torch.equal(gains, tail_patch_gains(planted_result, build, planted.test_loader(), k=2, test_indices=[0]))


def test_one_stands_for_a_list_of_one(planted_fit, planted_result, tmp_path):
    options = {"test_indices": [2], "folder": tmp_path, "trainer": 1}
    one = does_it_matter(planted_result, build, planted.test_loader(), 2, 2, against="random", **options)
    several = does_it_matter(planted_result, build, planted.test_loader(), 2, 2, against=["random"], **options)
    assert one.changes.keys() == {"proponents", "random"}
    assert torch.equal(one.changes["random"], several.changes["random"])
    with pytest.raises(ValueError, match="against must be of 'random', 'same label', 'tf-idf', but got 'randomly'"):
        does_it_matter(planted_result, build, planted.test_loader(), 2, 2, against="randomly")
    trace = planted_fit.callbacks[0].trace
    found = recommend(trace, build, planted.test_loader(), "weigh", 8, methods=TracInWE(), trainer=1)
    assert found.best.method == TracInWE()
    with pytest.raises(ValueError, match=r"That is a class: write TracInWE\(\)"):
        recommend(trace, build, planted.test_loader(), methods=TracInWE)


@pytest.mark.parametrize("ask", [does_it_matter, tail_patch_gains])
def test_what_is_no_result_is_told(ask):
    with pytest.raises(TypeError, match=r"but got 'result.safetensors'. One that was saved is read by InfluenceResult"):
        ask("result.safetensors", build, planted.test_loader())


def test_seeds_of_another_kind_are_told(planted_result, tmp_path):
    with pytest.raises(ValueError, match=r"seeds must be a whole number of at least 2, .* but got \[0, 1\]"):
        does_it_matter(planted_result, build, planted.test_loader(), 2, [0, 1])
    with pytest.raises(ValueError, match="seeds must be a list of numbers, but got 2"):
        retrainings(tmp_path).run(random_halves(20, 2), seeds=2)


@pytest.mark.parametrize(
    ("every", "epochs", "found"), [(1, 2, 2), (2, 3, 2), (3, 3, 3)], ids=["each", "one-without", "perhaps-all"]
)
def test_of_epochs_that_may_have_no_checkpoint_there_is_a_warning(tmp_path, every, epochs, found):
    callback = TracInCallback(tmp_path, dtype="float32", every_n_epochs=every)
    quiet(max_epochs=epochs, callbacks=[callback]).fit(*build(range(8), 0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert epochs_of(callback.trace) == found
    expected = [f"last checkpoint is of epoch {found}, and checkpoints are up to {every} epochs apart"] * (every > 1)
    assert [each in str(warning.message) for each, warning in zip(expected, told, strict=True)] == [True] * len(
        expected
    )


def test_another_number_of_steps_than_the_fit_made_is_warned_of(planted_fit, tmp_path):
    _, loader = build(list(range(len(TRAIN))), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_steps(planted_fit.callbacks[0].trace, Learner(), loader, EPOCHS)
    accumulated = quiet(max_epochs=1, accumulate_grad_batches=7, callbacks=[TracInCallback(tmp_path / "trace")])
    accumulated.fit(Learner(), loader)
    result = accumulated.influence(planted.test_loader(), method="tracin-last")
    with pytest.warns(UserWarning, match="The fit made 1 steps .* a retraining on all examples makes 7"):
        does_it_matter(result, build, planted.test_loader(), 2, seeds=2, test_indices=[0], against=["random"])
