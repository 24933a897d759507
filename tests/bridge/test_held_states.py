"""What data sets, collate functions and modules hold is found, and put back; what is not theirs is left alone."""

from __future__ import annotations

import functools
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from toy import Toy, loader, quiet
from untouched import GENERATORS, HOLDERS, Streamed, state_of

from lightning_tracin.bridge.held_states import Held
from lightning_tracin.bridge.unmoved import module_unmoved, unmoved

OF_MODULE = random.Random(4)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_generators_are_found_wherever_they_are(holder, generator):
    draw, where = HOLDERS[holder](GENERATORS[generator])
    before = state_of(where())
    held = Held([{"nested": (draw,)}])
    draw(7)
    assert state_of(where()) != before
    held.put_back()
    assert state_of(where()) == before


def augmented(n):
    return OF_MODULE.randrange(1, n)


def augmented_by_another(n):
    return [augmented(each) for each in (n,)]


@functools.lru_cache(1)
def remembered(n):
    return augmented(n)


CALLED = {
    "a function": augmented,
    "a function that calls another": augmented_by_another,
    "a lambda": lambda n: augmented(n),
    "a wrapped function": remembered,
    "its method": OF_MODULE.random,
    "a method that names it": type("Named", (), {"__call__": lambda self, n: augmented(n)})(),
    "a property": type(
        "Named", (), {"draw": property(lambda self: augmented(9)), "__call__": lambda self, n: self.draw}
    )(),
}


@pytest.mark.parametrize("called", CALLED.values(), ids=CALLED)
def test_global_generators_that_code_names_are_found(called):
    before = OF_MODULE.getstate()
    held = Held(called)
    called(9) if called != OF_MODULE.random else called()
    OF_MODULE.random()
    held.put_back()
    assert OF_MODULE.getstate() == before


@pytest.mark.parametrize("bits", [np.random.PCG64(1), np.random.Generator(np.random.Philox(1)).bit_generator])
def test_bit_generators_are_found(bits):
    before = str(bits.state)
    held = Held([bits])
    bits.random_raw()
    held.put_back()
    assert str(bits.state) == before


def test_the_systems_generator_has_no_state():
    held = Held(random.SystemRandom())
    held.put_back()


class Rows(Dataset):
    """Map-style: what it has read stays, but its generator goes back."""

    def __init__(self):
        self.generator, self.chunk, self.number, self.made = random.Random(1), None, -1, None
        self.kept = {}

    def __len__(self):
        return 9

    def __getitem__(self, index):
        self.chunk, self.number, self.made = [index], index, random.Random(index)
        self.kept[index] = self.generator.random()
        return index


