from __future__ import annotations

import csv
import sys
from pathlib import Path

import lightning.pytorch as twin
import pytest
import torch
from lightning.pytorch.cli import LightningCLI as TwinCLI
from toy import N_TEST, N_TRAIN, Data, Toy, loader, quiet, test_texts
from twin_toy import TwinToy

from lightning_tracin import (
    InfluenceResult,
    InfluenceTrainerMixin,
    Trace,
    TracInCallback,
    TracInLast,
    TracInLayer,
    TracInRidge,
    TracInSum,
    TracInWE,
    cli,
)
from lightning_tracin.cli import InfluenceCLIMixin, TracInCLI

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_tracin.TracInCallback
      init_args:
        dtype: float32
data:
  batch_size: 5
"""

MAIN = """
from lightning_tracin.cli import TracInCLI
from toy import Data, Toy

TracInCLI(Toy, Data)
"""

SAVED = "lightning_logs/version_0/config.yaml"


class TwinData(twin.LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)

    def test_dataloader(self):
        return loader(test_texts())


class TwinTrainer(InfluenceTrainerMixin, twin.Trainer):
    pass


class TwinTracInCLI(InfluenceCLIMixin, TwinCLI):
    pass


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, forks):
    """A folder in which ``main.py fit`` has run, in a process of its own."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "main.py").write_text(MAIN)
    run_main(forks, folder, "fit", "-c", "config.yaml")
    return folder


@pytest.fixture
def project(recorded, monkeypatch):
    monkeypatch.chdir(recorded)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    return recorded


