"""A run of which ModelCheckpoint's files are left: its trace is that of a fit that was recorded."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as twin
import pytest
import pytorch_lightning as pl
import torch
import torch_files
from families import FAMILIES
from lightning.pytorch.callbacks import ModelCheckpoint as TwinModelCheckpoint
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler
from toy import N_TRAIN, Data, Toy, loader, quiet, same_weights, site_of, test_texts
from transformers.optimization import Adafactor
from twin_toy import TwinToy

import lightning_tracin
from lightning_tracin import Trace, TracInCallback, TracInLast, TracInWE

WeightAveraging = getattr(pl.callbacks, "WeightAveraging", None)
METHODS = ("tracin-we", "tracin-last")

pytestmark = [torch_files.are_read, pytest.mark.filterwarnings("ignore:.*not known.*count as trained on")]


class Constant(Toy):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ByEpoch(Toy):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [StepLR(optimizer, 1, gamma=0.3)]


class OneCycle(Toy):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = OneCycleLR(optimizer, 0.1, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Groups(Toy):
    """The embedding learns faster, its group comes last, and the hidden layer is frozen."""

    def configure_optimizers(self):
        self.hidden.requires_grad_(False)
        groups = [
            {"params": self.head.parameters(), "lr": 0.01},
            {"params": [*self.hidden.parameters(), *self.embedding.parameters()], "lr": 0.2},
        ]
        optimizer = torch.optim.AdamW(groups)
        schedule = LambdaLR(optimizer, [lambda step: 0.8**step, lambda step: 1 / (1 + step)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


class WarmsUp(Constant):
    """By hand, as Lightning's documentation has it: each file has the full rate."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (self.trainer.global_step + 1) / 4)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class ByItself(Toy):
    """Adafactor finds its learning rates by itself, and says None."""

    def configure_optimizers(self):
        return Adafactor(self.parameters(), warmup_init=True)


class TwoOptimizers(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.influence_loss(batch).mean())
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        others = torch.optim.Adam([*self.hidden.parameters(), *self.head.parameters()], 0.02)
        return torch.optim.SGD(self.embedding.parameters(), 0.3), others


class OnPlateau(Toy):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = {"scheduler": ReduceLROnPlateau(optimizer, factor=0.1, patience=0), "monitor": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch, batch_idx):
        self.log("step", float(self.global_step))
        return super().training_step(batch, batch_idx)


def recorded_and_saved(folder, module, data=None, *, every: int | None = None, epochs: int = 2):
    """A trainer whose fit was recorded, and the files that ModelCheckpoint wrote of the same fit."""
    pl.seed_everything(0, verbose=False)
    files = ModelCheckpoint(folder / "files", save_top_k=-1, every_n_train_steps=every)
    callback = TracInCallback(folder / "trace", cache="on_demand", every_n_train_steps=every)
    trainer = quiet(enable_checkpointing=True, callbacks=[files, callback], max_epochs=epochs)
    trainer.fit(module, loader(shuffle=True) if data is None else data)
    return trainer, sorted((folder / "files").glob("*.ckpt"))


