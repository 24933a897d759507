"""What data sets, collate functions and modules hold that using them moves: found, and put back.

Random generators, counters of epochs and steps, positions in files, running sums: what a bounded walk over attributes,
containers, partials, bound methods and closures finds is noted before we read or compute, and put back after.
"""

from __future__ import annotations

import io
import random
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, suppress
from functools import cache, partial
from itertools import islice
from types import BuiltinMethodType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from lightning_tracin.parallel.fsdp import is_fsdp

_AT_MOST = 20_000  # things that are looked at

_ELEMENTS = 64  # of a container that are looked into

_COPIED = 1_000_000  # entries of a container that are noted

_BYTES = 2**30  # of tensors that are noted

_PLAIN = (type(None), int, float, complex, str, bytes, type, ModuleType, CodeType, np.ndarray, np.generic, range)

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)

_CALLED = (FunctionType, partial, MethodType, BuiltinMethodType, classmethod, staticmethod, property)

_MAY_DRAW = (FunctionType, partial)

_COUNTED = (list, dict, set, deque)

# The attributes of what these packages define are their own affair: trainers, threads, layers that set themselves up at
# their first call. Data sets, samplers and schedulers of torch are looked into.
_FOREIGN = (
    *("torch", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_tracin", "lightning_utilities"),
    *("numpy", "pandas", "pyarrow", "bitsandbytes", "torchao", "deepspeed", "transformer_engine"),
    *("threading", "multiprocessing", "concurrent", "asyncio", "logging", "weakref", "_thread", "builtins"),
)

_LOOKED_INTO = ("torch.utils.data", "torch.optim")

_OWN_KINDS = ("LightningModule", "LightningDataModule")

_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


class Held:
    """The state of what some things hold, as it is now.

    Map-style data sets keep what they have read, such as open files and caches: only random generators are put back in
    them, and generators that were made by reading. Anything else (streams, collate functions, samplers, modules) is put
    back whole: its attributes, and what its lists and dictionaries hold.

    Args:
        things: data sets, functions, modules, or anything that holds some.
        computed: whether tensors that modules hold (buffers, metrics, sums) are noted too.
    """

    def __init__(self, *things: Any, computed: bool = False) -> None:
        self._computed = computed
        spread = [each for each in things if isinstance(each, nn.Module) and is_fsdp(each)]
        parameters = [name for each in spread for name, _ in each.named_parameters()]  # now and then attributes
        self._not_ours = frozenset({*_base_attributes(), *(name.rpartition(".")[2] for name in parameters)})
        self._undo: list[Callable[[], object]] = []
        self._seen: dict[int, Any] = {}  # alive, so that each id stays that of one thing
        self._waiting: deque[tuple[Any, bool]] = deque((each, True) for each in things)
        self._bytes_left = _BYTES
        while self._waiting and len(self._seen) < _AT_MOST:
            with suppress(Exception):  # a thing may forbid to be looked at: then nothing is found in it
                self._see(*self._waiting.popleft())
        self._waiting.clear()

    def put_back(self) -> None:
        """Give everything the state that it had.

        Raises:
            Exception: what a thing raises that does not let itself be put back; all others are.
        """
        with ExitStack() as stack:  # goes through all, the last one first
            for undo in self._undo:
                stack.callback(undo)

    def _see(self, thing: Any, whole: bool) -> None:
        """Note the state of a thing, and have what it holds looked at.

        Args:
            thing: the thing.
            whole: whether all that it holds is put back, or random generators alone.
        """
        if isinstance(thing, _PLAIN) or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if _is_generator(thing):
            self._undo.append(_state_of(thing))
        elif isinstance(thing, (Tensor, io.IOBase)):
            if whole:
                self._note_content(thing)
        elif isinstance(thing, _CALLED):
            self._note_callable(thing, whole)
        elif isinstance(thing, (dict, list, set, deque, tuple, frozenset)):
            self._note_container(thing, whole)
        elif isinstance(thing, nn.Module):
            self._note_module(thing, whole)
        elif not _is_foreign(type(thing)):
            self._note_attributes(thing, whole and not _is_map_style(thing))

    def _expect(self, things: Iterable[Any], whole: bool) -> None:
        self._waiting.extend((each, whole) for each in things if type(each) not in _PLAIN)

    def _note_callable(self, called: Any, whole: bool) -> None:
        if isinstance(called, FunctionType):
            self._note_function(called, whole)
        elif isinstance(called, partial):
            self._expect((called.func, *called.args, *called.keywords.values()), whole)
        else:
            self._expect((getattr(called, name, None) for name in ("__self__", "__func__", "fget")), whole)

    def _note_function(self, function: FunctionType, whole: bool) -> None:
        """Closures, defaults, and the generators and functions among the global variables that the code names."""
        if _is_in(function.__module__ or "", _FOREIGN):
            return
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                self._undo.append(partial(_refill, cell, cell.cell_contents, whole))
                self._expect((cell.cell_contents,), whole)
        self._expect((function.__defaults__, function.__kwdefaults__), whole)
        self._note_mapping(vars(function), whole)
        if not _is_installed(function.__code__):
            named = [function.__globals__.get(name) for name in _names(function.__code__)]
            self._expect((each for each in named if isinstance(each, _MAY_DRAW) or _is_generator(each)), False)
            self._expect((each for each in named if whole and isinstance(each, _COUNTED)), True)

    def _note_attributes(self, thing: Any, whole: bool) -> None:
        """The attributes of an instance, and the generators of its class; of an optimizer the options of its groups."""
        if isinstance(thing, Optimizer):
            for group in thing.param_groups:
                self._note_mapping(group, whole, frozenset({"params"}))
            return
        names = getattr(thing, "__dict__", None)
        if isinstance(names, dict):
            self._note_mapping(names, whole, self._not_ours if _is_lightning(type(thing)) else frozenset())
        for slot in self._note_classes(thing):
            self._note_slot(thing, slot, whole)

    def _note_classes(self, thing: Any) -> Iterator[Any]:
        """Note generators among the class attributes of a thing, and those that methods name; its slots."""
        for kind in type(thing).__mro__:
            if not _is_in(kind.__module__, _FOREIGN):
                if id(kind) not in self._seen:
                    self._seen[id(kind)] = kind
                    self._expect(vars(kind).values(), False)
                yield from (each for each in vars(kind).values() if isinstance(each, MemberDescriptorType))

    def _note_slot(self, thing: Any, slot: MemberDescriptorType, whole: bool) -> None:
        value = getattr(thing, slot.__name__, None)
        self._expect((value,), whole)

        def undo() -> None:
            now = getattr(thing, slot.__name__, None)
            if now is not value and (whole or _is_generator(now)):
                slot.__set__(thing, value)

        self._undo.append(undo)

    def _note_mapping(self, mapping: MutableMapping[Any, Any], whole: bool, but: frozenset[str] = frozenset()) -> None:
        """The entries of a mapping, but for some."""
        noted = {name: value for name, value in mapping.items() if name not in but}
        self._undo.append(partial(_restore_entries, mapping, noted, whole, but))
        self._expect(noted.values(), whole)

    def _note_container(self, container: Any, whole: bool) -> None:
        if isinstance(container, dict) and len(container) <= _COPIED:
            noted = dict(container)
            self._undo.append(partial(_restore_entries, container, noted, whole, frozenset()))
        elif whole and isinstance(container, (list, set, deque)) and len(container) <= _COPIED:
            self._undo.append(partial(_restore_elements, container, list(container)))
        values = container.values() if isinstance(container, Mapping) else container
        self._expect(islice(values, _ELEMENTS), whole)

    def _note_module(self, module: nn.Module, whole: bool) -> None:
        """What a module holds beside its parameters: attributes, and, where things are computed, buffers and hooks."""
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "OptimizedModule" not in kinds and not _is_in(type(module).__module__, _FOREIGN):
            noted = {name: value for name, value in vars(module).items() if name not in self._not_ours}
            self._undo.append(partial(_restore_attributes, module, noted, whole, self._not_ours))
            self._expect(noted.values(), whole)
            list(self._note_classes(module))
        if not (whole and self._computed):
            return
        self._expect(module._modules.values(), whole)
        if _is_in(type(module).__module__, ("torch.distributed",)):
            return
        self._note_mapping(module._buffers, whole)
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, Mapping):
                self._expect(hooks.values(), whole)

    def _note_content(self, thing: Tensor | io.IOBase) -> None:
        if isinstance(thing, io.IOBase):
            self._note_position(thing)
        elif self._computed:
            self._note_tensor(thing)

    def _note_tensor(self, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter) or tensor.is_inference():  # the latter cannot be changed where we compute
            return
        self._bytes_left -= tensor.nbytes
        if self._bytes_left < 0:
            return
        version = tensor._version
        with torch.no_grad():
            value = tensor.detach().clone()

        def undo() -> None:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)

        self._undo.append(undo)

    def _note_position(self, file: io.IOBase) -> None:
        try:
            position = None if file.writable() else file.tell()
        except (OSError, ValueError):  # a pipe, a closed file, a text file in the middle of its lines
            return
        if position is None:  # what was written stays written
            return
        self._undo.append(lambda: file.closed or file.seek(position))