WRAPPED = {
    "alone": lambda rows: rows,
    "a subset": lambda rows: Subset(rows, range(9)),
    "joined": lambda rows: ConcatDataset([TensorDataset(torch.ones(1)), rows]),
    "inside a stream": lambda rows: ChainDataset([type("Of", (Streamed,), {"rows": rows})(rows.__getitem__)]),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_map_style_data_set_keeps_what_it_has_read(wrap):
    rows = Rows()
    before = rows.generator.getstate()
    with unmoved(loader(wrap(rows))):
        rows[3]
    assert rows.generator.getstate() == before
    assert (rows.chunk, rows.number, list(rows.kept), rows.made) == ([3], 3, [3], None)


class Stream(IterableDataset):
    """Holds a bit of everything."""

    def __init__(self, path):
        path.write_bytes(b"0123456789")
        self.file = path.open("rb")
        self.epoch, self.order, self.seen, self.of = 0, [1, 2], {1}, {"a": [1]}
        self.others = (deque([1], 3), defaultdict(list), OrderedDict(a=1), Counter(a=1))
        self.removed = True
        self.lock = threading.Lock()

    def state(self):
        return self.file.tell(), self.epoch, self.order, self.seen, self.of, self.others, sorted(vars(self))

    def __iter__(self):
        self.file.read(3)
        self.epoch += 1
        self.order.append(3)
        self.order = [*self.order]
        self.seen.add(2)
        self.of["a"].append(2)
        self.of["b"] = 3
        queue, lists, ordered, counts = self.others
        queue.extend([2, 3, 4])
        lists["a"].append(1)
        ordered.move_to_end("a")
        del ordered["a"]
        counts.update("aab")
        self.new = True
        vars(self).pop("removed", None)
        return iter([self.epoch])


def test_a_stream_is_put_back_whole(tmp_path):
    stream = Stream(tmp_path / "file")
    kept = stream.order
    before = str(stream.state())
    with unmoved(DataLoader(stream)):
        assert list(DataLoader(stream)) == [1]
        assert str(stream.state()) != before
    assert str(stream.state()) == before
    assert stream.order is kept
    stream.file.close()


def test_what_is_not_put_back_by_an_error_is_none_of_it():
    rows = Rows()
    before = rows.generator.getstate()

    def read():
        with unmoved(loader(rows)):
            rows[1]
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        read()
    assert rows.generator.getstate() == before


def test_collate_functions_worker_functions_and_samplers_are_put_back():
    class Sampler:
        def __init__(self):
            self.calls = 0

        def __iter__(self):
            self.calls += 1
            return iter(range(9))

        def __len__(self):
            return 9

    calls, total = [], 0
    sampler, own = Sampler(), torch.Generator().manual_seed(1)

    def collate(rows):
        nonlocal total
        total += 1
        calls.append(total)
        collate.count += 1
        return rows

    collate.count = 0
    data = DataLoader(Rows(), 3, sampler=sampler, collate_fn=collate, generator=own)
    before = own.get_state()
    with unmoved(data):
        assert len(list(data)) == 3
        assert (total, calls, collate.count, sampler.calls) == (3, [1, 2, 3], 3, 1)
    assert (total, calls, collate.count, sampler.calls) == (0, [], 0, 0)
    assert torch.equal(own.get_state(), before)


class Holding(Dataset):
    """Holds trainers, modules and threads, which are none of its own."""

    def __init__(self, trainer, module):
        self.trainer, self.module, self.thread = trainer, module, threading.Thread(target=print)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        self.trainer.fit_loop.epoch_progress.current.ready += 1
        self.trainer.callbacks.append(pl.Callback())
        return index


def test_trainers_are_left_alone():
    trainer = quiet()
    n_callbacks = len(trainer.callbacks)
    data = Holding(trainer, Toy())
    with unmoved(loader(data)):
        data[0]
    assert trainer.fit_loop.epoch_progress.current.ready == 1
    assert len(trainer.callbacks) == n_callbacks + 1


def test_what_is_large_costs_little():
    rows = [{"ids": list(range(100)), "of": {"deep": [[1] * 10] * 10}} for _ in range(3000)]
    assert len(Held(rows)._seen) < 2000
    circle: list = []
    circle.append(circle)
    deep: list = []
    for _ in range(50_000):
        deep = [deep]
    Held(circle, deep).put_back()


class Counts(Toy):
    """Everything that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("anew", torch.zeros(3))
        self.register_buffer("late", None)
        self.hidden.register_buffer("deep", torch.zeros(()))
        self.plain, self.cached = torch.zeros(3), None
        self.metric = MeanMetric()
        self.collection = MetricCollection({"a": MeanMetric(), "b": MeanMetric()})
        self.calls, self.losses, self.by_name = 0, [], {"a": {"b": 0}}
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, ids):
        self.in_place += 1
        self.anew = self.anew + 1
        self.late = torch.ones(())
        self.hidden.deep.add_(1)
        self.plain[0] += 1
        self.cached = self.embedding.weight * 2
        self.metric.update(3.0)
        self.collection.update(4.0)
        self.calls += 1
        self.losses.append(self.calls)
        self.by_name["a"]["b"] += 1
        torch.rand((), generator=self.generator)
        self.new = True
        return super().forward(ids)

    def state(self):
        tensors = (self.in_place, self.anew, self.late, self.hidden.deep, self.plain, self.cached)
        metrics = [(each.mean_value, each.weight, each._update_count) for each in (self.metric, self.collection["a"])]
        return str(
            (tensors, metrics, self.calls, self.losses, self.by_name, state_of(self.generator), vars(self).keys())
        )


def test_a_module_is_put_back_whole_and_keeps_its_tensors():
    module = Counts()
    buffer, plain = module.anew, module.plain
    calls = []
    module.head.register_forward_hook(lambda *_: calls.append(1))
    before, weights = module.state(), {name: id(each) for name, each in module.named_parameters()}
    with module_unmoved(module):
        for _ in range(3):
            module(torch.ones(2, 3, dtype=torch.long))
        assert module.state() != before
        assert len(calls) == 3
    assert module.state() == before
    assert module.anew is buffer
    assert module.plain is plain
    assert calls == []
    assert weights == {name: id(each) for name, each in module.named_parameters()}


def test_what_a_module_logs_is_no_value_of_training():
    module = Toy()
    own = module.log
    with module_unmoved(module):
        module.log("loss", 1.0, on_step=True)  # outside of a fit it would raise
        module.log_dict({"loss": 1.0})
        with module_unmoved(module):
            module.log("loss", 2.0)
        module.log("loss", 3.0)
    assert module.log == own
    assert "log" not in vars(module)


def test_buffers_of_a_module_that_was_moved_stay_where_it_is():
    module = Counts()
    with module_unmoved(module):
        module.anew = torch.ones(3, device="meta")
    assert module.anew.device.type == "meta"


def test_layers_that_are_built_meanwhile_stay():
    module = Counts()
    module.late_layer = None
    with module_unmoved(module):
        module.late_layer = nn.Linear(2, 2)
        module.calls += 1
    assert isinstance(module.late_layer, nn.Linear)
    assert module.calls == 0


def test_inference_tensors_are_left_alone():
    module = Counts()
    with torch.inference_mode():
        module.plain = torch.zeros(3)
    with module_unmoved(module):
        module.calls += 1
    assert module.calls == 0


def test_a_batch_hook_of_a_data_module_counts():
    data = pl.LightningDataModule()
    data.calls, data.rows, data.trainer = 0, Rows(), "a"
    with module_unmoved(nn.Module(), data):
        data.calls, data.trainer = 3, "b"
        data.rows[1]
    assert (data.calls, data.trainer, data.rows.number) == (0, "b", 1)


class Forbidding:
    """Does not let itself be looked at."""

    @property
    def __class__(self):
        raise RuntimeError("private")


def test_what_forbids_to_be_looked_at_is_left_out():
    generator = random.Random(1)
    before = generator.getstate()
    held = Held([Forbidding(), generator])
    generator.random()
    held.put_back()
    assert generator.getstate() == before


def test_what_does_not_let_itself_be_put_back_is_told_when_the_others_are():
    class Fixed(dict):
        def __delitem__(self, name):
            raise TypeError("nothing is taken out")

    first, fixed, last = random.Random(1), Fixed(), random.Random(2)
    before = first.getstate(), last.getstate()
    held = Held([first, fixed, last])
    fixed["a"] = [first.random(), last.random()]
    with pytest.raises(TypeError, match="nothing is taken out"):
        held.put_back()
    assert (first.getstate(), last.getstate()) == before


def test_what_is_written_into_a_file_stays(tmp_path):
    with (tmp_path / "log").open("w+") as file:
        held = Held(file)
        file.write("read 1\n")
        held.put_back()
        file.write("read 2\n")
    assert (tmp_path / "log").read_text() == "read 1\nread 2\n"


def test_tensors_are_noted_up_to_a_size(monkeypatch):
    monkeypatch.setattr("lightning_tracin.bridge.held_states._BYTES", 4 * 3)
    module = Toy()
    module.of = [torch.zeros(1), torch.zeros(100), torch.zeros(1)]
    with module_unmoved(module):
        for each in module.of:
            each += 1
    assert [float(each[0]) for each in module.of] == [0, 1, 1]


def test_old_generators_of_any_bits():
    old = np.random.RandomState(np.random.PCG64(1))
    held = Held(old)
    drawn = old.randint(1000)
    held.put_back()
    assert old.randint(1000) == drawn
