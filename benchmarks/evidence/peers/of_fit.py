"""The peers by name, each a function of a fit."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.evidence.answers import batches, losses
from benchmarks.evidence.baselines.of_fit import last_network
from benchmarks.evidence.fitting import Fitted
from benchmarks.evidence.ours import Scorer
from benchmarks.evidence.peers.captum_peer import tracin_cp, tracin_cp_fast
from benchmarks.evidence.peers.dattri_peer import projected_tracin, trak
from benchmarks.evidence.peers.kronfluence_peer import ek_fac
from benchmarks.evidence.peers.network import linear_weights
from benchmarks.evidence.peers.trackstar import track_star
from benchmarks.evidence.peers.unlearning import untrac_inv
from benchmarks.evidence.peers.variants import with_synonyms
from lightning_tracin import TracInLayer, TracInWE
from lightning_tracin.gradients.sites import Site, last_site, words_site


def captum_embedding(fitted: Fitted) -> Tensor:
    """Captum's TracInCP on the word embedding table."""
    site = _words(fitted)
    weights, rates = _checkpoints(fitted, site)
    return tracin_cp(fitted.module, weights, rates, fitted.task.test, fitted.task.train, [site.layer])


def captum_last(fitted: Fitted) -> Tensor:
    """Captum's TracInCP on the last layer."""
    site = _last(fitted)
    weights, rates = _checkpoints(fitted, site)
    return tracin_cp(fitted.module, weights, rates, fitted.task.test, fitted.task.train, [site.layer])


def captum_fast(fitted: Fitted) -> Tensor:
    """Captum's TracInCPFast on the last layer, without its bias."""
    site = _last(fitted)
    weights, rates = _checkpoints(fitted, site)
    return tracin_cp_fast(fitted.module, weights, rates, fitted.task.test, fitted.task.train, site.layer)


def dattri_trak(fitted: Fitted, *, all_checkpoints: bool, everything: bool = False) -> Tensor:
    """Dattri's TRAK at the last checkpoint or over all, without the embedding table unless ``everything``."""
    weights, _ = _checkpoints(fitted, _last(fitted))
    names = None if everything else linear_weights(fitted.module)
    chosen = weights if all_checkpoints else weights[-1:]
    return trak(fitted.module, chosen, fitted.task.test, fitted.task.train, names)


def dattri_tracin(fitted: Fitted) -> Tensor:
    """Dattri's TracIn over all linear and convolution layers, with its default projection to 512 numbers."""
    weights, rates = _checkpoints(fitted, _last(fitted))
    names = linear_weights(fitted.module)
    return projected_tracin(fitted.module, weights, rates, fitted.task.test, fitted.task.train, names)


def kronfluence_ekfac(fitted: Fitted, damping: float | None) -> Tensor:
    """Kronfluence's EK-FAC over all linear and convolution layers at the end of training."""
    return ek_fac(last_network(fitted), fitted.task.test, fitted.task.train, damping=damping)


def trackstar(fitted: Fitted) -> Tensor:
    """TrackStar's recipe over all linear and convolution layers that were recorded, at the end of training."""
    network, checkpoint = last_network(fitted), fitted.trace.checkpoints[-1]
    moments = {}
    for site in checkpoint.sites:
        if not site.has_words:
            weight = network.get_submodule(site.layer).weight
            assert isinstance(weight, Tensor)
            values = checkpoint.second_moments(site).values[:, : weight[0].numel()]  # the bias is the last column
            moments[f"{site.layer}.weight"] = values.reshape(weight.shape)
    return track_star(network, list(moments), moments, fitted.task.test, fitted.task.train)


def unlearned(fitted: Fitted, learning_rate: float) -> Tensor:
    """UnTrac-Inv: 5 steps of Adam up the loss of the test example."""
    tests, training = list(batches(fitted.task.test, size=1)), list(batches(fitted.task.train))
    return untrac_inv(
        last_network(fitted),
        lambda network, number: network.influence_loss(tests[number]),  # type: ignore[operator]
        lambda network: losses(network, training),  # type: ignore[arg-type]
        len(tests),
        learning_rate=learning_rate,
    )


def second_last(fitted: Fitted) -> Tensor:
    """TracIn-Sec: TracIn at the second last layer, the last one of those recorded beside the last."""
    *_, site = (each for each in fitted.trace.sites if not each.has_words and not each.is_last)
    return fitted.scores(TracInLayer(site.layer))


PEERS: dict[str, Scorer] = {
    "TracIn-WE-Topk (10)": partial(Fitted.scores, method=TracInWE(top_words=10)),
    "TracIn-WE-NoC": partial(Fitted.scores, method=TracInWE(exclude_tokens=("special",))),
    "TracIn-WE-Syn": with_synonyms,
    "TracIn-Sec": second_last,
    "Captum TracInCP, last": captum_last,
    "Captum TracInCPFast, last": captum_fast,
    "Captum TracInCP, embedding": captum_embedding,
    "dattri TRAK, last checkpoint": partial(dattri_trak, all_checkpoints=False),
    "dattri TRAK, all checkpoints": partial(dattri_trak, all_checkpoints=True),
    "dattri TRAK, all parameters": partial(dattri_trak, all_checkpoints=False, everything=True),
    "dattri TracIn, projected": dattri_tracin,
    "kronfluence EK-FAC": partial(kronfluence_ekfac, damping=None),
    "TrackStar's recipe": trackstar,
    "UnTrac-Inv, lr 5e-5": partial(unlearned, learning_rate=5e-5),
    "UnTrac-Inv, lr 1e-3": partial(unlearned, learning_rate=1e-3),
}


def _checkpoints(fitted: Fitted, site: Site) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Weights, and learning rates of a site."""
    checkpoints = fitted.trace.checkpoints
    return [each.weights() for each in checkpoints], [each.learning_rate_of(site) for each in checkpoints]


def _words(fitted: Fitted) -> Site:
    site = words_site(fitted.trace.sites)
    assert site is not None
    return site


def _last(fitted: Fitted) -> Site:
    site = last_site(fitted.trace.sites)
    assert site is not None
    return site
