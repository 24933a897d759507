"""What may stand as test examples: loaders, one or several, data sets, rows, texts; each comes in a loader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_tracin.bridge.collated_order import check_order
from lightning_tracin.bridge.compat import DATAMODULES
from lightning_tracin.bridge.mixin import label_names_of
from lightning_tracin.bridge.query_examples import checked_test_loader
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.bridge.unmoved import unmoved
from lightning_tracin.gradients.losses import hugging_face_model
from lightning_tracin.querying.asked import has_loader, last_fits, loader_of_datamodule
from lightning_tracin.querying.example_forms import is_pair
from lightning_tracin.querying.passes import Query
from lightning_tracin.querying.raw_examples import Collation, RawExamples
from lightning_tracin.results.result import InfluenceResult

_MOST_TOKENS = 10**6  # a tokenizer without a limit tells a number of thirty digits


@dataclass(frozen=True)
class AskedExamples:
    """The test examples of one loader.

    Attributes:
        name: its key or number, where there are several; else empty.
        loader: gives them in batches.
        raw: what they were made of, if they came without a loader.
    """

    name: str
    loader: Any
    raw: RawExamples | None = None

    def ready(self, longest: int | None) -> Any:
        """The loader, when all training texts are stored, of which the longest has so many tokens.

        Raises:
            ValueError: if the collate function puts examples in another order.
        """
        if self.raw is None:
            return self.loader
        self.raw.cut_at(longest)
        return _in_order(self.loader)


def examples_asked(query: Query, given: Any, train_dataloaders: Any) -> list[AskedExamples]:
    """The test examples of a question, in one loader or in several.

    Args:
        query: what is asked.
        given: what was passed for them; None for those of the datamodule that was passed, or that of the fit.
        train_dataloaders: that were passed.

    Raises:
        TypeError: if something is passed that is neither.
        ValueError: if there are none, or if it is not known how to make batches of them.
    """
    if given is None:
        if query.datamodule is None:
            raise ValueError(
                "There is nothing to explain: pass test examples, as in trainer.influence(test_loader), "
                'trainer.influence(["some text"], target="prediction") or trainer.influence(datamodule).'
            )
        given = loader_of_datamodule(query.trainer, query.datamodule, "test", query.processes)
    asked = []
    collation: list[Collation | None] = []  # found at most once
    for name, part in _parts(given).items():
        rows = _rows_of(part)
        if rows is None:
            asked.append(AskedExamples(name, _in_order(checked_test_loader(part, name))))
            continue
        if not collation:
            collation.append(_collation(query, train_dataloaders))
        raw = _raw(query, rows, collation[0])
        asked.append(AskedExamples(name, raw.loader(), raw))
    return asked


def told_by_loader(result: InfluenceResult, asked: Sequence[AskedExamples], owners: Sequence[int]) -> InfluenceResult:
    """A result that knows which loader each test example came in, and the texts that were passed as such.

    Args:
        result: of all loaders, one after the other.
        asked: its loaders.
        owners: for each row, the number of its loader.
    """
    if len(asked) > 1:
        names = tuple(each.name for each in asked)
        result = replace(result, test_loaders=torch.tensor(owners), test_loader_names=names)
    tokenizer = next((each.raw.tokenizer for each in asked if each.raw is not None), None)
    texts = {each.name: each.raw.texts() for each in asked if each.raw is not None}
    known = {name: of_loader for name, of_loader in texts.items() if of_loader is not None}
    if not known or not getattr(tokenizer, "is_fast", False):
        return result
    return result.with_texts(test=known if len(asked) > 1 else known[""], tokenizer=tokenizer)


def _parts(given: Any) -> dict[str, Any]:
    """Each loader, data set or list of rows by its name, which is empty where there is one.

    Raises:
        TypeError: if they are in something else than a list or a mapping.
        ValueError: if there are none.
    """
    given = getattr(given, "iterables", given)  # Lightning's CombinedLoader
    if isinstance(given, Mapping):
        parts = {str(name): part for name, part in given.items()}
        if len(parts) < len(given):
            raise ValueError(f"The names of test loaders must differ in print, but got {list(given)}.")
        if not all(map(_gives_examples, parts.values())):
            raise TypeError(
                f"The test examples are a {type(given).__name__} with {', '.join(parts)}, whose values are neither "
                "loaders nor data sets. Pass a list of rows, [row], or of texts; a batch cannot be asked about."
            )
    elif isinstance(given, (list, tuple)) and any(map(_gives_examples, given)):
        if not all(map(_gives_examples, given)):
            raise TypeError(
                "Of the list of test examples some are loaders or data sets, others are not: pass one kind."
            )
        parts = {str(number): part for number, part in enumerate(given)}
    else:
        return {"": given}
    if not parts:
        raise ValueError("There is no test loader in what was passed: there is nothing to explain.")
    return parts if len(parts) > 1 else {"": next(iter(parts.values()))}


def _gives_examples(part: Any) -> bool:
    """Whether something is a loader or a data set, rather than an example."""
    return isinstance(part, (DataLoader, IterableDataset)) or _is_dataset(part) or _is_stream(part)


def _is_dataset(part: Any) -> bool:
    """Whether something has examples by their numbers, as data sets of torch and of Hugging Face have."""
    kinds = (str, bytes, list, tuple, Mapping, Tensor, np.ndarray, np.generic, DataLoader, IterableDataset)
    plain = isinstance(part, kinds) or hasattr(part, "iloc") or isinstance(part, type)
    return not plain and hasattr(part, "__getitem__") and isinstance(part, Sized)


def _is_stream(part: Any) -> bool:
    """Whether something is a loader of the user's own, which gives batches."""
    return isinstance(part, Iterable) and not isinstance(part, type) and not hasattr(part, "__getitem__")