def require_same_checkpoints(recorded: Trace, past: Trace, moments=METHODS):
    assert len(recorded.checkpoints) == len(past.checkpoints) > 1
    for there, here in zip(recorded.checkpoints, past.checkpoints, strict=True):
        assert (there.step, there.epoch) == (here.step, here.epoch)
        assert same_weights(there.weights(), here.weights())
        for name in METHODS:
            site = site_of(here, name)
            assert here.learning_rate_of(site) == pytest.approx(there.learning_rate_of(site), rel=1e-6), name
            if name in moments:
                a, b = there.second_moments(site), here.second_moments(site)
                assert torch.equal(a.values, b.values)
                assert a.eps == b.eps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recorded fit of the toy, whose rate falls at every step, its files, and the trace made of these."""
    folder = tmp_path_factory.mktemp("run")
    trainer, files = recorded_and_saved(folder, Toy())
    return trainer, files, Trace.from_checkpoints(folder / "past", files, Toy(), loader())


@pytest.mark.parametrize(
    "method",
    [
        TracInWE(),
        TracInLast(),
        TracInWE(normalize="cosine"),
        TracInWE(precondition="adam"),
        TracInLast(normalize="cosine", precondition="adam"),
    ],
    ids=str,
)
def test_scores_are_those_of_the_recorded_fit(run, method):
    trainer, _, past = run
    expected = trainer.influence(loader(test_texts()), method=method)
    options = {"trace": past, "train_dataloaders": loader(), "method": method}
    found = quiet().influence(loader(test_texts()), Toy(), **options)
    assert torch.equal(found.scores, expected.scores)
    assert found.notes == expected.notes
    if method.normalize is None:  # else it is 1 for all
        assert torch.equal(quiet().self_influence(Toy(), **options), trainer.self_influence(method=method))


@pytest.mark.parametrize("kind", [Constant, ByEpoch, OneCycle, Groups, TwoOptimizers], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("error:.*approximate")
def test_rates_and_moments_are_those_of_the_recorded_fit(tmp_path, kind):
    _, files = recorded_and_saved(tmp_path, kind(), epochs=3)
    past = Trace.from_checkpoints(tmp_path / "past", reversed(files), kind(), loader())
    moments = ("tracin-last",) if kind is TwoOptimizers else METHODS
    require_same_checkpoints(Trace(tmp_path / "trace"), past, moments)
    assert past.header.notes == ()


@pytest.mark.parametrize("name", ["without-mixin", "t5", "lora"])
@pytest.mark.filterwarnings("error:.*approximate")
def test_models_of_other_kinds(tmp_path, name):
    family = FAMILIES[name]
    trainer, files = recorded_and_saved(tmp_path, family.build(), family.train_loader())
    past = Trace.from_checkpoints(tmp_path / "past", files, family.build(), family.train_loader())
    for method in METHODS:
        options = {"trace": past, "train_dataloaders": family.train_loader(), "method": method}
        found = quiet().influence(family.test_loader(), family.build(), **options)
        assert torch.equal(found.scores, trainer.influence(family.test_loader(), method=method).scores)


@pytest.mark.filterwarnings("ignore:.*approximate", "ignore:Adam's second moments are not known")
def test_a_bare_hugging_face_model_does_not_tell_which_layers_groups_hold(tmp_path):
    """Nor how the rate falls; refused where that matters, and said where not."""
    family = FAMILIES["bert-classes"]
    _, files = recorded_and_saved(tmp_path, family.build(), family.train_loader())
    with pytest.raises(ValueError, match="have different learning rates, and which layers they hold is not known"):
        Trace.from_checkpoints(tmp_path / "past", files, family.build().model, family.train_loader())
    past = Trace.from_checkpoints(
        tmp_path / "past", files, family.build().model, family.train_loader(), learning_rates=[1, 2]
    )
    (note,) = past.header.notes
    assert "BertForSequenceClassification has no configure_optimizers" in note
    assert [each.learning_rate for each in past.checkpoints] == [1, 2]


class Unfreezing(Constant):
    """The embedding is trained from the second epoch on."""

    def __init__(self):
        super().__init__()
        self.embedding.requires_grad_(False)

    def on_train_epoch_start(self):
        self.embedding.requires_grad_(self.current_epoch > 0)


def test_a_layer_that_no_step_has_moved_yet_counts_nothing(tmp_path):
    _, files = recorded_and_saved(tmp_path, Unfreezing())
    past = Trace.from_checkpoints(tmp_path / "past", files, Unfreezing(), loader())
    require_same_checkpoints(Trace(tmp_path / "trace"), past, ("tracin-last",))
    assert [each.learning_rate for each in past.checkpoints] == [0, pytest.approx(1e-2)]


@pytest.mark.filterwarnings("error:.*approximate")
def test_checkpoints_inside_of_epochs(tmp_path):
    _, files = recorded_and_saved(tmp_path, Toy(), every=3)
    past = Trace.from_checkpoints(tmp_path / "past", files, Toy(), loader())
    require_same_checkpoints(Trace(tmp_path / "trace"), past)
    assert [each.step for each in past.checkpoints] == [3, 6, 9]


def test_a_schedule_that_follows_a_metric_is_said_to_be_approximate(tmp_path):
    _, files = recorded_and_saved(tmp_path, OnPlateau(), epochs=3)
    with pytest.warns(UserWarning, match="approximate: the schedule follows a metric"):
        past = Trace.from_checkpoints(tmp_path / "past", files, OnPlateau(), loader())
    result = quiet().influence(loader(test_texts()), OnPlateau(), trace=past, train_dataloaders=loader())
    assert any("learning rates between the checkpoints are approximate" in note for note in result.notes)
    saved = [torch.load(file, weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"] for file in files]
    ends = zip([saved[0], *saved], saved, strict=False)
    assert [each.learning_rate for each in past.checkpoints] == pytest.approx([(a + b) / 2 for a, b in ends])


def test_another_schedule_than_that_of_the_run_is_found_out(run, tmp_path):
    _, files, _ = run
    with pytest.warns(UserWarning, match=r"configure_optimizers gives the rates 0\.01 after 5 steps"):
        past = Trace.from_checkpoints(tmp_path / "past", files, Constant(), loader())
    assert "approximate" in past.header.notes[0]


class InOneGo(ByEpoch):
    """Ends at the rate of two steps of the other, by one."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [StepLR(optimizer, 2, gamma=0.3**2)]


