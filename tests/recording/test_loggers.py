"""What each logger of Lightning is handed, read back from its own files."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path

import lightning.pytorch as twin
import pytest
import pytorch_lightning as pl
from lightning.pytorch.loggers import CSVLogger as TwinCSVLogger
from logged_fits import SCALARS, assert_scores, brute_scores, examples_of, explanation_of, fit, logged, read, steps_of
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import EPOCHS, loader, quiet, test_texts
from twin_toy import TwinToy

from lightning_tracin.gradients.printable import STEERING
from lightning_tracin.recording import loggers
from lightning_tracin.report.explanation import Example, Explanation, Influential, Word


def test_tensorboard_shows_the_table_as_markdown(tmp_path):
    trainer = fit(tmp_path, logger=[TensorBoardLogger(tmp_path), CSVLogger(tmp_path / "csv")])
    rows = read(Path(trainer.loggers[1].log_dir) / "influential.jsonl")
    events = EventAccumulator(trainer.loggers[0].log_dir, size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tables = events.Tensors("tracin/influential/text_summary")
    assert [each.step for each in tables] == steps_of(rows)
    for table in tables:
        text = table.tensor_proto.string_val[0].decode()
        own = [row for row in rows if row["step"] == table.step]
        lines = [line for line in text.splitlines() if line.startswith(("| proponent", "| opponent"))]
        for row, line in zip(own, lines, strict=True):
            kind, score, _, train, label, words, content = [cell.strip() for cell in line.strip("|").split("|")]
            assert kind == f"{row['role']} {row['rank']}"
            assert float(score) == pytest.approx(row["score"], rel=0.01)
            assert (int(train), label, words, content) == (
                row["train_index"],
                row["train_label"],
                row["words"],
                row["train_text"],
            )
        for _, index in examples_of(own):
            assert f"**Validation example {index}**, label **" in text
    for name in SCALARS:
        assert [each.step for each in events.Scalars(name)] == steps_of(rows)
    assert [each.step for each in events.Scalars("val_loss")] == steps_of(rows)


def assert_page(html, rows):
    """The page is of the last validation in a table: it has its step, examples and scores."""
    last = [row for row in rows if row["step"] == steps_of(rows)[-1]]
    content = json.loads(re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)[1])
    assert f"<title>Validation at step {last[0]['step']}</title>" in html
    assert [test["index"] for test in content["tests"]] == [index for _, index in examples_of(last)]


def wandb_records(file):
    """What a W&B run has written: a file of the LevelDB log format, with a protobuf message in each record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(data):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_history(file):
    """The rows that a W&B run has logged; its own process may go on writing for a while."""
    stop = time.monotonic() + 60
    while not any(each.WhichOneof("record_type") == "exit" for each in wandb_records(file)):
        assert time.monotonic() < stop, f"{file} does not end"
        time.sleep(0.1)
    rows = [each.history.item for each in wandb_records(file) if each.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in rows]


