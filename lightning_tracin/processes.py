"""The processes of a trainer that work on one trace together, and what they tell each other.

Every exchange carries along whether its sender has failed. So an error in one process ends all of them with that
error, and none waits for one that has left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed import is_available, is_initialized

from lightning_tracin.gradients import LinearGradients, Texts, WordGradients

_PIECE = 64 * 2**20  # bytes that travel at once, for each process
_SECONDS = 60.0  # that a shared file system may take to show one node what another has written
_BLOCKS: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in (WordGradients, LinearGradients, Texts)}
_ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, OSError, FileExistsError, FileNotFoundError)}
_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


class Processes:
    """One process among those that work together; by default it works alone.

    All processes must make the same calls in the same order. After an error was raised they make none any more.

    Args:
        strategy: the trainer's strategy, through which they talk; None for one that works alone.
        rank: the number of this process.
        count: how many there are.
    """

    def __init__(self, strategy: pl.strategies.Strategy | None = None, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count
        self._strategy = strategy
        self._over = False

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Processes:
        """Those of a trainer, which are started and connected if they are not yet.

        Raises:
            ValueError: if a process cannot see the whole model, or would not come back with what it finds.
        """
        check_strategy(trainer)
        connected = is_available() and is_initialized()
        if not connected:
            _check_returns(trainer)
        if trainer.world_size == 1:
            return cls()
        if not connected:  # as the trainer's next fit or predict would
            launcher: Any = trainer.strategy.launcher
            launcher.launch(trainer.strategy.setup_environment)
        return cls(trainer.strategy, trainer.global_rank, trainer.world_size)

    @property
    def first(self) -> bool:
        """Whether this process is the one that does what only one of them must do."""
        return self.rank == 0

    def own(self, n_pieces: int) -> range:
        """This process's part of pieces of work that lie one after the other."""
        return range(*(-(-n_pieces * rank // self.count) for rank in (self.rank, self.rank + 1)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave a block of code when all processes are through, or with an error if one of them has failed.

        Raises:
            Exception: what this process raised in the block; else the same as another process did.
        """
        try:
            yield
        except Exception as error:
            if not self._over and self.count > 1:
                with suppress(RuntimeError):  # the others are gone: what is raised here counts
                    self._exchange({"error": [type(error).__name__, str(error)]})
                self._over = True
            raise
        self.exchange(None)

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, as they can be written in JSON.

        Raises:
            Exception: as another process did in place of sending a value.
        """
        if self.count == 1:
            return [value]
        received = self._exchange({"value": value})
        for rank, message in enumerate(received):
            if "error" in message:
                self._over = True
                kind, text = message["error"]
                text = text if kind in _ERRORS else f"{kind}: {text}"
                raise _ERRORS.get(kind, RuntimeError)(f"{text} (In process {rank} of {self.count}.)")
        return [message["value"] for message in received]

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of all processes, on the CPU; each may send others, of its own shapes."""
        if self.count == 1:
            return [dict(tensors)]
        forms = self.exchange([[name, list(t.shape), str(t.dtype).split(".")[1]] for name, t in tensors.items()])
        parts = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
        received = self._gather_bytes(torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8))
        gathered = []
        for form, content in zip(forms, received, strict=True):
            found, start = {}, 0
            for name, shape, dtype in form:
                stop = start + torch.Size(shape).numel() * getattr(torch, dtype).itemsize
                found[name] = content[start:stop].clone().view(getattr(torch, dtype)).reshape(shape)
                start = stop
            gathered.append(found)
        return gathered

    def gather_blocks(self, block: Any) -> list[Any]:
        """The blocks of gradients or texts of all processes that have one."""
        if self.count == 1:
            return [] if block is None else [block]
        own = {} if block is None else vars(block)
        tensors = self.gather({name: value for name, value in own.items() if isinstance(value, Tensor)})
        others = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
        kinds = self.exchange(None if block is None else [type(block).__name__, others])
        sent = zip(kinds, tensors, strict=True)
        return [_BLOCKS[kind[0]](**kind[1], **found) for kind, found in sent if kind is not None]

    def leave(self) -> None:
        """Tell the others nothing any more: they may be where they do not listen."""
        self._over = True

    def _exchange(self, message: Any) -> list[Any]:
        content = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        return [json.loads(bytes(received.numpy())) for received in self._gather_bytes(content)]

    def _gather_bytes(self, content: Tensor) -> list[Tensor]:
        """Each process's bytes, (n,) uint8."""
        assert self._strategy is not None
        device = self._strategy.root_device
        lengths = self._strategy.all_gather(torch.tensor([len(content)], device=device)).flatten().tolist()
        received = [torch.empty(length, dtype=torch.uint8) for length in lengths]
        for start in range(0, max(lengths), _PIECE):
            own = content[start : start + _PIECE]
            piece = torch.zeros(min(_PIECE, max(lengths) - start), dtype=torch.uint8)
            piece[: len(own)] = own
            for row, whole in zip(self._strategy.all_gather(piece.to(device)).cpu(), received, strict=True):
                place = whole[start : start + _PIECE]
                place.copy_(row[: len(place)])
        return received


def check_strategy(trainer: pl.Trainer) -> None:
    """Check that each of a trainer's processes holds the whole model.

    Raises:
        ValueError: if it does not.
    """
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if names & _SHARDING:
        raise ValueError(
            f"{type(trainer.strategy).__name__} cuts the model into pieces, but lightning_tracin needs it whole in "
            'each process: train with Trainer(strategy="ddp"), or on one device.'
        )


def _check_returns(trainer: pl.Trainer) -> None:
    """Check that a trainer runs ``predict`` in this process, and not in others that end with it.

    Raises:
        ValueError: if it does not.
    """
    if "MultiProcessing" in type(trainer.strategy.launcher).__name__:
        raise ValueError(
            "A trainer that spawns or forks its processes (ddp_spawn, ddp_fork, ddp_notebook) cannot bring gradients "
            "back from them. A fit with it leaves its trace in the folder: ask that with another trainer, such as "
            'Trainer(devices=1).influence(..., model, trace="folder"), or one with strategy="ddp".'
        )


def require_same(processes: Processes, what: str, values: Sequence[Any]) -> None:
    """Check that all processes have come upon the same.

    Raises:
        ValueError: if they have not.
    """
    found = processes.exchange(list(values))
    differing = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    if differing is not None:
        raise ValueError(
            f"Processes 0 and {differing} of {processes.count} have different {what}. Load the same data in the same "
            "order in each of them: where it is split or shuffled at random, call seed_everything first."
        )


def await_file(path: Path) -> None:
    """Wait until a file that another process has written can be seen from here.

    Raises:
        FileNotFoundError: if it does not show up within a minute.
    """
    await_seen(path.exists, f"The first process has written {path.absolute()}")


def await_seen(seen: Callable[[], bool], what: str) -> None:
    """Wait until this process sees in a shared folder what another has written.

    Raises:
        FileNotFoundError: if it does not within a minute.
    """
    stop = time.monotonic() + _SECONDS
    while not seen():
        if time.monotonic() > stop:
            raise FileNotFoundError(f"{what}, but this one does not see it. Let all nodes share the trace's folder.")
        time.sleep(0.1)
