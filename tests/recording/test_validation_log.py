"""Validations that are logged: read back from the loggers' own files, compared with brute force and with queries."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from logged_fits import (
    Validated,
    assert_scores,
    at_checkpoint,
    brute_scores,
    examples_of,
    explanation_of,
    fit,
    logged,
    metrics,
    steps_of,
)
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toy import EPOCHS, N_TEST, STEPS_PER_EPOCH, Toy, loader, quiet, test_texts, texts
from variants import Plain, Reproducible

from lightning_tracin import Trace, TracInCallback, TracInWE
from lightning_tracin.recording import loggers
from lightning_tracin.recording.validation_log import is_suspected, summary


def test_every_validation_is_logged_with_what_brute_force_says(tmp_path):
    """The first one too, which ends before the first checkpoint is taken."""
    trainer = fit(tmp_path)
    trace = trainer.callbacks[0].trace
    rows = logged(trainer)
    assert steps_of(rows) == [step for step, _, _ in metrics(trainer)["val_loss"]]
    assert len(steps_of(rows)) == EPOCHS
    for epoch, step in enumerate(steps_of(rows)):
        own = [row for row in rows if row["step"] == step]
        assert {row["epoch"] for row in own} == {epoch}
        losses, probabilities = at_checkpoint(trace, epoch)
        highest = losses.topk(2)
        assert examples_of(own) == [(0, index) for index in highest.indices.tolist()]
        assert {(row["test_row"], row["test_index"]) for row in own} == set(enumerate(highest.indices.tolist()))
        for row in own:
            assert row["loss"] == pytest.approx(float(losses[row["test_index"]]), rel=1e-5)
            assert row["confidence"] == pytest.approx(float(probabilities[row["test_index"]].max()), rel=1e-5)
            assert row["prediction"] == str(int(probabilities[row["test_index"]].argmax()))
        assert_scores(own, brute_scores(trace, epoch + 1))


def test_the_last_validation_is_logged_as_influence_says_after_the_fit(tmp_path):
    trainer = fit(tmp_path, log_examples=3, log_k=2)
    rows = [row for row in logged(trainer) if row["epoch"] == EPOCHS - 1]
    result = Trace(tmp_path / "trace")
    result = quiet().influence(loader(test_texts()), trainer.lightning_module, trace=result)
    assert_scores(rows, result.scores, k=2)
    for explanation in result.explanations([index for _, index in examples_of(rows)], k=2):
        own = [row for row in rows if row["test_index"] == explanation.test.index]
        assert {row["test_text"] for row in own} == {explanation.test.text}
        assert {row["test_label"] for row in own} == {explanation.test.label}
        both = [each for each in (*explanation.proponents, *explanation.opponents) if each.score]
        for row, pushed in zip(own, both, strict=True):
            assert row["train_index"] == pushed.example.index
            assert row["train_text"] == pushed.example.text
            assert row["train_label"] == str(int(texts()[row["train_index"]][1]))
            assert row["share"] == pytest.approx(pushed.share, rel=1e-5)
            terms = dict(result.words(explanation.row, row["train_index"]))
            words = dict(entry.split(" ") for entry in row["words"].split(", ") if entry)
            assert all(float(term) == pytest.approx(terms[word], rel=0.06) for word, term in words.items())
            assert len(words) == min(5, sum(term != 0 for term in terms.values()))


def test_the_curves_say_what_the_table_says(tmp_path):
    trainer = fit(tmp_path, log_examples=N_TEST)
    rows, curves = logged(trainer), metrics(trainer)
    for number, step in enumerate(steps_of(rows)):
        proponents = [row for row in rows if row["step"] == step and row["role"] == "proponent" and row["score"] > 0]
        same = [row["test_label"] == row["train_label"] for row in proponents]
        assert curves["tracin/same_label"][number] == (step, number, pytest.approx(sum(same) / len(same)))
        held = [
            sum(row["share"] for row in proponents if row["test_index"] == index)
            for _, index in examples_of(proponents)
        ]
        assert curves["tracin/concentration"][number] == (step, number, pytest.approx(sum(held) / len(held), rel=1e-5))
    scores = brute_scores(trainer.callbacks[0].trace, EPOCHS).clamp(min=0)
    expected = [float(scores[index].topk(3).values.sum() / scores[index].sum()) for index in range(N_TEST)]
    assert curves["tracin/concentration"][-1][2] == pytest.approx(sum(expected) / N_TEST, rel=1e-4)


def test_validations_inside_of_an_epoch_count_the_checkpoints_up_to_then(tmp_path):
    trainer = fit(tmp_path, trainer={"val_check_interval": 2, "max_epochs": 3})
    trace = trainer.callbacks[0].trace
    rows = logged(trainer)
    assert steps_of(rows) == [step for step, _, _ in metrics(trainer)["val_loss"]] == [1, 3, 6, 8, 11, 13]
    counted = [1, 1, 1, 1, 2, 2]  # those of the first epoch wait for the first checkpoint
    for step, n_checkpoints in zip(steps_of(rows), counted, strict=True):
        assert_scores([row for row in rows if row["step"] == step], brute_scores(trace, n_checkpoints))


def test_the_loss_and_the_choice_are_those_of_the_validation(tmp_path):
    """In the middle of an epoch the weights are those of no checkpoint."""

    class Recording(Toy):
        def __init__(self):
            super().__init__()
            self.losses = []

        def validation_step(self, batch, batch_idx):
            self.losses.append(self.influence_loss(batch))

    trainer = fit(tmp_path, Recording(), trainer={"val_check_interval": 2, "num_sanity_val_steps": 0})
    rows = logged(trainer)
    losses = torch.cat(trainer.lightning_module.losses).view(4, N_TEST)
    for step, of_step in zip(steps_of(rows), losses, strict=True):
        own = {row["test_index"]: row["loss"] for row in rows if row["step"] == step}
        assert list(own) == of_step.topk(2).indices.tolist()
        assert list(own.values()) == pytest.approx(of_step.topk(2).values.tolist(), rel=1e-5)


def test_a_validation_without_a_checkpoint_of_its_epoch_does_not_wait_for_the_next(tmp_path):
    trainer = fit(tmp_path, every_n_epochs=2, trainer={"max_epochs": 3})
    trace = trainer.callbacks[0].trace
    assert [each.epoch for each in trace.checkpoints] == [1]
    rows = logged(trainer)
    assert list(dict.fromkeys(row["epoch"] for row in rows)) == [0, 1, 2]
    last = [row for row in rows if row["epoch"] == 2]
    result = quiet().influence(loader(test_texts()), Validated(), trace=tmp_path / "trace")
    assert_scores(last, result.scores)
    module = trainer.lightning_module.eval()
    losses = module.influence_loss(test_texts().tensors).detach()
    assert last[0]["loss"] == pytest.approx(float(losses.max()), rel=1e-5)


def test_checkpoints_by_steps(tmp_path):
    trainer = fit(tmp_path, every_n_train_steps=5)
    for epoch in range(EPOCHS):  # a checkpoint at the very step of the validation comes before it
        own = [row for row in logged(trainer) if row["epoch"] == epoch]
        assert_scores(own, brute_scores(trainer.callbacks[0].trace, epoch + 1))


@pytest.mark.parametrize("options", [{"cache": "training"}, {"methods": ["tracin-last"]}], ids=str)
def test_other_gradients(tmp_path, options):
    trainer = fit(tmp_path, **options)
    rows = [row for row in logged(trainer) if row["epoch"] == EPOCHS - 1]
    method = options.get("methods", ["tracin-we"])[0]
    result = quiet().influence(loader(test_texts()), Validated(), trace=tmp_path / "trace", method=method)
    assert_scores(rows, result.scores)
    assert all(bool(row["words"]) == (method == "tracin-we" and row["score"] != 0) for row in rows)


def test_given_examples_of_every_validation(tmp_path):
    trainer = fit(tmp_path, log_examples=[4, 1])
    rows = logged(trainer)
    for epoch in range(EPOCHS):
        own = [row for row in rows if row["epoch"] == epoch]
        assert examples_of(own) == [(0, 4), (0, 1)]
        assert_scores(own, brute_scores(trainer.callbacks[0].trace, epoch + 1))
        ids = test_texts()[4][0]
        assert own[0]["test_text"] == " ".join(str(int(token)) for token in ids if token)


def test_given_examples_cost_their_own_batches_only(tmp_path):
    class Counting(Toy):
        calls = 0

        def validation_step(self, batch, batch_idx):
            pass

        def influence_loss(self, batch):
            Counting.calls += self.trainer.validating  # what the module has is put back
            return super().influence_loss(batch)

    module = Counting()
    fit(tmp_path, module, log_examples=[5], trainer={"max_epochs": 1, "num_sanity_val_steps": 0})
    assert module.calls == 3  # the second of two batches, once more to tell what it says, and the example alone


@pytest.fixture
def warned(monkeypatch):
    """What the log warns of."""
    messages = []
    for module in ("beginning", "validation"):
        monkeypatch.setattr(f"lightning_tracin.recording.{module}.rank_zero_warn", messages.append)
    return messages


def test_examples_that_a_validation_does_not_have(tmp_path, warned):
    trainer = fit(tmp_path, log_examples=[4, 99, 0], trainer={"limit_val_batches": 1, "max_epochs": 1})
    assert examples_of(logged(trainer)) == [(0, 0)]
    assert warned == ["log_examples asks for [4, 99], but the validation came upon no such examples."]


def test_fewer_examples_than_asked_for_and_fewer_training_examples_than_k(tmp_path):
    trainer = fit(tmp_path, log_examples=50, log_k=50, trainer={"limit_val_batches": 1, "max_epochs": 1})
    rows = logged(trainer)
    assert sorted(examples_of(rows)) == [(0, index) for index in range(4)]
    assert len(rows) == int((brute_scores(trainer.callbacks[0].trace, 1)[:4] != 0).sum())


def test_several_loaders_are_numbered(tmp_path):
    other = texts(5, seed=9)
    trainer = fit(tmp_path, val=[loader(test_texts()), loader(other, batch_size=2)], log_examples=N_TEST + 5)
    trace = trainer.callbacks[0].trace
    rows = [row for row in logged(trainer) if row["epoch"] == EPOCHS - 1]
    assert sorted(examples_of(rows)) == [*((0, index) for index in range(N_TEST)), *((1, index) for index in range(5))]
    for number, data in enumerate((test_texts(), other)):
        own = [row for row in rows if row["dataloader_idx"] == number]
        losses, _ = at_checkpoint(trace, -1, data)
        assert all(row["loss"] == pytest.approx(float(losses[row["test_index"]]), rel=1e-5) for row in own)
        assert_scores(own, brute_scores(trace, EPOCHS, data))
    assert rows == sorted(rows, key=lambda row: -row["loss"])
    given = fit(tmp_path / "given", val={"a": loader(test_texts()), "b": loader(other)}, log_examples=[3])
    assert examples_of(logged(given)) == [(0, 3), (1, 3)]


def test_a_module_without_the_mixin(tmp_path):
    class PlainValidated(Plain):
        def validation_step(self, batch, batch_idx):
            pass

    trainer = fit(tmp_path, PlainValidated(), trainer={"max_epochs": 1})
    module = trainer.lightning_module.eval()
    with torch.no_grad():
        logits = module.head(module.embedding(test_texts().tensors[0]).mean(1))
        losses = functional.cross_entropy(logits, test_texts().tensors[1], reduction="none")
    rows = logged(trainer)
    assert examples_of(rows) == [(0, index) for index in losses.topk(2).indices.tolist()]
    result = quiet().influence(loader(test_texts()), PlainValidated(), trace=tmp_path / "trace")
    assert_scores(rows, result.scores)


class Named(Dataset):
    """Examples by name, one token of which the collate function leaves out."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        ids, label = self.data[index]
        return {"input_ids": ids, "labels": label}