def test_wandb_shows_a_table_at_the_step_of_the_validation(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    logger = WandbLogger(project="tracin", save_dir=tmp_path)
    trainer = fit(tmp_path, logger=[logger, CSVLogger(tmp_path / "csv")])
    rows = read(Path(trainer.loggers[1].log_dir) / "influential.jsonl")
    folder = Path(logger.experiment.dir)
    logger.experiment.finish()
    history = wandb_history(next(folder.parent.glob("*.wandb")))
    tables = [row for row in history if "tracin/influential/path" in row]
    assert [row["trainer/global_step"] for row in tables] == steps_of(rows)
    for entry in tables:
        table = json.loads((folder / entry["tracin/influential/path"]).read_text())
        found = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
        assert found == [row for row in rows if row["step"] == entry["trainer/global_step"]]
    for name in (*SCALARS, "val_loss"):
        assert [row["trainer/global_step"] for row in history if name in row] == steps_of(rows)
    (page,) = (row for row in history if "tracin/page/path" in row)
    assert page["trainer/global_step"] == steps_of(rows)[-1]
    assert_page((folder / page["tracin/page/path"]).read_text(), rows)
    assert [row["_step"] for row in history] == list(range(len(history)))  # none was refused


@pytest.mark.filterwarnings("ignore:.*'str' dtypes are included by select_dtypes:DeprecationWarning")
def test_mlflow_keeps_a_table_of_all_validations(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny brings no other store
    logger = MLFlowLogger("tracin", tracking_uri=f"file:{tmp_path}/runs")
    trainer = fit(tmp_path, logger=[logger, CSVLogger(tmp_path / "csv")])
    rows = read(Path(trainer.loggers[1].log_dir) / "influential.jsonl")
    table = json.loads(next((tmp_path / "runs").rglob("tracin/influential.json")).read_text())
    found = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    for line, row in zip(found, rows, strict=True):
        assert line.keys() == row.keys()
        for name, value in row.items():  # MLflow rounds, and turns labels that look like numbers into such
            assert (
                line[name] == pytest.approx(value, abs=1e-9)
                if isinstance(value, float)
                else str(line[name]) == str(value)
            )
    assert_page(next((tmp_path / "runs").rglob("tracin/page/influential.html")).read_text(), rows)
    for name in SCALARS:
        history = logger.experiment.get_metric_history(logger.run_id, name)
        assert [each.step for each in history] == steps_of(rows)


class CometLogger(Logger):
    """A stand-in: it has the name of Comet's logger, and its experiment is a fake that keeps what it is given."""

    name = "comet"
    version = "1"

    def __init__(self):
        super().__init__()
        self.experiment = self
        self.tables, self.metrics, self.assets = [], [], []

    def log_table(self, filename, tabular_data=None, headers=False):
        self.tables.append((filename, tabular_data, headers))

    def log_asset(self, file_data, file_name=None, step=None):
        self.assets.append((Path(file_data).read_text(), file_name, step))

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *_):
        pass


def test_comet_is_given_tables(tmp_path):
    comet = CometLogger()
    trainer = fit(tmp_path, logger=[comet, CSVLogger(tmp_path / "csv")])
    rows = read(Path(trainer.loggers[1].log_dir) / "influential.jsonl")
    assert [name for name, *_ in comet.tables] == [f"tracin-influential-step-{step:09d}.csv" for step in steps_of(rows)]
    found = [dict(zip(headers, line, strict=True)) for _, lines, headers in comet.tables for line in lines]
    assert found == rows
    ((page, name, step),) = comet.assets
    assert (name, step) == ("tracin/page/influential.html", steps_of(rows)[-1])
    assert_page(page, rows)
    assert [step for step, values in comet.metrics if set(SCALARS) <= values.keys()] == steps_of(rows)


class Unheard(Logger):
    """A logger of another package: nothing is known of it."""

    name = "unheard"
    version = 7

    def __init__(self, save_dir=None):
        super().__init__()
        self.folder = save_dir

    @property
    def save_dir(self):
        return self.folder

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *_):
        pass


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_logger_of_which_nothing_is_known_gets_lines_of_json(tmp_path, has_folder, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_tracin.recording.validation_log.rank_zero_info", said.append)
    root = {"trainer": {"default_root_dir": tmp_path / "root"}}
    trainer = fit(tmp_path, logger=Unheard(str(tmp_path / "own") if has_folder else None), **root)
    file = tmp_path / ("own" if has_folder else "root") / "unheard" / "version_7" / "influential.jsonl"
    assert_scores([row for row in read(file) if row["epoch"] == 1], brute_scores(trainer.callbacks[0].trace, EPOCHS))
    page = file.with_name("influential.html")
    assert said == [
        f"Unheard takes no tables: influential examples are in {file}.",
        f"A page of the last validation's influential examples is in {page}.",
    ]
    assert_page(page.read_text(), read(file))


class OfFiles(Unheard):
    """Takes files as LitLogger does, and nothing else."""

    def __init__(self, save_dir):
        super().__init__(save_dir)
        self.given = []

    def log_file(self, path: str):
        self.given.append((Path(path).name, Path(path).read_text()))


class OfTables(Unheard):
    """Takes tables as W&B does; its ``log_text`` is of another kind."""

    def __init__(self, save_dir):
        super().__init__(save_dir)
        self.given = []

    def log_table(self, key, columns=None, data=None, step=None):
        self.given += [(key, step, dict(zip(columns, line, strict=True))) for line in data]

    def log_text(self, key, step):
        raise AssertionError


class OfTexts(OfTables):
    """Takes texts; its ``log_table`` is of another kind."""

    def log_table(self, rows):
        raise AssertionError

    def log_text(self, key, text, *, step):
        self.given.append((key, step, text))


def test_loggers_of_others_by_what_they_take(tmp_path):
    files, tables, written = (kind(str(tmp_path / kind.__name__)) for kind in (OfFiles, OfTables, OfTexts))
    fit(tmp_path, logger=[CSVLogger(tmp_path / "csv"), files, tables, written])
    rows = read(next(tmp_path.rglob("version_0/influential.jsonl")))
    names, contents = zip(*files.given, strict=True)
    assert names == ("influential.jsonl",) * len(steps_of(rows)) + ("influential.html",)
    assert [json.loads(line) for line in contents[-2].splitlines()] == rows
    assert_page(contents[-1], rows)
    assert tables.given == [("tracin/influential", row["step"], row) for row in rows]
    assert [(key, step) for key, step, _ in written.given] == [("tracin/influential", each) for each in steps_of(rows)]
    assert written.given[-1][2] == loggers.markdown([row for row in rows if row["step"] == steps_of(rows)[-1]])


def test_loggers_and_trainers_of_lightning_pytorch(tmp_path):
    class TwinValidated(TwinToy):
        def validation_step(self, batch, batch_idx):
            pass

    trainer = fit(tmp_path, TwinValidated(), logger=TwinCSVLogger(tmp_path), kind=twin.Trainer)
    rows = [row for row in logged(trainer) if row["epoch"] == 1]
    result = quiet().influence(loader(test_texts()), _as_pytorch_lightning(trainer), trace=tmp_path / "trace")
    assert_scores(rows, result.scores)


def _as_pytorch_lightning(trainer):
    class Same(TwinToy.__mro__[1], pl.LightningModule):
        __init__ = pl.LightningModule.__init__
        influence_loss = TwinToy.influence_loss
        training_step = TwinToy.training_step

    module = Same()
    module.embedding, module.head = trainer.lightning_module.embedding, trainer.lightning_module.head
    return module


def test_markdown_is_not_broken_by_what_texts_hold():
    rows = loggers.rows_of([explanation_of("g|d", "b`d", [("x*y", 3.0)])], [(1, 2.5)], step=4, epoch=1)
    text = loggers.markdown(rows)
    assert r"of loader 1, label **g\|d**, prediction **b\`d** (90%), loss 2.5" in text
    assert r"so\_so &lt;b>" in text
    assert r"| proponent 1 | +3 | 30.0% | 3 | x\*y | a\|b +3 | a\|b |" in text


def test_no_sign_of_a_text_steers_what_shows_the_log():
    evil = "=1\x1b[2J\x9b\u202etxt\u2069\ud800"
    example = Example(3, (Word(evil, "", (0,)),), evil, evil)
    found = Explanation(0, example, (), (Influential(example, 1.0, None, (1.0,)),), ())
    rows = loggers.rows_of([found], [(0, 1.0)], step=0, epoch=0)
    assert rows[0]["train_label"] == rows[0]["test_text"] == "=1�[2J�txt�"
    assert not STEERING.search("".join(value for value in rows[0].values() if isinstance(value, str)))
    comet = CometLogger()
    loggers.log_table(comet, rows, step=0, root="")
    ((_, table, _),) = comet.tables
    assert {cell for cell in table[0] if isinstance(cell, str) and "txt" in cell and "+" not in cell} == {
        "'=1�[2J�txt�"
    }


def test_long_texts_are_cut():
    words = tuple(Word("word", " ", (place,)) for place in range(200))
    test = Example(0, words, "a")
    found = Explanation(0, test, (), (Influential(test, 1.0, None),), ())
    row = loggers.rows_of([found], [(0, 1.0)], step=0, epoch=0)[0]
    assert row["test_text"].endswith("word ...")
    assert len(row["test_text"]) <= 300
    assert row["words"] == ""


def test_mlflow_without_pandas_is_refused_before_training(tmp_path, monkeypatch):
    class MLFlowLogger(Unheard):
        pass

    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-tracin\[pandas\]"):
        fit(tmp_path, logger=MLFlowLogger(str(tmp_path)))
