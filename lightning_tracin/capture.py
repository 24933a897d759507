"""From one backward pass to the gradient of every example in a batch.

One forward pass gives the loss of each example, one backward pass of their sum gives the gradient at the output of the
embedding layer and of the linear layer. Neither needs a parameter that requires a gradient, so frozen, tied, quantised
and LoRA-wrapped weights all serve, and no parameter's ``.grad`` is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_tracin.gradients import LinearGradients, WordGradients

#: From a batch to the losses of its examples, (B,). A mean loss is given as that mean, repeated B times.
Losses: TypeAlias = Callable[[Any], Tensor]


_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


@dataclass(frozen=True)
class Captured:
    """What one batch gave.

    Attributes:
        losses: (B,) float32.
        token_owners: (P,) the example of each position that the embedding layer read, padding left out.
        token_ids: (P,) its token id, in reading order inside an example.
        words: gradients at the word embedding table, if an embedding layer was given.
        linear: gradients at the linear layer, if one was given.
    """

    losses: Tensor
    token_owners: Tensor
    token_ids: Tensor
    words: WordGradients | None
    linear: LinearGradients | None

    def __len__(self) -> int:
        return len(self.losses)

    def first_not_finite(self) -> int | None:
        """The first example whose loss or gradient is NaN or infinite, by its place in the batch."""
        bad = ~torch.isfinite(self.losses)
        if self.words is not None:
            bad[self.words.examples[~torch.isfinite(self.words.norms)]] = True
        if self.linear is not None:
            norms = self.linear.input_norms * self.linear.delta_norms
            bad[self.linear.examples[~torch.isfinite(norms)]] = True
        return int(torch.nonzero(bad)[0, 0]) if bool(bad.any()) else None


def capture(
    losses: Losses,
    batch: Any,
    *,
    embedding_layers: Sequence[nn.Module] = (),
    linear_layer: nn.Module | None = None,
    reading_layers: Sequence[nn.Module] = (),
    dims: dict[nn.Module, int] | None = None,
    module: nn.Module | None = None,
    independent: bool = True,
) -> Captured:
    """The gradients of a batch's examples, by one forward and one backward pass.

    Call it inside :func:`gradients_enabled`. Results lie on the CPU.

    Args:
        losses: from the batch to its examples' losses.
        batch: what the module's ``training_step`` takes, on the module's device.
        embedding_layers: modules called with token ids that share one table; all calls in a forward pass add up.
        linear_layer: ``nn.Linear``; its calls in one forward pass, and its positions, add up.
        reading_layers: embedding layers of which only the token ids are wanted.
        dims: for each layer, the dimension of its calls that counts the examples, as far as earlier batches told; what
            this one tells is added. The first batch, for which it is empty, is checked by one more backward pass.
        module: whose parameters need no gradients once ``dims`` knows all layers: the graph then holds less.
        independent: whether to check the first batch: that the first loss depends on its own example alone.

    Raises:
        ValueError: if the losses are not of shape (B,), if the first example's depends on others, or if a layer was not
            called as expected.
    """
    embeddings: _Calls = []
    linears: _Calls = []
    read: _Calls = []
    known = {} if dims is None else dims
    hooked = [*embedding_layers, *reading_layers, *([] if linear_layer is None else [linear_layer])]
    frozen = module is not None and all(layer in known for layer in hooked)
    with ExitStack() as hooks:
        if module is not None and frozen:
            hooks.enter_context(_frozen(module))
        for layer in embedding_layers:
            hooks.enter_context(_hooked(layer, embeddings, cut=True))
        for layer in reading_layers:
            hooks.enter_context(_hooked(layer, read, cut=False, differentiate=not frozen))
        if linear_layer is not None:
            hooks.enter_context(_hooked(linear_layer, linears, cut=False))
        per_example = checked(losses(batch))
        embeddings, linears, read = list(embeddings), list(linears), list(read)  # recomputation adds no more to these
        _require_called(embedding_layers, embeddings)
        _require_called(() if linear_layer is None else (linear_layer,), linears)
        if not frozen:  # else the first batch did
            _require_dependent(per_example)
        calls = [*embeddings, *linears]
        dims_here = _batch_dims(per_example, [*calls, *read], known, check=independent and not known)
        if per_example.requires_grad:
            gradients = torch.autograd.grad(per_example.sum(), [call.output for call in calls], allow_unused=True)
            for call, gradient in zip(calls, gradients, strict=True):
                call.gradient = gradient
    losses_seen = per_example.detach().float().cpu()
    return collected(losses_seen, batch, _reached(embeddings), _reached(linears), dims_here, read=read)


def collected(
    losses: Tensor,
    batch: Any,
    embeddings: Sequence[Call],
    linears: Sequence[Call],
    dims: Mapping[nn.Module, int],
    *,
    read: Sequence[Call] = (),
) -> Captured:
    """What the calls of a batch's forward pass give once a backward pass has given them gradients.

    Args:
        losses: (B,) the losses of the batch's examples.
        batch: what the module was called with; its attention masks say what is padding.
        embeddings: calls of embedding layers.
        linears: calls of the linear layer.
        dims: for each layer, the dimension of its calls that counts the examples: 0, or 1 (time first).
        read: calls of embedding layers of which only the token ids are wanted; they need no gradients.
    """
    owners = [_owners(len(losses), call.output.shape[:-1], dims[call.layer]) for call in [*embeddings, *linears]]
    token_owners = ids = torch.empty(0, dtype=torch.long)
    words = linear = None
    if embeddings:
        token_owners, ids, rows = _word_positions(embeddings, owners[: len(embeddings)], batch)
        words = WordGradients.from_positions(len(losses), token_owners, ids, rows)
    elif read:
        narrow = [replace(call, output=call.output[..., :1], gradient=call.output[..., :1].detach()) for call in read]
        owners_read = [_owners(len(losses), call.output.shape[:-1], dims[call.layer]) for call in read]
        token_owners, ids, _ = _word_positions(narrow, owners_read, batch)
    if linears:
        linear = LinearGradients.from_positions(len(losses), *_linear_positions(linears, owners[len(embeddings) :]))
    return Captured(losses, token_owners, ids, words, linear)


def checked(losses: object) -> Tensor:
    """The losses, if they are one for each example of a batch.

    Raises:
        ValueError: if they are not a float tensor of shape (B,).
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        got = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            "influence_loss must return one unreduced loss for each example of the batch, a float tensor of shape "
            f"(B,), but got {got}. Use reduction='none', and average over an example's own tokens or outputs only."
        )
    if len(losses) == 0:
        raise ValueError("influence_loss returned no loss: the batch is empty.")
    return losses


