"""Side by side with other libraries: the same model, checkpoints and texts, each in a process of its own.

Captum's ``TracInCP`` and dattri's ``TracInAttributor`` on the word embedding table, Captum's ``TracInCPFast`` on the
last layer. Seconds and the memory that is taken beyond the loaded model are compared, and the scores (``TracInCPFast``
leaves the bias out, so its scores differ). The texts are BBC articles for MiniLM-L6, and synthetic ones for the bag of
words, which dattri can compute too.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Row, in_own_process, parser, report
from benchmarks.workload import Bag, Synthetic, Texts, quiet
from lightning_tracin import Trace, TracInCallback

_BAG_HIDDEN = 128


class Network(nn.Module):
    """MiniLM as the peers want it: from padded ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, (B, 5)."""
        logits: Tensor = self.model(input_ids=ids, attention_mask=(ids != 0).long()).logits
        return logits


class Watched:
    """Seconds, and the most memory that was held beyond what was held at the beginning."""

    def __enter__(self) -> Watched:
        self._before = self._most = _resident_bytes()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._running = False
        self._thread.join()
        self.megabytes = (self._most - self._before) / 1e6

    def _watch(self) -> None:
        while self._running:
            self._most = max(self._most, _resident_bytes())
            time.sleep(0.005)


def _resident_bytes() -> int:
    """What this process holds in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


class Work:
    """What every contender is given.

    Attributes:
        module: the LightningModule.
        network: the same as the peers want it, from padded ids to logits.
        embedding: name of its word embedding layer.
        last: name of its last layer.
    """

    def __init__(self, options: Any) -> None:
        self.batch_size, self.own_batch_size = options.batch_size, options.own_batch_size or options.batch_size
        self.module: pl.LightningModule
        self.network: nn.Module
        if options.model == "bag":
            pl.seed_everything(0, verbose=False)
            self.module = self.network = Bag(_BAG_HIDDEN).eval()
            self.embedding, self.last = "embedding", "head"
            synthetic = {"train": Synthetic(options.examples), "test": Synthetic(options.tests, seed=1)}
            self._pairs = {part: _stacked(DataLoader(data, batch_size=64)) for part, data in synthetic.items()}
        else:
            self._texts = Texts(options.examples, options.tests)
            module = self._texts.module().eval()
            self.module, self.network = module, Network(module.model)
            self.embedding, self.last = "model.bert.embeddings.word_embeddings", "model.classifier"
            batches = {part: self._texts.loader(part) for part in ("train", "test")}
            self._pairs = {
                part: _stacked((each["input_ids"] * each["attention_mask"], each["labels"]) for each in of_part)
                for part, of_part in batches.items()
            }

    def loader(self, part: str) -> DataLoader[Any]:
        """Pairs of ids and labels, for the peers."""
        return DataLoader(self._pairs[part], batch_size=self.batch_size)

    def own_loader(self, part: str, *, shuffle: bool = False) -> DataLoader[Any]:
        """What the module's ``training_step`` takes."""
        if isinstance(self.module, Bag):
            return DataLoader(self._pairs[part], batch_size=self.own_batch_size, shuffle=shuffle)
        return self._texts.loader(part, self.own_batch_size, shuffle=shuffle)

    def fit(self, trace: Path) -> None:
        """Record the two checkpoints that all contenders use."""
        callback = TracInCallback(trace, cache="on_demand", dtype="float32")
        quiet(max_epochs=2, callbacks=[callback]).fit(self.module.train(), self.own_loader("train", shuffle=True))


def _stacked(batches: Iterable[Any]) -> TensorDataset:
    ids, labels = zip(*batches, strict=True)
    return TensorDataset(torch.cat(ids), torch.cat(labels))


def ours(work: Work, trace: Trace, method: str) -> dict[str, Any]:
    """The first query computes and stores the training gradients, the second finds them."""
    trainer = quiet()
    arguments: dict[str, Any] = {"model": work.module, "trace": trace, "method": method}
    with Watched() as first:
        trainer.influence(work.own_loader("test"), train_dataloaders=work.own_loader("train"), **arguments)
    with Watched() as query:
        result = trainer.influence(work.own_loader("test"), **arguments)
    return {
        "seconds": first.seconds,
        "query": query.seconds,
        "megabytes": max(first.megabytes, query.megabytes),
        "scores": result.scores,
    }


def captum_embedding(work: Work, trace: Trace) -> dict[str, Any]:
    """Captum's TracInCP on the embedding table."""
    from captum.influence import TracInCP

    tracin = TracInCP(
        work.network,
        work.loader("train"),
        [str(number) for number in range(len(trace.checkpoints))],
        checkpoints_load_func=_loading(work, trace, "tracin-we"),
        layers=[work.embedding],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
    )
    return _captum(tracin, work)


def captum_last(work: Work, trace: Trace) -> dict[str, Any]:
    """Captum's TracInCPFast on the last layer."""
    from captum.influence import TracInCPFast

    tracin = TracInCPFast(
        work.network,
        work.network.get_submodule(work.last),
        work.loader("train"),
        [str(number) for number in range(len(trace.checkpoints))],
        checkpoints_load_func=_loading(work, trace, "tracin-last"),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
    )
    return _captum(tracin, work)


