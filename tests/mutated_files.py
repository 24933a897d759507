"""Mutations of the files of traces and results: by value, by tensor, by byte, by place; each says what it has done.

Checksums are made valid again afterwards: those who make such files can compute them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_tracin.storage.files import hash_of_tensors

_RESULT, _CHECKSUM = "lightning_tracin.result", "lightning_tracin.checksum"

_WEIRD_TEXTS = (
    "",
    "..",
    "../../etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "a\x00b",
    "\x1b[2J\x9b31m\u202etxt",
    "[/red]",
    "\ud800",
    "x" * 5000,
    "words",
    "linear-0",
    "weights.safetensors",
    "NaN",
    "null",
)
_TOKENS = (
    *("", " ", "\n", "▁", "▁a", "Ġ", "Ġa", "##", "##a", "a</w>", "a@@", "<0xFF>", "<0x0A>", "[CLS]", "e\u0301"),
    *("\u0301", "语", "\u202e", "\x1b[2J", "=1+1", "a\tb", "\U0001f600", "'", "</script>", "\x00", "[/red]", "Ã"),
    "a" * 3000,
)
_WEIRD_NUMBERS = (0, -1, 1, 2, 7, 10**9, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308, -1e308, True, False)
_WEIRD_FLOATS = (float("nan"), float("inf"), -float("inf"))


class NothingToMutateError(Exception):
    """A mutation does not apply."""


def _json_values(draw: random.Random, copies: Path, names: str) -> str:
    """Change a value of a JSON file, or a key, and make the checksums valid again."""
    path = _one_of(draw, copies, names)
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("checksum")
    what = _mutated_value(draw, content)
    _write_json(path, content)
    rehash(copies)
    return f"{what} in {path.relative_to(copies)}"


def _vocabulary(draw: random.Random, copies: Path, names: str) -> str:
    """Words of other tokenizers, and none."""
    path = _one_of(draw, copies, names)
    words = json.loads(path.read_text(encoding="utf-8"))["words"]
    tokens = draw.sample(_TOKENS, draw.choice([1, 3, len(_TOKENS)]))
    _write_json(path, {"words": {token: draw.choice(tokens) for token in words}})
    return f"words {tokens}"


def _json_text(draw: random.Random, copies: Path, names: str) -> str:
    """JSON that is no value: nested deeply, with a key twice, huge, with NaN."""
    path = _one_of(draw, copies, names)
    text = path.read_text(encoding="utf-8")
    kind = draw.choice(["deep", "twice", "huge number", "NaN", "wide", "other"])
    key = draw.choice(list(json.loads(text)))
    if kind == "deep":
        text = text.replace("{", '{"' + key + '": ' + "[" * 100_000 + "]" * 100_000 + ",", 1)
    elif kind == "twice":
        text = text.replace("{", "{" + f'"{key}": {json.dumps(json.loads(text)[key])},', 1)
    elif kind == "huge number":
        text = text.replace("{", "{" + f'"{key}": {"9" * draw.choice([30, 400, 100_000])},', 1)
    elif kind == "NaN":
        text = text.replace("{", "{" + f'"{key}": {draw.choice(["NaN", "Infinity", "1e999", "-Infinity"])},', 1)
    elif kind == "wide":
        text = text.replace("{", "{" + f'"{key}": [{"[]," * 300_000}[]],', 1)
    else:
        text = draw.choice(["", "[]", "3", '"x"', "null", "{}", "\ufeff{}", '{"checksum": {}}', "{" * 5000])
    path.write_text(text, encoding="utf-8")
    return f"{kind} at {key} in {path.relative_to(copies)}"


def _tensors(draw: random.Random, copies: Path, names: str) -> str:
    """Change a tensor, its name, type, shape or values, and make the checksums valid again."""
    path = _one_of(draw, copies, names)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    what = _mutated_tensors(draw, tensors, metadata)
    if _RESULT in metadata:
        metadata[_CHECKSUM] = hash_of_tensors(tensors, metadata[_RESULT])
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    rehash(copies)
    return f"{what} in {path.relative_to(copies)}"


def _result_header(draw: random.Random, copies: Path, _: str) -> str:
    """Change a value of a result's header, and make its checksum valid again."""
    path = copies / "result.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    header = json.loads(metadata[_RESULT])
    what = _mutated_value(draw, header)
    text = json.dumps(header)
    save_file(tensors, path, {_RESULT: text, _CHECKSUM: hash_of_tensors(tensors, text)})
    return f"{what} in the result's header"