class Popping(Toy):
    """Takes its validation batches apart."""

    def influence_loss(self, batch):
        return functional.cross_entropy(self(batch["input_ids"]), batch["labels"], reduction="none")

    def validation_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        batch["input_ids"].zero_()
        assert len(labels)


def test_a_validation_step_that_takes_its_batch_apart(tmp_path):
    options = {"train": loader(Named(texts()), shuffle=True), "val": loader(Named(test_texts()))}
    trainer = fit(tmp_path, Popping(), **options)
    rows = [row for row in logged(trainer) if row["epoch"] == EPOCHS - 1]
    result = quiet().influence(loader(Named(test_texts())), Popping(), trace=tmp_path / "trace")
    assert_scores(rows, result.scores)


def test_batches_that_cannot_be_cut_are_refused(tmp_path):
    class TimeFirst(Validated):
        def influence_loss(self, batch):
            return functional.cross_entropy(self(batch[0].T), batch[1], reduction="none")

    def time_first(examples):
        ids, labels = zip(*examples, strict=True)
        return torch.stack(ids).T, torch.stack(labels)

    options = {"train": loader(collate_fn=time_first), "val": loader(test_texts(), collate_fn=time_first)}
    with pytest.raises(ValueError, match="log_examples must cut examples out of the validation batches"):
        fit(tmp_path, TimeFirst(), trainer={"num_sanity_val_steps": 0}, **options)


