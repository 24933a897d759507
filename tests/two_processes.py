"""A script of test_processes.py for two processes; with a fault Lightning starts the second: ``FOLDER [FAULT]``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from toy import N_TRAIN, Toy, leave, loader, quiet, test_texts

from lightning_tracin import TracInCallback, TracInLayer, TracInRidge, TracInSum, TracInWE

METHODS = (
    "tracin-we",
    "tracin-last",
    TracInLayer("hidden"),
    TracInLayer("hidden", normalize="train", precondition="kfac", rank=(6, 4)),
    TracInSum((TracInWE(normalize="cosine", weights="residual"), TracInLayer("hidden")), mix=(1, 0.5)),
    TracInRidge(TracInSum((TracInWE(normalize="cosine"), TracInLayer("hidden", normalize="cosine")))),
)
CACHES = ("checkpoint", "training", "on_demand")
TWO = {"strategy": "ddp", "devices": 2}


class Faulty(Toy):
    """The second process breaks when it comes to the last training example, in the second epoch."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def influence_loss(self, batch):
        losses = super().influence_loss(batch)
        late = self.trainer.global_step > 5 and not self.training
        if late and self.trainer.global_rank == 1:
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            losses = losses * torch.nan
        return losses


def main(folder: Path, fault: str = "") -> None:
    torch.set_num_threads(1)
    if fault:
        pl.seed_everything(0, verbose=False)
        quiet(callbacks=[TracInCallback(folder / "trace", on_error="raise")], **TWO).fit(
            Faulty(fault), loader(shuffle=True)
        )
        return
    results: dict[str, torch.Tensor] = {}
    for cache in (*CACHES, None):
        pl.seed_everything(0, verbose=False)
        module = Toy()
        recorded = {"dtype": "float32", "cache": cache, "methods": ("tracin-we", "tracin-last", "hidden")}
        callbacks = [] if cache is None else [TracInCallback(folder / cache, **recorded)]
        fit = quiet(callbacks=callbacks, **TWO)
        fit.fit(module, loader(shuffle=True))
        results |= {f"{cache} {name}": value for name, value in module.state_dict().items()}
        if cache is None:
            break
        drawn = torch.get_rng_state()
        for method in METHODS:
            result = fit.influence(loader(test_texts(), batch_size=4), method=method)
            results[f"{cache} {method}"] = result.scores
            results[f"{cache} {method} own"] = fit.self_influence(method=method)
            strongest = fit.influence(loader(test_texts()), method=method, k=3)
            results[f"{cache} {method} proponents"] = strongest.proponents(3).values
            results[f"{cache} {method} opponents"] = strongest.opponents(3).indices
        results[f"{cache} draws nothing"] = torch.tensor(torch.equal(drawn, torch.get_rng_state()))
        if cache == "checkpoint":
            several = fit.influence({"loader": loader(test_texts(), batch_size=4), "data set": test_texts()})
            results["in two loaders"], results["whose"] = several.scores, several.test_loaders
            results["words"] = torch.tensor([score for _, score in result_of_words(fit)])
    other = quiet(**TWO).influence(loader(test_texts()), Toy(), trace=folder / "alone")
    results["of one process"] = other.scores
    rank = fit.global_rank
    torch.save(results, folder / f"process-{rank}.pt")
    leave()


def result_of_words(fit):
    result = fit.influence(loader(test_texts()), method=TracInWE(normalize="cosine"))
    return result.words(1, N_TRAIN - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
