"""Trace: the folder that a fit leaves behind.

JSON and safetensors only. Every file, every folder of gradients and every checkpoint appears whole or not at all: it is
written under a name that ends in ``.partial`` and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_tracin.capture import Captured
from lightning_tracin.gradients import Gradients, Kept, SecondMoments, Texts, distinct
from lightning_tracin.layers import named_layer
from lightning_tracin.processes import ALONE, Processes, await_seen
from lightning_tracin.sharded import is_sharded, joined, parameter_names, whole_state
from lightning_tracin.store import Shards, ShardWriter, check_file, read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from lightning_tracin.training_set import TrainingSet  # which needs Lightning

FORMAT_VERSION = 1
_PARTIAL = ".partial"
_HEADER = (
    "id",
    "n_train",
    "data_fingerprint",
    "model_fingerprint",
    "model_class",
    "layers",
    "dtype",
    "top_words",
    "projection",
    "shard_examples",
)

#: One optimizer step: its number (``trainer.global_step`` before it), the optimizer, the rate of each of its groups.
Step = tuple[int, int, list[float]]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one moment of a fit, and the learning rates that led to it.

    Attributes:
        path: folder of this checkpoint.
        id: tells it apart from every other, also from one that a resumed fit put in its place.
        step: ``trainer.global_step``.
        epoch: ``trainer.current_epoch``.
        steps: the optimizer steps since the previous checkpoint.
        groups: for each optimizer and parameter group, the names of its parameters.
        checksums: of the weights' and second moments' files.
        layers: for each method, the name of the layer that it takes gradients at.
    """

    path: Path
    id: str
    step: int
    epoch: int
    steps: list[Step]
    groups: list[list[list[str]]]
    checksums: dict[str, str]
    layers: dict[str, str]

    @property
    def learning_rate(self) -> float:
        """The word embedding layer's mean learning rate since the previous checkpoint (last layer's without one)."""
        return self.learning_rate_of(next(iter(self.layers)))

    def learning_rate_of(self, method: str) -> float:
        """Mean rate, over the optimizer steps since the previous checkpoint, of the group that holds a layer's weight.

        Its bias counts with the same rate, whatever its own group's. A layer that no optimizer trains (a frozen
        embedding) gets the mean over all groups.

        Args:
            method: "tracin-we" or "tracin-last".
        """
        prefix = f"{self.layers[method]}."

        def holding(part: str) -> set[tuple[int, int]]:
            return {
                (optimizer, group)
                for optimizer, groups in enumerate(self.groups)
                for group, names in enumerate(groups)
                if any(name.startswith(part) for name in names)
            }

        held = holding(f"{prefix}weight") or holding(prefix)  # under adapters the weight is frozen, its parts are not
        rates = [
            rate
            for _, optimizer, of_groups in self.steps
            for group, rate in enumerate(of_groups)
            if not held or (optimizer, group) in held
        ]
        return sum(rates) / len(rates) if rates else 0.0

    def weights(self) -> dict[str, Tensor]:
        """The module's state dict, as trained: not averaged, tied weights under each of their names.

        Raises:
            ValueError: if the file is not as it was written.
        """
        tensors, tied = self._read("weights.safetensors")
        return {**tensors, **{alias: tensors[name] for alias, name in tied.items()}}

    def second_moments(self, method: str) -> SecondMoments:
        """Adam's bias-corrected second moments of the layer of a method.

        Raises:
            ValueError: if the fit's optimizer kept none of that layer, or the file is not as it was written.
        """
        name = f"second-moments-{method}.safetensors"
        if name not in self.checksums:
            raise ValueError(
                f'precondition="adam" needs Adam\'s second moments, but the fit kept none of {self.layers[method]!r} '
                f"at step {self.step}: it was frozen, or its optimizer is not of the Adam family."
            )
        tensors, metadata = self._read(name)
        return SecondMoments(tensors["values"], tensors.get("rows"), float(metadata["eps"]))

    def has_gradients(self, method: str) -> bool:
        """Whether the training examples' gradients for a method are stored."""
        return (self.path / method / "index.json").exists()

    def gradients(self, method: str) -> Shards:
        """The training examples' gradients for a method."""
        return Shards.open(self.path / method)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        return read_tensors(self.path / name, self.checksums[name])