def test_losses_that_are_not_finite_are_left_out(tmp_path, warned):
    class Breaking(Validated):
        def influence_loss(self, batch):
            losses = super().influence_loss(batch)
            if self.trainer.validating and len(losses) == 4:
                losses[2] = torch.nan
            return losses

    trainer = fit(tmp_path, Breaking(), log_examples=N_TEST, trainer={"max_epochs": 1})
    assert warned == ["The loss of 1 validation examples is NaN or infinite: they are not explained."]
    assert sorted(examples_of(logged(trainer))) == [(0, index) for index in range(N_TEST) if index != 2]


@pytest.mark.parametrize("trainer", [{"fast_dev_run": True}, {"limit_val_batches": 0}], ids=str)
@pytest.mark.filterwarnings("ignore:log_examples has no effect")
def test_where_nothing_is_logged(tmp_path, trainer):
    fitted = fit(tmp_path, trainer={**trainer, "default_root_dir": tmp_path})
    assert not list(tmp_path.rglob("influential.jsonl"))
    assert not any(name.startswith("tracin") for name in fitted.callback_metrics)


def test_a_sanity_check_and_a_validation_outside_of_fit_log_nothing(tmp_path):
    trainer = fit(tmp_path, trainer={"max_epochs": 1, "num_sanity_val_steps": 2})
    rows = logged(trainer)
    assert steps_of(rows) == [STEPS_PER_EPOCH - 1]
    trainer.validate(trainer.lightning_module, loader(test_texts()), verbose=False)
    assert logged(trainer) == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [({"logger": False}, "the trainer has no logger"), ({"limit_val_batches": 0}, "the fit has no validation")],
    ids=str,
)
def test_log_examples_without_effect_says_so(tmp_path, options, message, warned):
    fit(tmp_path, trainer={"max_epochs": 1, **options})
    assert warned == [f"log_examples has no effect: {message}."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_examples": -1}, "log_examples must be a number of validation examples or a list of their indices"),
        ({"log_examples": "all"}, "got 'all'"),
        ({"log_examples": True}, "got True"),
        ({"log_examples": 2.5}, "got 2.5"),
        ({"log_examples": [1, -2]}, r"got \[1, -2\]"),
        ({"log_examples": []}, "must name each validation example once"),
        ({"log_examples": [3, 3]}, "must name each validation example once"),
        ({"log_k": 0}, "log_k must be a whole number of at least 1"),
        ({"log_examples": 2, "cache": "on_demand"}, 'cache="on_demand" stores none'),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TracInCallback(**options)


def test_a_resumed_fit_goes_on_logging_over_all_checkpoints(tmp_path):
    class Validating(Reproducible):
        def validation_step(self, batch, batch_idx):
            pass

    saving = {"max_epochs": 1, "enable_checkpointing": False}
    first = fit(tmp_path, Validating(), trainer=saving)
    first.save_checkpoint(tmp_path / "state.ckpt")
    callback = TracInCallback(tmp_path / "trace", dtype="float32", log_examples=2)
    second = quiet(callbacks=[callback], logger=CSVLogger(tmp_path))
    second.fit(Validating(), loader(shuffle=True), loader(test_texts()), ckpt_path=tmp_path / "state.ckpt")
    rows = logged(second)
    assert {row["epoch"] for row in rows} == {1}
    assert_scores(rows, brute_scores(callback.trace, 2, kind=Validating))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [1, [0, 3]], ids=str)