def dattri_embedding(work: Work, trace: Trace) -> dict[str, Any]:
    """The TracInAttributor of dattri on the embedding table, without its random projection."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        ids, label = data
        logits = torch.func.functional_call(work.network, parameters, (ids[None],))
        return functional.cross_entropy(logits, label[None])

    names = work.network.state_dict().keys()
    weights = [
        {name: value for name, value in checkpoint.weights().items() if name in names}
        for checkpoint in trace.checkpoints
    ]
    task = AttributionTask(loss_func=loss, model=work.network, checkpoints=weights)
    rates = torch.tensor([checkpoint.learning_rate for checkpoint in trace.checkpoints])
    attributor = TracInAttributor(task, rates, normalized_grad=False, layer_name=[f"{work.embedding}.weight"])
    attributor.projector_kwargs = None  # the constructor always sets one
    with Watched() as watched:
        scores = attributor.attribute(work.loader("train"), work.loader("test"))
    return {"seconds": watched.seconds, "megabytes": watched.megabytes, "scores": scores.T}


def bergson_embedding(work: Work, trace: Trace) -> dict[str, Any]:
    """The layers that bergson collects gradients of, and whether the embedding layer is one of them."""
    from bergson.gradients import LayerAdapter

    supported = ", ".join(kind.__name__ for kind in LayerAdapter.supported_modules)
    layer = type(work.network.get_submodule(work.embedding))
    if issubclass(layer, LayerAdapter.supported_modules):
        raise RuntimeError(f"this version of bergson supports {layer.__name__}: measure it")
    raise RuntimeError(f"bergson has no gradients of {layer.__name__}, only of {supported}")


CONTENDERS: dict[str, Callable[[Work, Trace], dict[str, Any]]] = {
    "ours tracin-we": lambda work, trace: ours(work, trace, "tracin-we"),
    "ours tracin-last": lambda work, trace: ours(work, trace, "tracin-last"),
    "captum tracin-we": captum_embedding,
    "captum tracin-last": captum_last,
    "dattri tracin-we": dattri_embedding,
    "bergson tracin-we": bergson_embedding,
}


def _captum(tracin: Any, work: Work) -> dict[str, Any]:
    with Watched() as watched:
        scores = torch.cat([tracin.influence((ids, labels)) for ids, labels in work.loader("test")])
    return {"seconds": watched.seconds, "megabytes": watched.megabytes, "scores": scores}


def _loading(work: Work, trace: Trace, method: str) -> Callable[[nn.Module, str], float]:
    """Loads a checkpoint and returns its learning rate, as Captum asks for."""

    def load(_: nn.Module, number: str) -> float:
        checkpoint = trace.checkpoints[int(number)]
        work.module.load_state_dict(checkpoint.weights())
        site = next(site for site in checkpoint.sites if site.name == method)
        return checkpoint.learning_rate_of(site)

    return load


def _attempt(name: str, fixed: list[str], folder: Path) -> dict[str, Any]:
    """What a contender finds in a process of its own; or the reason why it does not."""
    try:
        return in_own_process("benchmarks.peers", "--one", name, "--trace", str(folder), *fixed)
    except RuntimeError as error:
        return {"reason": str(error).partition("): ")[2][:100]}


def main() -> None:
    """Measure and report; with ``--one``, one contender, as JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=128)
    arguments.add_argument("--tests", type=int, default=16)
    arguments.add_argument("--model", choices=("minilm", "bag"), default="minilm")
    arguments.add_argument("--batch-size", type=int, default=16, help="of every contender")
    arguments.add_argument("--own-batch-size", type=int, help="of lightning_tracin, if another")
    arguments.add_argument("--contenders", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    arguments.add_argument("--one", choices=CONTENDERS, help="only this contender, in this process")
    arguments.add_argument("--trace", help="folder of a recorded fit, with --one")
    options = arguments.parse_args()
    if options.one is not None:
        found = CONTENDERS[options.one](Work(options), Trace(options.trace))
        scores = Path(options.trace).with_name(options.one.replace(" ", "-") + ".pt")
        torch.save(found.pop("scores"), scores)
        sys.stdout.write("\n" + json.dumps({**found, "scores": str(scores)}) + "\n")
        return
    passed = ("examples", "tests", "model", "batch_size", "own_batch_size")
    settings = {name: getattr(options, name) for name in passed if getattr(options, name) is not None}
    fixed = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        Work(options).fit(trace)
        found = {name: _attempt(name, fixed, trace) for name in options.contenders}
        for name, result in found.items():
            if name.startswith("ours"):
                rows.append(Row(f"{name}: query, gradients stored", result["query"], "s", details=result))
                rows.append(Row(f"{name}: memory beyond the model", result["megabytes"], "MB"))
                continue
            method = name.split()[1]
            own = found[f"ours {method}"]
            if "reason" in result:
                rows.append(Row(f"{name}", None, details=result))
                continue
            limits = {"captum tracin-we": (">= 50", ">= 50"), "captum tracin-last": (">= 5", "")}
            faster, smaller = limits.get(name, ("", "")) if options.model == "minilm" else ("", "")
            exact, other = (torch.load(each["scores"], weights_only=True) for each in (own, result))
            error = float((exact - other).norm() / other.norm())
            rows += [
                Row(f"{name}: seconds / ours, gradients stored", result["seconds"] / own["query"], limit=faster),
                Row(f"{name}: seconds / ours, storing them first", result["seconds"] / own["seconds"], details=result),
                Row(f"{name}: memory beyond the model", result["megabytes"], "MB"),
                Row(f"{name}: memory / ours", result["megabytes"] / max(own["megabytes"], 1), limit=smaller),
                Row(f"{name}: difference of the scores", error, "", details={"relative": "to the peer's norm"}),
            ]
    title = (
        f"{options.examples} training and {options.tests} test texts, {options.model}, 2 checkpoints, batches of "
        f"{options.batch_size}, ours of {options.own_batch_size or options.batch_size}"
    )
    report(f"peers-{options.model}", title, rows, options.out)


if __name__ == "__main__":
    main()
