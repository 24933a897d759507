"""Side by side with other libraries: the same MiniLM-L6, checkpoints and BBC articles, each in a process of its own.

Captum's ``TracInCP`` and dattri's ``TracInAttributor`` on the word embedding table, Captum's ``TracInCPFast`` on the
last layer. Seconds and the memory that is taken beyond the loaded model are compared, and the scores.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Row, in_own_process, parser, report
from benchmarks.workload import Texts, quiet
from lightning_tracin import Trace, TracInCallback

EMBEDDING = "model.bert.embeddings.word_embeddings"
LAST = "model.classifier"


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
    """What every contender is given."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.texts = Texts(options.examples, options.tests)
        self.module = self.texts.module().eval()
        self.network = Network(self.module.model)
        self.trace = Trace(options.trace)
        self.batch_size = options.batch_size

    def loader(self, part: str) -> DataLoader[Any]:
        """Pairs of ids and labels."""
        batches = list(self.texts.loader(part, batch_size=1))
        ids = torch.cat([batch["input_ids"] * batch["attention_mask"] for batch in batches])
        data = TensorDataset(ids, torch.cat([batch["labels"] for batch in batches]))
        return DataLoader(data, batch_size=self.batch_size)


def ours(work: Work, method: str) -> dict[str, Any]:
    """The first query computes and stores the training gradients, the second finds them."""
    trainer = quiet()
    arguments: dict[str, Any] = {"model": work.module, "trace": work.trace, "method": method}
    with Watched() as first:
        trainer.influence(
            work.texts.loader("test", work.batch_size), train_dataloaders=work.texts.loader("train"), **arguments
        )
    with Watched() as query:
        result = trainer.influence(work.texts.loader("test", work.batch_size), **arguments)
    return {
        "seconds": first.seconds,
        "query": query.seconds,
        "megabytes": max(first.megabytes, query.megabytes),
        "scores": result.scores,
    }


def captum_embedding(work: Work) -> dict[str, Any]:
    """Captum's TracInCP on the embedding table."""
    from captum.influence import TracInCP  # type: ignore[import-untyped]

    tracin = TracInCP(
        work.network,
        work.loader("train"),
        [str(number) for number in range(len(work.trace.checkpoints))],
        checkpoints_load_func=_loading(work, "tracin-we"),
        layers=[EMBEDDING],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
    )
    return _captum(tracin, work)


def captum_last(work: Work) -> dict[str, Any]:
    """Captum's TracInCPFast on the last layer."""
    from captum.influence import TracInCPFast

    tracin = TracInCPFast(
        work.network,
        work.network.get_submodule(LAST),
        work.loader("train"),
        [str(number) for number in range(len(work.trace.checkpoints))],
        checkpoints_load_func=_loading(work, "tracin-last"),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
    )
    return _captum(tracin, work)


def dattri_embedding(work: Work) -> dict[str, Any]:
    """The TracInAttributor of dattri on the embedding table, without its random projection."""
    from dattri.algorithm.tracin import TracInAttributor  # type: ignore[import-not-found]
    from dattri.task import AttributionTask  # type: ignore[import-not-found]

    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        ids, label = data
        logits = torch.func.functional_call(work.network, parameters, (ids[None],))
        return functional.cross_entropy(logits, label[None])

    weights = [
        {name: value for name, value in checkpoint.weights().items() if name.startswith("model.")}
        for checkpoint in work.trace.checkpoints
    ]
    task = AttributionTask(loss_func=loss, model=work.network, checkpoints=weights)
    rates = torch.tensor([checkpoint.learning_rate for checkpoint in work.trace.checkpoints])
    attributor = TracInAttributor(task, rates, normalized_grad=False, layer_name=[f"{EMBEDDING}.weight"])
    attributor.projector_kwargs = None  # the constructor always sets one
    with Watched() as watched:
        scores = attributor.attribute(work.loader("train"), work.loader("test"))
    return {"seconds": watched.seconds, "megabytes": watched.megabytes, "scores": scores.T}