class Trace:
    """Opens the folder that a fit with :class:`~lightning_tracin.TracInCallback` left behind.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if there is no trace in the folder.
        ValueError: if a newer version of lightning_tracin wrote it, or it is damaged.

    Example::

        for checkpoint in Trace("trace").checkpoints:
            print(checkpoint.step, checkpoint.learning_rate)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "trace.json").exists():
            raise FileNotFoundError(
                f"There is no trace in {self.path.absolute()}: it holds no trace.json. Fit with TracInCallback first, "
                "or pass the folder that it wrote to."
            )
        header = read_json(self.path / "trace.json", ["version"])
        if header["version"] > FORMAT_VERSION:
            raise ValueError(
                f"The trace in {self.path} is of format version {header['version']}, but this lightning_tracin reads "
                f"up to {FORMAT_VERSION}. Update lightning_tracin, or fit again."
            )
        header = read_json(self.path / "trace.json", _HEADER)
        self.id: str = header["id"]
        self.n_train: int = header["n_train"]
        self.data_fingerprint: str = header["data_fingerprint"]
        self.model_fingerprint: str = header["model_fingerprint"]
        self.model_class: str = header["model_class"]
        self.layers: dict[str, str] = header["layers"]
        self.kept = Kept(header["dtype"], header["top_words"], header["projection"])
        self.shard_examples: int = header["shard_examples"]

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, n_train={self.n_train}, checkpoints={len(self.checkpoints)})"

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        state: Mapping[str, Any],
        model_class: str,
        n_train: int,
        data_fingerprint: str,
        layers: Mapping[str, str],
        kept: Kept,
        shard_examples: int,
    ) -> Trace:
        """Start an empty trace; one that is there already is removed."""
        remove_trace(path)
        path.mkdir(parents=True, exist_ok=True)
        header = {
            "format": "lightning_tracin trace",
            "version": FORMAT_VERSION,
            "id": uuid.uuid4().hex,
            "n_train": n_train,
            "data_fingerprint": data_fingerprint,
            "model_fingerprint": model_fingerprint(state),
            "model_class": model_class,
            "layers": dict(layers),
            **asdict(kept),
            "shard_examples": shard_examples,
        }
        write_json(path / "trace.json", header)
        return cls(path)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, in the order of the fit; read from the folder each time."""
        files = sorted(self.path.glob("checkpoints/*/checkpoint.json"))
        return [self._checkpoint(file) for file in files if file.parent.suffix != _PARTIAL]

    @property
    def has_texts(self) -> bool:
        """Whether the training examples' token ids and labels are stored: from the first caching on."""
        return bool(self._texts())

    def texts(self, examples: Sequence[int]) -> Texts:
        """Token ids and labels of some training examples, each asked for once, in the order given.

        Of an example that training has not come upon yet there is nothing.
        """
        blocks, places = [Texts.empty(0)], []
        missing = torch.arange(len(examples))
        for stored in self._texts():
            read: Texts = stored.read_examples([examples[place] for place in missing.tolist()])
            known = torch.isin(torch.arange(len(missing)), read.examples) | ~torch.isnan(read.labels)
            blocks.append(read)
            places.append(torch.where(known, missing, -1))
            missing = missing[~known]
            if not len(missing):
                break
        return Texts.cat(blocks).arranged(torch.cat([missing[:0], *places]), len(examples))

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """What to print for the token ids that occur in the training set."""
        path = self.path / "vocabulary.json"
        return {int(token): word for token, word in read_json(path).items()} if path.exists() else {}

    def add_words(self, words: Mapping[int, str], processes: Processes = ALONE) -> None:
        """Keep what to print for token ids, as each of the processes knows it."""
        known = dict(self.vocabulary)
        for own in processes.gather(dict(words)):
            known |= own
        if processes.first:
            write_json(self.path / "vocabulary.json", known)
        self.__dict__.pop("vocabulary", None)

    def verify(self) -> Iterator[tuple[Path, str | None]]:
        """Compare every file with what was written.

        JSON files, which have no checksum, are read. What is not named in any file, such as a checkpoint whose whole
        folder is gone, cannot be missed.

        Yields:
            Each file, and what is wrong with it, or None. A file or folder that a writing left behind when it was
            broken off counts as wrong, though nothing is read from it.
        """
        yield self.path / "trace.json", None  # it was read
        for path in sorted(self.path.rglob(f"*{_PARTIAL}")):
            yield path, f"{path} was left behind by a fit that was broken off (or is still running); it is never read."
        folders = [path for path in sorted(self.path.glob("checkpoints/*")) if path.suffix != _PARTIAL]
        for folder in folders:
            file = folder / "checkpoint.json"
            problem = _problem(file, partial(self._checkpoint, file))
            yield file, problem
            for name, checksum in {} if problem else self._checkpoint(file).checksums.items():
                yield folder / name, _problem(folder / name, partial(check_file, folder / name, checksum))
        stored = [folder / name for folder in folders for name in (*self.layers, "texts") if (folder / name).exists()]
        if stored:  # the texts come with the first gradients
            path = self.path / "vocabulary.json"
            yield path, _problem(path, partial(read_json, path))
            if not any(folder.name == "texts" for folder in stored):
                stored.append(self.path / "texts")
        for folder in stored:
            yield from self._verify_shards(folder)

    def check_counts(self, shards: Shards) -> None:
        """Check that shards hold as many examples as the trace has, in as many files.

        Raises:
            ValueError: if they do not.
        """
        found, expected = (shards.n_examples, shards.shard_examples), (self.n_train, self.shard_examples)
        if found != expected or len(shards.checksums) != len(shards):
            raise ValueError(
                f"{shards.folder / 'index.json'} is damaged: it counts {found[0]} examples in {len(shards.checksums)} "
                f"shards of {found[1]}, but the trace has {expected[0]} in shards of {expected[1]}. Restore the file "
                "from a copy, or fit again; of gradients it is enough to remove the folder."
            )

    def _verify_shards(self, folder: Path) -> Iterator[tuple[Path, str | None]]:
        """The part of :meth:`verify` for a folder of shards."""
        path = folder / "index.json"
        problem = _problem(path, lambda: self.check_counts(Shards.open(folder)))
        yield path, problem
        if problem is None:
            for file, checksum in Shards.open(folder).files:
                yield file, _problem(file, partial(check_file, file, checksum))

    def _checkpoint(self, file: Path) -> Checkpoint:
        keys = [each.name for each in fields(Checkpoint) if each.name not in ("path", "layers")]
        return Checkpoint(path=file.parent, layers=self.layers, **read_json(file, keys))

    def _texts(self) -> list[Shards]:
        """The stored texts: of the whole training set, or of what was trained on up to each checkpoint."""
        folders = [self.path / "texts", *sorted(self.path.glob("checkpoints/*/texts"))]
        return [Shards.open(folder) for folder in folders if (folder / "index.json").exists()]

    def check_model(self, state: Mapping[str, Any], model_class: str) -> None:
        """Check that a module is the one that was trained: the same parameters of the same shapes.

        Args:
            state: the module's state dict.
            model_class: the name of its class.

        Raises:
            ValueError: if it is not; the message names parameters that differ.
        """
        if model_fingerprint(state) == self.model_fingerprint:
            return
        own = _shapes(state)
        recorded = _shapes(self.checkpoints[0].weights()) if self.checkpoints else {}
        differing = sorted(name for name in own.keys() | recorded.keys() if own.get(name) != recorded.get(name))
        raise ValueError(
            f"The trace in {self.path} is of another model ({self.model_class}) than {model_class}: "
            f"{len(differing)} parameters differ in name or shape, such as "
            + "; ".join(f"{name}: {recorded.get(name)} in the trace, {own.get(name)} here" for name in differing[:3])
            + "."
        )

    def check_in_place(self) -> None:
        """Check that the folder still holds this trace.

        Raises:
            FileNotFoundError: if it holds none.
            ValueError: if it holds another.
        """
        if Trace(self.path).id != self.id:
            raise ValueError(f"Another fit has replaced the trace in {self.path}; pass that folder to use its trace.")

    def check_data(self, n_train: int, fingerprint: str) -> None:
        """Check that a training set is the one that was trained on.

        Raises:
            ValueError: if it has another number of examples, or other examples.
        """
        if (n_train, fingerprint) == (self.n_train, self.data_fingerprint):
            return
        difference = (
            f"it had {self.n_train} examples, this one has {n_train}"
            if n_train != self.n_train
            else "the examples, or their order in the data set, differ"
        )
        raise ValueError(
            f"The trace in {self.path} is of another training set: {difference}. Pass the data set of the fit, in its "
            "order, or fit again."
        )

    @contextmanager
    def new_checkpoint(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        step: int,
        epoch: int,
        steps: list[Step],
        processes: Processes = ALONE,
    ) -> Iterator[Checkpoint]:
        """Record a checkpoint. It joins the trace, whole, when all processes leave the context without an exception.

        Raises:
            FileNotFoundError: if the trace is no longer in its folder.
            ValueError: if another is in its place.
        """
        with processes.together():
            if processes.first:
                self.check_in_place()  # the lock is nothing to a person who moves folders
        names = parameter_names(module)
        groups = [
            [[name for weight in group["params"] for name in names.get(id(weight), [])] for group in each.param_groups]
            for each in optimizers
        ]
        content: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "step": step,
            "epoch": epoch,
            "steps": steps,
            "groups": groups,
        }
        with _appearing(self.path / "checkpoints" / f"step-{step:09d}", processes) as folder:
            content["checksums"] = self._write_layers(folder, module, optimizers, processes)
            if processes.first:
                write_json(folder / "checkpoint.json", content)
            content = processes.gather(content)[0]
            yield Checkpoint(path=folder, layers=self.layers, **content)

    def _write_layers(
        self, folder: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], processes: Processes
    ) -> dict[str, str]:
        """Let the first process write the weights and the layers' second moments; the files' checksums by name."""
        state = whole_state(module)
        holders = processes if is_sharded(module) else ALONE  # of a weight
        moments = {
            method: _second_moments(module, layer, optimizers, state, holders, sparse=method == "tracin-we")
            for method, layer in self.layers.items()
            if processes.first or holders.size > 1
        }
        if not processes.first:
            return {}
        checksums = {"weights.safetensors": _write_weights(folder / "weights.safetensors", state)}
        for method, of_layer in moments.items():
            if of_layer is not None:
                name = f"second-moments-{method}.safetensors"
                checksums[name] = _write_moments(folder / name, of_layer)
        return checksums

    def part(self, processes: Processes) -> range:
        """The training examples that a process stores: whole shards."""
        shards = processes.share(-(-self.n_train // self.shard_examples))
        return range(*(min(shard * self.shard_examples, self.n_train) for shard in (shards.start, shards.stop)))

    def by_length(self, training_set: TrainingSet, processes: Processes) -> Sequence[int]:
        """A process's :meth:`part`, each shard's examples from the longest to the shortest.

        Batches of examples that are about as long hold little padding. The stored texts tell how long they are, or else
        the data set; where neither does, the examples keep the order of the data set, as those of a stream must.

        Raises:
            ValueError: if the stored texts are damaged.
        """
        part = self.part(processes)
        if training_set.iterable:
            return part
        lengths = self._lengths(part)
        if lengths is None or not lengths.any():  # of a fit that looked at the last layer alone
            lengths = training_set.lengths(part)
        if lengths is None:
            return part
        order: list[int] = []
        for of_shard in torch.split(lengths, self.shard_examples):
            order += (torch.argsort(of_shard, descending=True, stable=True) + part.start + len(order)).tolist()
        return order

    def _lengths(self, part: range) -> Tensor | None:
        """(len(part),) how many words the stored texts of some whole shards hold, if there are any.

        Raises:
            ValueError: if the texts are damaged.
        """
        path = self.path / "texts"
        if not part or not (path / "index.json").exists():
            return None
        texts = Shards.open(path)
        self.check_counts(texts)
        shards = range(part.start // self.shard_examples, -(-part.stop // self.shard_examples))
        blocks: Iterator[Texts] = (texts.read(shard) for shard in shards)
        return torch.cat([torch.bincount(block.examples, minlength=block.n_examples) for block in blocks])

    @contextmanager
    def caching(
        self,
        checkpoint: Checkpoint,
        methods: Sequence[str],
        order: Sequence[int],
        processes: Processes = ALONE,
    ) -> Iterator[CachePass]:
        """Store the training examples' gradients at a checkpoint; all appear when every example was added.

        Args:
            checkpoint: of this trace.
            methods: those whose gradients are stored.
            order: in which this process adds the examples of its :meth:`part`. Those of a shard come together.
            processes: those that each add their part.

        Raises:
            ValueError: if another number of examples was added than the training set has.
        """
        with ExitStack() as folders:
            writers = {}
            for method in methods:
                writers[method] = self.writer(folders, checkpoint.path / method, processes, order)
            has_texts = processes.gather(self.has_texts)[0]
            texts = None if has_texts else self.writer(folders, self.path / "texts", processes, order)
            cache = CachePass(self, writers, texts, processes, order)
            yield cache
            cache.close()

    def drop_checkpoints_after(self, step: int) -> None:
        """Remove the checkpoints beyond a step, when a fit is resumed from an earlier one."""
        for checkpoint in self.checkpoints:
            if checkpoint.step > step:
                shutil.rmtree(checkpoint.path)

    def writer(
        self, contexts: ExitStack, folder: Path, processes: Processes = ALONE, order: Sequence[int] | None = None
    ) -> ShardWriter:
        """A writer of a process's shards into a folder that appears when it is complete.

        Shards hold the same examples at every checkpoint, so that scores can be added up shard by shard.
        """
        appearing = contexts.enter_context(_appearing(folder, processes))
        return contexts.enter_context(
            ShardWriter(
                appearing,
                dtype=self.kept.dtype,
                shard_examples=self.shard_examples,
                first_shard=self.part(processes).start // self.shard_examples,
                order=order,
            )
        )


class CachePass:
    """Takes the captured batches of one pass over the training set, or a process's part of it, in a known order."""

    def __init__(
        self,
        trace: Trace,
        writers: Mapping[str, ShardWriter],
        texts: ShardWriter | None,
        processes: Processes,
        order: Sequence[int],
    ) -> None:
        self.n_examples = 0
        self._order = order
        self._processes = processes
        self._trace = trace
        self._writers = writers
        self._texts = texts
        self._vocabulary: dict[int, str] = {}

    def unknown_tokens(self, captured: Captured) -> list[int]:
        """The token ids of a batch whose words are not known yet, each once."""
        if self._texts is None:
            return []
        return [token for token in distinct(captured.token_ids) if token not in self._vocabulary]

    def add(self, captured: Captured, labels: Tensor | None, words: Mapping[int, str]) -> None:
        """Store the next examples.

        Args:
            captured: their gradients.
            labels: (B, ...) their labels, kept for printing if they are one number for each.
            words: what to print for token ids that are new.

        Raises:
            ValueError: if a loss or gradient is not finite; the message names the training example.
        """
        if self.n_examples + len(captured) > len(self._order):
            raise ValueError(self._other_number(f"more than {len(self._order)}"))
        bad = captured.first_not_finite()
        if bad is not None:
            example = self._order[self.n_examples + bad]
            raise ValueError(
                f"The loss or gradient of training example {example} is NaN or infinite. Look at that example, or at "
                "the learning rate; what was stored before is complete."
            )
        for method, writer in self._writers.items():
            writer.add(self._trace.kept.of(gradients_of(captured, method)))
        if self._texts is not None:
            self._vocabulary.update(words)
            self._texts.add(texts_of(captured, labels))
        self.n_examples += len(captured)

    def close(self) -> None:
        """Finish the files; every training example must have been added."""
        if self.n_examples != len(self._order):
            raise ValueError(self._other_number(str(self.n_examples)))
        for writer in self._writers.values():
            writer.close(self._processes)
        if self._texts is not None:
            self._texts.close(self._processes)
            self._trace.add_words(self._vocabulary, self._processes)

    def _other_number(self, found: str) -> str:
        """That a pass gave another number of examples than there are."""
        them = "it" if len(self._order) == self._trace.n_train else f"{len(self._order)} of them"
        return (
            f"The training set has {self._trace.n_train} examples, but a pass over {them} gave {found}: the collate "
            "function drops or adds examples, so that they cannot be numbered."
        )


def gradients_of(captured: Captured, method: str) -> Gradients:
    """A batch's gradients for a method."""
    if method == "tracin-we":
        assert captured.words is not None
        return captured.words
    assert captured.linear is not None
    return captured.linear


def texts_of(captured: Captured, labels: Tensor | None) -> Texts:
    """What the examples of a batch say."""
    single = labels is not None and labels.shape == (len(captured),)
    numbers = labels.detach().cpu().double() if single and labels is not None else None
    unknown = torch.full((len(captured),), torch.nan, dtype=torch.float64)
    return Texts(len(captured), captured.token_owners, captured.token_ids, unknown if numbers is None else numbers)


def model_fingerprint(state: Mapping[str, Any]) -> str:
    """A hash of the names and shapes of a state dict's tensors."""
    return hashlib.sha256(repr(sorted(_shapes(state).items())).encode()).hexdigest()


def _problem(path: Path, read: Callable[[], object]) -> str | None:
    """What is wrong with a file, as reading it tells."""
    try:
        read()
    except FileNotFoundError:
        return f"{path} is missing."
    except (OSError, ValueError) as error:
        return str(error)
    return None


def remove_trace(path: Path) -> None:
    """Remove a trace's own files from a folder, and nothing else."""
    (path / "trace.json").unlink(missing_ok=True)
    (path / "vocabulary.json").unlink(missing_ok=True)
    for folder in ("checkpoints", "texts", "texts" + _PARTIAL, "running" + _PARTIAL):
        shutil.rmtree(path / folder, ignore_errors=True)


@contextmanager
def _appearing(folder: Path, processes: Processes = ALONE) -> Iterator[Path]:
    """A folder to fill, which takes its name when all processes are done and vanishes when one of them fails."""
    partial = folder.with_name(folder.name + _PARTIAL)
    with processes.together():
        if processes.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    try:
        with processes.together():
            yield partial
        with processes.together():
            if processes.first:
                partial.replace(folder)
        with processes.together():
            await_seen(folder.exists, f"The first process has written {folder}")
    except BaseException:
        if processes.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _write_weights(path: Path, state: Mapping[str, Any]) -> str:
    """Write a state dict's tensors, those that share memory once, and return the file's checksum."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        place = (value.device, value.data_ptr(), value.shape, value.stride())
        if value.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            storage = value.untyped_storage().data_ptr()
            tensors[name] = value.detach().cpu() if storage not in storages else value.detach().cpu().clone()
            storages.add(storage)
    return write_tensors(path, tensors, tied)


def _second_moments(
    module: nn.Module,
    name: str,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
    holders: Processes,
    *,
    sparse: bool,
) -> SecondMoments | None:
    """Adam's bias-corrected second moments of a layer's weight and bias; with ``sparse``, of the rows that have any.

    Args:
        module: that the optimizers train.
        name: of the layer.
        optimizers: those of the fit.
        state: the module's state dict, with whole weights.
        holders: the processes that each hold a part of every weight.
        sparse: whether to leave out rows of zeros.
    """
    layer, names = named_layer(module, name), parameter_names(module)
    columns: list[Tensor] = []
    eps = 0.0
    for kind in ("weight", "bias"):
        parameter = getattr(layer, kind, None)
        if parameter is None:
            continue
        corrected, eps = _second_moment(parameter, optimizers)
        if holders.size > 1:
            whole = state.get(names[id(parameter)][0])
            corrected = joined(corrected, None if whole is None else whole.shape, holders)
        if corrected is None:
            return None
        columns.append(corrected if corrected.dim() == 2 else corrected[:, None])
    if not columns:
        return None
    values = torch.cat(columns, dim=1)
    rows = torch.nonzero(values.any(dim=1))[:, 0] if sparse else None
    return SecondMoments(values if rows is None else values[rows], rows, eps)


def _second_moment(parameter: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Tensor | None, float]:
    """Adam's bias-corrected second moment of a parameter, if an optimizer has one, and its epsilon."""
    groups = [
        (optimizer.state.get(parameter, {}), group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(each is parameter for each in group["params"])
        and "betas" in group
        and isinstance(group.get("eps"), (int, float))  # Adafactor and its like have several
    ]
    for state, group in groups:
        if "exp_avg_sq" in state and "step" in state:  # without the step, the bias cannot be corrected
            corrected = state["exp_avg_sq"].float().cpu() / (1 - group["betas"][1] ** float(state["step"]))
            return corrected, group["eps"]
    return None, max((float(group["eps"]) for _, group in groups), default=0.0)


def _write_moments(path: Path, moments: SecondMoments) -> str:
    tensors = {"values": moments.values}
    if moments.rows is not None:
        tensors["rows"] = moments.rows
    return write_tensors(path, tensors, {"eps": repr(moments.eps)})