def test_log_examples_on_the_command_line(tmp_path, monkeypatch, examples):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(shuffle=True)

        def val_dataloader(self):
            return loader(test_texts())

    monkeypatch.chdir(tmp_path)
    method = {"class_path": "lightning_tracin.TracInWE", "init_args": {"exclude_tokens": ["common", 3]}}
    asked = {} if examples == 1 else {"log_method": method}
    arguments = {"dirpath": f"{tmp_path}/trace", "log_examples": examples, "log_k": 2, **asked}
    callback = {"class_path": "lightning_tracin.TracInCallback", "init_args": arguments}
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False}
    settings = {"trainer": {**options, "callbacks": [callback], "logger": logger}}
    (tmp_path / "fit.json").write_text(json.dumps(settings))
    cli = LightningCLI(Validated, Data, args=["fit", "--config", str(tmp_path / "fit.json")])
    rows = logged(cli.trainer)
    assert {row["rank"] for row in rows} == {1, 2}
    assert len(examples_of(rows)) == 1 if examples == 1 else examples_of(rows) == [(0, 0), (0, 3)]
    assert cli.trainer.callbacks[0].plan.log.method == (TracInWE(exclude_tokens=("common", 3)) if asked else None)


@pytest.mark.parametrize(
    ("found", "suspected"),
    [
        (explanation_of("good", "bad", [("bad", 3.0), ("good", 1.0)]), True),
        (explanation_of("good", "bad", [("good", 1.0)], [("bad", -3.0)]), True),
        (explanation_of("good", "bad", [("good", 3.0)], [("bad", -1.0)]), False),
        (explanation_of("good", "good", [("bad", 3.0)]), False),
        (explanation_of("good", "bad", [(None, 3.0)]), False),
        (explanation_of("good", None, [("bad", 3.0)], confidence=None), False),
    ],
)
def test_suspected_label_errors(found, suspected):
    assert is_suspected(found) == suspected
    assert summary([found]).get("tracin/suspected_label_errors", 0.0) == float(suspected)


