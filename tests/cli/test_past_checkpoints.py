"""``influence --checkpoints``: which of a trace's count, or files of a run that is over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch_files
from pytorch_lightning.callbacks import ModelCheckpoint
from toy import Data, Toy, fitted, loader, quiet

from lightning_tracin import InfluenceResult, Trace, TracInLayer
from lightning_tracin.cli import TracInCLI

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the trace of a fit, and the files of another."""
    folder = tmp_path_factory.mktemp("project")
    fitted(folder / "trace", data=loader(shuffle=True))
    files = ModelCheckpoint(folder / "files", save_top_k=-1)
    quiet(enable_checkpointing=True, callbacks=[files]).fit(Toy(), loader(shuffle=True))
    return folder


def asked(project, monkeypatch, subcommand, *arguments):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    quietly = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    TracInCLI(Toy, Data, args=[subcommand, *quietly, *arguments])


@pytest.mark.parametrize(
    ("given", "steps"),
    [(["last"], [10]), (["all"], [5, 10]), (["5"], [5]), (["[5,10]"], [5, 10]), (["10", "5"], [5, 10])],
    ids=str,
)
def test_those_of_a_trace(project, monkeypatch, tmp_path, given, steps):
    output = tmp_path / "r.safetensors"
    asked(project, monkeypatch, "influence", "--trace", "trace", "--output", str(output), "--checkpoints", *given)
    assert InfluenceResult.load(output).checkpoint_steps == steps


def test_a_list_in_the_configuration(project, monkeypatch, tmp_path):
    (tmp_path / "ask.yaml").write_text("checkpoints: [last]\n")
    arguments = ["--trace", "trace", "-c", str(tmp_path / "ask.yaml"), "--output", str(tmp_path / "s.csv")]
    asked(project, monkeypatch, "self_influence", *arguments)
    scores = quiet().self_influence(trace=project / "trace", checkpoints="last")
    first = (tmp_path / "s.csv").read_text().splitlines()[1]
    assert int(first.split(",")[0]) == int(scores.argmax())


def test_label_issues_are_those_of_the_checkpoints_that_are_asked_for(project, monkeypatch, tmp_path):
    output = tmp_path / "review.csv"
    arguments = ["--trace", "trace", "--output", str(output), "--checkpoints", "last"]
    asked(project, monkeypatch, "label_issues", *arguments)
    issues = quiet().label_issues(Toy(), trace=project / "trace", checkpoints="last")
    assert output.read_bytes() == issues.to_csv(tmp_path / "expected.csv").read_bytes()
    assert issues.rows() != quiet().label_issues(Toy(), trace=project / "trace").rows()


@torch_files.are_read
def test_files_of_a_run_that_is_over(project, monkeypatch, tmp_path):
    files = sorted(str(path) for path in Path(project / "files").glob("*.ckpt"))
    output, method = (
        tmp_path / "r.safetensors",
        '{"class_path": "lightning_tracin.TracInLayer", "init_args": {"name": "hidden"}}',
    )
    arguments = ["--trace", str(tmp_path / "past"), "--output", str(output), "--method", method]
    asked(project, monkeypatch, "influence", *arguments, "--checkpoints", *files)
    result = InfluenceResult.load(output)
    assert result.checkpoint_steps == [5, 10]
    made = Trace.from_checkpoints(tmp_path / "made", files, Toy(), Data(), methods=["hidden"])
    expected = quiet().influence(Data(), Toy(), trace=made, method=TracInLayer("hidden"))
    assert torch.equal(result.scores, expected.scores)
    with pytest.raises(FileExistsError, match="holds a trace already, which may be asked as it is"):
        asked(project, monkeypatch, "influence", *arguments, "--checkpoints", *files)
    given = ["--trace", str(tmp_path / "given"), "--learning_rates", "[1.0]", "--checkpoints", files[0]]
    asked(project, monkeypatch, "influence", *given)
    assert [each.learning_rate for each in Trace(tmp_path / "given").checkpoints] == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoints", "a.ckpt"], "say in which folder by --trace"),
        (["--checkpoints", "last", "5", "--trace", "trace"], "or files, but got"),
        (["--checkpoints", "7", "--trace", "trace"], "no checkpoint of step 7"),
        (["--checkpoints", "last", "--learning_rates", "[1.0]", "--trace", "trace"], "goes with the files"),
    ],
    ids=str,
)
def test_a_wrong_choice_is_one_clear_error(project, monkeypatch, arguments, message):
    with pytest.raises(ValueError, match=message):
        asked(project, monkeypatch, "influence", *arguments)


@torch_files.are_read
def test_rates_in_the_order_of_a_shell_are_told(project, monkeypatch, tmp_path):
    """Which puts epoch=10 before epoch=9."""
    for epoch, file in zip((9, 10), sorted((project / "files").glob("*.ckpt")), strict=True):
        (tmp_path / f"epoch={epoch}.ckpt").write_bytes(file.read_bytes())
    files = sorted(map(str, tmp_path.glob("*.ckpt")))
    options = ["--learning_rates", "[0.5,0.001]", "--output", str(tmp_path / "r.safetensors"), "--checkpoints", *files]
    with pytest.warns(UserWarning, match=r"0\.5 for .*epoch=10\.ckpt \(step 10\), 0\.001 for .*epoch=9\.ckpt"):
        asked(project, monkeypatch, "influence", "--trace", str(tmp_path / "past"), *options)
