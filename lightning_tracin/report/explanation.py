"""What people read of a result: a test example in words, and the training examples that pushed it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


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
        marks: of its token ids, see :class:`~lightning_tracin.gradients.texts.Texts`; empty where nothing is marked.
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
    marks: tuple[int, ...] = ()

    @cached_property
    def text(self) -> str:
        """The words as one text, without what the tokenizer added; without words, the text as it was given."""
        if not self.words:
            return self.unread.strip()
        text, border = "", ""
        for word in self.words:
            if word.special and not word.is_unknown:
                border = border or word.before.strip()  # between two texts, of which the second begins with it
            else:
                text += f" {border} {word.text}" if border else word.before + word.text
                border = ""
        return text.strip()

    @property
    def explained(self) -> str | None:
        """What to print for what of it is explained, as far as that is known."""
        return self.label if self.target is None else self.target

    @property
    def is_mistaken(self) -> bool:
        """Whether the model says another class than the label."""
        return self.confidence is not None and self.label is not None and self.label != self.prediction


class NamedTerm(NamedTuple):
    """What a word, or the part of it that both examples share, adds to a score.

    Attributes:
        name: the word, or its part.
        term: what it adds.
        is_stop: whether it is but a special token, or one that many training examples hold.
    """

    name: str
    term: float
    is_stop: bool


@dataclass(frozen=True)
class Influential:
    """A training example that pushed a test example.

    Attributes:
        example: what it says; its index is that in the training data set.
        score: the pair's score.
        share: the score, with those of its equal texts, as a part of all scores of its sign that the test example has;
            None where all are zero.
        terms: what each of the example's words adds to the score, in their order; empty for methods without words,
            and where the trace is gone.
        parts: what to call each of them: the word, or the part of it that the test example shares, as in "£…"; empty
            where each is called by its word.
        stops: whether each shares stop words alone: special tokens, and those that many training examples hold; empty
            where its word tells.
        equal: the indices of other training examples with the same text and label that push as strongly to the same
            side. They are not listed by themselves.
    """

    example: Example
    score: float
    share: float | None
    terms: tuple[float, ...] = ()
    parts: tuple[str, ...] = ()
    stops: tuple[bool, ...] = ()
    equal: tuple[int, ...] = ()

    @property
    def named_terms(self) -> list[NamedTerm]:
        """Each word that adds to the score or takes from it, in their order."""
        words = self.example.words
        parts = self.parts or [word.text for word in words]
        stops = self.stops or [word.is_stop for word in words]
        return [NamedTerm(*each) for each in zip(parts, self.terms, stops, strict=False) if each[1]]

    def listed_words(self, k: int = 5, *, stops_last: bool = True) -> list[NamedTerm]:
        """The words that add most to the score or take most from it; those that are called alike are added up.

        Args:
            k: how many.
            stops_last: whether special tokens and those that many training examples hold come after all others.
        """
        terms: dict[str, NamedTerm] = {}
        for name, term, is_stop in self.named_terms:
            known = terms.get(name, NamedTerm(name, 0.0, True))
            terms[name] = NamedTerm(name, known.term + term, known.is_stop and is_stop)
        return sorted(terms.values(), key=lambda word: (stops_last and word.is_stop, -abs(word.term)))[:k]

    def strongest_words(self, k: int = 5, *, stops_last: bool = True) -> list[tuple[str, float]]:
        """The words of :meth:`listed_words` and their terms."""
        return [(word.name, word.term) for word in self.listed_words(k, stops_last=stops_last)]


@dataclass(frozen=True)
class Explanation:
    """A test example, and who pushed it.

    Attributes:
        row: its row of the scores.
        test: what it says; its index is that in the test data set.
        terms: for each of its words, the sum of its terms over the proponents that are listed; empty as theirs are.
        proponents: those of positive score, strongest first.
        opponents: those of negative score, strongest (most negative) first.
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
        pieces: what each of its tokens says; empty where that is not known.
        is_common: whether many training examples hold each of its tokens.
        is_prompt: whether it is of a prompt, whose tokens have no label, before a completion, whose tokens have.
        tag: what to print for the label of its first token that has one, where labels are of tokens.
    """

    text: str
    before: str
    places: tuple[int, ...]
    special: bool = False
    pieces: tuple[str, ...] = ()
    is_common: bool = False
    is_prompt: bool = False
    tag: str | None = None

    @property
    def is_unknown(self) -> bool:
        """Whether it is the token for what the vocabulary lacks, which stands for a word of the text."""
        return self.text.strip("[]<>").lower() == "unk"

    @property
    def is_stop(self) -> bool:
        """Whether it is a stop word: a special token, or a common one."""
        return self.special or self.is_common