def test_curves_leave_out_what_is_not_known():
    positive = [("good", 3.0), ("bad", 1.0), ("bad", -1.0)]
    metrics = summary([explanation_of("good", "good", positive), explanation_of("bad", "good", [("bad", 4.0)])])
    assert metrics == {
        "tracin/same_label": pytest.approx(2 / 3),
        "tracin/concentration": pytest.approx(0.4),
        "tracin/suspected_label_errors": 0.0,
    }
    regression = explanation_of("0.3", "0.2", [("0.1", 3.0)], confidence=None)
    assert summary([regression]) == {"tracin/concentration": pytest.approx(0.3)}
    nothing = explanation_of(None, None, [], confidence=None)
    assert summary([nothing]) == {}
    assert loggers.rows_of([nothing], [(0, 1.0)], step=0, epoch=0) == []


def test_rounded_shares_are_no_more_than_the_whole():
    whole = explanation_of("good", "good", [("good", 7.0000002), ("bad", 3.0000002)])
    assert sum(each.share for each in whole.proponents) > 1
    assert summary([whole])["tracin/concentration"] == 1.0


def test_a_shuffled_validation_loader_numbers_by_its_order(tmp_path):
    """The text is that of the example all the same."""
    data = TensorDataset(*test_texts().tensors)
    trainer = fit(tmp_path, val=DataLoader(data, 4, shuffle=True), log_examples=N_TEST, trainer={"max_epochs": 1})
    rows = logged(trainer)
    losses, _ = at_checkpoint(trainer.callbacks[0].trace, 0)
    by_text = {
        " ".join(str(int(token)) for token in ids if token): float(loss)
        for (ids, _), loss in zip(data, losses, strict=True)
    }
    assert {row["test_index"] for row in rows} == set(range(N_TEST))
    assert all(row["loss"] == pytest.approx(by_text[row["test_text"]], rel=1e-5) for row in rows)


@pytest.mark.parametrize("part", [{"sampler": [5, 2], "batch_size": 2}, {"batch_sampler": [[5], [2]]}], ids=list)
def test_a_part_of_the_data_set_keeps_its_numbers(tmp_path, part):
    data = TensorDataset(*test_texts().tensors)
    trainer = fit(tmp_path, val=DataLoader(data, **part), log_examples=[2], trainer={"max_epochs": 1})
    rows = logged(trainer)
    assert examples_of(rows) == [(0, 2)]
    assert {row["test_text"] for row in rows} == {" ".join(str(int(token)) for token in data[2][0] if token)}
    assert_scores(rows, brute_scores(trainer.callbacks[0].trace, 1))


def test_mixed_precision(tmp_path):
    trainer = fit(tmp_path, trainer={"precision": "bf16-mixed"})
    rows = [row for row in logged(trainer) if row["epoch"] == EPOCHS - 1]
    asked = quiet(precision="bf16-mixed")
    result = asked.influence(loader(test_texts(), batch_size=1), Validated(), trace=tmp_path / "trace")
    assert_scores(rows, result.scores)