def test_another_schedule_that_ends_alike_is_found_out(tmp_path):
    _, files = recorded_and_saved(tmp_path, ByEpoch())
    with pytest.warns(UserWarning, match=r"makes another schedule than that of .*: gamma is 0\.3 there, 0\.09 here"):
        Trace.from_checkpoints(tmp_path / "past", files[-1], InOneGo(), loader())


@pytest.mark.filterwarnings("ignore:.*approximate")
def test_optimizers_that_cannot_be_those_of_the_run(run, tmp_path):
    """Their states are of no use then; the one rate of all groups is."""
    _, files, _ = run
    with pytest.warns(UserWarning, match=r"groups of \[\[5\]\] parameters, but those that are known"):
        past = Trace.from_checkpoints(tmp_path / "past", files, Groups(), loader())
    with pytest.raises(ValueError, match="needs Adam's second moments"):
        quiet().influence(
            loader(test_texts()), Groups(), trace=past, train_dataloaders=loader(), method=TracInWE(precondition="adam")
        )


@pytest.mark.filterwarnings("ignore:.*approximate")
def test_groups_of_different_rates_whose_layers_are_not_known_are_refused(tmp_path):
    _, files = recorded_and_saved(tmp_path, Groups())
    with (
        pytest.warns(UserWarning, match="Adam's second moments are not known"),
        pytest.raises(ValueError, match="have different learning rates, and which layers they hold is not known"),
    ):
        Trace.from_checkpoints(tmp_path / "past", files, Constant(), loader())
    assert not (tmp_path / "past").exists()


def test_rates_given_by_hand_go_with_their_files(run, tmp_path):
    _, files, _ = run
    given = [files[1], files[0]]
    with pytest.warns(UserWarning, match=r"not that of their steps: 0\.5 for .* \(step 10\), 2 for .* \(step 5\)"):
        past = Trace.from_checkpoints(
            tmp_path / "past", given, Toy(), loader(), learning_rates=[0.5, 2], methods=["head", "tracin-we"]
        )
    assert [each.learning_rate for each in past.checkpoints] == [2, 0.5]
    assert [site.name for site in past.sites] == ["tracin-we", "head"]
    assert past.checkpoints[0].second_moments(past.sites[0]).values.any()
    best = Trace.from_checkpoints(tmp_path / "best", files[1], Toy(), loader(), learning_rates=[1.0])
    assert [each.learning_rate for each in best.checkpoints] == [1.0]


