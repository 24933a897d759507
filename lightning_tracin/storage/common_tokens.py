"""The tokens that many training examples hold, counted from a trace's texts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_tracin.storage.checkpoint import Checkpoint, ever_drawn
from lightning_tracin.storage.trace import Trace

#: A token is common if more than this share of the training examples hold it.
COMMON_SHARE = 0.1


def common_tokens(trace: Trace, checkpoints: Sequence[Checkpoint]) -> Tensor:
    """The ids, int64 and ascending, of the tokens that more than a tenth of the training examples hold.

    An example counts once for each token, however often it holds it, and only if training has drawn it before one of
    the checkpoints. The texts are read shard by shard; nothing is found where none are stored.

    Args:
        trace: has the texts.
        checkpoints: those that count in a question, whose examples' texts are stored once it can be answered: so the
            answer does not depend on what was asked before, and stored for that.

    Raises:
        ValueError: if a file of the texts is damaged.
    """
    is_whole = trace.has_texts_of(ever_drawn(checkpoints))
    return _counted(trace.path, trace.id, tuple(each.id for each in checkpoints), is_whole)


@lru_cache(maxsize=8)
def _counted(path: Path, _: Hashable, ids: Sequence[str], *__: Hashable) -> Tensor:
    """What :func:`common_tokens` gives, counted once for each state of a trace: a question asks for it twice."""
    trace = Trace(path)
    if not trace.has_texts:
        return torch.empty(0, dtype=torch.long)
    drawn = ever_drawn([each for each in trace.checkpoints if each.id in ids])
    is_drawn = torch.ones(trace.n_train, dtype=torch.bool) if drawn is None else drawn
    tokens = counts = torch.empty(0, dtype=torch.long)
    for examples in trace.parts():
        texts = trace.texts(examples)
        held = torch.unique((texts.ids * len(examples) + texts.examples)[is_drawn[texts.examples + examples.start]])
        of_shard, n_examples = torch.unique_consecutive(held // len(examples), return_counts=True)
        tokens, place = torch.unique(torch.cat([tokens, of_shard]), return_inverse=True)
        counts = torch.zeros(len(tokens), dtype=torch.long).index_add_(0, place, torch.cat([counts, n_examples]))
    return tokens[counts > COMMON_SHARE * int(is_drawn.sum())]
