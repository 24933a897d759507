"""Kills processes that write traces, and checks what they leave: nothing wrong, nothing lost, nothing in the way.

``python -m torture.killer --scene "fit checkpoint" --operation 17`` (with ``tests`` on the path) repeats one kill.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin import Trace
from lightning_tracin.storage import shards
from lightning_tracin.storage.own_files import has_trace
from lightning_tracin.storage.verification import verify
from torture.children import NEVER, Aim, Ended, in_child
from torture.scenes import FOREIGN, SCENES, Scene, ask

#: What must not be: the keys of what :func:`kills` counts beside "kills".
BAD = ("wrong numbers", "foreign exceptions", "files lost", "files left over", "hangs")

# Lightning's own; a lock that nobody holds; a save that was broken off, in a folder of the user's; texts of a pass.
_MAY_STAY = re.compile(
    r"\.ckpt|\.lightning_tracin\.lock$|result\.safetensors\.[0-9a-f]{8}\.partial$|(^|/)\.tmp\w+$|/trace/texts/"
)

_SHARD_EXAMPLES = 8  # of 20, so that gradients lie in several files


@dataclass(frozen=True)
class Content:
    """A trace as numbers: the tensors of each checkpoint by its step, the scores up to each, what its scene adds."""

    checkpoints: dict[int, dict[str, Any]]
    scores: list[dict[str, Tensor]]
    looks: dict[str, Tensor]


@dataclass(frozen=True)
class Known:
    """A scene that was played to its end without a kill.

    Attributes:
        scene: the scene.
        template: the folder with what is there before.
        before: the trace that is there before, if there is one.
        after: the trace that is there in the end.
        names: the files that are there in the end, once the trace was asked.
        operations: how many there are on files.
        seconds: how long it takes.
    """

    scene: Scene
    template: Path
    before: Content | None
    after: Content
    names: frozenset[str]
    operations: int
    seconds: float


def kills(n: int, seed: int, folder: Path) -> Counter[str]:
    """Kill a number of processes, and count what is wrong afterwards; each wrong thing is printed.

    Args:
        n: number of kills.
        seed: of the choice of moments.
        folder: an empty folder to do it in.
    """
    chance = random.Random(seed)
    counted: Counter[str] = Counter()
    names = chance.sample([*SCENES], min(len(SCENES), max(3, n // 5)))  # playing one costs as much as two kills
    known = {name: play(SCENES[name], folder) for name in names}
    while counted["kills"] < n:
        one = known[names[counted["tries"] % len(names)]]
        counted["tries"] += 1
        counted += kill(one, _aim(one, chance), _aim(one, chance) if chance.random() < 0.25 else None, folder)
    return counted


def every_operation(scene: str, folder: Path) -> Counter[str]:
    """Kill one scene before each of its operations on files."""
    known = play(SCENES[scene], folder)
    counted: Counter[str] = Counter()
    for number in range(1, known.operations + 1):
        counted += kill(known, Aim(operation=number), None, folder)
    return counted


def play(scene: Scene, folder: Path) -> Known:
    """Play a scene without a kill, to know what must come of it.

    It is played where its processes will be killed, because Lightning's checkpoints say where their trace is.
    """
    shards.MOST_SHARD_EXAMPLES = _SHARD_EXAMPLES
    place = _place(folder)
    told, template, trace = folder / "told", folder / "templates" / scene.name, place / scene.trace
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)

    def begin() -> Content | None:
        scene.begin(place)
        _plant(scene, place)
        return _content(scene, place, folder / "prefix") if has_trace(trace) else None

    before = _value(in_child(begin, told))
    shutil.copytree(place, template)
    began = time.monotonic()
    acted = in_child(lambda: scene.act(place) and None, told)
    seconds = time.monotonic() - began
    _value(acted)
    after = _value(in_child(lambda: _content(scene, place, folder / "prefix"), told))
    _value(in_child(lambda: ask(place, scene.trace), told))
    return Known(scene, template, before, after, frozenset(_files(place)), acted.operations, seconds)


def kill(known: Known, aim: Aim, again: Aim | None, folder: Path) -> Counter[str]:
    """Kill a scene, perhaps kill what its user does next too, and then go on to the end; count what is wrong.

    Args:
        known: the scene, played in the same folder.
        aim: of the first kill.
        again: of the second; None for none.
        folder: where it was played.
    """
    scene, counted, told = known.scene, Counter[str](), folder / "told"
    folder = _place(folder)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(known.template, folder)
    untouched = _files(folder / scene.untouched) if scene.untouched else {}
    problems: list[tuple[str, str]] = []
    ended = in_child(lambda: scene.act(folder) and None, told, aim)
    killed = int(ended.killed)
    problems += _problems_of(ended, "what was killed")
    problems += _checked(known, folder, told, "after the kill", complete=False)
    if again is not None:
        ended = in_child(lambda: scene.go_on(folder) and None, told, again)
        killed += ended.killed
        problems += _problems_of(ended, "the next try")
        problems += _checked(known, folder, told, "after the second kill", complete=False)
    problems += _problems_of(in_child(lambda: scene.go_on(folder) and None, told), "going on")
    problems += _checked(known, folder, told, "in the end", complete=True)
    if untouched and not untouched.items() <= _files(folder / scene.untouched).items():
        problems.append(("files lost", f"{scene.untouched} is no longer as it was"))
    for kind, text in problems:
        sys.stdout.write(f"{kind}: {scene.name}, {aim}, again {again}: {text}\n")
    counted["kills"] = killed
    counted.update(kind for kind, _ in problems)
    return counted


def _place(folder: Path) -> Path:
    return folder / "place"


def _aim(known: Known, chance: random.Random) -> Aim:
    kind = chance.choice(("operation", "operation", "write", "moment"))
    if kind == "moment":
        return Aim(seconds=chance.random() * known.seconds)
    operation = chance.randint(1, known.operations)
    return Aim(operation=operation, length=chance.randint(0, 3000) if kind == "write" else None)


def _checked(known: Known, folder: Path, told: Path, when: str, *, complete: bool) -> list[tuple[str, str]]:
    ended = in_child(lambda: [*_wrong(known, folder, complete=complete)], told)
    found = [(kind, f"{when}: {text}") for kind, text in ended.value or ()]
    return [*_problems_of(ended, f"looking {when}"), *found]


def _problems_of(ended: Ended, what: str) -> Iterator[tuple[str, str]]:
    if ended.hung:
        yield "hangs", what
    if ended.error is not None:
        yield "foreign exceptions", f"{what} raised {ended.error[0]}: {ended.error[1]}\n{ended.error[2]}"


def _wrong(known: Known, folder: Path, *, complete: bool) -> Iterator[tuple[str, str]]:
    """What is wrong in a folder in which a process was killed, or in the end."""
    scene, path = known.scene, folder / known.scene.trace
    for name in (*FOREIGN, *scene.foreign):
        file = folder / name
        if not file.exists() or file.read_text() != _words_of(name):
            yield "files lost", name
    if complete:
        left = {name for name in _files(folder).keys() - known.names if not _MAY_STAY.search(name)}
        if left:
            yield "files left over", ", ".join(sorted(left))
    if has_trace(path):
        for problem in _wrong_numbers(known, folder, Trace(path), complete=complete):
            yield "wrong numbers", problem
    elif complete:
        yield "wrong numbers", "there is no trace"


def _wrong_numbers(known: Known, folder: Path, trace: Trace, *, complete: bool) -> Iterator[str]:
    for file, problem in verify(trace):
        if problem and (complete or "was left behind by a fit" not in problem):
            yield f"{file.relative_to(folder)}: {problem}"
    gone = [each.step for each in trace.checkpoints if _is_of_a_pass(known, folder, each)]
    found, traces = trace.checkpoints, [each for each in (known.before, known.after) if each]
    steps = [each.step for each in found]
    if complete:
        traces = [known.after] if steps == [*known.after.checkpoints] else []
    expected = [each for each in traces if steps == [*each.checkpoints][: len(steps)]]
    if not expected:
        yield f"there are checkpoints of the steps {steps}"
        return
    differences = [_difference(found, each, gone) for each in expected]
    same = [each for each, difference in zip(expected, differences, strict=True) if difference is None]
    if not same:
        yield str(differences[-1])
    elif found:
        scores = ask(folder, known.scene.trace)
        if not gone and not any(_same_tensors(scores, each.scores[len(found) - 1]) for each in same):
            yield f"the scores of {len(found)} checkpoints differ"
    if known.scene.look and not any(_same_tensors(known.scene.look(folder), each.looks) for each in expected):
        yield "what is beside the trace is neither old nor new"


def _is_of_a_pass(known: Known, folder: Path, checkpoint: Any) -> bool:
    """Whether training's own gradients, and texts, went with the process: those at the weights are in their place."""
    texts = (checkpoint.path / "texts" / "index.json").relative_to(folder)
    return texts.as_posix() in known.names and not (folder / texts).exists()


