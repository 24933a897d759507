"""Each mistake gets one clear error, early, and nothing that was stored is lost."""

from __future__ import annotations

import pytest
import torch
from mistakes import Endless, Plain, cross_entropy, empty, poisoned, with_loss
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, default_collate
from toy import N_TRAIN, Toy, fitted, loader, quiet, test_texts, texts
from transformers.pytorch_utils import Conv1D

from lightning_tracin import Trace, TracInCallback, TracInLast, TracInMixin, TracInWE
from lightning_tracin.storage import shards


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: cross_entropy(m, b), r"shape \(B,\), but got shape \(\)"),
        (lambda m, b: cross_entropy(m, b, reduction="none")[:, None], r"but got shape \(4, 1\)"),
        (lambda m, b: cross_entropy(m, b, reduction="none")[:, None].expand(-1, 7), r"but got shape \(4, 7\)"),
        (lambda m, b: cross_entropy(m, b, reduction="none").tolist(), "but got list"),
        (lambda m, b: b[1], "float tensor"),
        (lambda m, b: cross_entropy(m, b, reduction="none").detach(), "must not detach them"),
        (lambda m, b: cross_entropy(m, b, reduction="none")[:2], "4 training examples has 2 losses"),
        (lambda m, b: cross_entropy(m, b, reduction="none")[::2], "4 training examples has 2 losses"),
        (lambda m, b: cross_entropy(m, b)[None], "4 training examples has 1 losses"),
        (lambda m, b: cross_entropy(m, b, reduction="none")[:3], "neither the first nor the second dimension is"),
        (lambda m, b: cross_entropy(m, b, reduction="none") * m(b[0]).mean(), "depends on the other examples"),
    ],
    ids=[
        "scalar",
        "(B, 1)",
        "(B, T)",
        "list",
        "integers",
        "detached",
        "half",
        "each second",
        "a mean",
        "too few",
        "of the whole batch",
    ],
)
def test_a_loss_that_is_not_one_for_each_example(tmp_path, loss, message):
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path / "trace", with_loss(loss))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, labels: functional.cross_entropy(logits, labels, reduction="sum"), "not a mean of independent"),
        (lambda logits, labels: functional.cross_entropy(logits, labels, weight=torch.arange(1.0, 4)), "not a mean of"),
        (lambda logits, labels: functional.cross_entropy(logits @ logits.T, torch.arange(len(labels))), "not a mean"),
    ],
    ids=["sum", "weighted", "contrastive"],
)
def test_a_training_step_that_is_not_a_mean_of_independent_losses(tmp_path, loss, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*TracInMixin"):
        fitted(tmp_path / "trace", Plain(loss))


def to_the_longest(items):
    ids, labels = torch.utils.data.default_collate(items)
    return ids[:, : int((ids != 0).sum(1).max())], labels


class ReadsPadding(Toy):
    """Takes the mean over padding too."""

    def forward(self, ids):
        return 5 * self.head(torch.tanh(self.hidden(self.embedding(ids).mean(1))))


class PlainReadsPadding(ReadsPadding):
    influence_loss = None

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: cross_entropy(m, b, reduction="none") / len(b[1]),
        lambda m, b: cross_entropy(m, b, reduction="none") * len(b[1]) / (b[0] != 0).sum(),
    ],
    ids=["by the batch's examples", "by the batch's tokens"],
)
def test_a_loss_that_is_divided_by_what_the_batch_holds(tmp_path, loss):
    with pytest.raises(
        ValueError, match=r"the loss of training example \d+ is .* in a batch of 4, but .* in one of half"
    ):
        fitted(tmp_path / "trace", with_loss(loss))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("kind", [ReadsPadding, PlainReadsPadding])
def test_a_model_that_reads_padding_is_warned_of(tmp_path, kind):
    with pytest.warns(UserWarning, match="seems to read padding: (the loss of training example|losses are)"):
        fitted(tmp_path / "trace", kind(), loader(collate_fn=to_the_longest))


