"""Test examples against stored gradients: what a query after the fit and the log of a validation inside it share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.capture import Captured
from lightning_tracin.gradients import Texts, distinct, on_device
from lightning_tracin.losses import labels_of
from lightning_tracin.methods import Method, TracInWE
from lightning_tracin.mixin import label_names_of, tokenizer_of, words_of_batch
from lightning_tracin.predictions import Outputs
from lightning_tracin.processes import Processes
from lightning_tracin.result import InfluenceResult
from lightning_tracin.scores import TopK, merge_top, moments_of, top_of
from lightning_tracin.sharded import is_sharded, parts_kept
from lightning_tracin.trace import Checkpoint, Trace, gradients_of, texts_of


class TestExamples:
    """The test examples of one query: what they say, and their prepared gradients at each checkpoint.

    Args:
        module: the module, which is given each checkpoint's weights in turn.
        method: what scores will be.
        trace: the checkpoints and the training examples' gradients.
    """

    def __init__(self, module: nn.Module, method: Method, trace: Trace) -> None:
        self.module = module
        self.method = method
        self.trace = trace
        self.label_names = label_names_of(module)
        self.outputs = Outputs(module, trace.layers.get("tracin-last"))
        self.predictions = torch.empty(0, 2, dtype=torch.float64)
        self.indices = torch.empty(0, dtype=torch.long)
        self.texts = Texts(0, self.indices, self.indices, torch.empty(0, dtype=torch.float64))
        self.vocabulary: dict[int, str] = {}
        self.gradients: list[Any] = []
        self._came: list[int] = []
        self._blocks: list[Any] = []
        self._texts: list[Texts] = []
        self._predictions: list[Tensor] = []
        self._counted = False

    def take(self, captured: Captured, indices: list[int], batch: Any) -> None:
        """Keep a batch's gradients and texts."""
        came = indices or list(range(len(self._came), len(self._came) + len(captured)))  # a stream's are counted
        if len(came) != len(captured):
            raise ValueError(
                f"A batch of {len(came)} test examples has {len(captured)} losses: the collate function drops or adds "
                "examples, so that they cannot be numbered."
            )
        bad = captured.first_not_finite()
        if bad is not None:
            raise ValueError(f"The loss or gradient of test example {came[bad]} is NaN or infinite.")
        self._came.extend(came)
        self._blocks.append(gradients_of(captured, self.method.name))
        self._texts.append(texts_of(captured, labels_of(batch)))
        self._predictions.append(self.outputs.predictions(len(captured), labels_of(batch)))
        self._counted = not indices
        if not self.gradients:
            new = [token for token in distinct(captured.token_ids) if token not in self.vocabulary]
            self.vocabulary.update(words_of_batch(self.module, batch, new))

    def finish_checkpoint(self, checkpoint: Checkpoint, processes: Processes) -> None:
        """Arrange what came to any process at a checkpoint in the order of the data set."""
        own = (self._came, self._blocks, self._texts, self._predictions)
        parts = processes.gather((*own, self.vocabulary))
        self._came, self._blocks, self._texts, self._predictions = (
            [each for part in parts for each in part[number]] for number in range(len(own))
        )
        for part in parts:
            self.vocabulary.update(part[-1])
        if not self._blocks:
            raise ValueError("The test loader is empty: there is nothing to explain.")
        places, indices = _places(self._came)
        texts = Texts.cat(self._texts).arranged(places, len(indices))
        if not self.gradients:
            self.indices, self.texts = indices, texts
        elif not torch.equal(indices, self.indices) or (self._counted and not texts.equals(self.texts)):
            raise ValueError(
                "The test loader gave other examples at each pass, one for each checkpoint. Use a sampler that yields "
                "the same examples each time; their order does not matter, unless the data set is a stream."
            )
        block = type(self._blocks[0]).cat(self._blocks).arranged(places, len(indices))
        block = self.trace.kept.of(block)  # as the training side was stored
        self.gradients.append(self.method.prepare(block, moments_of(checkpoint, self.method), "test"))
        predictions = torch.cat(self._predictions)
        self.predictions = predictions.new_empty(len(indices), 2)
        self.predictions[places[places >= 0]] = predictions[places >= 0]  # those of the last checkpoint stay
        self._came, self._blocks, self._texts, self._predictions = [], [], [], []


