"""Every training example's gradients, taken from the backward passes that training makes anyway.

Forward hooks find the calls of the layers, tensor hooks take the gradients at their outputs; training itself is not
touched. What a batch gave is turned into rows at once, or by a thread while another device computes the next batch.

The gradients are those of the weights of the moment, with dropout on, and not those at the checkpoint that follows.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_tracin.capture import Call, Captured, batch_dims, capture, collected
from lightning_tracin.gradients import Block, distinct
from lightning_tracin.layers import layers_of_methods
from lightning_tracin.losses import MeanLoss, is_half, label_counts, labels_of, shallow
from lightning_tracin.mixin import losses_of, words_of_batch
from lightning_tracin.precision import full_precision
from lightning_tracin.processes import Processes
from lightning_tracin.runs import Runs
from lightning_tracin.trace import Checkpoint, Trace, gradients_of, texts_of

_USE = 'Use cache="checkpoint".'


class TrainingCache:
    """Takes gradients between the checkpoints of a fit, and stores them at each.

    Args:
        module: the module in training.
        trace: where the gradients go.
        methods: what to store gradients for.
        form: what :func:`check_training` found.
        processes: those that train together; each keeps what came to it until a checkpoint.
    """

    def __init__(
        self, module: nn.Module, trace: Trace, methods: Sequence[str], form: TrainingForm, processes: Processes
    ) -> None:
        self._module = module
        self._processes = processes
        self._trace = trace
        self._methods = tuple(methods)
        self._tables, self._linear = layers_of_methods(module, trace.layers, methods)
        self._form = form
        self._folder = trace.path / "running.partial" / f"process-{processes.rank}"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._runs = Runs(self._folder, trace.n_train, dtype=trace.kept.dtype)
        self._vocabulary: dict[int, str] = {}
        self._n_batches = 0
        self._indices: list[int] | None = None
        self._batch: Any = None
        self._calls: list[Call] = []
        self._taken: tuple[list[Call], float, bool] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning_tracin-training")
        self._pending: list[Future[None]] = []
        self._hooks: list[RemovableHandle] = [
            layer.register_forward_hook(self._record, with_kwargs=True) for layer in (*self._tables, *self._linear)
        ]

    def begin(self, indices: list[int], batch: Any) -> None:
        """A training batch begins.

        Args:
            indices: the data set indices of its examples.
            batch: what the module is called with.
        """
        batch = shallow(batch)  # training_step may take it apart
        self._indices, self._batch, self._calls, self._taken = indices, batch, [], None
        self._n_batches += 1

    def backward_ended(self, *, divisor: float, scaled: bool) -> None:
        """A backward pass of the batch is over; of several (an optimizer that calls its closure again) the last counts.

        Args:
            divisor: what the mean loss was divided by: accumulated batches, over an fp16 loss scale.
            scaled: whether the loss was scaled, so that the optimizer leaves out steps whose gradients overflow.
        """
        self._taken = ([call for call in self._calls if call.gradient is not None], divisor, scaled)
        self._calls = []

    def end(self) -> None:
        """A training batch is over: its gradients go to the thread.

        Raises:
            ValueError: if a gradient is not finite, here or in an earlier batch, or if a layer was not called.
            OSError: if the gradients of an earlier batch could not be written.
        """
        indices, taken, batch = self._indices, self._taken, self._batch
        self._indices = self._batch = self._taken = None
        if indices is None or taken is None:
            return  # training_step returned None: nothing was learned from this batch
        calls, divisor, scaled = taken
        embeddings = [call for call in calls if call.layer in self._tables]
        linears = [call for call in calls if call.layer in self._linear]
        if (self._tables and not embeddings) or (self._linear and not linears):
            raise ValueError(
                "A backward pass of training did not come through the layers "
                f"{', '.join(self._trace.layers.values())}, so it gave no gradients. {_USE}"
            )
        new = {token for call in embeddings for token in distinct(call.inputs)} - self._vocabulary.keys()
        self._vocabulary.update(words_of_batch(self._module, batch, sorted(new)))
        job = (indices, batch, embeddings, linears, divisor, scaled, self._n_batches)
        if not _computed_elsewhere(calls):
            self._take(*job)  # a thread would only take cores away from training
            return
        self._pending = [each for each in self._pending if not each.done() or each.result()]  # raises what it raised
        if len(self._pending) > 8:  # the thread lags behind: wait, rather than let batches pile up
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(self._take, *job))

    def came(self) -> int:
        """Of how many examples gradients have come to any of the processes since the last checkpoint; each must ask.

        Raises:
            ValueError: see :meth:`end`.
            OSError: if the gradients cannot be written.
        """
        with self._processes.together():
            for job in self._pending:
                job.result()
        self._pending = []
        return self._runs.count(self._processes)

    def store(self, checkpoint: Checkpoint, n_came: int) -> None:
        """Store what has come since the last checkpoint in the order of the data set.

        Args:
            checkpoint: of the trace.
            n_came: what :meth:`came` said.

        Raises:
            OSError: if the gradients cannot be written.
        """
        n_train = self._trace.n_train
        missing = n_train - n_came
        if missing:
            rank_zero_info(
                f"{missing} of {n_train} training examples count with a gradient of zero at the checkpoint of step "
                f"{checkpoint.step}: they were in no batch since the one before, or since the fit was resumed."
            )
        with ExitStack() as contexts:
            for name in (*self._methods, "texts"):
                writer = self._trace.writer(contexts, checkpoint.path / name, self._processes)
                for block in self._runs.arranged(name, self._trace.shard_examples, self._processes):
                    writer.add(block)
                writer.close(self._processes)
        self._trace.add_words(self._vocabulary, self._processes)
        self._runs.clear()

    def close(self) -> None:
        """Leave the module, and remove what was not stored at a checkpoint."""
        for hook in self._hooks:
            hook.remove()
        self._thread.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # not there, or another process still has its own in it
            self._folder.parent.rmdir()

    def _record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Note a layer's call in a training step, and ask for the gradient at its output."""
        if self._indices is None or not torch.is_grad_enabled():
            return output
        call = Call.of(layer, args, kwargs, output)
        frozen = not output.requires_grad
        output = output.detach().requires_grad_() if frozen else output
        output.register_hook(lambda gradient: setattr(call, "gradient", gradient.detach()))
        call.output = output.detach()
        self._calls.append(call)
        return output.clone() if frozen else output  # the module may change it in place, but no leaf

    def _take(
        self,
        indices: list[int],
        batch: Any,
        embeddings: list[Call],
        linears: list[Call],
        divisor: float,
        scaled: bool,
        when: int,
    ) -> None:
        """Turn a batch's gradients into rows."""
        sizes = {call.output.shape[self._form.dims[call.layer]] for call in (*embeddings, *linears)}
        if sizes != {len(indices)}:
            raise ValueError(
                f"In a training batch of {len(indices)} examples the layers were called on {sorted(sizes)} of them: "
                "the collate function drops or adds examples, so that they cannot be numbered."
            )
        captured = collected(torch.zeros(len(indices)), batch, embeddings, linears, self._form.dims)
        bad = captured.first_not_finite()
        if bad is not None:
            if scaled:
                return
            raise ValueError(
                f"The gradient of training example {indices[bad]} became NaN or infinite in training. Look at that "
                "example, or at the learning rate; what was stored before is complete."
            )
        numbers = torch.tensor(indices)
        factors = divisor * self._form.shares(self._module, batch, len(indices)).reciprocal()
        blocks: dict[str, Block] = {
            method: self._trace.kept.of(gradients_of(captured, method)).scaled(factors) for method in self._methods
        }
        self._runs.add(numbers, {**blocks, "texts": texts_of(captured, labels_of(batch))}, when)


