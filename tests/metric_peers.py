"""What dattri 0.3.0 and quanda 0.5.0 compute, written from their sources, as they need more than a test can install.

``test_peers_themselves`` of tests/metrics/test_peers.py compares these with dattri where that is installed.
"""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.regression import spearman_corrcoef


def spearman(first, second):
    """scipy.stats.spearmanr of two vectors: Pearson's correlation of ranks by counting."""
    ranked = [
        [(np.asarray(each) < value).sum() + (np.asarray(each) == value).sum() / 2 for value in np.asarray(each)]
        for each in (first, second)
    ]
    return np.corrcoef(*ranked)[0, 1]


def dattri_lds(score, ground_truth):
    """dattri.metric.metrics.lds: score (n_train, n_test), outputs (m, n_test) and indices (m, size)."""
    outputs, indices = ground_truth
    sums = torch.stack([score.T[:, index].sum(dim=1) for index in indices])
    return torch.tensor([spearman(sums[:, test], outputs[:, test]) for test in range(score.shape[1])])


def dattri_loo_corr(score, ground_truth):
    """dattri.metric.metrics.loo_corr: score (n_train, n_test), outputs (n_models, n_test); removed indices unused."""
    outputs, _ = ground_truth
    tests = range(score.shape[1])
    return torch.tensor([np.corrcoef(score[:, test], outputs[:, test])[0, 1] for test in tests])


def dattri_mislabel_detection_auc(score, is_noise):
    """dattri.metric.metrics.mislabel_detection_auc."""
    noise = set(torch.where(is_noise)[0].tolist())
    order = torch.argsort(score).flip(0).tolist()
    false_rates, true_rates = [0.0], [0.0]
    for count in range(1, len(order) + 1):
        found = len(noise & set(order[:count]))
        true_rates.append(found / len(noise))
        false_rates.append((count - found) / (len(order) - len(noise)))
    return torch.trapz(torch.tensor(true_rates), torch.tensor(false_rates))


def dattri_brittleness_order(scores):
    """The order in which dattri.metric.britteness.brittleness removes training examples."""
    return np.argsort(scores.numpy())[::-1]


def quanda_lds(explanations, subsets, outputs):
    """LinearDatamodelingMetric: mean over test examples of Spearman's correlation of sums and outputs (m, n_test)."""
    sums = torch.stack([explanations[:, subset].sum(dim=1) for subset in subsets], dim=1)
    return spearman_corrcoef(outputs, sums.T).mean()


def quanda_global_rank(self_influence):
    """SelfInfluenceRanking.get_global_rank: the index, times 1e-4, is added to the scores."""
    indices = torch.arange(self_influence.numel(), dtype=self_influence.dtype)
    return torch.argsort(self_influence + indices * 1e-4, descending=True, stable=True)


def quanda_mislabeling_detection(ranking, mislabeled):
    """MislabelingDetectionMetric.compute, from a ranking: curve and score."""
    curve = mislabeled[ranking].double().cumsum(0) / mislabeled.sum()
    return curve, torch.trapezoid(curve) / len(ranking)


def quanda_class_detection(explanations, train_labels, test_labels, s):
    """ClassDetectionMetric: the mean share of the same class among the s highest."""
    _, top = explanations.topk(k=s, dim=1)
    return (train_labels[top] == test_labels.unsqueeze(1)).float().mean(dim=1).mean()


def quanda_top_k_cardinality(explanations, top_k):
    """TopKCardinalityMetric."""
    _, top = explanations.topk(k=top_k, dim=1)
    return len(torch.unique(top)) / torch.numel(top)


def quanda_recall_at_k(explanations, entailment, k):
    """RecallAtKMetric."""
    _, order = torch.sort(explanations, dim=1, descending=True)
    hits = [bool(torch.any(labels[row[:k]])) for labels, row in zip(entailment, order, strict=True)]
    return np.mean(hits)


def quanda_model_randomization(explanations, randomized):
    """ModelRandomizationMetric with correlation_fn="spearman"."""
    return spearman_corrcoef(explanations.T, randomized.T).mean()


def quanda_tail_patch(deltas):
    """TailPatchMetric, from the change of the probability (n_test, k) by each step."""
    return torch.stack([row.mean() for row in deltas]).mean()
