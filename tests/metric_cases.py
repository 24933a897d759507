"""Each metric with inputs that can be cut into batches; and a script of two processes: ``metric_cases.py FOLDER``.

As a script it writes what each metric's ``compute`` gave where each process had one half, and where one had all.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin import metrics as M

N_TEST, N_TRAIN, M_SUBSETS, N_SEEDS = 10, 30, 12, 2


@dataclass
class Case:
    """A metric, what it is updated with, along which dimension that is cut, and the function of the same name."""

    metric: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    dims: tuple[int, ...]
    function: Callable[..., Any]

    def batch(self, first: int, last: int) -> tuple[Tensor, ...]:
        pairs = zip(self.inputs, self.dims, strict=True)
        return tuple(each.narrow(dim, first, last - first) for each, dim in pairs)

    @property
    def size(self) -> int:
        return self.inputs[0].shape[self.dims[0]]


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    scores, other = torch.randn(N_TEST, N_TRAIN), torch.randn(N_TEST, N_TRAIN)
    subsets, labels = torch.rand(M_SUBSETS, N_TRAIN) < 0.5, torch.arange(N_TRAIN) % 3
    outputs = torch.randn(M_SUBSETS, N_SEEDS, N_TEST) + (subsets.float() @ scores.T).unsqueeze(1)
    ks, changes = (5, 10, 20), torch.randn(N_TEST, N_SEEDS, 3)
    predictions, test_labels = torch.randint(2, (N_TEST, 3, 3)), torch.randint(2, (N_TEST,))
    alone, removed = torch.randn(9, N_TEST), torch.randperm(N_TRAIN)[:9]
    noisy, words, common = torch.rand(N_TRAIN) < 0.3, torch.randint(-1, 9, (N_TEST, 4)), torch.tensor([0, 1, 2])
    suspicion, F = (scores[0].round(), noisy), M.functional
    of_lds = partial(F.linear_datamodeling_score, subsets=subsets)

    def lds(within: Tensor | None = None) -> Case:
        metric = partial(M.LinearDatamodelingScore, subsets, within)
        return Case(metric, (scores, outputs), (0, 2), lambda s, o: of_lds(s, outputs=o, within=within))

    return {
        "LinearDatamodelingScore": lds(),
        "LinearDatamodelingScore within": lds(labels),
        "LeaveOneOutCorrelation": Case(
            partial(M.LeaveOneOutCorrelation, removed),
            (scores, alone),
            (0, 1),
            partial(F.leave_one_out_correlation, removed=removed),
        ),
        "DeletionCurve": Case(partial(M.DeletionCurve, ks), (changes,), (0,), partial(F.deletion_curve, ks=ks)),
        "Brittleness": Case(
            partial(M.Brittleness, ks), (predictions, test_labels), (0, 0), partial(F.brittleness, ks=ks)
        ),
        "TailPatch": Case(M.TailPatch, (changes[:, 0],), (0,), F.tail_patch),
        "MislabelDetectionAUROC": Case(M.MislabelDetectionAUROC, suspicion, (0, 0), F.mislabel_detection_auroc),
        "MislabelDetectionCurve": Case(M.MislabelDetectionCurve, suspicion, (0, 0), F.mislabel_detection_curve),
        "NoiseDetectionRate": Case(
            partial(M.NoiseDetectionRate, at=0.3), suspicion, (0, 0), partial(F.noise_detection_rate, at=0.3)
        ),
        "ClassDetection": Case(
            partial(M.ClassDetection, labels, k=4),
            (scores, test_labels),
            (0, 0),
            lambda s, t: F.class_detection(s, labels, t, k=4),
        ),
        "TopKCardinality": Case(partial(M.TopKCardinality, k=3), (scores,), (0,), partial(F.top_k_cardinality, k=3)),
        "ModelRandomization": Case(M.ModelRandomization, (scores, other), (0, 0), F.model_randomization),
        "RecallAtK": Case(partial(M.RecallAtK, k=5), (scores, other > 1), (0, 0), partial(F.recall_at_k, k=5)),
        "CommonWordShare": Case(
            partial(M.CommonWordShare, common), (words,), (0,), partial(F.common_word_share, common=common)
        ),
        "CancellationEffect": Case(
            partial(M.CancellationEffect, N_TEST), (scores.T.contiguous(),), (0,), F.cancellation_effect
        ),
    }


def numbers(value: Any) -> Any:
    """A result as lists of numbers, for comparison and JSON."""
    if isinstance(value, Tensor):
        return value.tolist()
    return None if value is None else [numbers(each) for each in value]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = {}
    for name, case in cases().items():
        metric, half = case.metric(), case.size // 2 + 1  # unequal parts
        metric.update(*(case.batch(0, half) if rank == 0 else case.batch(half, case.size)))
        alone = case.metric()  # whose batches all came to the first process
        if rank == 0:
            alone.update(*case.inputs)
        found[name] = [numbers(metric.compute()), numbers(alone.compute())]
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