def _is_generator(thing: Any) -> bool:
    """Whether a thing is a random generator whose state can be noted."""
    return isinstance(thing, GENERATORS) and not isinstance(thing, random.SystemRandom)


def _state_of(generator: Any) -> Callable[[], object]:
    """What gives a random generator the state that it has now."""
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state(legacy=False))
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return partial(setattr, bits, "state", bits.state)


def _refill(cell: Any, content: Any, whole: bool) -> None:
    """Put a variable of a closure back."""
    now = cell.cell_contents
    if now is not content and (whole or _is_generator(now)):
        cell.cell_contents = content


def _restore_attributes(module: nn.Module, noted: Mapping[str, Any], whole: bool, but: frozenset[str]) -> None:
    """Put the attributes of a module back, but for what has become a layer or a parameter of it, as by ``setup``."""
    registered = {*module._parameters, *module._buffers, *module._modules}
    noted = {name: value for name, value in noted.items() if name not in registered}
    _restore_entries(vars(module), noted, whole, but | registered)


def _restore_entries(
    mapping: MutableMapping[Any, Any], noted: Mapping[Any, Any], whole: bool, but: frozenset[str]
) -> None:
    """Put the entries of a mapping back; without ``whole`` those alone that are other generators now."""
    changed = [name for name, value in mapping.items() if noted.get(name, noted) is not value and name not in but]
    changed = [name for name in changed if whole or _is_generator(mapping[name])]
    for name in changed:
        if name in noted:
            mapping[name] = _at_place_of(noted[name], mapping[name])
        else:
            del mapping[name]
    if whole and len(mapping) < len(noted):
        mapping.update({name: value for name, value in noted.items() if name not in mapping})