def run_main(forks, folder, *arguments: str) -> str:
    done = forks.run("main.py", *arguments, cwd=folder, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    return done.stdout


def influence(*arguments: str) -> TracInCLI:
    return TracInCLI(Toy, Data, args=["influence", "-c", SAVED, *arguments])


def expected(trace, **options) -> InfluenceResult:
    """What the trainer's own method gives."""
    return quiet().influence(model=Toy(), datamodule=Data(), trace=trace, **options)


def test_fit_then_influence_from_the_configuration_that_fit_saved(forks, recorded):
    trace = recorded / "lightning_logs/version_0/trace"
    assert [each.step for each in Trace(trace).checkpoints] == [4, 8]
    run_main(
        forks, recorded, "influence", "-c", "config.yaml", "--trace", str(trace), "--output", "written/r.safetensors"
    )
    written = InfluenceResult.load(recorded / "written/r.safetensors")
    assert written.scores.shape == (N_TEST, N_TRAIN)
    assert torch.equal(written.scores, expected(trace).scores)
    assert written.words(0, 0) == expected(trace).words(0, 0)
    assert [each.step for each in Trace(trace).checkpoints] == [4, 8]  # the callback has done nothing


def test_label_issues_are_written_or_printed(project, capsys):
    TracInCLI(Toy, Data, args=["label_issues", "-c", SAVED, "--n", "5", "--output", "written/review.csv"])
    with Path("written/review.csv").open(newline="", encoding="utf-8") as file:
        found = [int(row["train_index"]) for row in csv.DictReader(file)]
    trace = "lightning_logs/version_0/trace"
    assert found == [each.example.index for each in quiet().label_issues(Toy(), trace=trace, n=5).issues]
    TracInCLI(Toy, Data, args=["label_issues", "-c", SAVED, "--method", "tracin-we"])
    assert str(quiet().label_issues(Toy(), trace=trace, method="tracin-we")) in capsys.readouterr().out


def test_the_result_is_printed_where_no_file_is_asked_for(project, capsys):
    influence()
    printed = capsys.readouterr().out
    assert str(expected("lightning_logs/version_0/trace")) in printed


def test_a_method_with_options_and_k_come_from_the_configuration(project):
    Path("ask.yaml").write_text(
        "k: 3\n"
        "method:\n"
        "  class_path: lightning_tracin.TracInWE\n"
        "  init_args: {normalize: cosine, exclude_tokens: [5, 7]}\n"
        "output: asked.safetensors\n"
    )
    influence("-c", "ask.yaml")
    result = InfluenceResult.load("asked.safetensors")
    method = TracInWE(normalize="cosine", exclude_tokens=(5, 7))
    assert result.method == method
    assert torch.equal(result.proponents(3).values, expected(result.trace, method=method, k=3).proponents(3).values)


def test_a_sum_over_layers_comes_from_the_configuration(project):
    """The last layer goes by its own name, too."""
    Path("ask.yaml").write_text(
        "method:\n"
        "  class_path: lightning_tracin.TracInSum\n"
        "  init_args:\n"
        "    parts:\n"
        "      - tracin-we\n"
        "      - class_path: lightning_tracin.TracInLayer\n"
        "        init_args: {name: head, normalize: cosine, weights: residual}\n"
        "    mix: [1, 0.5]\n"
        "    scales: [1, 2]\n"
        "output: summed.safetensors\n"
    )
    influence("-c", "ask.yaml")
    result = InfluenceResult.load("summed.safetensors")
    parts = TracInWE(), TracInLayer("head", normalize="cosine", weights="residual")
    method = TracInSum(parts, mix=(1, 0.5), scales=(1, 2))
    assert result.method == method
    assert torch.equal(result.scores, expected(result.trace, method=method).scores)
    assert result.words(0, 0) == expected(result.trace).words(0, 0)
    cosines = expected(result.trace, method=TracInLast(normalize="cosine", weights="residual")).scores
    torch.testing.assert_close(result.scores, expected(result.trace).scores + 0.25 * cosines)


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ("tracin-last", TracInLast()),
        ('{"class_path": "lightning_tracin.TracInLast"}', TracInLast()),
        ('{"class_path": "TracInLast", "init_args": {"normalize": "cosine"}}', TracInLast("cosine")),
        (
            '{"class_path": "lightning_tracin.TracInWE", "init_args": {"exclude_tokens": ["common", 3]}}',
            TracInWE(exclude_tokens=("common", 3)),
        ),
        ('{"class_path": "lightning_tracin.TracInLast", "init_args": {"normalize": "train"}}', TracInLast("train")),
        (
            '{"class_path": "lightning_tracin.TracInRidge", "init_args": {"alpha": 1, "method": '
            '{"class_path": "lightning_tracin.TracInWE", "init_args": {"normalize": "cosine"}}}}',
            TracInRidge(TracInWE(normalize="cosine"), alpha=1),
        ),
    ],
)
def test_methods_on_the_command_line(project, tmp_path, given, method):
    influence("--method", given, "--output", f"{tmp_path}/r.safetensors")
    assert InfluenceResult.load(tmp_path / "r.safetensors").method == method


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tracin-best", "method must be one of tracin-we, tracin-last"),
        ('{"class_path": "lightning_tracin.TracInWE", "init_args": {"normalize": "no"}}', "normalize must be"),
        ('{"class_path": "lightning_tracin.TracInWE", "init_args": {"weights": "loss"}}', "weights must be"),
        ('{"class_path": "lightning_tracin.TracInWE", "init_args": {"norm": "no"}}', "norm"),
        ('{"class_path": "lightning_tracin.TracIn"}', "TracIn"),
        ('{"class_path": "torch.nn.Identity"}', "method must be one of"),
        ('{"normalize": "cosine"}', "needs class_path"),
        ('{"class_path": "lightning_tracin.TracInLayer"}', "name"),
        ('{"class_path": "lightning_tracin.TracInSum", "init_args": {"parts": ["tracin-we"]}}', "parts must be two"),
        ('{"class_path": "lightning_tracin.TracInRidge", "init_args": {"method": "tracin-we"}}', "normalize="),
        ('{"class_path": "lightning_tracin.TracInSum", "init_args": {"parts": [{"mix": 1}, 2]}}', "needs class_path"),
    ],
)
def test_a_wrong_method_is_a_wrong_command_line(project, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        influence("--method", given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "target"), [("prediction", "prediction"), ("1", 1), ("[2, 0]", (2, 0)), ("['1', 0]", ("1", 0))]
)
def test_a_target_on_the_command_line(project, tmp_path, given, target):
    influence("--target", given, "--output", f"{tmp_path}/r.safetensors")
    result = InfluenceResult.load(tmp_path / "r.safetensors")
    own = expected("lightning_logs/version_0/trace", target=target)
    assert torch.equal(result.scores, own.scores)
    assert (result.target, result.target_names) == (own.target, own.target_names)


def test_a_wrong_target_is_a_wrong_command_line(project, capsys):
    with pytest.raises(SystemExit):
        influence("--target", "[1, 1]")
    assert 'Parser key "target": target=' in capsys.readouterr().err


def test_a_page_is_written_with_html(project, tmp_path, capsys):
    influence("--html", f"{tmp_path}/page.html", "--method", "tracin-last")
    assert "proponents" not in capsys.readouterr().out
    expected("lightning_logs/version_0/trace", method="tracin-last").to_html(tmp_path / "expected.html")
    assert (tmp_path / "page.html").read_text() == (tmp_path / "expected.html").read_text()