def _raw_bytes(draw: random.Random, copies: Path, names: str) -> str:
    """Change bytes, cut off, or add; with checksums of safetensors files made valid again."""
    path = _one_of(draw, copies, names)
    content = bytearray(path.read_bytes())
    kind = draw.choice(["bytes", "header bytes", "cut", "longer", "length of header", "empty"])
    if kind == "bytes":
        for _ in range(draw.choice([1, 1, 5, 50])):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif kind == "header bytes":
        for _ in range(draw.choice([1, 3])):
            content[draw.randrange(min(len(content), 400))] = draw.randrange(256)
    elif kind == "cut":
        del content[draw.randrange(len(content)) :]
    elif kind == "longer":
        content += bytes(draw.randrange(256) for _ in range(draw.choice([1, 8, 1000])))
    elif kind == "length of header":
        content[:8] = struct.pack("<Q", draw.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]))
    else:
        content.clear()
    path.write_bytes(content)
    if path.suffix == ".safetensors":
        rehash(copies)
    return f"{kind} of {path.relative_to(copies)}"


def _places(draw: random.Random, copies: Path, names: str) -> str:
    """Put a link, a device, a pipe, a folder or another file in the place of a file."""
    path = _one_of(draw, copies, names)
    other, outside = _one_of(draw, copies, names).read_bytes(), copies.with_name("outside")
    kind = draw.choice(["zero", "pipe", "folder", "loop", "outside", "swapped", "gone"])
    shutil.move(path, outside)
    if kind == "swapped":
        path.write_bytes(other)
        rehash(copies)
    elif kind != "gone":
        put = {
            "zero": lambda: path.symlink_to("/dev/zero"),
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "loop": lambda: path.symlink_to(path),
            "outside": lambda: path.symlink_to(outside),
        }
        put[kind]()
    return f"{path.relative_to(copies)} is {kind}"


def _folders(draw: random.Random, copies: Path, names: str) -> str:
    """Put a link in the place of a folder, or foreign files with unspeakable names into it."""
    path = _one_of(draw, copies, names)
    if draw.random() < 0.5:
        (path.parent / "step-0\x1b[31m").mkdir(exist_ok=True)
        (path.parent / "\x1b]0;x\x07\u202e.partial").touch()
        return f"foreign files beside {path.relative_to(copies)}"
    outside = copies.with_name("outside")
    shutil.move(path.parent, outside)
    path.parent.symlink_to(outside)
    return f"{path.parent.relative_to(copies)} is a link to a folder outside"


_JSON, _SAFETENSORS = "trace/**/*.json", "trace/**/*.safetensors"
MUTATIONS: list[tuple[Callable[[random.Random, Path, str], str], str]] = [
    (_json_values, _JSON),
    (_json_values, "trace/trace.json"),
    (_json_values, "trace/checkpoints/*/checkpoint.json"),
    (_json_values, "trace/**/index.json"),
    (_json_text, _JSON),
    (_vocabulary, "trace/vocabulary.json"),
    (_tensors, _SAFETENSORS),
    (_tensors, "trace/**/00000.safetensors"),
    (_tensors, "trace/**/0*.safetensors"),
    (_tensors, "trace/**/second-moments-*.safetensors"),
    (_tensors, "result.safetensors"),
    (_tensors, "result.safetensors"),
    (_result_header, ""),
    (_result_header, ""),
    (_raw_bytes, _SAFETENSORS),
    (_raw_bytes, _JSON),
    (_raw_bytes, "result.safetensors"),
    (_places, "trace/**/*.*s*"),
    (_folders, "trace/*/**/*.*s*"),
]


