"""Which example each position of a layer's call belongs to.

Most layers are called with the examples in the first dimension, or in the second if time comes first. A layer may also
be called on several rows for each example: the choices of a question, the sentences of a pair, a chosen and a rejected
answer. Where the rows of an example are is found, and checked, by the gradients of single losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.calls import Call
from lightning_tracin.gradients.linear_layers import features_last

_LEAVE_OUT = (
    "If the layer is called on what all examples share, such as relative positions, leave it out of the methods of "
    "TracInCallback"
)


@dataclass(frozen=True)
class Layout:
    """Where the examples are in a layer's calls.

    Attributes:
        dim: the dimension of the positions that counts the examples, or their rows.
        together: whether an example's rows stand together, as those of ``view(B * C, T)`` do; those of
            ``cat([first, second])`` do not.
        checked: the numbers of rows of an example that were seen; empty if batches of one example were, where each
            layout would do.
    """

    dim: int = 0
    together: bool = True
    checked: frozenset[int] = frozenset()

    def rows(self, n_examples: int, positions: torch.Size) -> int | None:
        """The number of rows of each example in a call; None if this dimension cannot hold the examples."""
        length = positions[self.dim] if self.dim < len(positions) else 0
        return length // n_examples if length and length % n_examples == 0 else None

    def fits(self, n_examples: int, positions: torch.Size) -> bool:
        """Whether this may be relied on in a call: one with several rows may have several others than were seen."""
        rows = self.rows(n_examples, positions)
        return n_examples == 1 or rows in self.checked or (rows is not None and max(self.checked, default=1) > 1)

    def owners(self, n_examples: int, positions: torch.Size) -> Tensor:
        """The example of each position of a call, int64 in the shape of the positions."""
        examples, rows = torch.arange(n_examples), self.rows(n_examples, positions) or 1
        owners = examples.repeat_interleave(rows) if self.together else examples.repeat(rows)
        return owners.view([-1 if dim == self.dim else 1 for dim in range(len(positions))]).expand(positions)

    def having_seen(self, n_examples: int, calls: Sequence[Call]) -> Layout:
        """The same layout after calls of a batch of several examples."""
        return replace(self, checked=self.checked | {self.rows(n_examples, call.positions) or 1 for call in calls})


def find_layouts(
    losses: Tensor,
    calls: Sequence[Call],
    known: dict[nn.Module, Layout],
    *,
    check: bool,
    passes: int | None = None,
    names: Mapping[nn.Module, str] | None = None,
) -> dict[nn.Module, Layout]:
    """For each layer, the layout of its calls in a batch.

    Args:
        losses: (B,) the losses of the batch's examples, with their graph. The repeated mean of a batch shows nothing:
            then a layer that is not known must be called on one row for each example.
        calls: the calls of the layers.
        known: the layouts that earlier batches determined; those that this batch determines are added.
        check: whether to check that the first example's loss does not depend on other examples.
        passes: the number of backward passes to run, 0 or 1, as FSDP requires; None for as many as are needed.
        names: what errors call the layers.

    Returns:
        The layout for every layer; the first one that is possible as long as no batch determined it.

    Raises:
        ValueError: if the loss depends on other examples, or no layout is possible.
    """
    n_examples, names = len(losses), names or {}
    is_repeated = n_examples == 1 or (losses.stride(0) == 0 and not check)  # a stride of 0: one mean loss, expanded
    calls_of = {call.layer: [each for each in calls if each.layer is call.layer] for call in calls}
    possible: dict[nn.Module, list[list[Layout]]] = {}
    for layer, of_layer in calls_of.items():
        fits = layer in known and all(known[layer].fits(n_examples, call.positions) for call in of_layer)
        possible[layer] = (
            [[known[layer]]]
            if fits
            else _possible_layouts(n_examples, of_layer, names.get(layer, str(layer)), is_repeated=is_repeated)
        )
        check = check or not (fits or is_repeated)
    shown = [call for call in calls if call.output.requires_grad] if losses.requires_grad else []
    for example in range(n_examples if passes is None else passes):
        unsure = shown and not is_repeated and (check or any(len(tiers[0]) > 1 for tiers in possible.values()))
        if passes is None and not unsure:
            break
        for call, gradient in zip(shown, _gradients(losses[example], shown), strict=True):
            if not is_repeated:
                possible[call.layer] = _narrowed(possible[call.layer], call, gradient, example, n_examples)
                _require_any(possible[call.layer], call, names.get(call.layer, str(call.layer)), example)
        check = False
    found = {layer: tiers[0][0] for layer, tiers in possible.items()}
    if passes is None and not is_repeated:
        _check_rows(losses, shown, found)
    for layer, tiers in possible.items():
        if n_examples == 1:
            known.setdefault(layer, found[layer])
        elif len(tiers[0]) == 1:
            known[layer] = found[layer].having_seen(n_examples, calls_of[layer])
    return found


def new_layers(n_examples: int, calls: Sequence[Call], known: Mapping[nn.Module, Layout]) -> set[nn.Module]:
    """The layers whose calls are not of the layouts that are known of them."""
    return {
        call.layer for call in calls if call.layer in known and not known[call.layer].fits(n_examples, call.positions)
    }


def _possible_layouts(n_examples: int, calls: Sequence[Call], name: str, *, is_repeated: bool) -> list[list[Layout]]:
    """The layouts that the shapes of a layer's calls allow: those with one row for each example, then the others.

    Raises:
        ValueError: if they allow none.
    """
    if n_examples == 1:
        return [[Layout()]]
    one, several = [], []
    for dim, together in ((0, True), (0, False), (1, True), (1, False)):
        rows = {Layout(dim, together).rows(n_examples, call.positions) for call in calls}
        if rows == {1}:
            one += [Layout(dim)] if together else []
        elif None not in rows:
            several.append(Layout(dim, together))
    tiers = [tier for tier in ([one[:1]] if is_repeated else [one, several]) if tier]
    if not tiers:
        what = "is the number of losses" if is_repeated else "is the number of losses, or a multiple of it"
        unfit = next((call for call in calls if not _has_rows(call, n_examples)), calls[0])
        raise ValueError(
            f"The layer {name} was called on positions of shape {tuple(unfit.positions)}, of which neither the first "
            f"nor the second dimension {what}, {n_examples}. Each example needs a row of its own, or as many rows as "
            "any other: rearrange what the layer is called with, or return one loss for each of its rows. "
            f"{_LEAVE_OUT}."
        )
    return tiers


def _has_rows(call: Call, n_examples: int) -> bool:
    """Whether one of the first two dimensions of a call may count the examples."""
    return any(Layout(dim).rows(n_examples, call.positions) for dim in (0, 1))


def _narrowed(
    tiers: list[list[Layout]], call: Call, gradient: Tensor, example: int, n_examples: int
) -> list[list[Layout]]:
    """Those layouts by which an example's loss has a gradient at its own positions only.

    Args:
        tiers: layouts that are possible.
        call: of the layer.
        gradient: that of the example's loss, at the call's positions, features last.
        example: the example's place in the batch.
        n_examples: how many the batch holds.

    Returns:
        Those; none if there is no layout by which it has.
    """
    # The training pass reports NaN gradients, by the example that has them.
    is_reached = (gradient.nan_to_num(0, 0, 0) != 0).any(-1).cpu()

    def is_possible(layout: Layout) -> bool:
        return not bool(is_reached[layout.owners(n_examples, call.positions) != example].any())

    narrowed = [[layout for layout in tier if is_possible(layout)] for tier in tiers]
    return [tier for tier in narrowed if tier]


def _require_any(tiers: list[list[Layout]], call: Call, name: str, example: int) -> None:
    """Check that there are layouts by which an example's loss has no gradient at other examples' positions of a call.

    There are none where the loss is taken with statistics over the batch, with negatives from it or over the whole of
    it; and where the layer is called on something that all examples share.

    Raises:
        ValueError: if there are none.
    """
    if tiers:
        return
    raise ValueError(
        f"By its gradient at the layer {name}, which was called on positions of shape {tuple(call.positions)}, the "
        f"loss of {'the first example' if example == 0 else f'example {example}'} depends on the other examples of its "
        "batch, so it has no gradient of its own. Compute each example's loss from that example alone (no statistics "
        f"over the batch, no negatives from the batch) in influence_loss. {_LEAVE_OUT}."
    )


def _check_rows(losses: Tensor, calls: Sequence[Call], layouts: Mapping[nn.Module, Layout]) -> None:
    """Check, where a layer is called on a number of rows that is new, that each belongs to the example that it should.

    Where the signs of some losses are turned, those of the gradients at their examples' rows must turn, and no others.

    Args:
        losses: (B,) the losses of the batch's examples, with their graph.
        calls: the calls of the layers.
        layouts: those that were found.

    Raises:
        ValueError: if one does not.
    """
    n_examples = len(losses)

    def is_new(call: Call) -> bool:
        rows = layouts[call.layer].rows(n_examples, call.positions)
        return rows != 1 and rows not in layouts[call.layer].checked

    new = [call for call in calls if is_new(call)]
    if not new:
        return
    drawn = torch.randint(2, (n_examples,), generator=torch.Generator().manual_seed(0))
    signs = 1 - 2 * torch.cat([torch.tensor([0, 1]), drawn])[:n_examples]
    turned = (losses * signs.to(losses)).sum()
    for call, plain, found in zip(new, _gradients(losses.sum(), new), _gradients(turned, new), strict=True):
        owners = layouts[call.layer].owners(n_examples, call.positions)
        plain, found = plain.float().nan_to_num(0, 0, 0), found.float().nan_to_num(0, 0, 0)
        norms = plain.norm(dim=-1)
        errors = (found - plain * signs[owners].to(plain)[..., None]).norm(dim=-1)
        if bool((errors > 1e-2 * norms + 1e-5 * norms.max()).any()):
            raise ValueError(
                f"A layer was called on {call.positions[layouts[call.layer].dim]} rows for {n_examples} examples, "
                "which do not belong to them in equal numbers: not as in view(B * C, ...), nor as in cat([first, "
                "second]). Call the layer with as many rows for each example, in one of these orders."
            )


def _gradients(loss: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """The gradients of a loss at the outputs of some calls, features last."""
    outputs = [call.output for call in calls]
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
    return [features_last(call.layer, gradient) for call, gradient in zip(calls, gradients, strict=True)]