def scored(
    test: TestExamples, checkpoints: Sequence[Checkpoint], k: int | None, processes: Processes, device: torch.device
) -> InfluenceResult:
    """Multiply test gradients with the stored ones, shard by shard: no more than one shard is in memory.

    Each process scores its share of the shards, and all have the result.

    Args:
        test: the test examples, with their gradients at each of the checkpoints.
        checkpoints: those that have the method's gradients.
        k: keep only the k strongest proponents and opponents of each test example.
        processes: those that each score their share.
        device: what multiplies.

    Raises:
        ValueError: if scores are not finite.
    """
    result = _unscored(test, checkpoints)
    method = result.method
    stored = [checkpoint.gradients(method.name) for checkpoint in checkpoints]
    moments = [moments_of(checkpoint, method) for checkpoint in checkpoints]
    rates = [checkpoint.learning_rate_of(method.name) for checkpoint in checkpoints]
    columns: list[Tensor] = [torch.zeros(len(result.test_indices), 0)]
    strongest: list[tuple[TopK, TopK]] = []
    totals = torch.zeros(len(result.test_indices), 2, dtype=torch.float64)
    for shard in processes.share(len(stored[0])):
        start, stop = stored[0].bounds(shard)
        scores = torch.zeros(len(result.test_indices), stop - start, dtype=torch.float32, device=device)
        for gradients, shards, moment, rate in zip(test.gradients, stored, moments, rates, strict=True):
            block = shards.read(shard)
            scores += rate * method.dot(on_device(gradients, device), method.prepare(block, moment, "train"), moment)
        totals += torch.stack([scores.clamp(min=0).sum(1), scores.clamp(max=0).sum(1)], 1).cpu()
        if not torch.isfinite(totals).all():
            example = int(result.test_indices[~torch.isfinite(totals).all(1)][0])
            raise ValueError(
                f"Scores of test example {example} are too large for float32: the products of its gradients with those "
                'of training examples overflow. Use a method with normalize="cosine", or look at the learning rate.'
            )
        if k is None:
            columns.append(scores.cpu())
        else:
            strongest = [merge_top([*strongest, top_of(scores, start, k)], k)]
    result.totals = torch.stack(processes.gather(totals)).sum(0)
    if k is None:
        result.scores = torch.cat(processes.gather(torch.cat(columns, dim=1)), dim=1)
    else:
        parts = [part for of_process in processes.gather(strongest) for part in of_process]
        result.strongest_proponents, result.strongest_opponents = merge_top(parts, k)
    return result


def _unscored(test: TestExamples, checkpoints: Sequence[Checkpoint]) -> InfluenceResult:
    """All that a result says of the test examples, but the scores."""
    return InfluenceResult(
        method=test.method,
        n_train=test.trace.n_train,
        test_indices=test.indices,
        test_texts=test.texts,
        test_gradients=test.gradients if isinstance(test.method, TracInWE) else [],  # only word terms need them later
        words_of_ids={**test.trace.vocabulary, **test.vocabulary},
        label_names=test.label_names,
        predictions=test.predictions,
        trace=test.trace,
        checkpoint_ids=[each.id for each in checkpoints],
        tokenizer=tokenizer_of(test.module),
    )


@contextmanager
def weights_kept(module: nn.Module) -> Iterator[None]:
    """Give a module back the weights and the training flags that it had."""
    if is_sharded(module):
        with parts_kept(module):
            yield
        return
    state = {name: value.cpu().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    training = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        module.load_state_dict(state, strict=False)
        for part, flag in training.items():
            part.training = flag


def _places(indices: list[int]) -> tuple[Tensor, Tensor]:
    """Of examples as they came: the place of each by data set index (-1 for a repetition), and the indices."""
    came = torch.tensor(indices)
    seen, place = torch.unique(came, return_inverse=True)
    first = torch.full((len(seen),), len(came)).scatter_reduce(0, place, torch.arange(len(came)), "amin")
    places = torch.full((len(came),), -1)
    places[first] = torch.arange(len(seen))
    return places, seen
