"""From one backward pass to the gradient of every example in a batch.

One forward pass gives the loss of each example, one backward pass of their sum gives the gradient at the output of
every layer that is asked for. Neither needs a parameter that requires a gradient, so frozen, tied, quantised and
LoRA-wrapped weights all serve, and no parameter's ``.grad`` is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_tracin.gradients.calls import (
    Call,
    frozen_parameters,
    recorded_calls,
    recording_hook,
    require_called,
    require_dependent,
)
from lightning_tracin.gradients.example_dims import detect_example_dims, examples_of_positions
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.layers import SiteLayers
from lightning_tracin.gradients.losses import Losses, checked_losses
from lightning_tracin.gradients.positions import linear_positions, word_positions
from lightning_tracin.gradients.sites import Gradients
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients


@dataclass(frozen=True)
class Captured:
    """What one batch gave.

    Attributes:
        losses: (B,) float32.
        token_owners: (P,) the example of each position that the embedding layer read, padding left out.
        token_ids: (P,) its token id, in reading order inside an example.
        gradients: at each site, by its key: of words by rows, of linear layers by factors.
    """

    losses: Tensor
    token_owners: Tensor
    token_ids: Tensor
    gradients: Mapping[str, Gradients]

    def __len__(self) -> int:
        return len(self.losses)

    def first_not_finite(self) -> int | None:
        """The first example whose loss or gradient is NaN or infinite, by its place in the batch."""
        bad = ~torch.isfinite(self.losses)
        for block in self.gradients.values():
            norms = block.input_norms * block.delta_norms if isinstance(block, FactorGradients) else block.norms
            bad[block.examples[~torch.isfinite(norms)]] = True
        return int(torch.nonzero(bad)[0, 0]) if bool(bad.any()) else None

    def texts(self, labels: Tensor | None) -> Texts:
        """What the examples say; labels (B, ...) count if they are one number for each."""
        single = labels is not None and labels.shape == (len(self),)
        numbers = labels.detach().cpu().double() if single and labels is not None else None
        unknown = torch.full((len(self),), torch.nan, dtype=torch.float64)
        return Texts(len(self), self.token_owners, self.token_ids, unknown if numbers is None else numbers)


def capture(
    losses: Losses,
    batch: Any,
    sites: Sequence[SiteLayers],
    *,
    reading_layers: Sequence[nn.Module] = (),
    dims: dict[nn.Module, int] | None = None,
    module: nn.Module | None = None,
    independent: bool = True,
) -> Captured:
    """The gradients of a batch's examples, by one forward and one backward pass.

    Call it inside :func:`~lightning_tracin.gradients.eval_mode.gradients_enabled`. Results lie on the CPU.

    Args:
        losses: from the batch to its examples' losses.
        batch: what the module's ``training_step`` takes, on the module's device.
        sites: where gradients are taken. All calls of a site's layers in a forward pass, and all positions, add up.
        reading_layers: embedding layers of which only the token ids are wanted.
        dims: for each layer, the dimension of its calls that counts the examples, as far as earlier batches told; what
            this one tells is added. The first batch, for which it is empty, is checked by one more backward pass.
        module: whose parameters need no gradients once ``dims`` knows all layers: the graph then holds less.
        independent: whether to check the first batch: that the first loss depends on its own example alone.

    Raises:
        ValueError: if the losses are not of shape (B,), if the first example's depends on others, or if a layer was not
            called as expected.
    """
    calls: list[Call] = []
    read: list[Call] = []
    known = {} if dims is None else dims
    layers = [layer for each in sites for layer in each.layers]
    frozen = module is not None and all(layer in known for layer in (*layers, *reading_layers))
    with ExitStack() as hooks:
        if module is not None and frozen:
            hooks.enter_context(frozen_parameters(module))
        for each in sites:
            for layer in each.layers:
                hooks.enter_context(recording_hook(layer, calls, cut=each.site.has_words))
        for layer in reading_layers:
            hooks.enter_context(recording_hook(layer, read, cut=False, differentiate=not frozen))
        per_example = checked_losses(losses(batch))
        calls, read = list(calls), list(read)  # recomputation adds no more to these
        require_called([each.layers for each in sites], calls)
        if not frozen:  # else the first batch did
            require_dependent(per_example)
        dims_here = detect_example_dims(per_example, [*calls, *read], known, check=independent and not known)
        if per_example.requires_grad:
            gradients = torch.autograd.grad(per_example.sum(), [call.output for call in calls], allow_unused=True)
            for call, gradient in zip(calls, gradients, strict=True):
                call.gradient = gradient
    return captured_from_calls(per_example.detach().float().cpu(), batch, sites, calls, dims_here, read=read)


def captured_from_calls(
    losses: Tensor,
    batch: Any,
    sites: Sequence[SiteLayers],
    calls: Sequence[Call],
    dims: Mapping[nn.Module, int],
    *,
    read: Sequence[Call] = (),
) -> Captured:
    """What the calls of a batch's forward pass give once a backward pass has given them gradients.

    Args:
        losses: (B,) the losses of the batch's examples.
        batch: what the module was called with; its attention masks say what is padding.
        sites: whose layers were called.
        calls: of the sites' layers.
        dims: for each layer, the dimension of its calls that counts the examples: 0, or 1 (time first).
        read: calls of embedding layers of which only the token ids are wanted; they need no gradients.
    """

    def owners_of(some: Sequence[Call]) -> list[Tensor]:
        return [examples_of_positions(len(losses), call.positions, dims[call.layer]) for call in some]

    token_owners = token_ids = torch.empty(0, dtype=torch.long)
    gradients: dict[str, Gradients] = {}
    for each in sites:
        own = _reached([call for call in calls if call.layer in each.layers])
        if each.site.has_words:
            token_owners, token_ids, rows = word_positions(own, owners_of(own), batch)
            gradients[each.site.key] = WordGradients.from_positions(len(losses), token_owners, token_ids, rows)
        else:
            gradients[each.site.key] = FactorGradients.from_positions(
                len(losses), *linear_positions(own, owners_of(own))
            )
    if read:
        narrow = [replace(call, output=call.output[..., :1], gradient=call.output[..., :1].detach()) for call in read]
        token_owners, token_ids, _ = word_positions(narrow, owners_of(read), batch)
    return Captured(losses, token_owners, token_ids, gradients)


def find_example_dims(
    losses: Losses, batch: Any, layers: Sequence[nn.Module], *, independent: bool
) -> dict[nn.Module, int]:
    """For each layer, the dimension of its calls that counts the examples: 0, or 1 (time first).

    By a backward pass, needed or not: after a forward pass without one, FSDP in mixed precision loses the gradients of
    the training step that follows. With ``independent``, it also checks what :func:`capture` checks of a first batch.
    """
    with recorded_calls(losses, batch, layers) as (per_example, calls):
        return detect_example_dims(per_example, calls, {}, check=independent, always=True)


def without_inference_tensors(batch: Any) -> Any:
    """The batch with inference tensors, which autograd refuses, replaced by copies."""
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _reached(calls: list[Call]) -> list[Call]:
    """The calls that the losses depend on; if there are none, all of them, with gradients of zero."""
    return [call for call in calls if call.gradient is not None] or calls
