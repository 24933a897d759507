"""``keep_weights=False``: gradients without weights answer what they can, and refuse the rest at once."""

from __future__ import annotations

import json

import pytest
import torch
from toy import Toy, fitted, loader, quiet, same_weights, test_texts

from lightning_tracin import Trace, TracInCallback, TracInLayer, TracInWE
from lightning_tracin.cli.command import main
from lightning_tracin.storage.files import read_json, write_json
from lightning_tracin.storage.verification import verify


class HalfFrozen(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.hidden.requires_grad_(False)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A trace of the same fit as that of ``toy``, without weights."""
    path = tmp_path_factory.mktemp("without") / "trace"
    fitted(path, keep_weights=False)
    return path


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_gradients_are_all_that_is_stored(tmp_path, cache):
    fitted(tmp_path / "trace", HalfFrozen(), keep_weights=False, cache=cache)
    stored = {path.name for path in (tmp_path / "trace").rglob("*.safetensors")}
    assert not {name for name in stored if name.startswith(("weights", "frozen"))}
    assert not [problem for _, problem in verify(Trace(tmp_path / "trace")) if problem is not None]
    assert Trace(tmp_path / "trace").has_texts


@pytest.mark.parametrize("method", ["tracin-we", "tracin-last", TracInWE(normalize="train", precondition="adam")])
def test_self_influence_is_that_of_a_fit_with_weights(toy, without, method):
    expected = toy.self_influence(method=method)
    assert torch.equal(quiet().self_influence(trace=without, method=method), expected)


def test_influence_is_refused_before_anything_is_read(without):
    with pytest.raises(
        ValueError, match=r"2 of 2 checkpoints in .* \(the first is that of step 5\).*keep_weights=True"
    ):
        quiet().influence(loader(test_texts()), Toy(), trace=without)
    with pytest.raises(ValueError, match="have no weights"):
        Trace(without).checkpoints[0].weights()


def test_gradients_that_were_not_recorded_cannot_be_filled_in(tmp_path):
    trainer = fitted(tmp_path / "trace", keep_weights=False)
    for folder in (tmp_path / "trace").glob("checkpoints/*/words"):
        for path in folder.iterdir():
            path.unlink()
    with pytest.raises(ValueError, match="have no weights"):
        trainer.self_influence()
    assert trainer.self_influence(method="tracin-last").sum() > 0
    with pytest.raises(ValueError, match="hidden"):
        trainer.self_influence(method=TracInLayer("hidden"))


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({"cache": "on_demand"}, 'cache="checkpoint"'), ({"log_examples": 2}, "log_examples=0")],
)
def test_what_needs_weights_later_is_refused_before_training(tmp_path, options, remedy):
    with pytest.raises(ValueError, match=remedy):
        TracInCallback(tmp_path, keep_weights=False, **options)


def test_another_model_is_told_without_weights(without):
    other = Toy()
    other.hidden = torch.nn.Linear(8, 9)
    with pytest.raises(ValueError, match=r"of another model.*no weights that could tell which"):
        quiet().self_influence(other, trace=without)


def test_a_resumed_fit_may_keep_weights_again(tmp_path):
    fit = fitted(tmp_path / "trace", HalfFrozen(), keep_weights=False, dtype="float16")
    fit.save_checkpoint(tmp_path / "fit.ckpt")
    resumed = quiet(callbacks=[TracInCallback(tmp_path / "trace", on_error="raise")], max_epochs=3)
    module = HalfFrozen()
    resumed.fit(module, loader(), ckpt_path=tmp_path / "fit.ckpt")
    checkpoints = Trace(tmp_path / "trace").checkpoints
    assert [each.keeps_weights for each in checkpoints] == [False, False, True]
    assert same_weights(checkpoints[-1].weights(), module.state_dict())
    assert resumed.self_influence().sum() > 0
    with pytest.raises(ValueError, match=r"2 of 3 checkpoints"):
        resumed.influence(loader(test_texts()))


def test_weights_that_are_gone_but_were_kept_are_damage(tmp_path):
    fitted(tmp_path / "trace")
    checkpoint = Trace(tmp_path / "trace").checkpoints[0]
    (checkpoint.path / "weights.safetensors").unlink()
    problems = [problem for _, problem in verify(Trace(tmp_path / "trace")) if problem is not None]
    assert problems == [f"{checkpoint.path / 'weights.safetensors'} is missing."]


@pytest.mark.parametrize("changed", [{"keeps_weights": True}, {"checksums": {"weights.safetensors": "0" * 32}}])
def test_a_checkpoint_that_contradicts_itself_is_damaged(tmp_path, changed):
    fitted(tmp_path / "trace", keep_weights=False)
    file = Trace(tmp_path / "trace").checkpoints[0].path / "checkpoint.json"
    content = read_json(file)
    write_json(file, {**content, **changed})
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
        Trace(tmp_path / "trace").checkpoints  # noqa: B018


def test_info_says_that_weights_are_not_kept(without, capsys):
    assert main(["info", str(without)]) == 0
    assert capsys.readouterr().out.count("not kept") == 2
    assert main(["info", str(without), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["keeps_weights"] for each in told["checkpoints"]] == [False, False]