def _at_place_of(value: Any, now: Any) -> Any:
    """A value, on the device on which it is now, where a trainer has moved it."""
    both = isinstance(value, Tensor) and isinstance(now, Tensor)
    return value.to(now.device) if both and value.device != now.device else value


def _restore_elements(container: Any, noted: list[Any]) -> None:
    """Put the elements of a list, a set or a deque back."""
    now = list(container)
    if len(now) == len(noted) and all(a is b for a, b in zip(now, noted, strict=True)):
        return
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(noted)


def _names(code: CodeType) -> Iterator[str]:
    """The global variables that a function's code names, with that of the functions inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@cache
def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is of one of some packages; what of torch is looked into is of none."""
    named = any(module == each or module.startswith(f"{each}.") for each in packages)
    return named and not module.startswith(_LOOKED_INTO)


def _is_installed(code: CodeType) -> bool:
    """Whether code is of a library: it draws from no generator of the user's, and names functions without end."""
    return "site-packages" in code.co_filename or code.co_filename.startswith(_STANDARD_LIBRARY)


def _is_lightning(kind: type) -> bool:
    return any(each.__name__ in _OWN_KINDS for each in kind.__mro__)


def _is_foreign(kind: type) -> bool:
    """Whether instances of a class are not looked into: trainers, callbacks, threads, and what C code defines."""
    foreign = any(_is_in(each.__module__, _FOREIGN) for each in kind.__mro__ if each is not object)
    return foreign and not _is_lightning(kind) and not issubclass(kind, Optimizer)


def _is_map_style(thing: Any) -> bool:
    """Whether a thing is a data set whose examples are read by index."""
    kind = type(thing)
    return (
        not isinstance(thing, (IterableDataset, Mapping)) and hasattr(kind, "__getitem__") and hasattr(kind, "__len__")
    )


@cache
def _base_attributes() -> frozenset[str]:
    """The attributes that torch and Lightning give every module: theirs to handle."""
    return frozenset({*vars(pl.LightningModule()), *vars(pl.LightningDataModule())})
