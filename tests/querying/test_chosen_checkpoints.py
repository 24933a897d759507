"""``checkpoints=``: which of the trace's count, and what is then drawn, predicted and said."""

from __future__ import annotations

import pytest
import torch
from brute_force import BruteForce, dense_gradients
from rich.console import Console
from torch.utils.data import SubsetRandomSampler
from toy import N_TRAIN, RATE, Toy, fitted, loader, mean_rate, test_texts, texts

from lightning_tracin import InfluenceResult, TracInLast

STEPS = [2, 4, 6, 8, 10]


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    """A fit with a checkpoint at every second step, before each of which training drew 8 of 20 examples."""
    return fitted(tmp_path_factory.mktemp("fine") / "trace", every_n_train_steps=2)


def expected(trainer, steps):
    """Brute force over some checkpoints; examples count at those before which a batch held them."""
    module, total = Toy(), 0.0
    for checkpoint in trainer.callbacks[0].trace.checkpoints:
        if checkpoint.step not in steps:
            continue
        module.load_state_dict(checkpoint.weights())
        test, train = (
            dense_gradients(module, module.embedding, loader(data, 1), lambda b: module.influence_loss(b)[0])
            for data in (test_texts(), texts())
        )
        rate = mean_rate(checkpoint.step - 2, checkpoint.step)
        drawn = checkpoint.drawn()
        total = total + BruteForce([rate], [test], [train]).scores() * (1 if drawn is None else drawn)
    return total


@pytest.mark.parametrize(
    ("choice", "steps"),
    [
        (None, STEPS),
        ("all", STEPS),
        ("last", [10]),
        (4, [4]),
        ([6, 2], [2, 6]),
        (slice(-2, None), [8, 10]),
        (slice(None, None, -2), [2, 6, 10]),
    ],
    ids=str,
)
def test_scores_are_those_of_brute_force_over_the_chosen(fine, choice, steps):
    result = fine.influence(loader(test_texts()), checkpoints=choice)
    assert result.checkpoint_steps == steps
    torch.testing.assert_close(result.scores.double(), expected(fine, steps), rtol=1e-4, atol=1e-9)


def test_what_no_batch_held_before_the_chosen_is_left_out(fine):
    last = fine.callbacks[0].trace.checkpoints[-1]
    drawn = set(torch.nonzero(last.drawn())[:, 0].tolist())
    result = fine.influence(loader(test_texts()), checkpoints="last")
    assert set(range(N_TRAIN)) - drawn == set(result.undrawn.tolist())
    assert set(result.proponents(len(drawn)).indices[0].tolist()) == drawn
    (note,) = (note for note in result.notes if "No batch held 12 of the 20 examples" in note)
    assert "led to the checkpoints that count" in note
    with pytest.warns(UserWarning, match=f"all {len(drawn)}"):
        kept = fine.influence(loader(test_texts()), checkpoints="last", k=N_TRAIN)
    assert kept.proponents(len(drawn)).indices.sort().values.tolist() == [sorted(drawn)] * len(kept.test_indices)


def test_what_the_sampler_never_draws_is_no_training_example(tmp_path):
    held = [1, 3, 5, 7, 9, 11, 13, 15]
    trainer = fitted(tmp_path / "trace", data=loader(sampler=SubsetRandomSampler(held)))
    for choice in (None, "last"):
        result = trainer.influence(loader(test_texts()), checkpoints=choice)
        assert set(result.undrawn.tolist()) == set(range(N_TRAIN)) - set(held)


def test_predictions_are_those_of_the_last_of_the_chosen(fine):
    module = Toy()
    for step in (2, 8):
        checkpoint = next(each for each in fine.callbacks[0].trace.checkpoints if each.step == step)
        module.load_state_dict(checkpoint.weights())
        classes = module.eval()(test_texts().tensors[0]).softmax(1).max(1)
        result = fine.influence(loader(test_texts()), checkpoints=step)
        assert result.predictions[:, 0].tolist() == classes.indices.tolist()
        torch.testing.assert_close(result.predictions[:, 1].float(), classes.values.detach())


def test_the_result_and_its_file_name_the_steps(fine, tmp_path, capsys):
    result = fine.influence(loader(test_texts()), checkpoints=[4, 8])
    path = result.save(tmp_path / "result.safetensors")
    loaded = InfluenceResult.load(path)
    assert loaded.checkpoint_steps == [4, 8]
    Console().print(loaded)
    assert "2 checkpoints (steps 4 to 8)" in " ".join(capsys.readouterr().out.split())
    assert "1 checkpoint (step 2)" in str(fine.influence(loader(test_texts()), checkpoints=2))


def test_self_influence_adds_up_over_checkpoints(fine):
    parts = [fine.self_influence(checkpoints=step, method=TracInLast()) for step in STEPS]
    torch.testing.assert_close(torch.stack(parts).sum(0), fine.self_influence(method=TracInLast()))


def test_only_the_chosen_are_filled(tmp_path):
    trainer = fitted(tmp_path / "trace", cache="on_demand")
    trainer.influence(loader(test_texts()), checkpoints="last")
    first, last = trainer.callbacks[0].trace.checkpoints
    assert [each.has_gradients(each.sites[0]) for each in (first, last)] == [False, True]
    assert last.learning_rate == pytest.approx(mean_rate(5, 10, RATE))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (3, r"no checkpoint of step 3\. There are those of the steps 2, 4, 6, 8, 10"),
        ([2, 7, 5], "no checkpoint of step 5, 7"),
        ([], r"or a slice of the list of checkpoints, but got \[\]"),
        ("best", "but got 'best'"),
        (True, "but got True"),
        (slice(7, None), "names none of the 5 checkpoints"),
    ],
    ids=str,
)
def test_a_wrong_choice_is_one_clear_error(fine, choice, message):
    with pytest.raises(ValueError, match=message):
        fine.influence(loader(test_texts()), checkpoints=choice)
