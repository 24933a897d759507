"""Reader: from token ids, labels and predictions to what people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_tracin.gradients.texts import IN_SECOND, NO_LABEL
from lightning_tracin.report.explanation import Example, Word
from lightning_tracin.results.marked_words import BETWEEN, marked
from lightning_tracin.results.words import Marks, is_special, marks_of, shared_part, spans_of, words_in, words_of

#: The raw text of an example, or of its two parts.
RawText: TypeAlias = str | tuple[str, str]


def require_texts(name: str, texts: Sequence[RawText], needed: int) -> None:
    """Check that there are as many raw texts as there are examples, and that the first one is a text.

    Raises:
        TypeError: if it is neither a text nor a pair of texts.
        ValueError: if there are fewer.
    """
    if len(texts) < needed:
        raise ValueError(f"{name} must have a text for each of {needed} examples, but has {len(texts)}.")
    if needed and not isinstance(texts[0], (str, Sequence)):
        raise TypeError(
            f"{name} must have a text, or a pair of texts, for each example, but its first is a "
            f"{type(texts[0]).__name__}. Of rows, pass the column: [row['text'] for row in rows]."
        )


@dataclass(frozen=True)
class Reader:
    """Knows what to print for token ids and labels.

    Attributes:
        words_of_ids: what to print for each token id.
        label_names: what to print for each label.
        tokenizer: the fast tokenizer that made the ids, where raw texts are to be read with it.
        common: the ids of tokens that many training examples hold.
    """

    words_of_ids: Mapping[int, str]
    label_names: Mapping[int, str]
    tokenizer: Any = None
    common: frozenset[int] = frozenset()

    def example(
        self,
        index: int,
        ids: Sequence[int],
        label: float | None,
        raw_texts: Sequence[RawText] | None,
        *,
        marks: Sequence[int] = (),
        label_set: Sequence[int] | None = None,
        prediction: float | None = None,
        confidence: float | None = None,
    ) -> Example:
        """An example in words.

        Args:
            index: its index in its data set.
            ids: its token ids.
            label: its label, if it has one.
            raw_texts: the raw text of each example of its data set, if they are at hand.
            marks: of its token ids, see :class:`~lightning_tracin.gradients.texts.Texts`; none where nothing is marked.
            label_set: its labels, if it has a set of them.
            prediction: what the model says of it, if that is known.
            confidence: the probability that the model gives to that.
        """
        words, unread = self.words(ids, marks), ""
        if raw_texts is not None:
            words, unread = self._words_of_raw_text(raw_texts[index], index, ids, words)
        words = marked(words, ids, marks, self.label_names)
        named = self.label(label) if label_set is None else self.label_set(label_set)
        said = self.label(prediction)
        kept = () if set(marks) <= {NO_LABEL} else tuple(marks)
        return Example(index, tuple(words), named, said, confidence, unread, tuple(ids), marks=kept)

    def respelled(self, example: Example, raw_text: RawText) -> Example:
        """An example as a raw text spells it."""
        words, unread = self._words_of_raw_text(raw_text, example.index, example.ids, list(example.words))
        both = zip(example.words, words, strict=True)
        kept = (replace(new, before=BETWEEN) if old.before == BETWEEN else new for old, new in both)
        return replace(example, words=tuple(kept), unread=unread)

    def words(self, ids: Sequence[int], marks: Sequence[int] = ()) -> list[Word]:
        """The words that an example's tokens are joined into, none across the border of two texts."""
        border = marks.index(IN_SECOND) if IN_SECOND in marks else 0
        tokens = [self.token(token) for token in ids]
        words = words_of(tokens[:border], self._marks)
        for word in words_of(tokens[border:], self._marks):
            words.append(replace(word, places=tuple(place + border for place in word.places)))
        if not self.common:
            return words
        return [replace(word, is_common=all(ids[place] in self.common for place in word.places)) for word in words]

    def parts(self, example: Example, terms: Mapping[int, float]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
        """What to call the words of an example that shares some of its tokens with another, and which say little.

        Args:
            example: the example.
            terms: of the token ids that it shares.

        Returns:
            For each word its name, and whether it shares special and common tokens alone.
        """
        parts: list[str] = []
        stops: list[bool] = []
        for word in example.words:
            tokens = [example.ids[place] for place in word.places]
            shared = [token in terms for token in tokens]
            special = word.special or all(is_special(self.token(token)) for token in tokens)  # [UNK] for any emoji
            parts.append("".join(map(self.token, tokens)) if special else shared_part(word, shared))
            stops.append(special or self.common.issuperset(token for token in tokens if token in terms))
        return tuple(parts), tuple(stops)

    def token(self, token: int) -> str:
        """What to print for a token id: the id itself where nothing else is known."""
        return self.words_of_ids.get(token, str(token))

    def label(self, value: float | None) -> str | None:
        """What to print for a label or a prediction."""
        if value is None:
            return None
        return self.label_names.get(int(value), str(int(value))) if value.is_integer() else f"{value:.6g}"

    def label_set(self, numbers: Sequence[int]) -> str:
        """What to print for a set of labels."""
        return ", ".join(str(self.label(float(number))) for number in numbers) or "none"

    def _words_of_raw_text(
        self, raw_text: RawText, index: int, ids: Sequence[int], words: list[Word]
    ) -> tuple[list[Word], str]:
        """The same words as the raw text spells them, and what the text goes on with after the last of them."""
        found = spans_of(self.tokenizer, raw_text, ids)
        if found is None:
            rank_zero_warn(
                f"The text given for example {index} is not what its token ids were made of: tokens are shown. Texts "
                "must be in the order of the data set."
            )
            return words, ""
        text, spans = found
        end = max((span[1] for span in spans if span is not None), default=0)
        return words_in(text, spans, words), text[end:]

    @cached_property
    def _marks(self) -> Marks:
        """The marks of the whole vocabulary, which one example alone may not show."""
        return marks_of(self.words_of_ids.values())