def _one_of(draw: random.Random, copies: Path, names: str) -> Path:
    found = sorted(path for path in copies.glob(names) if path.is_file())
    if not found:
        raise NothingToMutateError
    return draw.choice(found)


def _mutated_value(draw: random.Random, content: dict) -> str:
    """Change something in an object: a value by its type, or the keys."""
    places = list(_places_in(content))
    owner, key, path = draw.choice(places)
    kind = draw.choice(["type", "value", "value", "drop", "double", "rename"])
    old = owner[key]
    if kind == "drop":
        del owner[key]
    elif kind == "double" and isinstance(owner, list):
        owner.insert(key, old)
    elif kind == "rename" and isinstance(owner, dict):
        owner[draw.choice(_WEIRD_TEXTS)] = owner.pop(key)
    elif kind == "value":
        owner[key] = _other_value(draw, old)
    else:
        kind = "type"
        owner[key] = draw.choice(
            [None, [], {}, "", "text", 3, 2.5, True, [old], {"a": old}, str(old), *_WEIRD_NUMBERS, *_WEIRD_FLOATS]
        )
    return f"{kind} of {path}: {str(old)[:60]!r} -> {str(owner[key] if _has(owner, key) else None)[:60]!r}"


def _has(owner: dict | list, key: str | int) -> bool:
    return key in owner if isinstance(owner, dict) else key < len(owner)


def _places_in(content: object, path: str = "$") -> list[tuple[dict | list, str | int, str]]:
    found: list[tuple[dict | list, str | int, str]] = []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found.append((content, key, f"{path}.{key}"))
        found += _places_in(value, f"{path}.{key}")[:50]
    return found


def _other_value(draw: random.Random, old: object) -> object:
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return draw.choice([old + 1, old - 1, -old, old * 1000, *_WEIRD_NUMBERS])
    if isinstance(old, float):
        return draw.choice([-old, old * 2, *_WEIRD_NUMBERS, *_WEIRD_FLOATS])
    if isinstance(old, str):
        return draw.choice([old[:-1], old + "x", old.upper(), old[::-1], *_WEIRD_TEXTS])
    if isinstance(old, list):
        return draw.choice([old[:-1], old * 2, old[::-1], old * 1000 if len(str(old)) < 200 else [], [old]])
    if isinstance(old, dict):
        return draw.choice([{}, dict(list(old.items())[:-1]), {**old, "more": 1}, {**old, "../../x": "0" * 32}, [old]])
    return draw.choice(["", 0, [], {}, "text"])


