"""ExcludedTokens: what a method leaves out, as it was asked for, and the token ids that this stands for in a trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_tracin.checked_numbers import LARGEST, index_of

#: Names for many tokens at once; all other strings are words.
SPECIAL, COMMON = "special", "common"

_PRINTED_WORDS, _PRINTED_IDS = 12, 4  # So many are printed; of more, their number.


class ExcludedTokens(tuple[int | str, ...]):
    """Token ids, words, "special" and "common", in the order in which they were asked for.

    Args:
        asked: what to leave out; one string stands for itself.
        ids: all token ids that this stands for, in one trace; not needed where it is ids alone.

    Attributes:
        ids: the token ids, ascending; None where they are yet to be looked up in a trace.

    Raises:
        ValueError: if it is neither ids nor strings.

    Example:
        >>> ExcludedTokens(["special", "the", 7]), ExcludedTokens(range(300)).described()
        (('special', 'the', 7), '300 tokens')
    """

    ids: tuple[int, ...] | None

    def __new__(cls, asked: Any, ids: Iterable[int] | None = None) -> ExcludedTokens:
        """Check what is asked for."""
        try:
            several = [asked] if isinstance(asked, str) else list(asked)
        except TypeError as error:
            raise _refusal(asked) from error
        tokens = [token for each in several if (token := each if isinstance(each, str) else index_of(each)) is not None]
        numbers = [token for token in tokens if isinstance(token, int)]
        found = numbers if len(numbers) == len(tokens) else ids
        is_too_large = any(abs(token) >= LARGEST for token in (*numbers, *(found or ())))
        if len(tokens) < len(several) or is_too_large or "" in tokens:
            raise _refusal(asked)
        excluded = super().__new__(cls, tokens)
        excluded.ids = None if found is None else tuple(sorted({*found, *numbers}))
        return excluded

    def __repr__(self) -> str:
        n_words, n_ids = len(self.words), len(self._numbers)
        if n_words <= _PRINTED_WORDS and n_ids <= _PRINTED_IDS:
            return super().__repr__()
        words = map(repr, self.words) if n_words <= _PRINTED_WORDS else [f"<{n_words} words>"]
        return f"({', '.join([*words, *([f'<{n_ids} token ids>'] if n_ids else [])])})"

    @property
    def words(self) -> tuple[str, ...]:
        """The words that were asked for, with "special" and "common"."""
        return tuple(each for each in self if isinstance(each, str))

    def described(self) -> str:
        """What is left out, in a few words."""
        named = [f"{name} tokens" for name in (SPECIAL, COMMON) if name in self]
        n_words, n_ids = len(set(self.words) - {SPECIAL, COMMON}), len(self._numbers)
        counts = [f"{n} {name}{'s' * (n > 1)}" for n, name in ((n_words, "word"), (n_ids, "token")) if n]
        return " and ".join([*named, *counts])

    @property
    def _numbers(self) -> list[int]:
        return [each for each in self if isinstance(each, int)]


def _refusal(asked: Any) -> ValueError:
    return ValueError(
        'exclude_tokens must be token ids, such as tokenizer.all_special_ids, words, "special" or "common", but got '
        f"{asked!r}."
    )
