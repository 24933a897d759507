"""The classes against the functions: in batches, over two processes, pickled, on axes."""

from __future__ import annotations

import json
import pickle

import matplotlib.pyplot as plt
import pytest
import torch
from metric_cases import N_TEST, N_TRAIN, cases, numbers
from torchmetrics import Metric, MetricCollection

from lightning_tracin import metrics

CASES = cases()

pytestmark = pytest.mark.parametrize("name", CASES)


def flat(value) -> list[float]:
    """All numbers of a result in a row."""
    if value is None or not isinstance(value, list):
        return [] if value is None else [value]
    return [number for each in value for number in flat(each)]


def approx(value):
    return pytest.approx(flat(numbers(value)), rel=1e-5, abs=1e-6)


def filled(case):
    metric = case.metric()
    for first in range(0, case.size, 3):
        metric.update(*case.batch(first, min(first + 3, case.size)))
    return metric


def flat_states(metric) -> list[torch.Tensor]:
    return [each for state in metric.metric_state.values() for each in (state if isinstance(state, list) else [state])]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, forks):
    """What two processes, with a part of the examples each, or with all and none, say of the whole."""
    folder = tmp_path_factory.mktemp("two")
    done = forks.run_two(folder, script="metric_cases.py")
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_class_of_each_name(name):
    metric = CASES[name].metric()
    assert isinstance(metric, Metric)
    assert type(metric).__name__ == name.split()[0]
    assert getattr(metrics, type(metric).__name__) is type(metric)


def test_batches_are_the_whole(name):
    case = CASES[name]
    assert flat(numbers(filled(case).compute())) == approx(case.function(*case.inputs))


def test_forward_returns_the_batch_and_keeps_it(name):
    case = CASES[name]
    metric = case.metric()
    half = 6 * case.size // 10
    value = metric(*case.batch(0, half))
    assert flat(numbers(value)) == approx(case.function(*case.batch(0, half)))
    metric.update(*case.batch(half, case.size))
    assert flat(numbers(metric.compute())) == approx(case.function(*case.inputs))


def test_reset_forgets(name):
    case = CASES[name]
    metric = filled(case)
    metric.reset()
    metric.update(*case.inputs)
    assert flat(numbers(metric.compute())) == approx(case.function(*case.inputs))


def test_pickled_and_cloned(name):
    metric = filled(CASES[name])
    expected = approx(metric.compute())
    assert flat(numbers(pickle.loads(pickle.dumps(metric)).compute())) == expected
    assert flat(numbers(metric.clone().compute())) == expected


def test_states_hold_no_scores(name):
    """Of (n_test, n_train) nothing is kept: less than half of its size, in whatever form."""
    metric = filled(CASES[name])
    assert (
        sum(each.numel() for each in flat_states(metric)) <= N_TEST * N_TRAIN * 1.25
        if "Linear" in name
        else N_TEST * N_TRAIN / 2
    )


def test_half_precision_leaves_labels_and_indices(name):
    metric = filled(CASES[name])
    before = {key: each.clone() for key, each in metric.named_buffers() if not each.is_floating_point()}
    states = [each.dtype for each in flat_states(metric) if not each.is_floating_point()]
    metric.set_dtype(torch.float16)
    after = dict(metric.named_buffers())
    assert all(after[key].dtype == each.dtype and torch.equal(after[key], each) for key, each in before.items())
    assert [each.dtype for each in flat_states(metric) if not each.is_floating_point()] == states
    assert all(each.dtype == torch.float16 for each in flat_states(metric) if each.is_floating_point())


def test_two_processes_say_what_one_says(name, of_two):
    case = CASES[name]
    for first, second in zip(*(each[name] for each in of_two), strict=True):
        assert flat(first) == flat(second)
        assert flat(first) == approx(case.function(*case.inputs))


def test_in_a_collection(name):
    case = CASES[name]
    collection = MetricCollection({"it": case.metric()})
    collection.update(*case.inputs)
    assert flat(numbers(collection.compute()["it"])) == approx(case.function(*case.inputs))


def test_plots(name):
    metric = filled(CASES[name])
    figure, axes = metric.plot()
    assert axes.lines
    assert figure is not None
    figure.canvas.draw()
    fresh, (one, other) = plt.subplots(2)
    assert metric.plot(ax=one)[1] is one
    metric.plot(metric.compute(), ax=other)
    assert len(one.lines) == len(other.lines)
    plt.close(figure)
    plt.close(fresh)


def test_arguments_are_on_the_devices_of_the_metric(name):
    """What is given at the start moves along with the states; "meta" stands for another device."""
    metric = CASES[name].metric().to("meta")
    held = [*metric.buffers(), *(each for each in metric.metric_state.values() if isinstance(each, torch.Tensor))]
    assert {each.device.type for each in held} <= {"meta"}
