"""Small models, data and fits drawn at random, with the scores that brute force finds for them.

What is drawn is plain (names, sizes, seeds), so that an example that fails can be read and made again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from brute_force import (
    BruteForce,
    chosen_rows,
    dense_gradients,
    product_weights,
    second_moments_of,
    untie,
    weight_of,
    with_bias,
)
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, default_collate
from toy import quiet

from lightning_tracin import TracInCallback, TracInLast, TracInLayer, TracInMixin, TracInSum, TracInWE, Trainer

BODIES = ("linear", "convolution", "lstm", "gru", "attention", "twice")
TASKS = ("class", "tags", "next words")
CACHES = ("checkpoint", "on_demand", "training")
# Of the largest score that Cauchy and Schwarz allow.
TOLERANCES = {"float32": 2e-5, "float16": 3e-3, "int8": 5e-2}
DECAY = 0.9
# With cache="training" the weights must stay where they are, so that gradients are those at the checkpoint.
RATES = {"checkpoint": (2e-2, 1e-2), "on_demand": (2e-2, 1e-2), "training": (2e-10, 1e-10)}


@dataclass(frozen=True)
class Drawn:
    """A model, its data, and how it is fitted and asked."""

    seed: int
    body: str
    task: str
    tied: bool
    bias: bool
    mapping: bool  # whether a batch is a mapping, with a mask, or a pair
    cut: bool  # whether batches are cut to their longest text
    vocabulary: int
    length: int
    n_train: int
    n_test: int
    batches: list[list[int]]  # of each epoch
    test_order: list[int]
    test_batch_size: int
    epochs: int
    every: dict[str, int]
    optimizer: str
    cache: str
    dtype: str
    shard_examples: int
    block_bytes: int


@st.composite
def drawn_fits(draw: Any, **fixed: Any) -> Drawn:
    task = draw(st.sampled_from(TASKS))
    n_train, n_test = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    order = draw(st.permutations(range(n_train))) + draw(st.lists(st.integers(0, n_train - 1), max_size=3))
    size = draw(st.integers(1, len(order)))
    batches = [list(dict.fromkeys(order[start : start + size])) for start in range(0, len(order), size)]
    epochs = draw(st.integers(1, 3))
    by_steps = draw(st.booleans())
    most = epochs * len(batches) if by_steps else epochs
    return Drawn(
        seed=draw(st.integers(0, 10**6)),
        body=draw(st.sampled_from(BODIES)),
        task=task,
        tied=task == "next words" and draw(st.booleans()),
        bias=draw(st.booleans()),
        mapping=draw(st.booleans()),
        cut=draw(st.booleans()),
        vocabulary=draw(st.integers(3, 12)),
        length=draw(st.integers(2, 6)),
        n_train=n_train,
        n_test=n_test,
        batches=batches,
        test_order=draw(st.permutations(range(n_test))),
        test_batch_size=draw(st.integers(1, n_test)),
        epochs=epochs,
        every={"every_n_train_steps" if by_steps else "every_n_epochs": draw(st.integers(1, min(most, 3)))},
        optimizer=draw(st.sampled_from(("SGD", "AdamW"))),
        cache=fixed.get("cache") or draw(st.sampled_from(CACHES)),
        dtype=fixed.get("dtype") or draw(st.sampled_from((*TOLERANCES,))),
        shard_examples=draw(st.sampled_from((1, 2, 3, 4096))),
        block_bytes=draw(st.sampled_from((1, 2**29))),
    )


@st.composite
def drawn_methods(draw: Any, drawn: Drawn, *, words_only: bool = False, by_rates: bool = False) -> Any:
    """A method that a drawn fit can be asked for; ``by_rates`` if checkpoints must count by their learning rates."""
    # Bytes round to parts of a row's largest entry, and Adam's moments magnify the small ones: nothing is promised.
    has_moments = drawn.optimizer == "AdamW" and drawn.dtype != "int8"
    precondition = st.sampled_from([None, "adam"] if has_moments else [None])
    # Where a head is applied to each word, its gradients may lie as matrices, which do not tell residuals.
    weights = ("learning-rate", "equal", *(["residual"] if drawn.task == "class" else []))
    options = {
        "normalize": draw(st.sampled_from((None, "train", "cosine"))),
        "precondition": draw(precondition),
        "weights": draw(st.sampled_from(weights[:1] if by_rates else weights)),
    }
    kinds = ["words"] if words_only else ["words", "last", "layer", "sum"]
    kind = draw(st.sampled_from(kinds))
    layers = inner_layers(drawn)
    if kind == "layer" and layers:
        return TracInLayer(draw(st.sampled_from(layers)), **options)
    if kind in ("last", "layer"):
        return TracInLast(**options)
    tokens = draw(st.lists(st.integers(0, drawn.vocabulary - 1), max_size=2, unique=True))
    words = TracInWE(draw(st.sampled_from((None, 1, 2))), tuple(tokens), **options)
    if kind == "words":
        return words
    parts = [words, TracInLast(**options), *(TracInLayer(name, **options) for name in layers[:1])]
    return TracInSum(parts, mix=[1.0, -0.5, 2.0][: len(parts)], scales=[1.0, 0.5, 2.0][: len(parts)])


class Net(TracInMixin, pl.LightningModule):
    """Embeds, mixes positions by its body, and says something of the text or of each word; padding is never read."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn, hidden = drawn, 4
        self.embedding = nn.Embedding(drawn.vocabulary, hidden, padding_idx=0)
        self.embedding.weight.data *= 0.5  # of a model that is all but certain, float32 gives a few digits of 1 - p
        width = hidden
        if drawn.body == "linear":
            self.inner = nn.Linear(hidden, hidden)
        elif drawn.body == "convolution":
            self.inner = nn.Conv1d(hidden, hidden, 3, padding=1)
        elif drawn.body in ("lstm", "gru"):
            self.recurrent = (nn.LSTM if drawn.body == "lstm" else nn.GRU)(hidden, hidden, batch_first=True)
        elif drawn.body == "attention":
            self.inner, self.keys = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        else:
            self.inner = nn.Linear(2 * hidden, hidden)
        self.head = nn.Linear(width, drawn.vocabulary if drawn.task == "next words" else 3, bias=drawn.bias)
        if drawn.tied:
            self.head.weight = self.embedding.weight

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        embedded, body = self.embedding(ids), self.drawn.body
        embedded = embedded * mask[..., None]
        if body == "linear":
            return self.inner(embedded).tanh() * (1 + torch.arange(ids.shape[1]) / 10)[:, None].to(embedded)
        if body == "convolution":
            return self.inner(embedded.transpose(1, 2)).transpose(1, 2).tanh()
        if body in ("lstm", "gru"):
            return self.recurrent(embedded)[0]
        if body == "attention":
            likeness = self.inner(embedded) @ self.keys(embedded).transpose(1, 2)
            return likeness.masked_fill(~mask[:, None, :], -math.inf).softmax(2) @ embedded
        before = self.embedding(functional.pad(ids, (1, 0))[:, :-1])  # the first word follows padding
        return self.inner(torch.cat([embedded, before], dim=2)).tanh()

    def influence_loss(self, batch: Any) -> Tensor:
        ids, labels = (batch["input_ids"], batch["labels"]) if isinstance(batch, dict) else batch
        mask = ids != 0
        states = self.states(ids, mask)
        if self.drawn.task == "class":
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return functional.cross_entropy(self.head(pooled), labels, reduction="none")
        each = functional.cross_entropy(self.head(states).transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return each.sum(1) / (labels != -100).sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.influence_loss(batch).mean()

    def configure_optimizers(self) -> Any:
        slow, fast = RATES[self.drawn.cache]
        table = self.embedding.weight
        others = [each for each in self.parameters() if each is not table]
        groups = [{"params": [table], "lr": slow}, {"params": others, "lr": fast}]
        optimizer = getattr(torch.optim, self.drawn.optimizer)([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: DECAY**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build(drawn: Drawn) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(drawn.seed)
        return Net(drawn)


def inner_layers(drawn: Drawn) -> list[str]:
    named = build(drawn).named_modules()
    return [name for name, part in named if isinstance(part, (nn.Linear, nn.Conv1d)) and name != "head"]


class Texts(Dataset):
    """Random words with repetitions, padded on the right."""

    def __init__(self, drawn: Drawn, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, drawn.vocabulary, (n, drawn.length), generator=generator)
        lengths = torch.randint(1, drawn.length + 1, (n, 1), generator=generator)
        mask = torch.arange(drawn.length) < lengths
        self.ids = ids.where(mask, 0)
        if drawn.task == "class":
            self.labels = torch.randint(3, (n,), generator=generator)
        elif drawn.task == "tags":
            self.labels = torch.randint(3, ids.shape, generator=generator).where(mask, -100)
        else:
            self.labels = ids.roll(-1, 1).where(mask, -100)
        self.mapping = drawn.mapping

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        ids, labels = self.ids[index], self.labels[index]
        return (
            {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels} if self.mapping else (ids, labels)
        )


def cut_to_the_longest(items: list[Any]) -> Any:
    batch = default_collate(items)
    ids = batch["input_ids"] if isinstance(batch, dict) else batch[0]
    longest = int((ids != 0).sum(1).max())
    if isinstance(batch, dict):
        return {name: column[:, :longest] if column.dim() == 2 else column for name, column in batch.items()}
    return [column[:, :longest] if column.dim() == 2 else column for column in batch]


class Seen(pl.Callback):
    """Weights and Adam's second moments after each step, kept by nothing of ours."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.moments: dict[int, dict[str, tuple[Tensor, float]]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = pl_module.state_dict()
        self.weights[trainer.global_step] = {name: value.clone() for name, value in state.items()}
        if pl_module.drawn.optimizer == "AdamW":
            self.moments[trainer.global_step] = second_moments_of(trainer.optimizers[0], pl_module)


@dataclass
class Fit:
    """A drawn fit after it has run, and what brute force says of it."""

    drawn: Drawn
    path: Path
    trainer: Trainer = field(init=False)
    seen: Seen = field(init=False, default_factory=Seen)

    def __post_init__(self) -> None:
        drawn = self.drawn
        methods = ("tracin-we", "tracin-last", *(["*"] if inner_layers(drawn) else []))
        options = {"dtype": drawn.dtype, "cache": drawn.cache, "methods": methods, "on_error": "raise", **drawn.every}
        callbacks = [TracInCallback(self.path, **options), self.seen]
        self.trainer = quiet(callbacks=callbacks, max_epochs=drawn.epochs)
        self.trainer.fit(build(drawn), self.train_loader())

    @cached_property
    def train(self) -> Texts:
        return Texts(self.drawn, self.drawn.n_train, self.drawn.seed + 1)

    @cached_property
    def test(self) -> Texts:
        return Texts(self.drawn, self.drawn.n_test, self.drawn.seed + 2)

    def train_loader(self) -> DataLoader:
        return DataLoader(self.train, batch_sampler=self.drawn.batches, collate_fn=self._collate)

    def test_loader(self) -> DataLoader:
        drawn = self.drawn
        return DataLoader(self.test, drawn.test_batch_size, sampler=drawn.test_order, collate_fn=self._collate)

    @property
    def _collate(self) -> Any:
        return cut_to_the_longest if self.drawn.cut else default_collate

    @cached_property
    def steps(self) -> list[range]:
        """The optimizer steps before each checkpoint, from 0."""
        of_epoch = len(self.drawn.batches)
        ((name, every),) = self.drawn.every.items()
        interval = every if name == "every_n_train_steps" else every * of_epoch
        ends = range(interval, self.drawn.epochs * of_epoch + 1, interval)
        return [range(end - interval, end) for end in ends]

    def rates(self, layer: str) -> list[float]:
        of_table = layer == "embedding" or (layer == "head" and self.drawn.tied)
        rate = RATES[self.drawn.cache][0 if of_table else 1]
        return [rate * sum(DECAY**step for step in steps) / len(steps) for steps in self.steps]

    def counted(self, steps: range) -> Tensor:
        """(n_train,) bool: the examples that count at the checkpoint after some steps."""
        batches = self.drawn.batches
        drawn = {index for step in steps for index in batches[step % len(batches)]}
        return torch.tensor([index in drawn for index in range(self.drawn.n_train)])

    def reference(self, layer: str, side: Texts | None = None) -> BruteForce:
        """Brute force at a layer, by the weights that training had; of the test examples, or of others."""
        test, train = [], []
        for steps in self.steps:
            module = build(self.drawn)
            module.load_state_dict(self.seen.weights[steps.stop])
            untie(module, module.embedding)
            part, losses = module.double().get_submodule(layer), module.influence_loss
            for found, data in ((test, side or self.test), (train, self.train)):
                found.append(
                    dense_gradients(module, part, DataLoader(data), lambda batch, losses=losses: losses(batch))
                )
            train[-1] = train[-1] * self.counted(steps)[:, None, None]
        return BruteForce(self.rates(layer), test, train)

    def expected(self, method: Any, side: Texts | None = None, first: int | None = None) -> Expected:
        """What a method should give, by brute force.

        Args:
            method: the method.
            side: the test examples, if they are others than the fit's.
            first: how many checkpoints count; None for all.
        """
        if isinstance(method, TracInSum):
            mix = [summand.factor for summand in method.summands]
            parts = [self.expected(part, side, first) for part in method.parts]
            scores = sum(factor * part.scores for factor, part in zip(mix, parts, strict=True))
            return Expected(scores, sum(abs(factor) * part.bounds for factor, part in zip(mix, parts, strict=True)))
        layer = layer_of(method)
        brute, options = self.reference(layer, side), {"normalize": method.normalize}
        rates = self._weights(method.weights) or brute.rates
        brute = BruteForce(rates[:first], brute.test[:first], brute.train[:first])
        if isinstance(method, TracInWE):
            options |= {"exclude_tokens": method.exclude_tokens, "top_words": method.top_words}
        if method.precondition == "adam":
            options["second_moments"] = self._second_moments(layer)
        return _with_bounds(brute, brute.scores(**options), **options)

    def _weights(self, weights: str) -> list[float] | None:
        """How checkpoints count, where it is not by learning rates."""
        if weights != "residual":
            return [1.0] * len(self.steps) if weights == "equal" else None
        found = []
        for steps in self.steps:
            module = build(self.drawn)
            module.load_state_dict(self.seen.weights[steps.stop])
            with torch.no_grad():
                losses = torch.cat([module.double().influence_loss(batch) for batch in DataLoader(self.train)])
            residuals = 1 - losses.neg().exp()
            found.append(math.sqrt(float(residuals[self.counted(steps)].mean())))
        return found

    def _second_moments(self, layer: str) -> list[tuple[Tensor, float]]:
        part, found = build(self.drawn).get_submodule(layer), []
        name = "embedding" if layer == "head" and self.drawn.tied else layer
        for steps in self.steps:
            moments = self.seen.moments[steps.stop]
            weight, eps = moments[f"{name}.weight"]
            found.append((with_bias(weight_of(part, weight), moments.get(f"{layer}.bias", (None,))[0]), eps))
        return found


@dataclass(frozen=True)
class Expected:
    """Scores in double precision, NaN where rounding decides, and what each can be at most, by Cauchy and Schwarz."""

    scores: Tensor
    bounds: Tensor

    def require(self, found: Tensor, dtype: str) -> None:
        """Check that scores are these, as exactly as the type that gradients are stored in allows."""
        assert found.shape == self.scores.shape
        errors = (found.double() - self.scores).abs().nan_to_num(0.0)
        worst = (errors / self.bounds.clamp(min=torch.finfo(torch.float64).tiny)).max()
        assert bool((errors <= TOLERANCES[dtype] * self.bounds).all()), f"{worst}: {found}, not {self.scores}"
        assert bool(torch.isfinite(found).all())


def _with_bounds(
    brute: BruteForce,
    scores: Tensor,
    *,
    normalize: str | None,
    second_moments: list[tuple[Tensor, float]] | None = None,
    exclude_tokens: tuple[int, ...] = (),
    top_words: int | None = None,
) -> Expected:
    bounds, unclear = torch.zeros_like(scores), torch.zeros_like(scores, dtype=torch.bool)
    for number, (rate, *sides) in enumerate(zip(brute.rates, brute.test, brute.train, strict=True)):
        weights = product_weights(sides[0], second_moments and second_moments[number])
        norms, doubtful = [], []
        for side in sides:
            chosen = chosen_rows(side, weights, exclude_tokens, top_words)
            norms.append(torch.einsum("iab,iab,ab->i", chosen, chosen, weights).sqrt())
            doubtful.append(_ties(chosen_rows(side, weights, exclude_tokens, None), weights, top_words))
        small = 1e-3 * max(float(each.max()) for each in norms)
        if normalize == "cosine":
            doubtful[0] |= norms[0] < small
            norms[0] = torch.ones_like(norms[0])
        if normalize is not None:
            doubtful[1] |= (norms[1] < small) & (norms[1] > 0)
            norms[1] = torch.ones_like(norms[1])
        # In float32 a gradient is a difference of numbers as large as those of other examples.
        least = 1e-2 * max(float(each.max()) for each in norms)
        bounds += rate * torch.outer(*(each.clamp(min=least) for each in norms))
        unclear |= doubtful[0][:, None] | doubtful[1]
    return Expected(scores.masked_fill(unclear, math.nan), bounds)


def _ties(gradients: Tensor, weights: Tensor, top_words: int | None) -> Tensor:
    """(examples,) bool: whether it is by a hair that a word is among the strongest."""
    if top_words is None or top_words >= gradients.shape[1]:
        return torch.zeros(len(gradients), dtype=torch.bool)
    lengths = (gradients**2 * weights).sum(2).sort(dim=1, descending=True).values
    return lengths[:, top_words] > 0.9 * lengths[:, top_words - 1]


def layer_of(method: Any) -> str:
    if isinstance(method, TracInWE):
        return "embedding"
    return method.name if isinstance(method, TracInLayer) else "head"