def test_losses_that_are_drawn_at_random_say_nothing_of_their_batch(tmp_path):
    def masking(items):
        ids, labels = torch.utils.data.default_collate(items)
        return torch.where(torch.rand(ids.shape) < 0.3, 1, ids), labels

    fitted(tmp_path / "masked", data=loader(collate_fn=masking))
    fitted(tmp_path / "noisy", with_loss(lambda m, b: cross_entropy(m, b, reduction="none") * torch.rand(len(b[1]))))


def test_a_training_step_that_optimizes_by_hand(tmp_path):
    module = Plain(functional.cross_entropy)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"(?s)optimizes manually.*TracInMixin"):
        fitted(tmp_path / "trace", module)


def test_a_training_step_that_takes_its_batches_from_the_loader(tmp_path):
    class Taking(Toy):
        def training_step(self, dataloader_iter):
            return self.influence_loss(next(dataloader_iter)[0]).mean()

    with pytest.raises(ValueError, match=r"^training_step of Taking takes its batches from a dataloader_iter, so"):
        fitted(tmp_path / "trace", Taking(), on_error="warn")
    assert not (tmp_path / "trace" / "trace.json").exists()
    trainer = quiet(max_epochs=1)
    trainer.fit(Taking(), loader())
    trainer.save_checkpoint(tmp_path / "over.ckpt")
    assert len(Trace.from_checkpoints(tmp_path / "past", [tmp_path / "over.ckpt"], Taking(), loader()).checkpoints) == 1


def test_the_default_loss_of_a_module_that_is_not_hugging_face(tmp_path):
    class Defaulting(Toy):
        influence_loss = TracInMixin.influence_loss

        def training_step(self, batch, batch_idx):
            return cross_entropy(self, batch)

    with pytest.raises(ValueError, match=r"(?s)no loss for each example.*Override influence_loss"):
        fitted(tmp_path / "trace", Defaulting())


def test_no_embedding_layer(tmp_path):
    module = Toy()
    module.embedding = nn.Sequential()
    with pytest.raises(ValueError, match=r'has no embedding layer.*methods=\("tracin-last",\)'):
        fitted(tmp_path / "trace", module)


def test_two_heads(tmp_path):
    class TwoHeads(Toy):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 3)

        def influence_loss(self, batch):
            words = self.embedding(batch[0]).mean(1)
            return functional.cross_entropy(self.head(words) + self.other(words), batch[1], reduction="none")

    with pytest.raises(ValueError, match=r"(?s)head \(.*other \(.*influence_last_layer|other \(.*head \("):
        fitted(tmp_path / "trace", TwoHeads())


def test_a_named_layer_that_is_not_one(tmp_path):
    class Wrong(Toy):
        def influence_last_layer(self):
            return self.dropout

    with pytest.raises(ValueError, match=r"must return an nn\.Linear, but returned Dropout"):
        fitted(tmp_path / "trace", Wrong())


def test_the_maximum_of_a_bag_has_no_words(tmp_path):
    class Bag(Toy):
        def __init__(self):
            super().__init__()
            self.embedding = nn.EmbeddingBag(40, 8, mode="max")

        def forward(self, ids):
            return self.head(self.embedding(ids))

    with pytest.raises(ValueError, match=r"EmbeddingBag\(.*takes the maximum .* no gradient for each word. Use mode="):
        fitted(tmp_path / "trace", Bag())


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("index", [1, 13])
def test_a_training_gradient_that_is_not_finite_is_named(tmp_path, index, value):
    module, data = poisoned(index, value)
    with pytest.raises(ValueError, match=rf"training example {index} is NaN or infinite"):
        fitted(tmp_path / "trace", module, loader(data, shuffle=True))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_gradient_that_becomes_nan_late_keeps_the_checkpoints_before_it(tmp_path):
    class Late(Toy):
        def influence_loss(self, batch):
            losses = super().influence_loss(batch)
            if self.training or self.trainer.current_epoch == 0:
                return losses
            return torch.where((batch[0] == texts()[17][0]).all(1), torch.nan, losses)

    with pytest.raises(ValueError, match="training example 17 is NaN or infinite"):
        fitted(tmp_path / "trace", Late())
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5]
    assert not list(tmp_path.rglob("*.partial"))
    assert quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace").scores.abs().sum() > 0