@dataclass(frozen=True)
class TrainingForm:
    """How the gradients of training are made of those of the examples' losses.

    Attributes:
        dims: for each layer, the dimension of its calls that counts the examples.
        by_labels: whether the loss of a batch is the mean over all labelled tokens, rather than over the examples.
    """

    dims: Mapping[nn.Module, int]
    by_labels: bool

    def shares(self, module: nn.Module, batch: Any, n_examples: int) -> Tensor:
        """What each example's loss counts in the loss of its batch, (n_examples,)."""
        counts = label_counts(module, batch) if self.by_labels else None
        if counts is None:
            return torch.full((n_examples,), 1 / n_examples, dtype=torch.float32)
        return counts.cpu().float().clamp(min=1) / max(1, int(counts.sum()))


@full_precision()
def check_training(
    module: nn.Module, layers: Mapping[str, str], methods: Sequence[str], batch: Any, of_losses: Captured
) -> TrainingForm:
    """Check that the gradients of training are those of the examples' losses.

    Call it inside :func:`~lightning_tracin.capture.gradients_enabled`.

    Args:
        module: the module that is about to be trained.
        layers: the names of the layers, by method.
        methods: what gradients are needed for.
        batch: a first batch of the training set, on the module's device.
        of_losses: what the losses of its examples gave.

    Raises:
        ValueError: if the loss of ``training_step`` is not a mean of the examples' losses, or if hooks do not run.
    """
    name = type(module).__name__
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(f'cache="training" needs automatic optimization, but {name} optimizes manually. {_USE}')
    compiled = any(type(part).__name__ == "OptimizedModule" for part in module.modules())
    if compiled or getattr(module, "_compiler_ctx", None):
        raise ValueError(f'cache="training" cannot see into a compiled module, as {name} is. {_USE}')
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        rank_zero_warn(
            f'{name} has batch norm, which in training mixes the examples of a batch: what cache="training" stores for '
            'an example is then partly of its neighbours. cache="checkpoint" is free of that.'
        )
    tables, linear = layers_of_methods(module, layers, methods)
    losses = losses_of(module)
    dims = batch_dims(losses, batch, [*tables, *linear], independent=False)
    if isinstance(losses, MeanLoss):
        return TrainingForm(dims, by_labels=False)  # the mean is what it checks on its own
    last = linear[0] if linear else None
    of_training = capture(MeanLoss(module), batch, embedding_layers=tables, linear_layer=last, dims=dims)
    expected, found = (torch.stack(_norms(captured)) for captured in (of_losses, of_training))
    tolerance = 5e-2 if is_half(module) else 1e-3
    for by_labels in (True, False):
        form = TrainingForm(dims, by_labels)
        weighted = expected * form.shares(module, batch, len(of_losses)) * len(of_losses)
        if torch.allclose(found, weighted, rtol=tolerance, atol=float(weighted.max()) * tolerance):
            return form
    worst = int((found - expected).abs().amax(0).argmax())
    raise ValueError(
        f"training_step of {name} does not return the mean of influence_loss over the batch: the gradient of the first "
        f"batch's example {worst} has the norm {float(found[0, worst]):.4g} by the one and "
        f"{float(expected[0, worst]):.4g} by the other. Is its loss weighted, a sum, or random? "
        f'cache="training" cannot tell the examples\' gradients from it. {_USE}'
    )


def _norms(captured: Captured) -> list[Tensor]:
    """The norms of the examples' gradients at each layer."""
    return [block.example_norms() for block in (captured.words, captured.linear) if block is not None]


def _computed_elsewhere(calls: Sequence[Call]) -> bool:
    """Whether another device than the CPU computes."""
    return any(call.output.device.type != "cpu" for call in calls)


def divisor_of(accumulated: int, scaler: Any) -> tuple[float, bool]:
    """What Lightning and an fp16 loss scaler together divide a mean loss by, and whether there is a scaler."""
    scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None
    return accumulated / (scale or 1.0), scale is not None
