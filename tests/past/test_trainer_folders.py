"""A run of Hugging Face's own Trainer: scores from the folders that it saved are those of brute force."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version

import pytest
import pytorch_lightning as pl
import torch
import torch_files
from brute_force import BruteForce, dense_gradients
from packaging.version import Version
from torch.utils.data import default_collate
from toy import quiet
from trainer_runs import N_TEST, N_TRAIN, STEPS_PER_EPOCH, batches, model, trained
from transformers import BertForSequenceClassification

from lightning_tracin import Trace, TracInLast, TracInMixin, TracInWE

EMBEDDING = "bert.embeddings.word_embeddings"

pytestmark = [
    torch_files.are_read,  # as optimizer.pt is
    pytest.mark.filterwarnings("ignore::UserWarning:(transformers|accelerate|torch).*"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, trained(folder)


@pytest.fixture(scope="module")
def past(run, tmp_path_factory):
    """The trace of that run, made with the bare model, from the folder of all checkpoints."""
    path = tmp_path_factory.mktemp("past") / "trace"
    return Trace.from_checkpoints(path, run[0], model(), batches(N_TRAIN, 0))


def brute_force(folder, watching, layer):
    """Of a layer, by the Trainer's own rates and the weights that transformers loads."""
    rates, sides = [], ([], [])
    for number in range(3):
        steps = watching.rates[number * STEPS_PER_EPOCH : (number + 1) * STEPS_PER_EPOCH]
        rates.append(sum(steps) / len(steps))
        at = BertForSequenceClassification.from_pretrained(folder / f"checkpoint-{(number + 1) * STEPS_PER_EPOCH}")
        for side, (n, seed) in zip(sides, ((N_TEST, 1), (N_TRAIN, 0)), strict=True):
            found = dense_gradients(at, at.get_submodule(layer), batches(n, seed, 1), lambda b, at=at: at(**b).loss)
            side.append(found)
    return BruteForce(rates, *sides)


def moments_at(watching, layer):
    """Of a layer, in the form of its gradients."""
    found = []
    for each in watching.moments:
        values, eps = each[f"{layer}.weight"]
        bias = each.get(f"{layer}.bias")
        found.append((values if bias is None else torch.cat([values, bias[0][:, None]], 1), eps))
    return found


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (TracInWE(), EMBEDDING),
        (TracInLast(), "classifier"),
        (TracInWE(normalize="cosine"), EMBEDDING),
        (TracInWE(precondition="adam"), EMBEDDING),
        (TracInLast(normalize="cosine", precondition="adam"), "classifier"),
    ],
    ids=str,
)
def test_scores_are_those_of_brute_force(run, past, method, layer):
    folder, watching = run
    result = quiet().influence(
        batches(N_TEST, 1), model(), trace=past, train_dataloaders=batches(N_TRAIN, 0), method=method
    )
    moments = moments_at(watching, layer) if method.precondition else None
    expected = brute_force(folder, watching, layer).scores(normalize=method.normalize, second_moments=moments)
    torch.testing.assert_close(result.scores.double(), expected, rtol=2e-3, atol=float(expected.abs().max()) * 1e-3)
    assert past.header.notes == ()
    assert past.model_class == "BertForSequenceClassification"


@pytest.mark.filterwarnings("ignore:The learning rates between")
@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup"])
def test_a_warmup_that_nothing_shows_is_not_ruled_out(tmp_path, kind):
    """It was over before the first rate was saved or logged."""
    trained(tmp_path / "run", lr_scheduler_type=kind, warmup_steps=2, logging_steps=3)
    past = Trace.from_checkpoints(tmp_path / "past", tmp_path / "run", model(), batches(N_TRAIN, 0))
    told = [bool(re.search(r"a warm-up that was over before step [23], the first", each)) for each in past.header.notes]
    assert told == ([True] if kind == "constant_with_warmup" else [])


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"lr_scheduler_type": "constant"}, None),
        ({"lr_scheduler_type": "cosine"}, None),
        ({"lr_scheduler_type": "linear", "warmup_steps": 4}, None),
        pytest.param(
            {"lr_scheduler_type": "polynomial", "logging_steps": 1},
            None,
            marks=pytest.mark.skipif(Version(version("transformers")) < Version("4.51"), reason="logs the next step's"),
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_restarts",
                "lr_scheduler_kwargs": {"num_cycles": 2},
                "logging_steps": 50,
            },
            "approximate",
        ),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.filterwarnings("ignore:The learning rates between")
def test_rates_are_those_that_the_trainer_used(tmp_path, options, note):
    watching = trained(tmp_path / "run", **options)
    past = Trace.from_checkpoints(tmp_path / "past", tmp_path / "run", model(), batches(N_TRAIN, 0))
    assert [note in each for each in past.header.notes] == ([True] if note else [])
    if note is None:
        expected = torch.tensor(watching.rates).view(3, -1).mean(1).tolist()
        assert [each.learning_rate for each in past.checkpoints] == pytest.approx(expected, rel=1e-4)


