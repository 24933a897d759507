"""Methods from their names, to and from JSON, and described in words; variants of a method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, Literal

import msgspec

from lightning_tracin.gradients.printable import storable
from lightning_tracin.gradients.sites import Site
from lightning_tracin.scoring.excluded_tokens import ExcludedTokens
from lightning_tracin.scoring.methods import (
    Method,
    SiteMethod,
    TracInLast,
    TracInLayer,
    TracInSum,
    TracInWE,
)
from lightning_tracin.scoring.ridge import TracInRidge

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (TracInWE, TracInLast, TracInLayer, TracInSum, TracInRidge)
}


class _Named(msgspec.Struct, forbid_unknown_fields=True):
    """Excluded tokens of which some were asked for by name."""

    asked: list[int | str]
    ids: list[int]


# The methods that need no argument, by the name that users pass.
_BY_NAME: dict[str, type[TracInWE | TracInLast]] = {"tracin-we": TracInWE, "tracin-last": TracInLast}


# How each kind is written.
_WRITTEN: dict[type[Any], str] = {
    TracInWE: "TracInWE()",
    TracInLast: "TracInLast()",
    TracInLayer: 'TracInLayer("name.of.the.layer")',
    TracInSum: "TracInSum((TracInWE(), TracInLast()))",
    TracInRidge: 'TracInRidge(TracInWE(normalize="cosine"))',
}


def method_of(method: str | Method) -> Method:
    """The method of a name; a method is returned as it is.

    Raises:
        ValueError: if it is neither a method nor the name of one.
    """
    if isinstance(method, tuple(_KINDS.values())):
        return method  # type: ignore[return-value]
    if isinstance(method, str) and method in _BY_NAME:
        return _BY_NAME[method]()
    raise ValueError(
        f"method must be one of {', '.join(_BY_NAME)}, or a TracInWE, TracInLast, TracInLayer, TracInSum or "
        f"TracInRidge, but got {method!r}.{_advice_on(method)}"
    )


def _advice_on(method: Any) -> str:
    """What to write instead of something that is no method; empty where that cannot be told."""
    if isinstance(method, type) and method in _WRITTEN:
        return f" That is a class: write {_WRITTEN[method]}."
    if isinstance(method, (list, tuple)) and method:
        return f" Ask for one: {method[0]!r}. Scores of several are added by a TracInSum."
    if isinstance(method, str):
        written = {re.sub("[^a-z]", "", name.lower()): f'"{name}"' for name in _BY_NAME}
        written |= {kind.__name__.lower(): _WRITTEN[kind] for kind in (TracInLayer, TracInSum, TracInRidge)}
        near = get_close_matches(re.sub("[^a-z]", "", method.lower()), written, n=1, cutoff=0.7)
        return f" Did you mean {written[near[0]]}?" if near else ""
    return ""


def method_at(site: Site) -> Method:
    """The method with default options that scores by the gradients of a site."""
    if site.has_words:
        return TracInWE()
    if site.rank is not None:
        return TracInLayer(site.layer, precondition="kfac")
    return TracInLast() if site.is_last else TracInLayer(site.layer)


def recorded_site(method: SiteMethod, sites: Sequence[Site]) -> Site:
    """The recorded site at which a method needs gradients.

    Raises:
        ValueError: if the fit did not record it.
    """
    site = method.site_in(sites)
    if site is None:
        names: dict[type[Any], str] = {kind: name for name, kind in _BY_NAME.items()}
        name = names.get(type(method), getattr(method, "name", ""))
        advice = f'Fit again with "{name}" among the methods of TracInCallback.'
        if isinstance(method, TracInLast):
            advice += (
                " If it was, the model has no head, that is, no single linear layer feeds the loss: let "
                "influence_last_layer() return one, or ask by a method whose layer was recorded."
            )
        raise ValueError(
            f"The fit did not record the layer of {method}: it recorded {tuple(each.name for each in sites)}. {advice}"
        )
    return site


def method_to_json(method: Method) -> dict[str, Any]:
    """The method as a JSON object, for :func:`method_from_json`."""
    options: dict[str, Any] = {option.name: getattr(method, option.name) for option in fields(method)}
    if isinstance(method, TracInWE):
        options["exclude_tokens"] = _excluded_to_json(method.excluded)
    if isinstance(method, TracInSum):
        options["parts"] = [method_to_json(part) for part in method.parts]
    if isinstance(method, TracInRidge):
        options["of"] = method_to_json(options.pop("method"))  # "method" is the name of the kind
    return {"method": type(method).__name__, **options}


def method_from_json(content: dict[str, Any]) -> Method:
    """The method of a JSON object from :func:`method_to_json`.

    Raises:
        ValueError: if the object does not describe a method.
    """
    try:
        options = msgspec.convert(content, dict[str, Any])
        kind = _KINDS[msgspec.convert(options.pop("method", None), Literal[tuple(_KINDS)])]
        if kind is TracInRidge:
            options["method"] = method_from_json(msgspec.convert(options.pop("of", None), dict[str, Any]))
        unknown = options.keys() - {option.name for option in fields(kind)}
        if unknown:
            raise ValueError(f"it has no {sorted(unknown)[0]}")
        if kind is TracInSum:
            parts = [method_from_json(part) for part in msgspec.convert(options.get("parts"), list[Any])]
            plain = [1.0] * len(parts)  # as older versions added scores
            numbers = {"mix": options.get("mix"), "scales": options.get("scales", plain)}
            return TracInSum(parts, **msgspec.convert(numbers, dict[str, list[float] | None]))  # type: ignore[arg-type]
        if kind is TracInRidge:
            kinds = {"alpha": float, "residual": float, "landmarks": int | None}
            numbers = {name: msgspec.convert(options[name], kind) for name, kind in kinds.items() if name in options}
            return TracInRidge(options["method"], **numbers)
        if kind is TracInWE:
            excluded = _excluded_from_json(options.pop("exclude_tokens", []))
            return replace(msgspec.convert(options, TracInWE), exclude_tokens=excluded)
        method: Method = msgspec.convert(options, kind)
    except (ValueError, msgspec.ValidationError) as error:
        raise ValueError(f"{str(content)[:200]} is no method: {error}") from error
    return method


def _excluded_to_json(excluded: ExcludedTokens) -> Any:
    """The ids alone where nothing else was asked for, as results of all versions have them."""
    if not excluded.words:
        return list(excluded)
    return {"asked": [storable(each) if isinstance(each, str) else each for each in excluded], "ids": excluded.ids}


def _excluded_from_json(content: Any) -> ExcludedTokens:
    if not isinstance(content, dict):
        return ExcludedTokens(msgspec.convert(content, list[int]))
    named = msgspec.convert(content, _Named)
    return ExcludedTokens(named.asked, named.ids)


def is_constant_on_itself(method: Method) -> bool:
    """Whether every example has the same influence on itself, as with cosines: that of a gradient with itself is 1."""
    is_cosine = all(summand.method.normalize == "cosine" for summand in method.summands)
    return is_cosine and not isinstance(method, TracInRidge)


def require_not_constant(method: Method) -> None:
    """Check that a method's self-influence tells examples apart.

    Raises:
        ValueError: if every example has the same.
    """
    if is_constant_on_itself(method):
        raise ValueError(
            f"By {method} every example has the same influence on itself: the cosine of a gradient with itself is 1. "
            f'Use "tracin-last", which finds mislabelled examples best, or {without_normalizing(method)}.'
        )


def without_normalizing(method: Method) -> Method:
    """The same method without normalisation: its products are not divided by norms. Of a ridge, the method inside."""
    if isinstance(method, TracInRidge):
        return without_normalizing(method.method)  # type: ignore[arg-type]
    if isinstance(method, TracInSum):
        return replace(method, parts=[replace(part, normalize=None) for part in method.parts], scales=None)
    return replace(method, normalize=None)


def described(method: Method) -> str:
    """A method in words, with the number of excluded words and token ids in place of their list.

    Example:
        >>> described(TracInWE(normalize="cosine", exclude_tokens=range(200)))
        'TracIn-WE, cosine, without 200 tokens'
        >>> described(TracInWE(exclude_tokens=("special", "common", "said")))
        'TracIn-WE, without special tokens and common tokens and 1 word'
        >>> method = TracInSum((TracInWE(), TracInLayer("encoder.0", normalize="cosine")), mix=(1, 0.5))
        >>> described(method)
        '(TracIn-WE) / σ + 0.5 × (TracIn at encoder.0, cosine) / σ'
        >>> described(replace(method, scales=(2e-5, 1)))
        '(TracIn-WE) / 2e-05 + 0.5 × (TracIn at encoder.0, cosine)'
        >>> described(TracInRidge(TracInWE(normalize="cosine")))
        'ridge of (TracIn-WE, cosine), alpha 0.0625, residual ** 0.5'
        >>> described(TracInLast(precondition="kfac", rank=(128, 32)))
        'TracIn-Last, preconditioned by K-FAC (damping 0.1, 128 × 32 components)'
    """
    if isinstance(method, TracInRidge):
        power = f", residual ** {method.residual:g}" if method.residual else ""
        by = f", {method.landmarks} landmarks" if method.landmarks else ""
        inside: Any = method.method
        if isinstance(inside, TracInSum):  # cosines are mixed as they are
            inside = replace(inside, scales=[1.0] * len(inside.parts))
        return f"ridge of ({described(inside)}), alpha {method.alpha:g}{power}{by}"
    if isinstance(method, TracInSum):
        scales = [" / σ"] * len(method.parts)
        if method.scales is not None:
            scales = ["" if scale == 1 else f" / {scale:.3g}" for scale in method.scales]
        factors = ["" if factor == 1 else f"{factor:g} × " for factor in method.mixed]
        names = [f"({described(part)})" for part in method.parts]
        return " + ".join(map("".join, zip(factors, names, scales, strict=True)))
    excluded = method.excluded.described() if isinstance(method, TracInWE) else ""
    top_words = getattr(method, "top_words", None)
    kind = {TracInWE: "TracIn-WE", TracInLast: "TracIn-Last"}.get(type(method))
    phrases = [
        kind or f"TracIn at {getattr(method, 'name', '')}",
        {"train": "normalised by the training example", "cosine": "cosine", None: ""}[method.normalize],
        {"adam": "preconditioned by Adam", "kfac": _described_kfac(method), None: ""}[method.precondition],
        {"equal": "checkpoints alike", "residual": "checkpoints by residual"}.get(method.weights, ""),
        f"{top_words} top words" if top_words else "",
        f"without {excluded}" if excluded else "",
    ]
    return ", ".join(phrase for phrase in phrases if phrase)


def _described_kfac(method: TracInWE | TracInLast | TracInLayer) -> str:
    """How a method preconditions by K-FAC, in words; empty for one at the word table, which cannot."""
    if isinstance(method, TracInWE):
        return ""
    components = "" if method.rank is None else f", {method.rank[0]} × {method.rank[1]} components"
    return f"preconditioned by K-FAC (damping {method.damping:g}{components})"
