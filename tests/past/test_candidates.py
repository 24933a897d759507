"""Candidates: examples that were not trained on, scored at a trace's checkpoints, for choosing what to add."""

from __future__ import annotations

import shutil

import msgspec
import pytest
import torch
from brute_force import BruteForce, dense_gradients
from rich.console import Console
from toy import Toy, fitted, loader, mean_rate, quiet, site_of, test_texts, texts

from lightning_tracin import InfluenceResult, Trace, TracInLast, TracInWE
from lightning_tracin.cli.command import main
from lightning_tracin.results.result_file import ResultHeader, read_result
from lightning_tracin.storage import files

N_CANDIDATES = 9


def candidates():
    return texts(N_CANDIDATES, seed=7)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    trainer = fitted(folder / "trace", cache="on_demand")
    source = trainer.callbacks[0].trace
    return source, Trace.from_checkpoints(folder / "candidates", source, Toy(), loader(candidates()))


def asked(trace, **options):
    return quiet().influence(
        loader(test_texts()), Toy(), trace=trace, train_dataloaders=loader(candidates()), **options
    )


@pytest.mark.parametrize(
    ("method", "layer"),
    [(TracInWE(normalize="cosine", precondition="adam"), "embedding"), (TracInLast(), "head")],
    ids=str,
)
def test_scores_are_those_of_brute_force(made, method, layer):
    source, trace = made
    module, sides, moments = Toy(), ([], []), []
    for checkpoint in source.checkpoints:
        module.load_state_dict(checkpoint.weights())
        for side, data in zip(sides, (test_texts(), candidates()), strict=True):
            batches, of_layer = loader(data, 1), module.get_submodule(layer)
            side.append(dense_gradients(module, of_layer, batches, lambda b: module.influence_loss(b)[0]))
        own = checkpoint.second_moments(site_of(checkpoint, "tracin-we"))
        values = torch.zeros_like(module.embedding.weight)
        values[own.rows] = own.values
        moments.append((values, own.eps))
    expected = BruteForce([mean_rate(0, 5), mean_rate(5, 10)], *sides).scores(
        normalize=method.normalize, second_moments=moments if method.precondition else None
    )
    result = asked(trace, method=method)
    torch.testing.assert_close(result.scores.double(), expected, rtol=2e-3, atol=1e-4)


def test_results_say_that_they_were_not_trained_on(made, tmp_path, capsys):
    result = asked(made[1], k=2)
    assert result.candidates
    assert sum("candidates, not trained on" in note for note in result.notes) == 1
    loaded = InfluenceResult.load(result.save(tmp_path / "result.safetensors"))
    Console(width=200).print(loaded)
    assert f"6 test and {N_CANDIDATES} candidates, not trained on, 2 checkpoints" in capsys.readouterr().out
    page = result.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{N_CANDIDATES} candidates, not trained on" in page


def test_the_command_line_says_so_too(made, capsys):
    assert main(["info", str(made[1].path)]) == 0
    assert f"{N_CANDIDATES}; candidates, not trained on" in capsys.readouterr().out


def test_a_header_and_a_result_of_before_say_nothing_of_it(made, tmp_path):
    """Fields that are newer than the format have defaults."""
    shutil.copytree(made[0].path, tmp_path / "trace")
    content = files.read_json(tmp_path / "trace" / "trace.json")
    older = {name: value for name, value in content.items() if name not in ("candidates", "notes")}
    files.write_json(tmp_path / "trace" / "trace.json", older)
    header = Trace(tmp_path / "trace").header
    assert (header.candidates, header.notes) == (False, ())
    path = asked(made[1], k=1).save(tmp_path / "result.safetensors")
    content = msgspec.to_builtins(read_result(path)[0])
    older = {name: value for name, value in content.items() if name not in ("candidates", "checkpoint_steps")}
    header = msgspec.convert(older, ResultHeader)
    assert (header.candidates, header.checkpoint_steps) == (False, [])


def test_candidates_of_candidates_are_some(made, tmp_path):
    again = Trace.from_checkpoints(tmp_path / "again", made[1], Toy(), loader(candidates()))
    assert again.header.candidates
    assert again.header.n_train == N_CANDIDATES


def test_those_that_train_are_no_candidates(made, tmp_path):
    assert not Trace.from_checkpoints(tmp_path / "same", made[0], Toy(), loader()).header.candidates
