"""Methods by name: from arguments, to and from JSON, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from lightning_tracin.gradients.sites import Site
from lightning_tracin.scoring.methods import (
    Method,
    SiteMethod,
    TracInLast,
    TracInLayer,
    TracInSum,
    TracInWE,
)

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (TracInWE, TracInLast, TracInLayer, TracInSum)}

# The methods that a string asks for.
_BY_NAME: dict[str, type[TracInWE | TracInLast]] = {"tracin-we": TracInWE, "tracin-last": TracInLast}


def method_of(method: str | Method) -> Method:
    """A method from its name, or itself.

    Raises:
        ValueError: if there is no method of that name.
    """
    if isinstance(method, tuple(_KINDS.values())):
        return method  # type: ignore[return-value]
    if isinstance(method, str) and method in _BY_NAME:
        return _BY_NAME[method]()
    raise ValueError(
        f"method must be one of {', '.join(_BY_NAME)}, or a TracInWE, TracInLast, TracInLayer or TracInSum, but got "
        f"{method!r}."
    )


def method_at(site: Site) -> Method:
    """The method, without options, that scores by the gradients of a site."""
    if site.has_words:
        return TracInWE()
    return TracInLast() if site.is_last else TracInLayer(site.layer)


def recorded_site(method: SiteMethod, sites: Sequence[Site]) -> Site:
    """The site that a method needs gradients of.

    Raises:
        ValueError: if the fit did not record it.
    """
    site = method.site_in(sites)
    if site is None:
        name = {TracInWE: "tracin-we", TracInLast: "tracin-last"}.get(type(method), getattr(method, "name", ""))
        raise ValueError(
            f"The fit did not record the layer of {method}: it ran with methods={tuple(each.name for each in sites)}. "
            f'Fit again with "{name}" among the methods of TracInCallback.'
        )
    return site


def method_to_json(method: Method) -> dict[str, Any]:
    """The method as JSON, for :func:`method_from_json`."""
    options: dict[str, Any] = {each.name: getattr(method, each.name) for each in fields(method)}
    if isinstance(method, TracInSum):
        options["parts"] = [method_to_json(part) for part in method.parts]
    return {"method": type(method).__name__, **options}


def method_from_json(content: dict[str, Any]) -> Method:
    """The method that :func:`method_to_json` wrote.

    Raises:
        ValueError: if it is none.
    """
    try:
        options = dict(content)
        kind = _KINDS[options.pop("method")]
        if kind is TracInSum:
            options["parts"] = [method_from_json(part) for part in options["parts"]]
        method: Method = kind(**options)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{content!r} is no method: {error}.") from error
    return method


def is_constant_on_itself(method: Method) -> bool:
    """Whether every example's influence on itself is the same: the cosine of a gradient with itself is 1."""
    return all(each.method.normalize == "cosine" for each in method.summands)


def without_normalizing(method: Method) -> Method:
    """The same method, whose products are not divided by norms."""
    if isinstance(method, TracInSum):
        return replace(method, parts=[replace(part, normalize=None) for part in method.parts])
    return replace(method, normalize=None)


def described(method: Method) -> str:
    """A method in words, without the long list of the tokens that it leaves out.

    Example:
        >>> described(TracInWE(normalize="cosine", exclude_tokens=range(200)))
        'TracIn-WE, cosine, without 200 tokens'
        >>> described(TracInSum((TracInWE(), TracInLayer("encoder.0", normalize="cosine")), mix=(1, 0.5)))
        '(TracIn-WE) + 0.5 × (TracIn at encoder.0, cosine)'
    """
    if isinstance(method, TracInSum):
        named = [f"({described(part)})" for part in method.parts]
        factors = [each.factor for each in method.summands]
        return " + ".join(
            name if factor == 1 else f"{factor:g} × {name}" for name, factor in zip(named, factors, strict=True)
        )
    n_left_out = len(getattr(method, "exclude_tokens", ()))
    top_words = getattr(method, "top_words", None)
    kind = {TracInWE: "TracIn-WE", TracInLast: "TracIn-Last"}.get(type(method))
    parts = [
        kind or f"TracIn at {getattr(method, 'name', '')}",
        {"train": "normalised by the training example", "cosine": "cosine", None: ""}[method.normalize],
        "preconditioned by Adam" if method.precondition else "",
        f"{top_words} top words" if top_words else "",
        f"without {n_left_out} token{'s' * (n_left_out > 1)}" if n_left_out else "",
    ]
    return ", ".join(part for part in parts if part)
