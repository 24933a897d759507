"""The state of a module while gradients are taken: eval mode with autograd, and everything restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def gradients_enabled(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode with autograd on, and restore every submodule's training flag on exit.

    It works inside of ``torch.no_grad`` and ``torch.inference_mode``. Compiled modules run eagerly, so that their hooks
    fire.
    """
    training = {submodule: submodule.training for submodule in module.modules()}
    # A forward pass through nn.Embedding(max_norm=...) rescales the weight in place.
    limited = [submodule.weight for submodule in training if getattr(submodule, "max_norm", None) is not None]
    saved = [(weight, weight.detach().clone()) for weight in limited if isinstance(weight, Tensor)]
    # cuDNN has no backward pass for a recurrent layer in eval mode; PyTorch's own kernels have one.
    has_recurrent = any(isinstance(submodule, nn.RNNBase) for submodule in training)
    had_fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if has_recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if hasattr(torch.compiler, "set_stance"):  # torch >= 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            module.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it skips padded positions, which training computes
            yield
        finally:
            for submodule, flag in training.items():
                submodule.training = flag
            torch.backends.mha.set_fastpath_enabled(had_fastpath)
            with torch.no_grad():
                for weight, value in saved:
                    weight.copy_(value)


@contextmanager
def zero_weights_filled(module: nn.Module) -> Iterator[None]:
    """Fill weight matrices that are all zero (of a new head) with small random numbers, from a fixed seed.

    A zero weight makes the gradients before it zero, or all losses equal, so that checks of gradients and losses would
    always pass. The zeros are restored on exit.
    """
    generator = torch.Generator().manual_seed(0)
    filled = [
        parameter
        for parameter in module.parameters()
        if parameter.dim() > 1 and parameter.is_floating_point() and not parameter.any()
    ]
    with torch.no_grad():
        for parameter in filled:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in filled:
                parameter.zero_()