def _difference(found: list[Any], expected: Content, gone: list[int]) -> str | None:
    """How checkpoints differ from those of a trace, in words; None if they do not, as far as they have gradients.

    Args:
        found: the checkpoints.
        expected: the trace.
        gone: the steps at which the gradients are others.
    """
    for checkpoint in found:
        known, own = expected.checkpoints[checkpoint.step], _tensors(checkpoint)
        if checkpoint.step in gone:
            own = {name: value for name, value in own.items() if not name.startswith("gradients")}
        for name in own.keys() | (known.keys() - {n for n in known if n.startswith("gradients")}):
            if name in known and not (name in own and _same(own[name], known[name])):
                return f"{name} at step {checkpoint.step} differs"
    return None


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _content(scene: Scene, folder: Path, prefix: Path) -> Content:
    path, scores = folder / scene.trace, []
    trace = Trace(path)
    steps = [each.step for each in trace.checkpoints]
    for step in steps:
        shutil.copytree(path, prefix)
        Trace(prefix).drop_checkpoints_after(step)
        scores.append(ask(prefix.parent, prefix.name))
        shutil.rmtree(prefix)
    looks = scene.look(folder) if scene.look else {}
    return Content({each.step: _tensors(each) for each in trace.checkpoints}, scores, looks)