def test_an_optimizer_that_finds_its_rates_by_itself_takes_those_given(tmp_path):
    files = ModelCheckpoint(tmp_path / "files", save_top_k=-1)
    quiet(enable_checkpointing=True, callbacks=[files], max_epochs=2).fit(ByItself(), loader())
    saved = sorted((tmp_path / "files").glob("*.ckpt"))
    with pytest.raises(ValueError, match=r"step=5\.ckpt found its learning rates by itself.*Pass learning_rates="):
        Trace.from_checkpoints(tmp_path / "past", saved, ByItself(), loader())
    past = Trace.from_checkpoints(tmp_path / "past", saved, ByItself(), loader(), learning_rates=[0.5, 2])
    assert [each.learning_rate for each in past.checkpoints] == [0.5, 2]
    for each, path in zip(past.checkpoints, saved, strict=True):
        assert same_weights(each.weights(), torch.load(path)["state_dict"])


@pytest.mark.filterwarnings("ignore:The learning rates between")
def test_a_warmup_by_hand_is_not_called_exact(tmp_path):
    _, saved = recorded_and_saved(tmp_path, WarmsUp())
    past = Trace.from_checkpoints(tmp_path / "past", saved, WarmsUp(), loader())
    assert [each.learning_rate for each in past.checkpoints] == [0.01, 0.01]
    assert Trace(tmp_path / "trace").checkpoints[0].learning_rate == pytest.approx(0.007)
    (note,) = past.header.notes
    assert "approximate: optimizer_step of the module may change them" in note


@pytest.mark.skipif(WeightAveraging is None, reason="of Lightning 2.6")
def test_weights_are_those_that_were_trained_where_their_average_was_saved(tmp_path):
    averaging = WeightAveraging(avg_fn=lambda average, new, _: 0.5 * average + 0.5 * new)
    pl.seed_everything(0, verbose=False)
    files = ModelCheckpoint(tmp_path / "files", save_top_k=-1)
    callback = TracInCallback(tmp_path / "trace", cache="on_demand")
    quiet(enable_checkpointing=True, callbacks=[averaging, callback, files], max_epochs=2).fit(Constant(), loader())
    saved = sorted((tmp_path / "files").glob("*.ckpt"))
    assert not same_weights(torch.load(saved[0])["state_dict"], torch.load(saved[0])["current_model_state"])
    past = Trace.from_checkpoints(tmp_path / "past", saved, Constant(), loader())
    require_same_checkpoints(Trace(tmp_path / "trace"), past)


def test_of_two_parts_that_are_named_alike_none_is_chosen(tmp_path):
    teacher, student = Toy(), Toy()
    both = {
        f"{part}.{name}": value
        for part, own in (("teacher", teacher), ("student", student))
        for name, value in own.state_dict().items()
    }
    with pytest.raises(ValueError, match=r"several parts.*'student' and 'teacher'.*Pass the module that was trained"):
        Trace.from_checkpoints(tmp_path / "past", both, Toy(), loader(), learning_rates=[1])
    one = {name: value for name, value in both.items() if name.startswith("teacher")}
    past = Trace.from_checkpoints(tmp_path / "past", one, Toy(), loader(), learning_rates=[1])
    assert same_weights(past.checkpoints[0].weights(), teacher.state_dict())


def test_names_that_are_sorted_as_text_are_told(run, tmp_path):
    """Epoch 10 comes before epoch 9; in the order of the steps nothing is to be said."""
    _, files, _ = run
    named = [tmp_path / f"epoch={epoch}-step={step}.ckpt" for epoch, step in ((9, 5), (10, 10))]
    for path, file in zip(named, files, strict=True):
        path.write_bytes(file.read_bytes())
    rates = {"learning_rates": [0.5, 0.001]}
    past = Trace.from_checkpoints(tmp_path / "past", named, Toy(), loader(), **rates)
    assert [(each.step, each.learning_rate) for each in past.checkpoints] == [(5, 0.5), (10, 0.001)]
    as_text = sorted(tmp_path.glob("*.ckpt"))
    assert as_text == named[::-1]
    with pytest.warns(UserWarning, match=r"0\.5 for .*epoch=10-step=10\.ckpt \(step 10\), 0\.001 for .*10 before 9"):
        Trace.from_checkpoints(tmp_path / "as_text", as_text, Toy(), loader(), **rates)