def _mutated_tensors(draw: random.Random, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Change a tensor, or the metadata."""
    name = draw.choice(sorted(tensors))
    mutate = draw.choice([_type, _shape, _rows, _names, _names, _values, _values, _values])
    if mutate is _names and metadata and draw.random() < 0.3:
        key = draw.choice(sorted(metadata))
        metadata[key] = draw.choice(["", "nan", "-1", "inf", "[]", "text", "1e400", "\x1b[2J"])
        return f"metadata {key} = {metadata[key]!r}"
    return mutate(draw, tensors, name)


def _type(draw: random.Random, tensors: dict[str, torch.Tensor], name: str) -> str:
    floats = ("float64", "float32", "float16", "bfloat16", "complex64", "float8_e4m3fn")
    dtype = getattr(torch, draw.choice([*floats, "int64", "int32", "int16", "int8", "uint8", "bool"]))
    tensor = tensors[name]
    tensors[name] = (tensor.nan_to_num() if tensor.is_floating_point() else tensor).to(dtype)
    return f"{name} as {dtype}"


def _shape(draw: random.Random, tensors: dict[str, torch.Tensor], name: str) -> str:
    shapes = [lambda t: t[None], lambda t: t.flatten(), lambda t: t[:0], lambda t: t.flatten()[:, None], lambda t: t.mT]
    tensor = tensors[name]
    tensors[name] = draw.choice(shapes)(tensor) if tensor.dim() == 2 else tensor[:, None]
    return f"shape of {name}: {tuple(tensor.shape)} -> {tuple(tensors[name].shape)}"


def _rows(draw: random.Random, tensors: dict[str, torch.Tensor], name: str) -> str:
    """Of one tensor, or of all, which then agree with each other."""
    mutate = draw.choice(
        [lambda t: t[:-1], lambda t: torch.cat([t, t[-1:]]), lambda t: t.flip(0), lambda t: torch.cat([t, t])]
    )
    every = draw.random() < 0.3
    for each in list(tensors) if every else [name]:
        if tensors[each].dim():
            tensors[each] = mutate(tensors[each])
    return f"rows of {'all tensors' if every else name}"


def _names(draw: random.Random, tensors: dict[str, torch.Tensor], name: str) -> str:
    kind, other = draw.choice(["rename", "drop", "add", "swap"]), draw.choice(sorted(tensors))
    if kind == "rename":
        other = draw.choice(["x", "examples", "rows", "../x", "", name + "s", "lengths", "gradients.9.9.norms"])
        tensors[other] = tensors.pop(name)
    elif kind == "drop":
        del tensors[name]
    elif kind == "add":
        tensors["more"] = torch.zeros(draw.choice([0, 1, 5]))
    else:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"{kind} of {name}, {other!r}"


def _values(draw: random.Random, tensors: dict[str, torch.Tensor], name: str) -> str:
    flat = tensors[name].flatten()
    if not len(flat):
        return "nothing"
    places = [draw.randrange(len(flat)) for _ in range(draw.choice([1, 1, 3, len(flat)]))]
    if flat.is_floating_point():
        value = draw.choice([*_WEIRD_FLOATS, -1.0, 0.0, 1e30, 6e4, 3e38, 1e-40])
    else:
        value = draw.choice([-1, 0, 1, 5, 19, 20, 39, 40, 100, 127, -128, 10**6, 2**31 - 1, -(2**31), 2**62])
        bounds = torch.iinfo(flat.dtype)
        value = min(max(value, bounds.min), bounds.max)
    flat[places] = torch.tensor(value, dtype=torch.float64 if flat.is_floating_point() else flat.dtype).to(flat.dtype)
    tensors[name] = flat.view(tensors[name].shape)
    return f"{len(places)} values of {name} = {value}"


def _write_json(path: Path, content: dict) -> None:
    """As the package writes it, but for numbers and texts that it would not write."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    content = {**content, "checksum": xxhash.xxh3_128_hexdigest(canonical.encode())}
    path.write_text(json.dumps(content), encoding="utf-8")


def rehash(copies: Path) -> None:
    """Make all checksums of files valid again, as far as the files that hold them can be read."""
    for path in copies.rglob("*.json"):
        if path.name not in ("index.json", "checkpoint.json") or not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        sums = content.get("checksums") if isinstance(content, dict) else None
        names = sums if isinstance(sums, dict) else range(len(sums)) if isinstance(sums, list) else ()
        for name in list(names):
            file = path.parent / (f"{name:05d}.safetensors" if isinstance(name, int) else name)
            with contextlib.suppress(OSError, ValueError):
                if file.is_file() and file.resolve().is_relative_to(copies.resolve()) and isinstance(sums[name], str):
                    sums[name] = xxhash.xxh3_128_hexdigest(file.read_bytes())
        components = path.with_name("components.safetensors")
        if isinstance(content, dict) and content.get("components") and components.is_file():
            content["components"] = xxhash.xxh3_128_hexdigest(components.read_bytes())
        content.pop("checksum", None)
        _write_json(path, content)
