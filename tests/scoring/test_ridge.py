"""Dual ridge against its definition: dense gradients, dense kernels and a dense solution in double precision."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from brute_force import dense_gradients, relative_error
from torch.utils.data import DataLoader, SubsetRandomSampler
from toy import EPOCHS, N_TEST, N_TRAIN, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import InfluenceResult, Trace, TracInLast, TracInLayer, TracInRidge, TracInSum, TracInWE
from lightning_tracin.scoring import kernels as kernels_module
from lightning_tracin.scoring import ridge_solvers as solvers_module
from lightning_tracin.scoring.naming import described, method_from_json, method_to_json
from lightning_tracin.scoring.ridge_solvers import Landmarks, WholeKernel

WE = TracInWE(normalize="cosine")
HIDDEN = TracInLayer("hidden", normalize="cosine")
METHODS = [
    TracInRidge(WE),
    TracInRidge(TracInLast(normalize="cosine"), alpha=0.5, residual=0),
    TracInRidge(TracInSum((WE, HIDDEN), mix=(1, 3)), alpha=0.01, residual=1),
    TracInRidge(TracInSum((WE, HIDDEN), mix=(1, 3)), alpha=0.01, residual=1, landmarks=9),
]
LAYERS = {TracInWE: "embedding", TracInLast: "head", TracInLayer: "hidden"}


def singles(data):
    return [tuple(each[None] for each in data[index]) for index in range(len(data))]


def cosines(method, checkpoint):
    """Those of a method at one site: (test, train) and (train, train), and the learning rate there."""
    name = LAYERS[type(method)]
    sides = []
    for data in (test_texts(), texts()):
        module = Toy()
        module.load_state_dict(checkpoint.weights())
        layer = module.get_submodule(name)
        gradients = dense_gradients(
            module, layer, singles(data), lambda batch, module=module: module.influence_loss(batch)[0]
        )
        sides.append(gradients / gradients.flatten(1).norm(dim=1)[:, None, None])
    test, train = (side.flatten(1) for side in sides)
    return test @ train.T, train @ train.T, checkpoint.learning_rate_of(method.site_in(checkpoint.sites))


def residuals(checkpoint):
    module = Toy().eval()
    module.load_state_dict(checkpoint.weights())
    ids, labels = texts().tensors
    return 1 - module(ids).double().softmax(1).gather(1, labels[:, None])[:, 0].detach()


def solved(ridge, checkpoint, drawn):
    """Of one checkpoint: scores (n_test, n_train), and those of training examples on themselves."""
    parts = [(summand.method, summand.factor) for summand in ridge.summands]
    kernels = [(factor * rate, *both) for method, factor in parts for *both, rate in [cosines(method, checkpoint)]]
    weight = sum(each for each, _, _ in kernels)
    test, train = (sum(kernel[0] * kernel[side] for kernel in kernels) / weight for side in (1, 2))
    a = ridge.alpha * len(drawn)
    inner, own_products = (train[drawn][:, drawn] for _ in range(2))
    if ridge.landmarks is not None:  # Nyström: the kernel that is solved by has the rank of the landmarks
        places = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[: ridge.landmarks]
        inner = inner[:, places] @ torch.linalg.inv(inner[places][:, places]) @ inner[places]
        own_products = inner
    inverse = torch.linalg.inv(inner + a * torch.eye(len(drawn), dtype=torch.float64))
    factors = weight * residuals(checkpoint)[drawn] ** ridge.residual
    scores, own = torch.zeros(N_TEST, N_TRAIN, dtype=torch.float64), torch.zeros(N_TRAIN, dtype=torch.float64)
    scores[:, drawn] = (a * inverse @ test[:, drawn].T).T * factors
    own[drawn] = (a * inverse @ own_products).diagonal() * factors
    return scores, own


def expected(ridge, path, drawn=None):
    drawn = torch.arange(N_TRAIN) if drawn is None else drawn
    found = [solved(ridge, checkpoint, drawn) for checkpoint in Trace(path).checkpoints]
    return [sum(each[side] for each in found) for side in (0, 1)]


def asked(path, method, **options):
    return quiet().influence(loader(test_texts()), Toy(), trace=path, method=method, **options)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace with three sites."""
    path = tmp_path_factory.mktemp("ridge") / "trace"
    fitted(path, methods=("tracin-we", "tracin-last", "hidden"))
    return path


