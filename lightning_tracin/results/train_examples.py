"""What training examples say, read of a trace."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_tracin.report.explanation import Example
from lightning_tracin.results.reader import RawText, Reader
from lightning_tracin.storage.trace import Trace


def train_examples(
    trace: Trace, indices: Sequence[int], reader: Reader, raw_texts: Sequence[RawText] | None = None
) -> dict[int, Example]:
    """Some training examples in words, by index.

    Args:
        trace: has their token ids and labels.
        indices: in the training data set, distinct.
        reader: knows what to print for them.
        raw_texts: the text of every training example as it was written, if they are at hand.
    """
    if not indices:
        return {}
    texts = trace.texts(indices)
    said = zip(indices, texts.ids_by_example(), texts.marks_by_example(), strict=True)
    return {
        index: reader.example(
            index, ids, texts.label_of(place), raw_texts, marks=marks, label_set=texts.label_set_of(place)
        )
        for place, (index, ids, marks) in enumerate(said)
    }