def test_one_checkpoint_has_one_rate(run, tmp_path):
    _, files, _ = run
    last = tmp_path / "last.ckpt"
    last.write_bytes(files[1].read_bytes())
    given = [*files, last]
    past = Trace.from_checkpoints(tmp_path / "past", given, Toy(), loader(), learning_rates=[1, 2, 2])
    assert [each.learning_rate for each in past.checkpoints] == [1, 2]
    with pytest.raises(ValueError, match=r"last\.ckpt are the same checkpoint, of step 10, but .* gives them 2 and 3"):
        Trace.from_checkpoints(tmp_path / "two", given, Toy(), loader(), learning_rates=[1, 2, 3])


def test_a_datamodule_in_the_place_of_the_loader(run, tmp_path):
    _, files, _ = run
    past = Trace.from_checkpoints(tmp_path / "past", files, Toy(), Data())
    scores = quiet().influence(Data(), Toy(), trace=past).scores
    expected = quiet().influence(loader(test_texts()), Toy(), trace=run[2], train_dataloaders=loader()).scores
    assert torch.equal(scores, expected)


def test_last_ckpt_counts_once(run, tmp_path):
    _, files, _ = run
    last = tmp_path / "last.ckpt"
    last.write_bytes(files[1].read_bytes())
    past = Trace.from_checkpoints(tmp_path / "past", [*files, last], Toy(), loader())
    assert [each.step for each in past.checkpoints] == [5, 10]


def test_what_the_sampler_can_draw_was_trained_on(run, tmp_path):
    _, files, _ = run
    held = [0, 2, 4, 6, 8]
    weights = [float(index in held) for index in range(N_TRAIN)]
    samplers = [SubsetRandomSampler(held), WeightedRandomSampler(weights, 10)]
    for number, sampler in enumerate(samplers):
        past = Trace.from_checkpoints(tmp_path / str(number), files, Toy(), loader(sampler=sampler))
        assert sorted(set(range(N_TRAIN)) - set(past.undrawn.tolist())) == held

    class Own(torch.utils.data.SequentialSampler):
        pass

    with pytest.warns(UserWarning, match="Which examples Own has drawn is not known: all 20 count as trained on"):
        past = Trace.from_checkpoints(tmp_path / "own", files, Toy(), loader(sampler=Own(range(N_TRAIN))))
    assert not len(past.undrawn)


def test_the_model_is_left_as_it_was(run, tmp_path):
    _, files, _ = run
    module = Toy().train()
    module.embedding.eval()
    before, state = {name: each.clone() for name, each in module.state_dict().items()}, torch.get_rng_state()
    Trace.from_checkpoints(tmp_path / "past", files, module, loader())
    assert same_weights(before, module.state_dict())
    assert module.training
    assert not module.embedding.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_other_package(tmp_path):
    files = TwinModelCheckpoint(tmp_path / "files", save_top_k=-1)
    trainer = quiet(twin.Trainer, enable_checkpointing=True, callbacks=[files])
    trainer.fit(TwinToy(), loader())
    past = Trace.from_checkpoints(tmp_path / "past", sorted((tmp_path / "files").glob("*")), TwinToy(), loader())
    result = lightning_tracin.influence(
        quiet(twin.Trainer), loader(test_texts()), TwinToy(), trace=past, train_dataloaders=loader()
    )
    assert result.checkpoint_steps == [5, 10]


def test_one_class_for_all_traces(run):
    trainer, _, past = run
    assert isinstance(past, Trace)
    assert isinstance(Trace(past.path), Trace)
    assert isinstance(trainer.influence(loader(test_texts())).trace, Trace)
    assert not isinstance(Path(past.path), Trace)
    assert repr(past).startswith("Trace(")