def test_rates_that_older_trainers_logged_are_those_of_the_next_step(run, tmp_path):
    """Before transformers 4.51; the schedulers' states tell which."""
    folder, watching = run
    rates = [*watching.rates, 0.0]
    for step in (3, 6, 9):
        target = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(folder / f"checkpoint-{step}", target)
        state = json.loads((target / "trainer_state.json").read_text())
        state["log_history"] = [{"step": done, "learning_rate": rates[done]} for done in range(1, step + 1)]
        state["log_history"].append({"step": step, "grad_norm": float("nan")})  # as the Trainer writes it
        (target / "trainer_state.json").write_text(json.dumps(state))
    past = Trace.from_checkpoints(tmp_path / "past", tmp_path / "run", model(), batches(N_TRAIN, 0))
    expected = torch.tensor(watching.rates).view(3, -1).mean(1).tolist()
    assert [each.learning_rate for each in past.checkpoints] == pytest.approx(expected, rel=1e-5)
    assert past.header.notes == ()


class Own(TracInMixin, pl.LightningModule):
    """The same model inside of a LightningModule that calls it otherwise."""

    def __init__(self):
        super().__init__()
        self.network = model()

    def forward(self, **batch):
        return self.network(**batch)


def test_inside_of_a_lightning_module(run, past, tmp_path):
    folders = [run[0] / f"checkpoint-{step}" for step in (9, 3, 6)]
    made = Trace.from_checkpoints(tmp_path / "past", folders, Own(), batches(N_TRAIN, 0))
    options = {"train_dataloaders": batches(N_TRAIN, 0), "method": TracInWE(precondition="adam")}
    found = quiet().influence(batches(N_TEST, 1), Own(), trace=made, **options)
    expected = quiet().influence(batches(N_TEST, 1), model(), trace=past, **options)
    torch.testing.assert_close(found.scores, expected.scores)
    with pytest.raises(ValueError, match=r"(?s)of another model \(Own\) than BertForSequenceClassification"):
        quiet().influence(batches(N_TEST, 1), model(), trace=made)


def test_weights_alone_in_other_forms(run, tmp_path):
    """Shards, and what torch.save wrote, without optimizers; rates from what was logged."""
    for step in (3, 6, 9):
        source, target = run[0] / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}"
        target.mkdir(parents=True)
        shutil.copy(source / "trainer_state.json", target)
        at = BertForSequenceClassification.from_pretrained(source)
        if step == 3:
            torch.save(at.state_dict(), target / "pytorch_model.bin")
        else:
            at.save_pretrained(target, max_shard_size="4KB")
            assert (target / "model.safetensors.index.json").exists()
    with pytest.warns(UserWarning, match="learning rates between the checkpoints are approximate"):
        past = Trace.from_checkpoints(tmp_path / "past", tmp_path / "run", model(), batches(N_TRAIN, 0))
    rates = torch.tensor(run[1].rates).view(3, -1).mean(1).tolist()
    assert [each.learning_rate for each in past.checkpoints] == pytest.approx(rates, rel=0.25)
    with pytest.raises(ValueError, match="needs Adam's second moments"):
        quiet().influence(batches(N_TEST, 1), model(), trace=past, method=TracInWE(precondition="adam"))


class Words:
    """As much of a tokenizer as names words."""

    def convert_ids_to_tokens(self, ids):
        return [f"word{token}" for token in ids]

    def pad(self, items):
        return default_collate(items)


@pytest.mark.parametrize("place", ["attribute", "collator"])
def test_words_are_named_by_the_tokenizer_that_is_there(past, place):
    own, tokenizer = model(), Words()
    collate = tokenizer.pad if place == "collator" else None
    if place == "attribute":
        own.tokenizer = tokenizer
    result = quiet().influence(
        batches(N_TEST, 1, collate_fn=collate), own, trace=past, train_dataloaders=batches(N_TRAIN, 0)
    )
    (explained,) = result.explanations([0])
    assert explained.test.words[0].text.startswith("word")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor pytorch_model.bin"),
        (lambda f: (f / "trainer_state.json").write_text("{"), "trainer_state.json is damaged"),
        (lambda f: (f / "trainer_state.json").write_text('{"global_step": -4}'), "-4 is no number of steps"),
        (lambda f: (f / "optimizer.pt").write_bytes(b"PK\3\4 no zip"), "optimizer.pt is damaged, or is no checkpoint"),
        (lambda f: torch.save([1], f / "scheduler.pt"), "its schedulers are no list of state dicts"),
        (
            lambda f: (f / "model.safetensors").rename(f / "adapter_model.safetensors"),
            "holds the weights of adapters alone",
        ),
        (
            lambda f: (
                (f / "model.safetensors").unlink(),
                (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}})),
            ),
            r"names a file in another folder, \.\./b",
        ),
    ],
    ids=["weights", "no weights", "state", "step", "optimizer", "scheduler", "adapters", "index"],
)
def test_a_damaged_folder_is_one_clear_error(run, tmp_path, damage, message):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(run[0] / "checkpoint-3", folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Trace.from_checkpoints(tmp_path / "past", folder, model(), batches(N_TRAIN, 0))
    assert not (tmp_path / "past").exists()
