"""Every training example's gradients, taken from the backward passes that training makes anyway.

Forward hooks find the calls of the layers, tensor hooks take the gradients at their outputs; training itself is not
touched. What a batch gave is turned into rows at once, or by a thread while another device computes the next batch.

The gradients are those of the weights of the moment, with dropout on, and not those at the checkpoint that follows.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_tracin.bridge.mixin import labels_of_module, words_of_batch
from lightning_tracin.gradients.batches import batch_size, shallow_copy
from lightning_tracin.gradients.calls import Call
from lightning_tracin.gradients.capture import captured_from_calls
from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.rows import unique_tokens
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.recording.training_form import USE_CHECKPOINT, TrainingForm
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.runs import Runs
from lightning_tracin.storage.trace import Trace
from lightning_tracin.storage.training_pass import all_not_finite, shard_writer


class TrainingCache:
    """Takes gradients between the checkpoints of a fit, and stores them at each.

    Args:
        module: the module in training.
        trace: where the gradients go.
        form: what :func:`~lightning_tracin.recording.training_form.check_training` found.
        processes: those that train together; each keeps what it has recorded until a checkpoint.
    """

    def __init__(
        self, module: nn.Module, trace: Trace, form: TrainingForm, processes: Processes, *, tolerant: bool = True
    ) -> None:
        self._module = module
        self._processes = processes
        self._trace = trace
        self._sites = sites_on_module(module, trace.sites)
        self._form = form
        self._folder = trace.path / "running.partial" / f"process-{processes.rank}"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._runs = Runs(self._folder, trace.n_train, dtype=trace.dtype)
        self._vocabulary: dict[int, str] = {}
        self._n_batches = 0
        self._tolerant = tolerant
        self._not_finite: set[int] = set()
        self._failure: Exception | None = None
        self._indices: list[int] | None = None
        self._batch: Any = None
        self._calls: list[Call] = []
        self._taken: tuple[list[Call], float, bool] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning_tracin-training")
        self._pending: list[Future[None]] = []
        self._hooks: list[RemovableHandle] = [
            layer.register_forward_hook(self._record, with_kwargs=True) for each in self._sites for layer in each.layers
        ]

    def begin(self, indices: list[int], batch: Any) -> None:
        """A training batch begins.

        Args:
            indices: the data set indices of its examples.
            batch: what the module is called with.
        """
        batch = shallow_copy(batch)  # training_step may take it apart
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
        if self._failure is not None:
            raise self._failure
        indices, taken, batch = self._indices, self._taken, self._batch
        self._indices = self._batch = self._taken = None
        if indices is None or taken is None:
            return  # training_step returned None: nothing was learned from this batch
        calls, divisor, scaled = taken
        reached = {call.layer for call in calls}
        missed = [each.site.layer for each in self._sites if reached.isdisjoint(each.layers)]
        if missed:
            raise ValueError(
                f"A backward pass of training did not come through the layers {', '.join(missed)}, so it gave no "
                f"gradients. {USE_CHECKPOINT}"
            )
        self._learn_words(batch, calls)
        job = _Job(indices, batch, calls, divisor, scaled, self._n_batches)
        if not _computed_elsewhere(calls):
            self._take(job)  # a thread would only take cores away from training
            return
        self._pending = [each for each in self._pending if not each.done() or each.result()]  # raises what it raised
        if len(self._pending) > 8:  # the thread lags behind: wait, rather than let batches pile up
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(self._take, job))

    def count_recorded(self) -> int:
        """Of how many examples any of the processes has gradients since the last checkpoint; each must ask.

        Raises:
            ValueError: see :meth:`end`.
            OSError: if the gradients cannot be written.
        """
        with self._processes.synchronized():
            for job in self._pending:
                job.result()
        self._pending = []
        return self._runs.count(self._processes)

    def store(self, checkpoint: Checkpoint, n_recorded: int) -> None:
        """Store what has come since the last checkpoint in the order of the data set.

        Args:
            checkpoint: of the trace.
            n_recorded: what :meth:`count_recorded` said.

        Raises:
            OSError: if the gradients cannot be written.
        """
        n_train = self._trace.n_train
        missing = n_train - n_recorded
        if missing:
            rank_zero_info(
                f"{missing} of {n_train} training examples count with a gradient of zero at the checkpoint of step "
                f"{checkpoint.step}: they were in no batch since the one before, or since the fit was resumed."
            )
        not_finite = all_not_finite(self._not_finite, n_recorded, checkpoint.step, self._processes)
        with ExitStack() as contexts:
            for name in (*(each.site.key for each in self._sites), "texts"):
                writer = contexts.enter_context(shard_writer(self._trace, checkpoint.path / name, self._processes))
                for block in self._runs.arranged(name, self._trace.shard_examples, self._processes):
                    writer.add(block)
                writer.close(self._processes, not_finite)
        self._trace.add_words(self._vocabulary, self._processes)
        self._runs.clear()
        self._not_finite = set()

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
        try:
            call = Call.of(layer, args, kwargs, output)
        except ValueError as error:  # The user's forward pass goes on; the error is raised when the batch is over.
            self._failure = self._failure or error
            return output
        frozen = not output.requires_grad
        output = output.detach().requires_grad_() if frozen else output
        output.register_hook(lambda gradient: setattr(call, "gradient", gradient.detach()))
        call.output = output.detach()
        self._calls.append(call)
        return output.clone() if frozen else output  # the module may change it in place, but no leaf

    def _learn_words(self, batch: Any, calls: Sequence[Call]) -> None:
        """Keep what to print for token ids that are new."""
        tables = [layer for each in self._sites if each.site.has_words for layer in each.layers]
        read = {token for call in calls if call.layer in tables for token in unique_tokens(call.inputs)}
        self._vocabulary.update(words_of_batch(self._module, batch, sorted(read - self._vocabulary.keys())))

    def _take(self, job: _Job) -> None:
        """Turn a batch's gradients into rows."""
        indices, layouts = job.indices, {call.layer: self._form.layout_of(call.layer) for call in job.calls}
        for call in job.calls:
            layout = layouts[call.layer]
            rows = layout.rows(len(indices), call.positions)
            several = rows is not None and max(layout.checked, default=1) > 1 and batch_size(job.batch) == len(indices)
            if rows not in (layout.checked or {1}) and not several:
                raise ValueError(
                    f"In a training batch of {len(indices)} examples a layer was called on "
                    f"{call.positions[layout.dim]} of them: the collate function drops or adds examples, so that they "
                    "cannot be numbered."
                )
        captured = captured_from_calls(torch.zeros(len(indices)), job.batch, self._sites, job.calls, layouts)
        bad = captured.not_finite()
        if bool(bad.any()):
            if job.scaled:
                return
            found = [index for index, is_bad in zip(indices, bad.tolist(), strict=True) if is_bad]
            if not self._tolerant:
                raise ValueError(
                    f"The gradient of training example {found[0]} became NaN or infinite in training. Look at that "
                    "example, or at the learning rate; what was stored before is complete."
                )
            self._not_finite |= set(found)
            captured = captured.without_gradients_of(bad)
        self._not_finite -= {index for index, is_bad in zip(indices, bad.tolist(), strict=True) if not is_bad}
        factors = job.divisor * self._form.shares(self._module, job.batch, len(indices)).reciprocal()
        blocks: dict[str, Ragged] = {
            each.site.key: each.site.stored(captured.gradients[each.site.key]).scaled(factors) for each in self._sites
        }
        blocks["texts"] = captured.texts(labels_of_module(self._module, job.batch, len(indices)))
        self._runs.add(torch.tensor(indices), blocks, job.number)


@dataclass(frozen=True)
class _Job:
    """A training batch whose gradients are to be turned into rows.

    Attributes:
        indices: the data set indices of its examples.
        batch: what the module was called with.
        calls: of the sites' layers, with the gradients at their outputs.
        divisor: what the mean loss was divided by.
        scaled: whether the loss was scaled.
        number: of the batch.
    """

    indices: list[int]
    batch: Any
    calls: list[Call]
    divisor: float
    scaled: bool
    number: int


def _computed_elsewhere(calls: Sequence[Call]) -> bool:
    """Whether another device than the CPU computes."""
    return any(call.output.device.type != "cpu" for call in calls)