@pytest.mark.parametrize("method", METHODS, ids=range(len(METHODS)))
def test_scores_are_those_of_the_dense_solution(recorded, method):
    scores, own = expected(method, recorded)
    assert relative_error(asked(recorded, method).scores, scores) < 1e-5
    assert relative_error(quiet().self_influence(trace=recorded, method=method), own) < 1e-5


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("method", METHODS, ids=range(len(METHODS)))
def test_kernels_come_in_blocks_of_any_size(recorded, monkeypatch, method, size):
    monkeypatch.setattr(kernels_module, "_rows_at_once", lambda *_: size)
    assert relative_error(asked(recorded, method).scores, expected(method, recorded)[0]) < 1e-5


def test_a_large_alpha_gives_the_cosines_back(recorded):
    method = TracInSum((WE, HIDDEN), mix=(1, 3))
    plain = [asked(recorded, part).scores for part in method.parts]
    ridge = asked(recorded, TracInRidge(method, alpha=1e6, residual=0)).scores
    torch.testing.assert_close(ridge, plain[0] / 4 + plain[1] * 3 / 4, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("alpha", [1 / 16, 10, 1e6])
@pytest.mark.parametrize("landmarks", [None, 12])
def test_leverage_keeps_its_digits_whatever_alpha(monkeypatch, alpha, landmarks):
    monkeypatch.setattr(solvers_module, "_COLUMNS_AT_ONCE", 7)
    monkeypatch.setattr(solvers_module, "_ROWS_AT_ONCE", 7)
    examples = torch.nn.functional.normalize(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    examples[3] = 0  # says nothing of anything
    kernel = examples.double() @ examples.double().T
    shift = alpha * len(kernel)
    expected = shift * torch.linalg.solve(kernel + shift * torch.eye(len(kernel)), kernel).diagonal()
    if landmarks is None:
        found = WholeKernel.of(kernel.float(), shift).on_themselves()
        assert float(found[3]) == 0
    else:  # as many as there are dimensions, which tell all of the kernel
        places = torch.arange(10, 10 + landmarks)
        found = Landmarks.of(kernel[:, places].float(), places, shift).on_themselves()
    torch.testing.assert_close(found.double(), expected, rtol=2e-6 if landmarks is None else 1e-4, atol=1e-7)


def test_copies_share_what_they_say():
    """Ten copies of one example, and another as far away: by cosines the ten count ten times, here hardly more."""
    kernel = torch.ones(11, 11, dtype=torch.float64)
    kernel[10, :10] = kernel[:10, 10] = 0
    found = WholeKernel.of(kernel, 0.01).solved(torch.ones(11, 1, dtype=torch.float64))[:, 0]
    assert float(found[:10].sum()) == pytest.approx(0.01 * 10 / 10.01)  # s / (λ + a) of eigenvalue λ = 10
    assert float(found[10]) == pytest.approx(0.01 / 1.01)


@pytest.mark.parametrize("cache", ["training", "on_demand"])
def test_other_caches(tmp_path, monkeypatch, cache):
    """Of training's own gradients, without dropout and at rates of next to nothing, and of those of a first query."""
    monkeypatch.setattr("toy.RATE", 1e-10)
    module = Toy()
    module.dropout.p = 0.0
    trainer = fitted(tmp_path, module, cache=cache)
    method = TracInRidge(WE)
    result = trainer.influence(loader(test_texts()), method=method)
    assert relative_error(result.scores, expected(method, tmp_path)[0]) < 1e-5


@pytest.mark.parametrize("checkpoints", ["last", None])
def test_with_k_and_in_blocks(recorded, monkeypatch, checkpoints):
    method, whole = METHODS[2], asked(recorded, METHODS[2], checkpoints=checkpoints)
    calls = []
    dual = kernels_module.Kernels._dual
    monkeypatch.setattr(kernels_module.Kernels, "_dual", lambda *given: calls.append(1) or dual(*given))
    monkeypatch.setattr("lightning_tracin.querying.influence._BLOCK_BYTES", 1)
    blocks = asked(recorded, method, k=4, checkpoints=checkpoints)
    assert len(calls) == (1 if checkpoints else EPOCHS)  # not for each of the blocks
    for side in ("proponents", "opponents"):
        found, wanted = getattr(blocks, side)(4), getattr(whole, side)(4)
        assert torch.equal(found.indices, wanted.indices)
        torch.testing.assert_close(found.values, wanted.values)
    torch.testing.assert_close(blocks.totals, whole.totals)


def test_what_training_never_drew_is_no_training_example(tmp_path):
    drawn = [0, 2, 3, 5, 8, 13, 17, 19]
    data = DataLoader(texts(), batch_size=4, sampler=SubsetRandomSampler(drawn))
    fitted(tmp_path, data=data)
    for method in METHODS[:2]:
        scores, own = expected(method, tmp_path, torch.tensor(drawn))
        result = asked(tmp_path, method)
        assert relative_error(result.scores, scores) < 1e-5
        assert set(asked(tmp_path, method, k=8).proponents(8).indices.flatten().tolist()) == set(drawn)
        assert relative_error(result.self_influence(), own) < 1e-5


@pytest.mark.parametrize("target", ["prediction", 1, (0, 2)])
def test_targets(recorded, target):
    """The other side of the products changes, and nothing else: linear in it, up to the norm of each test example."""
    result, plain = (
        asked(recorded, method, target=target, checkpoints="last") for method in (METHODS[1], METHODS[1].method)
    )
    checkpoint = Trace(recorded).checkpoints[-1]
    _, train, _ = cosines(METHODS[1].method, checkpoint)
    a = METHODS[1].alpha * N_TRAIN
    wanted = a * torch.linalg.solve(train + a * torch.eye(N_TRAIN, dtype=torch.float64), plain.scores.double().T).T
    assert relative_error(result.scores, wanted) < 1e-5


def test_without_residuals_no_last_layer_is_needed(tmp_path):
    fitted(tmp_path, methods=("tracin-we",))
    assert asked(tmp_path, TracInRidge(WE, residual=0)).scores.isfinite().all()
    with pytest.raises(ValueError, match=r"tracin-last.*residual=0"):
        asked(tmp_path, TracInRidge(WE))


def test_a_result_without_words(recorded, tmp_path):
    result = asked(recorded, METHODS[0])
    with pytest.raises(ValueError, match=r"Ask by TracInWE\(.*for words"):
        result.words(0, 1)
    result.save(tmp_path / "result.safetensors")
    loaded = InfluenceResult.load(tmp_path / "result.safetensors")
    assert loaded.method == METHODS[0]
    assert torch.equal(loaded.scores, result.scores)
    assert loaded.label_issues(n=3)
    result.to_html(tmp_path / "page.html")
    assert "ridge of" in str(result)
    assert set(result.to_pandas()) == set(asked(recorded, TracInLast()).to_pandas())


def test_labels_are_reviewed_by_leverage(recorded):
    issues = quiet().label_issues(Toy(), trace=recorded, method=METHODS[0])
    order = [issue.example.index for issue in issues.issues]
    assert order == expected(METHODS[0], recorded)[1].argsort(descending=True).tolist()


@pytest.mark.parametrize(
    "method", [*METHODS, TracInRidge(TracInWE(exclude_tokens=(2, 3), normalize="cosine"))], ids=range(5)
)
def test_json(method):
    assert method_from_json(method_to_json(method)) == method
    assert eval(repr(method)) == method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": TracInWE()}, "normalize"),
        ({"method": TracInSum((WE, TracInLast()))}, "normalize"),
        ({"method": TracInRidge(WE)}, "method must be"),
        ({"method": TracInWE}, "method must be"),
        ({"method": "tracin-we"}, "method must be"),
        ({"method": TracInSum((WE, HIDDEN), mix=(1, -1))}, "mix must"),
        ({"method": TracInSum((WE, HIDDEN), mix=(0, 0))}, "mix must"),
        ({"method": TracInSum((WE, HIDDEN), scales=(1, 2))}, "need no scales"),
        ({"method": WE, "alpha": 0}, "alpha must be"),
        ({"method": WE, "alpha": float("nan")}, "alpha must be"),
        ({"method": WE, "residual": -1}, "residual must be"),
        ({"method": WE, "landmarks": 0}, "landmarks must be"),
        ({"method": WE, "landmarks": 1.5}, "landmarks must be"),
    ],
    ids=range(13),
)
def test_what_is_no_ridge(options, message):
    with pytest.raises(ValueError, match=message):
        TracInRidge(**options)