@pytest.mark.parametrize("told", [N_TRAIN - 1, N_TRAIN + 1])
def test_a_stream_that_tells_a_wrong_number_of_examples(tmp_path, told):
    class Wrong(IterableDataset):
        def __len__(self):
            return told

        def __iter__(self):
            return iter(texts())

    found = f"more than {told}" if told < N_TRAIN else str(N_TRAIN)
    with pytest.raises(ValueError, match=f"has {told} examples, but a pass over it gave {found}: "):
        fitted(tmp_path / "trace", data=DataLoader(Wrong(), batch_size=N_TRAIN + 1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: loader(Endless()), "does not tell how many examples"),
        (lambda: [loader(), loader()], "one training loader, but got 2"),
        (lambda: {"a": loader(), "b": loader()}, "one training loader, but got 2"),
        (lambda: CombinedLoader([loader(), loader()], "max_size"), "one training loader, but got 2"),
        (lambda: [loader()], "comes in a list.*Pass the loader itself"),
        (lambda: {"a": loader()}, "comes in a dict.*Pass the loader itself"),
        (lambda: CombinedLoader({"a": loader()}), "comes in a dict.*Pass the loader itself"),
        (lambda: DataLoader(texts(), batch_size=None), "does not batch"),
        (lambda: [[torch.ones(2, 3)], [torch.ones(2, 3)]], "one training loader|must come in a"),
    ],
    ids=[
        "unknown length",
        "list",
        "dict",
        "combined",
        "list of one",
        "dict of one",
        "combined dict of one",
        "unbatched",
        "list of batches",
    ],
)
def test_training_data_that_cannot_be_numbered(tmp_path, data, message):
    class Any(Toy):
        def training_step(self, batch, batch_idx):
            return self.embedding.weight.sum()

    with pytest.raises((ValueError, TypeError), match=message):
        fitted(tmp_path / "trace", Any(), data())
    assert not (tmp_path / "trace").exists()


def test_a_collate_function_that_drops_examples(tmp_path):
    def drop(rows):
        return torch.utils.data.default_collate(rows[:-1])

    with pytest.raises(ValueError, match=r"A batch of 4 training examples has 3 losses: the collate function"):
        fitted(tmp_path / "trace", data=loader(collate_fn=drop))


class Late:
    """Adds or drops examples only when training has begun."""

    def __init__(self, taken: slice, added: int) -> None:
        self.taken, self.added, self.module = taken, added, Toy()

    def __call__(self, items):
        if self.module._trainer is not None and self.module.trainer.global_step:
            items = items[self.taken] + items[: self.added]
        return torch.utils.data.default_collate(items)


@pytest.mark.parametrize("shard_examples", [8, 100])
@pytest.mark.parametrize(("taken", "added", "found"), [(slice(None), 4, "more than 20"), (slice(3), 0, "15")])
def test_a_collate_function_that_adds_or_drops_examples_later(
    tmp_path, monkeypatch, taken, added, found, shard_examples
):
    monkeypatch.setattr(shards, "MOST_SHARD_EXAMPLES", shard_examples)
    collate = Late(taken, added)
    with pytest.raises(ValueError, match=f"has 20 examples, but a pass over it gave {found}: the collate function"):
        fitted(tmp_path, collate.module, loader(collate_fn=collate))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