def _tensors(checkpoint: Any) -> dict[str, Any]:
    """All numbers of a checkpoint."""
    found: dict[str, Any] = {name: value.clone() for name, value in checkpoint.weights().items()}
    for site in checkpoint.sites:
        moments = checkpoint.second_moments(site)
        found[f"moments {site.key}"] = moments.values.clone()
        found[f"rate {site.key}"] = checkpoint.learning_rate_of(site)
        if checkpoint.has_gradients(site):
            stored = checkpoint.gradients(site)
            for shard in range(len(stored)):
                columns = stored.read(shard).columns
                found |= {f"gradients {site.key} {shard} {name}": value.clone() for name, value in columns.items()}
    return found


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _plant(scene: Scene, folder: Path) -> None:
    for name in (*FOREIGN, *scene.foreign):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(_words_of(name))


def _words_of(name: str) -> str:
    return f"what somebody keeps in {name}"


def _value(ended: Ended) -> Any:
    if ended.killed or ended.error is not None:
        raise RuntimeError(f"A scene could not be played without a kill: {ended.error}")
    return ended.value


def _be_quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder")
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scene", choices=SCENES, help="only this one, before each operation or as follows")
    parser.add_argument("--operation", type=int, default=NEVER)
    parser.add_argument("--length", type=int)
    parser.add_argument("--seconds", type=float)
    asked = parser.parse_args()
    _be_quiet()
    if asked.scene is None:
        counted = kills(asked.kills, asked.seed, asked.folder)
    elif asked.operation == NEVER and asked.seconds is None:
        counted = every_operation(asked.scene, asked.folder)
    else:
        known = play(SCENES[asked.scene], asked.folder)
        counted = kill(known, Aim(asked.seconds, asked.operation, asked.length), None, asked.folder)
    sys.stdout.write(f"{dict(counted)}\n")
    return int(any(counted[key] for key in BAD))


if __name__ == "__main__":
    sys.exit(main())
