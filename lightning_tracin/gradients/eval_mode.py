"""How a module runs while gradients are taken: in eval mode, with autograd on, and without a trace afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


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
def zero_weights_filled(module: nn.Module) -> Iterator[None]:
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