@pytest.mark.parametrize(
    ("collate", "found"),
    [(lambda items: default_collate([*items, *items]), 8), (lambda items: default_collate(items[:-1]), 3)],
    ids=["adds", "drops"],
)
def test_a_collate_function_that_always_adds_or_drops_is_refused_before_training(tmp_path, collate, found, cache):
    with pytest.raises(ValueError, match=f"A batch of 4 training examples has {found} losses: the collate"):
        fitted(tmp_path / "trace", data=loader(collate_fn=collate), cache=cache)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TracInCallback(cache="always"),
            "cache must be 'checkpoint', 'training' or 'on_demand', but got 'always'",
        ),
        (lambda: TracInCallback(methods="tracin-we"), "methods must be some of"),
        (lambda: TracInCallback(methods=()), "methods must be some of"),
        (lambda: TracInCallback(dtype="float8"), "dtype must be one of"),
        (lambda: TracInCallback(top_words=0), "top_words must be None or a whole number of at least 1, but got 0"),
        (lambda: TracInCallback(every_n_epochs=0), "every_n_epochs must be a whole number of at least 1, but got 0"),
        (lambda: TracInCallback(every_n_train_steps=0), "every_n_train_steps must be None or a whole number .* got 0"),
        (
            lambda: TracInWE(exclude_tokens=[1.5]),
            r"exclude_tokens must be token ids.*all_special_ids, words, .*, but got \[1\.5\]",
        ),
        (lambda: TracInWE(exclude_tokens=3), "exclude_tokens must be token ids, such as tokenizer.all_special_ids"),
        (lambda: TracInWE(top_words=0), "top_words must be None or a whole number of at least 1, but got 0"),
        (lambda: TracInWE(normalize="test"), "normalize must be None, 'train' or 'cosine', but got 'test'"),
        (lambda: TracInLast(precondition="sgd"), "precondition must be None, 'adam' or 'kfac', but got 'sgd'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_layer(tmp_path):
    with pytest.raises(ValueError, match=r"methods names 'tracin', but Toy has no .* of that name. The nearest are: "):
        fitted(tmp_path / "trace", methods=("tracin",))
    assert not (tmp_path / "trace").exists()


def test_a_fit_without_a_training_example(tmp_path):
    trainer = fitted(tmp_path / "trace", data=loader(empty()))
    with pytest.raises(ValueError, match="There is no trace"):
        trainer.influence(loader(test_texts()))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_dirpath_that_is_not_a_folder(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        fitted(tmp_path / place, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


class CausalConvolution(nn.Conv1d):
    """The usual way to write one."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=2)

    def forward(self, values):
        return super().forward(values)[..., : -self.padding[0]]


class CosineLinear(nn.Linear):
    def forward(self, values):
        return 5 * functional.linear(functional.normalize(values), functional.normalize(self.weight), self.bias)


class SpelledOut(nn.Linear):
    """What it computes is that of its class."""

    def forward(self, values):
        return values @ self.weight.T + self.bias


class Causal(Toy):
    def __init__(self):
        super().__init__()
        self.convolution = CausalConvolution()

    def forward(self, ids):
        words = self.convolution(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(words).sum(1))


class WithHead(Toy):
    def __init__(self, head):
        super().__init__()
        self.head = head


def tripled(head):
    head.register_forward_hook(lambda module, inputs, output: 3 * output)
    return WithHead(head)


@pytest.mark.parametrize(
    ("build", "method", "message"),
    [
        (Causal, "convolution", r"CausalConvolution is a Conv1d .* returns \(\d, 8, 7\) instead of \(\d, 8, 9\)"),
        (lambda: WithHead(CosineLinear(8, 3)), "tracin-last", "CosineLinear is a Linear .* returns other numbers"),
        (
            lambda: tripled(nn.Linear(8, 3)),
            "tracin-last",
            "Linear is a Linear by its class, but its own forward, or a forward hook, returns other",
        ),
        (lambda: tripled(Conv1D(3, 8)), "head", "Conv1D is a Conv1D by its class, but .* hook, returns other numbers"),
    ],
    ids=["causal", "cosine", "hook", "hook of GPT-2's"],
)
def test_a_layer_that_is_linear_by_its_class_alone(tmp_path, build, method, message):
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path / "trace", build(), methods=(method,))
    assert not (tmp_path / "trace").exists()


def test_a_linear_layer_that_is_spelled_out_is_one(tmp_path):
    plain, spelled = Toy(), WithHead(SpelledOut(8, 3))
    spelled.load_state_dict(plain.state_dict())
    found = []
    for name, module in (("plain", plain), ("spelled", spelled)):
        torch.manual_seed(0)
        trainer = fitted(tmp_path / name, module, methods=("tracin-last",))
        found.append(trainer.influence(loader(test_texts()), method="tracin-last").scores)
    torch.testing.assert_close(*found)


class WithoutRate(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group["lr"] = None


def test_an_optimizer_without_a_learning_rate(tmp_path):
    module = Toy()
    module.configure_optimizers = lambda: WithoutRate(module.parameters())
    with pytest.raises(ValueError, match=r"WithoutRate finds its learning rates by itself \(lr=None\)"):
        fitted(tmp_path / "trace", module)
    assert not (tmp_path / "trace").exists()
