"""A query against one memory copy of the bytes that it must read.

Test gradients are multiplied with stored ones of synthetic examples (MiniLM's shapes, words as frequent as in BBC),
shard by shard, as ``trainer.influence`` does. It is compared with copying the rows of the words that the test examples
hold, by libc's ``memcpy``, which is one thread, and by all of torch's, into warm and into fresh memory; and with a
matrix product of as many multiplications.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, in_turns, median_ratio, parser, peak_megabytes, report
from benchmarks.workload import HIDDEN, word_gradients
from lightning_tracin import TracInWE
from lightning_tracin.gradients.rows import DTYPES
from lightning_tracin.scoring.strongest import merge_top, top_of
from lightning_tracin.storage.encoding import encode
from lightning_tracin.storage.shards import Shards, ShardWriter, fitting_shard_examples

_BLOCK = 500


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=20_000, help="cached training examples")
    arguments.add_argument("--tests", type=int, default=64, help="test examples")
    arguments.add_argument("--checkpoints", type=int, default=1)
    arguments.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--k", type=int, default=10, help="proponents and opponents that are kept")
    options = arguments.parse_args()
    method = TracInWE()
    test = method.prepare(word_gradients(options.tests, seed=1), None, "test")
    with tempfile.TemporaryDirectory() as folder:
        shards = _stored(Path(folder), options.examples, options.dtype)

        def query() -> None:
            strongest: list[Any] = []
            for shard in range(len(shards)):
                start, stop = shards.bounds(shard)
                scores = torch.zeros(options.tests, stop - start)
                for _ in range(options.checkpoints):
                    scores += method.dot(test, method.prepare(shards.read(shard), None, "train"), None)
                best = top_of(scores, torch.arange(start, stop), options.k)
                strongest = [merge_top([*strongest, best], options.k)]

        wanted = torch.unique(test.tokens)
        needed, pairs = 0, 0
        counts = torch.bincount(test.tokens)
        for shard in range(len(shards)):
            tokens = shards.read(shard).tokens
            needed += int(torch.isin(tokens, wanted).sum())
            pairs += int(counts[tokens[tokens < len(counts)]].sum())
        rows = torch.ones(needed, HIDDEN, dtype=DTYPES[options.dtype])
        warm, columns = torch.empty_like(rows), torch.randn(HIDDEN, max(1, round(pairs / needed)))
        part = torch.randn(min(needed, 2048), HIDDEN)

        def product() -> None:
            for _ in range(0, needed, len(part)):
                part @ columns

        turns = {
            "query": query,
            "memcpy": lambda: ctypes.memmove(warm.data_ptr(), rows.data_ptr(), rows.nbytes),
            "copy": lambda: warm.copy_(rows),
            "fresh copy": lambda: rows.clone(),
            "product": product,
        }
        seconds = in_turns(turns, options.repeats)
    times = {name: statistics.median(each) for name, each in seconds.items()}
    per_checkpoint = [each / options.checkpoints for each in seconds["query"]]

    def over(what: str, name: str, limit: str = "") -> Row:
        return Row(f"query / {what}", median_ratio(per_checkpoint, seconds[name]), limit=limit)

    size = rows.nbytes / 1e6
    report(
        f"query-{options.examples}x{options.checkpoints}-{options.dtype}",
        f"{options.tests} test examples over {options.examples:,} cached ones, {options.checkpoints} checkpoint(s), "
        f"{options.dtype}: {size:,.0f} MB of rows are needed at each",
        [
            over("memcpy, into warm memory", "memcpy", limit="<= 3"),
            over("memory copy by all threads, into warm memory", "copy", limit="<= 3"),
            over("memory copy by all threads, into fresh memory", "fresh copy"),
            over("matrix product of the same size", "product"),
            Row("query, all checkpoints", times["query"], "s", details=times),
            Row("peak memory", peak_megabytes(), "MB"),
        ],
        options.out,
    )


def _stored(folder: Path, n_examples: int, dtype: str) -> Shards:
    """Synthetic gradients on disk."""
    block = word_gradients(_BLOCK, seed=2)
    encoded = encode(block.as_dtype(dtype))  # type: ignore[arg-type]
    per_example = sum(tensor.nbytes for tensor in encoded.values()) / _BLOCK
    size = fitting_shard_examples(per_example, n_examples)
    everything = range(n_examples)
    with ShardWriter(folder, dtype=dtype, shard_examples=size, examples=everything) as writer:  # type: ignore[arg-type]
        for start in range(0, n_examples, _BLOCK):
            writer.add(word_gradients(min(_BLOCK, n_examples - start), seed=2 + start))
        writer.close()
    return Shards.open(folder)


if __name__ == "__main__":
    main()