def test_self_influence_writes_every_example_the_highest_first(project, tmp_path):
    TracInCLI(Toy, Data, args=["self_influence", "-c", SAVED, "--output", f"{tmp_path}/self.csv"])
    rows = list(csv.DictReader((tmp_path / "self.csv").open()))
    scores = quiet().self_influence(Toy(), trace="lightning_logs/version_0/trace")
    assert [int(row["train_index"]) for row in rows] == scores.argsort(descending=True).tolist()
    for row in rows:
        assert float(row["self_influence"]) == float(scores[int(row["train_index"])])


def test_self_influence_prints_the_highest(project, capsys):
    TracInCLI(Toy, Data, args=["self_influence", "-c", SAVED, "--method", "tracin-last"])
    scores = quiet().self_influence(Toy(), trace="lightning_logs/version_0/trace", method="tracin-last")
    printed = capsys.readouterr().out
    assert f" {int(scores.argmax())} " in printed.splitlines()[3]
    assert f"{float(scores.max()):.3g}" in printed.splitlines()[3]


def test_the_trace_is_where_the_callback_of_the_configuration_writes(project, tmp_path):
    """A relative dirpath, as people write it."""
    config = Path(SAVED).read_text().replace("dirpath: null", "dirpath: lightning_logs/version_0/trace")
    (tmp_path / "config.yaml").write_text(config)
    output = f"{tmp_path}/r.safetensors"
    TracInCLI(Toy, Data, args=["influence", "-c", f"{tmp_path}/config.yaml", "--output", output])
    assert InfluenceResult.load(output).trace.path == Path("lightning_logs/version_0/trace").absolute()


def test_the_checkpoint_that_a_fit_was_resumed_from_is_not_looked_at(project, tmp_path):
    """LightningCLI would take the model's arguments from it; Toy has none."""
    torch.save({"hyper_parameters": {"layers": 3}}, tmp_path / "last.ckpt")
    config = Path(SAVED).read_text().replace("ckpt_path: null", f"ckpt_path: {tmp_path}/last.ckpt")
    assert "last.ckpt" in config
    Path("resumed.yaml").write_text(config)
    TracInCLI(Toy, Data, args=["influence", "-c", "resumed.yaml", "--trace", f"{Path(SAVED).parent}/trace", "--k", "1"])


def test_without_a_trace_the_error_says_what_to_pass(project):
    with pytest.raises(ValueError, match="There is no trace to compute influence from"):
        TracInCLI(Toy, Data, args=["influence", "-c", "config.yaml"])


def test_the_subcommands_are_those_of_lightning_and_three_more(project, capsys):
    assert list(TracInCLI.subcommands()) == [
        "fit",
        "validate",
        "test",
        "predict",
        "influence",
        "self_influence",
        "label_issues",
    ]
    with pytest.raises(SystemExit):
        TracInCLI(Toy, Data, args=["influence", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("--trace TRACE", "--method METHOD", "--output OUTPUT", "--html HTML", "--k K"):
        assert words in printed
    assert "Score every training example's influence on every test example" in printed
    with pytest.raises(SystemExit):
        TracInCLI(Toy, Data, args=["fit", "--help"])
    assert "--method" not in capsys.readouterr().out


def test_a_program_that_only_parses_has_the_trainer_with_influence(project):
    cli = TracInCLI(Toy, Data, run=False, args=["-c", "config.yaml"])
    assert any(isinstance(each, TracInCallback) for each in cli.trainer.callbacks)
    result = cli.trainer.influence(model=cli.model, datamodule=cli.datamodule, trace=Path(SAVED).with_name("trace"))
    assert torch.equal(result.scores, expected(result.trace).scores)


def test_the_mixin_serves_the_command_line_of_lightning_pytorch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    (tmp_path / "config.yaml").write_text(CONFIG.replace("data:\n  batch_size: 5", ""))
    TwinTracInCLI(TwinToy, TwinData, trainer_class=TwinTrainer, args=["fit", "-c", "config.yaml"])
    output = f"{tmp_path}/r.safetensors"
    arguments = ["influence", "-c", SAVED, "--output", output]
    TwinTracInCLI(TwinToy, TwinData, trainer_class=TwinTrainer, args=arguments)
    trainer = quiet(TwinTrainer)
    result = trainer.influence(model=TwinToy(), datamodule=TwinData(), trace="lightning_logs/version_0/trace")
    assert torch.equal(InfluenceResult.load(output).scores, result.scores)


def test_without_jsonargparse_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "lightning_tracin.cli.subcommands")
    monkeypatch.delattr(cli, "subcommands")
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-tracin\[cli\]"):
        cli.TracInCLI  # noqa: B018
