"""The names of a checkpoint's weights in the module: with other prefixes, where it was saved from inside or outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_tracin.gradients.printable import printable

_COMPILED = "_orig_mod"  # the attribute by which torch.compile's wrapper refers to the module

_TRIED = 3  # weights whose names are looked for with every prefix


def names_in_module(saved: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> dict[str, str]:
    """The module's name of each weight of a checkpoint.

    Args:
        saved: the checkpoint's weights; those beside the part that the module is are left out.
        state: the module's state dict.
        name: of the checkpoint, for the message.

    Raises:
        ValueError: if the checkpoint lacks weights, or has others, or of other shapes; the message lists some.
    """
    bare = {_uncompiled(each): each for each in saved}
    wanted = {_uncompiled(each): each for each in state}
    strip, add = _prefixes(bare, wanted, name)
    found = {
        own: wanted[f"{add}{each.removeprefix(strip)}"]
        for each, own in bare.items()
        if each.startswith(strip) and f"{add}{each.removeprefix(strip)}" in wanted
    }
    unknown = sorted(
        own
        for each, own in bare.items()
        if each.startswith(strip) and own not in found and saved[own].is_floating_point()
    )
    there = {state[each].data_ptr() for each in found.values() if state[each].numel()}
    missing = sorted(  # a weight that is tied to one that is there need not be
        own for own in state.keys() - set(found.values()) if state[own].data_ptr() not in there
    )
    differing = sorted(
        f"{own}: {tuple(saved[own].shape)} there, {tuple(state[each].shape)} in the model"
        for own, each in found.items()
        if saved[own].shape != state[each].shape
    )
    if missing or unknown or differing:
        problems = [
            f"{len(each)} {what}, such as {_listed(each)}"
            for each, what in (
                (missing, "weights of the model are not in it"),
                (unknown, "of its weights are not in the model"),
                (differing, "have another shape"),
            )
            if each
        ]
        raise ValueError(f"{name} is not of this model: {'; '.join(problems)}. Pass the model that was trained.")
    return found


def _prefixes(saved: Iterable[str], wanted: Mapping[str, str], name: str) -> tuple[str, str]:
    """What has to be taken off the names, and what put before them, so that most are the module's.

    Raises:
        ValueError: if different weights would do equally well.
    """
    names = sorted(saved)
    tried = {("", "")}
    for each in sorted(wanted)[:_TRIED]:
        tried |= {(own.removesuffix(each), "") for own in names if own.endswith(f".{each}")}
    for own in names[:_TRIED]:
        tried |= {("", each.removesuffix(own)) for each in wanted if each.endswith(f".{own}")}

    found = {
        (strip, add): [own for own in names if own.startswith(strip) and f"{add}{own.removeprefix(strip)}" in wanted]
        for strip, add in tried
    }
    best, *others = sorted(found, key=lambda each: (-len(found[each]), len(each[0]) + len(each[1]), each))
    alike = [each for each in others if len(found[each]) == len(found[best]) and found[each] != found[best]]
    if alike:
        parts = " and ".join(repr(strip.removesuffix(".")) for strip, _ in (best, alike[0]))
        raise ValueError(
            f"{name} has several parts whose weights are named as the model's, {parts}: which of them was meant cannot "
            "be told. Pass the module that was trained, or the state dict of the part."
        )
    return best


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _listed(names: list[str]) -> str:
    return printable(", ".join(names[:3]))
