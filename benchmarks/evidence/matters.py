"""Do the proponents of a prediction matter? ``does_it_matter`` on a task of the study, as a user would ask it."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console

from benchmarks.evidence.fitting import fitted, right_and_balanced
from benchmarks.evidence.tasks import TASKS
from lightning_tracin.retraining import does_it_matter


def main() -> None:
    """Retrain, print what comes of it, and write how many test examples show it by themselves."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), default="bbc-cnn")
    parser.add_argument("--folder", type=Path, default=Path("evidence"), help="of all fits of the study")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("-k", type=int, default=50, help="proponents that are left out")
    parser.add_argument("--tests", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    task = TASKS[options.task]()
    fit = fitted(task, options.folder)
    tests = right_and_balanced(fit.probabilities(), task.test.labels, options.tests)
    result = fit.trainer.influence(
        task.test_loader(), fit.module, train_dataloaders=fit.train_loader(), trace=fit.trace.path
    )
    effect = does_it_matter(
        result,
        task.build,
        task.test_loader(),
        options.k,
        options.seeds,
        test_indices=tests,
        against=["random"],
        trainer=task.trainer,
        folder=options.folder / task.name / "deletion",
    )
    console = Console()
    console.print(effect)
    beaten = effect.beats("random")
    content = {
        "command": f"python -m benchmarks.evidence.matters --task {task.name} -k {options.k} --seeds {options.seeds}",
        "summary": effect.summary(),
        "sentences": [effect.sentence(row) for row in range(len(tests))],
        "beats_random": beaten.tolist(),
    }
    (options.out / f"matters-{options.task}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"{int(beaten.sum())} of {len(tests)} test examples show it by themselves.")


if __name__ == "__main__":
    main()
