"""Test examples against stored gradients: what a query after the fit and the log of a validation inside it share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.bridge.mixin import label_names_of, labels_of_module, tokenizer_of, words_of_batch
from lightning_tracin.bridge.targets import TargetLosses
from lightning_tracin.gradients.capture import Captured
from lightning_tracin.gradients.losses import NOT_FINITE_ADVICE, require_one_each
from lightning_tracin.gradients.predictions import PredictionProbe
from lightning_tracin.gradients.rows import unique_tokens
from lightning_tracin.gradients.sites import last_site
from lightning_tracin.gradients.targets import Target
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.parallel.fsdp import is_fsdp, local_weights_restored
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.scoring.kernels import Kernels
from lightning_tracin.scoring.methods import Method, word_part
from lightning_tracin.scoring.ridge_scores import ridge_scores
from lightning_tracin.scoring.score import PreparedTests, Scores, joined_scores, score, with_scales
from lightning_tracin.scoring.terms import Term, terms_at
from lightning_tracin.storage.checkpoint import Checkpoint, undrawn
from lightning_tracin.storage.common_tokens import common_tokens
from lightning_tracin.storage.scratch import Scratch
from lightning_tracin.storage.trace import Trace

_LABELS_READ = 4096  # of so many training examples, which tell of what kind labels are


class Queries:
    """Some test examples: what they say, and their prepared gradients at each checkpoint.

    Args:
        module: the module, which is given each checkpoint's weights in turn.
        method: what scores will be.
        trace: the checkpoints and the training examples' gradients.
        target: what of the test examples is explained; their labels by default.
    """

    def __init__(self, module: nn.Module, method: Method, trace: Trace, target: Target | None = None) -> None:
        self.module = module
        self.method = method
        self.trace = trace
        self.label_names = label_names_of(module)
        self.probe = probe_of(module, trace)
        self.target = target or Target()
        self.targets = TargetLosses(module, self.target, self.probe, partial(first_labels, trace))
        self.target_names: list[str] = []
        self.target_classes: list[int] = []
        self.predictions = torch.empty(0, 2, dtype=torch.float64)
        self.indices = torch.empty(0, dtype=torch.long)
        self.texts = Texts.empty(0)
        self.vocabulary: dict[int, str] = {}
        self.checkpoints: list[Checkpoint] = []
        self.scores: Scores | None = None
        self._terms: list[Term] = []
        self._gradients: list[Any] = []
        self._taken: list[int] = []
        self._captured: list[Captured] = []
        self._texts: list[Texts] = []
        self._predictions: list[Tensor] = []
        self._counted = False

    def take(self, captured: Captured, indices: list[int], batch: Any) -> None:
        """Keep a batch's gradients and texts.

        Args:
            captured: its gradients.
            indices: of its examples in their data set; none for a stream, whose examples are counted.
            batch: the batch itself.

        Raises:
            ValueError: if the examples cannot be numbered, or a gradient is not finite.
        """
        numbers = indices or list(range(len(self._taken), len(self._taken) + len(captured)))
        require_one_each(len(captured), len(numbers), "test")
        bad = captured.first_not_finite()
        if bad is not None:
            what = captured.fault(bad)
            raise ValueError(f"The {what} of test example {numbers[bad]} is NaN or infinite. {NOT_FINITE_ADVICE}")
        self._taken.extend(numbers)
        self._captured.append(captured)
        labels = labels_of_module(self.module, batch, len(captured))
        self._texts.append(captured.texts(self.targets.known(labels)))
        self._predictions.append(self.targets.predictions(batch, labels, captured.losses))
        self._counted = not indices
        if not self.checkpoints:
            new = [token for token in unique_tokens(captured.token_ids) if token not in self.vocabulary]
            self.vocabulary.update(words_of_batch(self.module, batch, new))

    def finish_checkpoint(self, checkpoint: Checkpoint, processes: Processes) -> None:
        """Arrange what any process has taken at a checkpoint in the order of the data set.

        Raises:
            ValueError: if there are no examples, or others than at the checkpoint before.
        """
        terms = terms_at(checkpoint, self.method)
        keys = list(dict.fromkeys(term.site.key for term in terms))
        blocks = {key: [captured.gradients[key] for captured in self._captured] for key in keys}
        names = [] if self.target.is_plain else [self.targets.name_of(number) for number in self._taken]
        own = (self._taken, self._texts, self._predictions, names, blocks, self.vocabulary, self.targets.classes)
        parts = processes.gather(own)
        taken, texts, predictions, names = ([each for part in parts for each in part[number]] for number in range(4))
        for part in parts:
            self.vocabulary.update(part[5])
            self.target_classes = list(part[6]) or self.target_classes  # a process without examples knows none
        if not taken:
            raise ValueError("The test loader is empty: there is nothing to explain.")
        places, indices = _places(taken)
        self._arrange(places, indices, texts, predictions)
        name_of = dict(zip(taken, names, strict=False))
        self.target_names = [name_of[number] for number in indices.tolist()] if names else []
        captured = {}
        for key in keys:
            of_site = [block for part in parts for block in part[4][key]]
            captured[key] = type(of_site[0]).cat(of_site).arranged(places, len(indices))
        self._terms += terms
        self._gradients += [term.prepared_tests(captured[term.site.key]) for term in terms]
        self.checkpoints.append(checkpoint)
        self._taken, self._captured, self._texts, self._predictions = [], [], [], []

    def score(
        self,
        k: int | None,
        processes: Processes,
        device: torch.device,
        *,
        kernels: Kernels | None = None,
        strict: bool = True,
    ) -> None:
        """Multiply the gradients with the stored ones; a sum whose scales are not known gets those of these examples.

        Args:
            k: keep only the k strongest proponents and opponents of each test example.
            processes: those that each score their share.
            device: what multiplies.
            kernels: of a method that is a ridge, also for other blocks of test examples.
            strict: refuse a sum of which one part's scores are all the same.

        Raises:
            ValueError: if scores are not finite, or a part's are all the same.
        """
        if kernels is not None:
            self.scores = ridge_scores(self.tests, k, kernels)
            return
        self.method = with_scales(self.method, [self.tests], processes, device, strict=strict)
        self.scores = score(self.tests.counted_by(self.method), k, processes, device)

    @property
    def tests(self) -> PreparedTests:
        """The test examples as they are multiplied, until their gradients are dropped."""
        return PreparedTests(self.indices, self._terms, self._gradients)

    def word_gradients(self) -> list[WordGradients]:
        """The prepared rows at each checkpoint that word terms are products of; none for a method without words."""
        if word_part(self.method) is None:
            return []
        return [gradients for gradients in self._gradients if isinstance(gradients, WordGradients)]

    def drop_gradients(self) -> None:
        """Forget the gradients, which are not needed any more."""
        self._gradients = []

    def _arrange(self, places: Tensor, indices: Tensor, texts: list[Texts], predictions: list[Tensor]) -> None:
        """Texts and predictions in the order of the data set; those of the last checkpoint stay."""
        arranged = Texts.cat(texts).arranged(places, len(indices))
        if not self.checkpoints:
            self.indices, self.texts = indices, arranged
        elif not torch.equal(indices, self.indices) or (self._counted and not arranged.equals(self.texts)):
            raise ValueError(
                "The test loader gave other examples at each pass, one for each checkpoint. Use a sampler that yields "
                "the same examples each time; their order does not matter, unless the data set is a stream."
            )
        found = torch.cat(predictions)
        self.predictions = found.new_empty(len(indices), 2)
        self.predictions[places[places >= 0]] = found[places >= 0]


def result_of(blocks: Sequence[Queries], gradients: Sequence[list[WordGradients]], scratch: Scratch) -> InfluenceResult:
    """What was found out about several blocks of test examples, one after the other.

    Args:
        blocks: each scored.
        gradients: of each, what word terms are products of.
        scratch: holds those that lie in files.
    """
    first = blocks[0]
    scores = joined_scores([block.scores for block in blocks if block.scores is not None])
    vocabulary = dict(first.trace.vocabulary)
    for block in blocks:
        vocabulary |= block.vocabulary
    return InfluenceResult(
        method=first.method,
        n_train=first.trace.n_train,
        test_indices=torch.cat([block.indices for block in blocks]),
        test_texts=Texts.cat([block.texts for block in blocks]),
        test_gradients=[each for each in gradients if each],
        words_of_ids=vocabulary,
        label_names=first.label_names,
        predictions=torch.cat([block.predictions for block in blocks]),
        trace=first.trace,
        checkpoint_ids=[each.id for each in first.checkpoints],
        checkpoint_steps=[each.step for each in first.checkpoints],
        candidates=first.trace.header.candidates,
        scores=scores.scores,
        strongest_proponents=scores.proponents,
        strongest_opponents=scores.opponents,
        totals=scores.totals,
        undrawn=undrawn(first.checkpoints),
        common_tokens=first.texts.ids[:0]
        if word_part(first.method) is None
        else common_tokens(first.trace, first.checkpoints),
        target=str(first.target),
        target_names=[name for block in blocks for name in block.target_names],
        target_classes=first.target_classes,
        tokenizer=tokenizer_of(first.module),
        scratch=scratch,
    )


def probe_of(module: nn.Module, trace: Trace) -> PredictionProbe:
    """What sees the predictions of a module."""
    last = last_site(trace.sites)
    return PredictionProbe(module, None if last is None else last.layer)


def first_labels(trace: Trace) -> Tensor:
    """(n,) the labels of the first training examples, NaN where they are not one number; none if none are stored."""
    return trace.texts(range(min(trace.n_train, _LABELS_READ))).labels if trace.has_texts else torch.empty(0)


@contextmanager
def weights_kept(module: nn.Module) -> Iterator[None]:
    """Give a module back the weights, buffers, their types and the training flags that it had.

    A trainer in true half or double precision casts the module that it is given.
    """
    if is_fsdp(module):
        with local_weights_restored(module):
            yield
        return
    state = {name: value.cpu().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    dtypes = {name: each.dtype for name, each in _tensors(module).items()}
    buffers = {name: each.cpu().clone() for name, each in module.named_buffers() if name not in state}
    training = {part: part.training for part in module.modules()}
    told = {part: part._dtype for part in training if isinstance(getattr(part, "_dtype", None), torch.dtype)}
    try:
        yield
    finally:
        for name, each in _tensors(module).items():
            if each.dtype != dtypes.get(name, each.dtype):
                each.data = each.data.to(dtypes[name])
        module.load_state_dict(state, strict=False)
        for name, each in module.named_buffers():
            if name in buffers and each.shape == buffers[name].shape:
                each.data = buffers[name].to(each.device)
        for part, flag in training.items():
            part.training = flag
        for part, dtype in told.items():
            part.__dict__["_dtype"] = dtype


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _places(indices: list[int]) -> tuple[Tensor, Tensor]:
    """Of examples as they came: the place of each by data set index (-1 for a repetition), and the indices."""
    taken = torch.tensor(indices)
    seen, place = torch.unique(taken, return_inverse=True)
    first = torch.full((len(seen),), len(taken)).scatter_reduce(0, place, torch.arange(len(taken)), "amin")
    places = torch.full((len(taken),), -1)
    places[first] = torch.arange(len(seen))
    return places, seen