def bergson_embedding(work: Work) -> dict[str, Any]:
    """The layers that bergson collects gradients of, and whether the embedding layer is one of them."""
    from bergson.gradients import LayerAdapter  # type: ignore[import-not-found]

    supported = ", ".join(kind.__name__ for kind in LayerAdapter.supported_modules)
    layer = type(work.network.get_submodule(EMBEDDING))
    if issubclass(layer, LayerAdapter.supported_modules):
        raise RuntimeError(f"this version of bergson supports {layer.__name__}: measure it")
    raise RuntimeError(f"bergson has no gradients of {layer.__name__}, only of {supported}")


CONTENDERS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "ours tracin-we": lambda work: ours(work, "tracin-we"),
    "ours tracin-last": lambda work: ours(work, "tracin-last"),
    "captum tracin-we": captum_embedding,
    "captum tracin-last": captum_last,
    "dattri tracin-we": dattri_embedding,
    "bergson tracin-we": bergson_embedding,
}


def _captum(tracin: Any, work: Work) -> dict[str, Any]:
    with Watched() as watched:
        scores = torch.cat([tracin.influence((ids, labels)) for ids, labels in work.loader("test")])
    return {"seconds": watched.seconds, "megabytes": watched.megabytes, "scores": scores}


def _loading(work: Work, method: str) -> Callable[[nn.Module, str], float]:
    """Loads a checkpoint and returns its learning rate, as Captum asks for."""

    def load(_: nn.Module, number: str) -> float:
        checkpoint = work.trace.checkpoints[int(number)]
        work.module.load_state_dict(checkpoint.weights())
        return checkpoint.learning_rate_of(method)

    return load


def _attempt(name: str, fixed: list[str], folder: Path) -> dict[str, Any]:
    """What a contender finds in a process of its own; or the reason why it does not."""
    try:
        return in_own_process("benchmarks.peers", "--one", name, "--trace", str(folder), *fixed)
    except RuntimeError as error:
        return {"reason": str(error).rpartition(": ")[2][-160:]}


def main() -> None:
    """Measure and report; with ``--one``, one contender, as JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=128)
    arguments.add_argument("--tests", type=int, default=16)
    arguments.add_argument("--batch-size", type=int, default=16, help="of every contender")
    arguments.add_argument("--one", choices=CONTENDERS, help="only this contender, in this process")
    arguments.add_argument("--trace", help="folder of a recorded fit, with --one")
    options = arguments.parse_args()
    if options.one is not None:
        found = CONTENDERS[options.one](Work(options))
        scores = Path(options.trace).with_name(options.one.replace(" ", "-") + ".pt")
        torch.save(found.pop("scores"), scores)
        sys.stdout.write("\n" + json.dumps({**found, "scores": str(scores)}) + "\n")
        return
    fixed = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("examples", "tests", "batch-size")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        texts = Texts(options.examples, options.tests)
        trainer = quiet(max_epochs=2, callbacks=[TracInCallback(trace, cache="on_demand", dtype="float32")])
        trainer.fit(texts.module(), texts.loader("train", shuffle=True))
        found = {name: _attempt(name, fixed, trace) for name in CONTENDERS}
        for name, result in found.items():
            if name.startswith("ours"):
                rows.append(Row(f"{name}: query, gradients stored", result["query"], "s", details=result))
                continue
            method = name.split()[1]
            own = found[f"ours {method}"]
            if "reason" in result:
                rows.append(Row(f"{name}", None, details=result))
                continue
            limits = {"captum tracin-we": (">= 50", ">= 50", "")}.get(name, ("", "", ""))
            limits = ("", "", ">= 5") if name == "captum tracin-last" else limits
            exact, other = (torch.load(each["scores"], weights_only=True) for each in (own, result))
            error = float((exact - other).norm() / other.norm())
            rows += [
                Row(f"{name}: seconds / ours, gradients stored", result["seconds"] / own["query"], limit=limits[2]),
                Row(
                    f"{name}: seconds / ours, all", result["seconds"] / own["seconds"], limit=limits[0], details=result
                ),
                Row(f"{name}: memory / ours", result["megabytes"] / max(own["megabytes"], 1), limit=limits[1]),
                Row(f"{name}: difference of the scores", error, "", details={"relative": "to the peer's norm"}),
            ]
    title = f"{options.examples} training and {options.tests} test articles, MiniLM-L6, 2 checkpoints"
    report("peers", title, rows, options.out)


if __name__ == "__main__":
    main()