@pytest.mark.parametrize(
    "content", [{"of": None}, {}, {"of": {"method": "TracInWE"}}, {"of": {"method": "TracInRidge"}}], ids=str
)
def test_what_is_no_ridge_in_a_file(content):
    with pytest.raises(ValueError, match="is no method"):
        method_from_json({"method": "TracInRidge", **content})


def test_memory_is_told_before_it_is_taken(recorded, monkeypatch, caplog):
    with caplog.at_level("INFO"):
        asked(recorded, METHODS[0])
    assert f"TracInRidge: the kernel of {N_TRAIN} training examples takes" in caplog.text
    monkeypatch.setattr(kernels_module, "free_memory", lambda: 800)
    monkeypatch.setattr(kernels_module.Kernels, "_dual", None)
    with pytest.raises(ValueError, match=r"20 training examples with 20.*landmarks=2"):
        asked(recorded, METHODS[0])
    monkeypatch.setattr(kernels_module, "free_memory", lambda: 150)
    with pytest.raises(ValueError, match=r"150 bytes are free\. Ask by the method inside it"):
        asked(recorded, METHODS[0])


@pytest.mark.parametrize(("n_train", "free"), [(20_000, 2_400_000_000), (4000, 50_000_000), (20, 800)])
def test_as_many_landmarks_as_are_advised_fit(monkeypatch, n_train, free):
    monkeypatch.setattr(kernels_module, "free_memory", lambda: free)
    with pytest.raises(ValueError, match="landmarks=") as refused:
        kernels_module.require_memory(TracInRidge(WE), n_train)
    advised = int(re.search(r"landmarks=(\d+)", str(refused.value))[1])
    kernels_module.require_memory(TracInRidge(WE, landmarks=advised), n_train)
    with pytest.raises(ValueError, match="landmarks="):
        kernels_module.require_memory(TracInRidge(WE, landmarks=advised + advised // 5 + 2), n_train)


def test_how_checkpoints_count_is_that_of_the_method(recorded):
    """By rates, each checkpoint's share is its own; alike, their sum."""
    parts = [asked(recorded, TracInRidge(WE), checkpoints=slice(number, number + 1)).scores for number in range(EPOCHS)]
    rates = [each.learning_rate for each in Trace(recorded).checkpoints]
    equal = asked(recorded, TracInRidge(TracInWE(normalize="cosine", weights="equal"))).scores
    torch.testing.assert_close(equal, sum(part / rate for part, rate in zip(parts, rates, strict=True)))


def test_a_ridge_in_words():
    assert described(METHODS[3]) == (
        "ridge of ((TracIn-WE, cosine) + 3 × (TracIn at hidden, cosine)), alpha 0.01, residual ** 1, 9 landmarks"
    )


def test_a_ridge_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS[0].alpha = 1.0