def _rows_of(part: Any) -> Sequence[Any] | None:
    """Examples that come without a loader; None for a loader.

    Raises:
        TypeError: if they are something that has no examples.
        ValueError: if they are none.
    """
    if isinstance(part, str):
        _require_text(part)
        part = [part]
    if isinstance(part, type):
        raise TypeError(f"The test examples are the class {part.__name__}. Pass one of it: {part.__name__}(...).")
    if isinstance(part, (list, tuple)) and any(isinstance(each, DATAMODULES) for each in part):
        raise TypeError("The test examples can be those of one datamodule: pass it by itself, not in a list.")
    if not (isinstance(part, (list, tuple)) or _is_dataset(part)):
        return None
    if len(part) == 0:
        raise ValueError(f"The {type(part).__name__} of test examples is empty: there is nothing to explain.")
    kinds = {"text" if isinstance(each, str) or is_pair(each) else "other" for each in _listed(part)}
    if len(kinds) > 1:
        raise TypeError(
            "Of the test examples some are texts (a string, or a tuple of two), others are not. Pass examples of one "
            "kind."
        )
    rows: Sequence[Any] = part
    return rows


def _listed(part: Any) -> Iterator[Any]:
    """The examples of a list; of a data set, which may be slow to read, none."""
    return iter(part if isinstance(part, (list, tuple)) else ())


def _require_text(given: str) -> None:
    """Check that a string is not meant as a path.

    Raises:
        ValueError: if there is a file or a folder of that name.
    """
    if given and os.path.exists(given):  # noqa: PTH110 (never raises)
        raise ValueError(
            f"{given!r} is taken for a text to explain, but it is a file or a folder. Read it, and pass its texts or "
            f"rows in a list; the folder that a fit recorded goes to trace=.... To ask about this very text, pass "
            f"[{given!r}]."
        )


def _in_order(loader: Any) -> Any:
    """A loader whose examples come in their order, which is checked."""
    with unmoved(loader):
        check_order(loader, "test")
    return loader


def _raw(query: Query, rows: Sequence[Any], collation: Collation | None) -> RawExamples:
    """Test examples without a loader, in the form of training's."""
    tokenizer = query.tokenizer
    config = getattr(hugging_face_model(query.module), "config", None)
    limits = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    known = [each for each in limits if isinstance(each, int) and 0 < each < _MOST_TOKENS]
    return RawExamples(
        rows,
        collation,
        tokenizer,
        label_names=label_names_of(query.module),
        most_tokens=min(known, default=None),
    )


def _collation(query: Query, train_dataloaders: Any) -> Collation | None:
    """How training made its batches: by the loader that was passed, that of the fit, or the datamodule's."""
    if train_dataloaders is not None:
        return Collation.of_loader(TrainingSet(train_dataloaders).loader)
    fits = [each.training_set.loader for each in last_fits(query.trainer) if each.trace.id == query.trace.id]
    if fits:
        return Collation.of_loader(fits[0])
    datamodule = query.datamodule
    if datamodule is None or not has_loader(datamodule, "train"):
        return None
    return Collation.of_loader(
        TrainingSet(loader_of_datamodule(query.trainer, datamodule, "train", query.processes)).loader
    )