def batch_dims(losses: Losses, batch: Any, layers: Sequence[nn.Module], *, independent: bool) -> dict[nn.Module, int]:
    """For each layer, the dimension of its calls that counts the examples: 0, or 1 (time first).

    By a backward pass, needed or not: after a forward pass without one, FSDP in mixed precision loses the gradients of
    the training step that follows. With ``independent``, it also checks what :func:`capture` checks of a first batch.
    """
    with _recorded(losses, batch, layers) as (per_example, calls):
        return _batch_dims(per_example, calls, {}, check=independent, always=True)


@contextmanager
def gradients_enabled(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode with autograd on, and leave every submodule's training flag as it was.

    Works inside ``torch.no_grad`` and ``torch.inference_mode``; hooks fire in compiled modules too, which run eagerly.
    """
    training = {part: part.training for part in module.modules()}
    limited = [part.weight for part in training if getattr(part, "max_norm", None) is not None]
    kept = [(weight, weight.detach().clone()) for weight in limited if isinstance(weight, Tensor)]
    # cuDNN has no backward pass for a recurrent layer in eval mode; PyTorch's own kernels have one.
    recurrent = any(isinstance(part, nn.RNNBase) for part in training)
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if hasattr(torch.compiler, "set_stance"):  # torch >= 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            module.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it leaves out padding, and with it what training computes
            yield
        finally:
            for part, flag in training.items():
                part.training = flag
            torch.backends.mha.set_fastpath_enabled(fused)
            with torch.no_grad():
                for weight, value in kept:  # a forward pass through nn.Embedding(max_norm=...) changes it
                    weight.copy_(value)


@contextmanager
def weights_filled(module: nn.Module) -> Iterator[None]:
    """Fill weights that are zero as a whole (a new head) with small numbers, the same ones each time.

    Where they are zero, so are gradients behind them, or all losses are alike: a check would tell nothing.
    """
    generator = torch.Generator().manual_seed(0)
    filled = [each for each in module.parameters() if each.dim() > 1 and each.is_floating_point() and not each.any()]
    with torch.no_grad():
        for parameter in filled:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in filled:
                parameter.zero_()


def usable_in_autograd(batch: Any) -> Any:
    """The batch with inference tensors, which autograd refuses, replaced by copies."""
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


@dataclass
class Call:
    """One call of a layer in a forward pass, and the gradient at its output once a backward pass has given one."""

    layer: nn.Module
    inputs: Tensor
    output: Tensor
    gradient: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        """From what a forward hook is given.

        Raises:
            ValueError: if the layer does not take a tensor and return a tensor.
        """
        value = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if value is None or not isinstance(output, Tensor):
            raise ValueError(f"The layer {layer} must take a tensor and return a tensor; it returned {type(output)}.")
        return cls(layer, value.detach().clone(), output)


_Calls: TypeAlias = list[Call]


@contextmanager
def _recorded(losses: Losses, batch: Any, layers: Sequence[nn.Module]) -> Iterator[tuple[Tensor, _Calls]]:
    """The losses of a batch, and the calls of layers that led to them.

    Hooks stay for the backward pass: where that computes a part again (activation checkpointing), it must find the
    layers as they were.
    """
    calls: _Calls = []
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(_hooked(layer, calls, cut=False))
        per_example = checked(losses(batch))
        _require_called(layers, calls)
        _require_dependent(per_example)
        yield per_example, list(calls)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Give no parameter a gradient: what only that would need is not kept, nor a graph before the hooked layers."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()


@contextmanager
def _hooked(layer: nn.Module, calls: _Calls, *, cut: bool, differentiate: bool = True) -> Iterator[None]:
    """Record the layer's calls; with ``cut`` nothing before its output is differentiated.

    Without ``differentiate`` its output stays as it is, and has no gradient.
    """

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():  # the losses cannot depend on it
            return output
        call = Call.of(layer, args, kwargs, output)
        if not differentiate:
            calls.append(call)
            return output
        if cut or not output.requires_grad:
            output = output.detach().requires_grad_()
        call.output = output
        calls.append(call)
        copy: Tensor = output.clone()  # the model may change it in place; the gradient is taken at the output itself
        return copy

    handle = layer.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _reached(calls: _Calls) -> _Calls:
    """The calls that the losses depend on; if there are none, all of them, with gradients of zero."""
    reached = [call for call in calls if call.gradient is not None]
    return reached or [replace(call, gradient=torch.zeros_like(call.output)) for call in calls]


def _require_called(layers: Sequence[nn.Module], calls: _Calls) -> None:
    if layers and not calls:
        raise ValueError(
            f"The layer {layers[0]} was not called when the loss of a batch was computed, or where no gradient could "
            "be taken: inside of torch.no_grad, or of a checkpoint with use_reentrant=True (use False)."
        )


def _require_dependent(losses: Tensor) -> None:
    if not losses.requires_grad:
        raise ValueError(
            "The losses do not depend on the layers' outputs: influence_loss must not detach them or use torch.no_grad."
        )


def _batch_dims(
    losses: Tensor, calls: _Calls, known: dict[nn.Module, int], *, check: bool, always: bool = False
) -> dict[nn.Module, int]:
    """For each layer, the dimension of its calls in a batch that counts the examples.

    Args:
        losses: (B,).
        calls: of the layers.
        known: what earlier batches told; what this one tells is added.
        check: whether to check that the first example's loss does not depend on the others.
        always: by one backward pass, needed or not.

    Raises:
        ValueError: if the loss depends on other examples, or no dimension counts examples.
    """
    for call in calls:
        fits = _fitting(losses, call.output)
        if len(fits) == 1:
            known[call.layer] = fits[0]
    outputs = [call.output for call in calls]
    for example in range(1 if always else len(losses)):  # FSDP allows one backward pass, once for all
        if not (always or check) and all(call.layer in known for call in calls):
            break
        gradients = torch.autograd.grad(losses[example], outputs, retain_graph=True, materialize_grads=True)
        for call, gradient in zip(calls, gradients, strict=True):
            if call.layer not in known:
                time_first = _is_time_first(losses, gradient, example)
                if time_first is not None:
                    known[call.layer] = int(time_first)
            if check:
                owners = _owners(len(losses), call.output.shape[:-1], known.get(call.layer, 0))
                _require_independent(owners, gradient)
        check = False
    return {call.layer: known.get(call.layer, 0) for call in calls}


def _require_independent(owners: Tensor, of_first: Tensor) -> None:
    """Check where the gradient of the first example's loss, at a call's output, is not zero.

    Raises:
        ValueError: if at other examples: batch norm in training mode, negatives from the batch, a loss over the batch.
    """
    if bool(of_first[owners.to(of_first.device) != 0].nan_to_num(0, 0, 0).any()):  # NaN is named where it is found
        raise ValueError(
            "The loss of the first example depends on the other examples of its batch, so it has no gradient of "
            "its own. Compute each example's loss from that example alone (no statistics over the batch, no "
            "negatives from the batch) in influence_loss."
        )


def _fitting(losses: Tensor, output: Tensor) -> list[int]:
    """The dimensions of a layer's call that have the length of the losses: the first, the second (time first), or both.

    Raises:
        ValueError: if neither has.
    """
    shape = tuple(output.shape[:-1])
    fits = [dim for dim, length in enumerate(shape[:2]) if length == len(losses)]
    if not fits:
        raise ValueError(
            f"A layer was called on positions of shape {shape}, of which neither the first nor the second dimension is "
            f"the number of losses, {len(losses)}. Each example needs its own row: rearrange what the layer is called "
            "with, or return one loss for each of its rows."
        )
    return fits


def _owners(n_examples: int, shape: torch.Size, dim: int) -> Tensor:
    """The example of each position of a layer's call, in the shape of the positions."""
    view = [1] * len(shape)
    view[dim] = n_examples
    return torch.arange(n_examples).view(view).expand(shape)


def _is_time_first(losses: Tensor, of_own: Tensor, example: int) -> bool | None:
    """With as many positions as examples: whether an example's loss moves its own column, not its own row.

    Args:
        losses: (B,).
        of_own: the gradient of the example's loss at the output of a layer's call.
        example: its number.

    Returns:
        None if that cannot be told: it has one word, where its column and its row meet.
    """
    if len(losses) == 1 or losses.stride(0) == 0:  # one mean repeated says nothing of single examples
        return False
    moved = of_own.flatten(2).abs().amax(-1) > 0
    moved[example, example] = False
    in_column = bool(moved[:, example].any())
    moved[:, example] = False
    elsewhere = bool(moved.any())
    return in_column and not elsewhere if in_column or elsewhere else None


def _word_positions(calls: Sequence[Call], owners_of_calls: list[Tensor], batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Example, token id and gradient of every position that is not padding, over all calls of the embedding layer."""
    parts = []
    for call, owners in zip(calls, owners_of_calls, strict=True):
        assert call.gradient is not None
        ids, output = call.inputs, call.output
        padding = getattr(getattr(call.layer, "base_layer", call.layer), "padding_idx", None)  # peft wraps the layer
        if ids.is_floating_point() or output.shape[:-1] != ids.shape:
            raise ValueError(
                f"The embedding layer must turn ids of shape (B, T) into vectors of shape (B, T, H), but turned "
                f"{ids.dtype} {tuple(ids.shape)} into {tuple(output.shape)}. Return the word embedding layer from "
                "influence_embedding_layer (an EmbeddingBag has no gradient for each word)."
            )
        keep = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
        mask = _attention_mask(batch, ids)
        if mask is not None:
            keep &= mask != 0
        kept = torch.nonzero(keep.cpu().reshape(-1))[:, 0]
        gradient = call.gradient.float().cpu().reshape(-1, output.shape[-1])
        if len(kept) < len(gradient):  # a copy of all rows is dear
            gradient = gradient[kept]
        parts.append((owners.reshape(-1)[kept], ids.cpu().reshape(-1)[kept].long(), gradient))
    return _by_example(parts)


def _linear_positions(calls: Sequence[Call], owners_of_calls: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Example, input (a 1 appended where there is a bias) and delta of every position, over all calls of the layer."""
    parts = []
    for call, owners in zip(calls, owners_of_calls, strict=True):
        assert call.gradient is not None
        delta = call.gradient.float().cpu()
        flat = call.inputs.float().cpu().reshape(-1, call.inputs.shape[-1])
        if getattr(call.layer, "bias", None) is not None:
            flat = torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
        parts.append((owners.reshape(-1), flat, delta.reshape(-1, delta.shape[-1])))
    return _by_example(parts)


def _by_example(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The positions of all calls, example by example, each in the order of its calls and positions."""
    if len(parts) == 1 and bool((parts[0][0].diff() >= 0).all()):
        return parts[0]
    owners, first, second = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = torch.argsort(owners, stable=True)
    return owners[order], first[order], second[order]


def _attention_mask(batch: Any, ids: Tensor) -> Tensor | None:
    """The attention mask that belongs to the ids that the embedding layer was called with."""
    if not isinstance(batch, Mapping):
        return None
    for ids_name, mask_name in _MASKS.items():
        named, mask = batch.get(ids_name), batch.get(mask_name)
        if not isinstance(named, Tensor) or not isinstance(mask, Tensor):
            continue
        if mask.shape == ids.shape == named.shape and torch.equal(named, ids):
            return mask
    return None
