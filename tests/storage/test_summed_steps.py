"""Steps between two checkpoints that are so many that their file could not be read again are summed up."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
import torch
from toy import Toy, fitted, loader, quiet, test_texts

from lightning_tracin import Trace, TracInLayer
from lightning_tracin.storage import schemas, summed_steps
from lightning_tracin.storage.schemas import CheckpointFile
from lightning_tracin.storage.summed_steps import summed_up


def test_more_steps_than_a_file_holds_with_frozen_layers_and_rates_that_change(tmp_path):
    frozen = [f"linear-{number}" for number in range(70)]
    steps = [(step, 0, [1e-3 / (step + 1), 0.1], frozen) for step in range(60_000)]
    summed, repeats = summed_up(steps)
    fields = {"id": "a", "step": 60_000, "epoch": 0, "previous": None, "groups": [[["w"], ["b"]]], "checksums": {}}
    content = CheckpointFile(**fields, steps=summed, repeats=repeats, keeps_weights=False)
    schemas.write(tmp_path / "checkpoint.json", content)
    read = schemas.read(tmp_path / "checkpoint.json", CheckpointFile)
    assert (read.repeats, len(read.steps)) == ([60_000], 1)
    mean = sum(rates[0] for _, _, rates, _ in reversed(steps)) / len(steps)
    assert read.steps[0] == (0, 0, [pytest.approx(mean, rel=1e-12), pytest.approx(0.1, rel=1e-15)], frozen)


@pytest.mark.parametrize("seed", range(5))
def test_mean_rates_are_those_of_single_steps(toy, monkeypatch, seed):
    """Two optimizers in turn, whose groups share layers, and which leave some alone at random, as layer drop does."""
    random, made = Random(seed), Trace(toy.callbacks[0].trace.path).checkpoints[0]
    keys = [site.key for site in made.sites]
    steps = [
        (
            at,
            at % 2,
            [random.expovariate(1000) for _ in range(1 + at % 2)],
            [key for key in keys if random.random() < 0.3],
        )
        for at in range(1000)
    ]
    groups = [[["embedding.weight"]], [["head.weight"], ["embedding.weight", "head.bias"]]]
    single = replace(made, steps=steps, groups=groups, frozen_sites=frozenset())
    assert summed_up(steps) == (steps, [])
    monkeypatch.setattr(summed_steps, "_MOST_VALUES", 300)
    summed, repeats = summed_up(steps)
    assert len(summed) <= 2 * 2 ** len(keys)
    assert sum(repeats) == 1000
    for site, holds in zip(made.sites, ({(0, 0), (1, 1)}, {(1, 0)}), strict=True):
        counted = []
        for _, optimizer, rates, unmoved in steps:
            own = [Fraction(rate) for group, rate in enumerate(rates) if (optimizer, group) in holds]
            counted += ([Fraction(0)] if site.key in unmoved else own) if own else []
        mean = float(sum(counted) / len(counted))
        assert mean > 1e-4
        assert single.learning_rate_of(site) == pytest.approx(mean, rel=1e-15)
        assert replace(single, steps=summed, repeats=repeats).learning_rate_of(site) == pytest.approx(mean, rel=1e-15)
        assert replace(single, steps=summed, repeats=repeats).moves(site)


def copy_of(path):
    trace = Trace.from_checkpoints(path.with_name(f"copy of {path.name}"), Trace(path), Toy(), loader())
    return trace, quiet().influence(loader(test_texts()), Toy(), trace=trace, train_dataloaders=loader()).scores


def test_scores_are_those_of_single_steps(tmp_path, monkeypatch):
    """Also of a trace that was copied, where steps have the numbers that its sites have there."""
    of_single = fitted(tmp_path / "single", methods=("hidden", "tracin-we", "tracin-last"), cache="on_demand")
    (copied, scores), checkpoints = copy_of(tmp_path / "single"), Trace(tmp_path / "single").checkpoints
    written = json.loads((checkpoints[0].path / "checkpoint.json").read_text())
    assert not {"repeats", "keeps_weights"} & written.keys()  # so that earlier versions read it
    monkeypatch.setattr(summed_steps, "_MOST_VALUES", 10)
    of_summed = fitted(tmp_path / "summed", methods=("hidden", "tracin-we", "tracin-last"), cache="on_demand")
    copied_too, scores_too = copy_of(tmp_path / "summed")
    for of_one, of_other in (
        (checkpoints, Trace(tmp_path / "summed").checkpoints),
        (copied.checkpoints, copied_too.checkpoints),
    ):
        for one, other in zip(of_one, of_other, strict=True):
            assert (len(one.steps), one.repeats, len(other.steps), other.repeats) == (5, [], 1, [5])
            for site in one.sites:
                assert other.learning_rate_of(site) == pytest.approx(one.learning_rate_of(site), rel=1e-15)
    torch.testing.assert_close(scores_too, scores, rtol=1e-6, atol=0)
    for method in ("tracin-we", "tracin-last", TracInLayer("hidden")):
        expected = of_single.influence(loader(test_texts()), method=method).scores
        torch.testing.assert_close(
            of_summed.influence(loader(test_texts()), method=method).scores, expected, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("repeats", [[1], [5, 0], [5, 10**9], [5, 5, 5]])
def test_numbers_of_steps_are_verified(tmp_path, repeats):
    with pytest.raises(ValueError, match=r"repeats|for how many they stand"):
        schemas.write(
            tmp_path / "checkpoint.json",
            CheckpointFile(
                id="a",
                step=9,
                epoch=0,
                previous=None,
                steps=[(0, 0, [0.1], []), (5, 0, [0.1], [])],
                groups=[[["w"]]],
                checksums={},
                keeps_weights=False,
                repeats=repeats,
            ),
        )
