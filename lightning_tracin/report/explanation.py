"""What people read of a result: a test example in words, and the training examples that pushed it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Example:
    """What an example says.

    Attributes:
        index: its index in its data set.
        words: in reading order; empty where its text is not known.
        label: what to print for its label, if it has one.
        prediction: what to print for what the model says; None for training examples, and where it is not known.
        confidence: the probability that the model gives to its prediction, if it gives any.
        unread: what the raw text goes on with after the last token that the model was given.
        ids: its token ids, among which the words have their places.
        loader: the name of the loader that it came in; None where there was one.
        target: what to print for what of it is explained; None for training examples, and where that is its label.
    """

    index: int
    words: tuple[Word, ...]
    label: str | None
    prediction: str | None = None
    confidence: float | None = None
    unread: str = ""
    ids: tuple[int, ...] = ()
    loader: str | None = None
    target: str | None = None

    @cached_property
    def text(self) -> str:
        """The words as one text, without what the tokenizer added; without words, the text as it was given."""
        if not self.words:
            return self.unread.strip()
        return "".join(word.before + word.text for word in self.words if not word.special).strip()

    @property
    def explained(self) -> str | None:
        """What to print for what of it is explained, as far as that is known."""
        return self.label if self.target is None else self.target

    @property
    def is_mistaken(self) -> bool:
        """Whether the model says another class than the label."""
        return self.confidence is not None and self.label is not None and self.label != self.prediction


@dataclass(frozen=True)
class Influential:
    """A training example that pushed a test example.

    Attributes:
        example: what it says; its index is that in the training data set.
        score: the pair's score.
        share: the score as a part of all scores of its sign that the test example has; None where all are zero.
        terms: what each of the example's words adds to the score, in their order; empty for methods without words,
            and where the trace is gone.
    """

    example: Example
    score: float
    share: float | None
    terms: tuple[float, ...] = ()

    def strongest_words(self, k: int = 5) -> list[tuple[str, float]]:
        """The words that add most to the score or take most from it, and their terms; repeated words added up."""
        terms: dict[str, float] = defaultdict(float)
        for word, term in zip(self.example.words, self.terms, strict=False):
            if term:
                terms[word.text] += term
        return sorted(terms.items(), key=lambda word: -abs(word[1]))[:k]


@dataclass(frozen=True)
class Explanation:
    """A test example, and who pushed it.

    Attributes:
        row: its row of the scores.
        test: what it says; its index is that in the test data set.
        terms: for each of its words, the sum of its terms over the proponents that are listed; empty as theirs are.
        proponents: strongest first.
        opponents: strongest (most negative) first.
    """

    row: int
    test: Example
    terms: tuple[float, ...]
    proponents: tuple[Influential, ...]
    opponents: tuple[Influential, ...]


@dataclass(frozen=True)
class Word:
    """A word of an example.

    Attributes:
        text: what to print.
        before: what stands between the word before and this one.
        places: of its tokens among the example's.
        special: whether it is a token that the tokenizer has added, such as [CLS].
    """

    text: str
    before: str
    places: tuple[int, ...]
    special: bool = False
