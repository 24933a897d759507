"""Words as people see them: the tokens of any tokenizer joined into words, and what stands between them.

A token carries its tokenizer's marks: ``##ing`` goes on with a word (WordPiece), ``Ġthe`` and ``▁the`` begin one after
a space (byte-level BPE, SentencePiece), ``the</w>`` ends one, ``th@@`` does not (BPE). Which marks a vocabulary uses is
read off its tokens. Where the raw text is at hand and the tokenizer tells offsets, words are cut out of it instead.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, TypeAlias

from lightning_tracin.report.explanation import Word

#: How the tokens of a vocabulary are to be joined; None: each is a word.
Marks: TypeAlias = Literal["##", "Ġ", "▁", "</w>", "@@", "characters"] | None

#: Where a token stands in the raw text, from the first character to one past the last; None: nowhere.
Span: TypeAlias = tuple[int, int] | None

_AFTER: tuple[Literal["</w>", "@@"], ...] = ("</w>", "@@")

_SPECIAL = re.compile(r"\[[A-Z][A-Z0-9_]*\]|<(?!0x)/?[|\w][^<>\s]*>")

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

_UNSPACED = (  # These ranges of characters are the scripts that put no space between words.
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3000, 0x30FF),  # Japanese syllables, and the punctuation of Chinese and Japanese
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF00, 0xFFEF),
    (0x20000, 0x323AF),
)

_CLOSING, _OPENING = frozenset(".,;:!?%)]}…"), frozenset("([{$£€#")


def marks_of(tokens: Iterable[str]) -> Marks:
    """The marks that a vocabulary uses, as far as its tokens tell; special tokens do not count.

    Example:
        >>> marks_of(["the", "cat", "##s"]), marks_of(["Ġthe", "Ġcat", "s"]), marks_of(["the", "cat"])
        ('##', 'Ġ', None)
    """
    plain = [token for token in tokens if token and not is_special(token)]
    if any("▁" in token for token in plain):
        return "▁"
    if any(token.startswith("Ġ") and token != "Ġ" for token in plain) or _is_byte_level(plain):
        return "Ġ"
    if any(token.startswith("##") and token != "##" for token in plain):
        return "##"
    for ending in _AFTER:
        if any(token.endswith(ending) and token != ending for token in plain):
            return ending
    if plain and all(len(token) == 1 for token in plain) and any(token.isspace() for token in plain):
        return "characters"
    return None


def is_special(token: str) -> bool:
    """Whether a token looks like one that no text contains: [CLS], <s>, <|endoftext|>, but not the byte <0x0A>."""
    return bool(_SPECIAL.fullmatch(token))


def word_of_token(token: str, marks: Marks) -> str:
    """The word that a token prints as by itself; a piece that the marks bind to another stays as it is called.

    Example:
        >>> [word_of_token(token, "Ġ") for token in ("Ġthe", "the")], word_of_token("##ing", "##")
        (['the', 'the'], '##ing')
    """
    is_piece = (marks == "##" and token.startswith("##")) or (marks == "@@" and token.endswith("@@"))
    return token if is_piece or is_special(token) else _read(token, marks)[1].decode(errors="replace")


def words_of(tokens: Sequence[str], marks: Marks) -> list[Word]:
    """Join an example's tokens into words.

    A word ends where the marks say so, where letters and punctuation meet, and between the signs of scripts without
    spaces. Every token belongs to one word.

    Args:
        tokens: in reading order, as the tokenizer calls them.
        marks: of their vocabulary.

    Example:
        >>> [word.text for word in words_of(["[CLS]", "tar", "##iff", "##s", ",", "2"], "##")]
        ['[CLS]', 'tariffs', ',', '2']
    """
    words: list[_Growing] = []
    open_word = False  # This says whether the next token may go on with the last word.
    for place, token in enumerate(tokens):
        if is_special(token):
            words.append(_Growing(" ", special=True).with_token(token.encode(), place))
            open_word = False
            continue
        spaced, content, open_after = _read(token, marks)
        if marks is not None and content.isspace():  # A token of spaces alone belongs to the word that follows.
            if not words or words[-1].content:
                words.append(_Growing(" "))
            words[-1].with_token(b"", place)
            open_word = True
            continue
        last = words[-1] if words else None
        if last is not None and open_word and (not last.content or (not spaced and _goes_on(last, content, marks))):
            last.with_token(content, place)
        else:
            words.append(_Growing(" " if spaced or not open_word else "").with_token(content, place))
        open_word = open_after
    if len(words) > 1 and not words[-1].content and not words[-2].special:  # The text ends with spaces.
        for place in words.pop().places:
            words[-1].with_token(b"", place)
    return _tidied([each.finished() for each in words], spell=marks == "##")


def words_in(raw: str, spans: Sequence[Span], words: Sequence[Word]) -> list[Word]:
    """The same words, as they stand in the raw text: with its own case, spelling and spaces.

    Args:
        raw: the text.
        spans: (number of tokens) where each token stands.
        words: what :func:`words_of` made of the tokens.
    """
    found: list[Word] = []
    end = 0
    for word in words:
        places = [span for place in word.places if (span := spans[place]) is not None and span[0] < span[1]]
        if not places:
            found.append(replace(word, before=" " if found and word.special else ""))
            continue
        start, stop = max(end, min(span[0] for span in places)), max(span[1] for span in places)
        text = raw[start:stop]
        before = raw[end:start] + text[: len(text) - len(text.lstrip())]
        if not before and found and found[-1].special:
            before = " "
        own = [spans[place] for place in word.places]
        pieces = [raw[slice(*span)].strip() if span else piece for span, piece in zip(own, word.pieces, strict=True)]
        written = text.lstrip() or word.text
        found.append(replace(word, text=written, before=before, pieces=tuple(pieces), special=False))
        end = max(end, stop)
    return found


def spans_of(tokenizer: Any, text: str | tuple[str, str], ids: Sequence[int]) -> tuple[str, list[Span]] | None:
    """Where an example's tokens stand in its raw text, which may have been cut off at either end.

    Args:
        tokenizer: a fast tokenizer of transformers, the one that made the ids.
        text: the raw text, or a pair of texts.
        ids: the example's token ids.

    Returns:
        The text (of a pair, both with a line break between them) and a span for each token; None if the tokenizer
        tells no offsets, or if the ids are not of this text.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    parts = [text] if isinstance(text, str) else list(text)
    special = set(tokenizer.all_special_ids)
    spans: list[Span] = [None] * len(ids)
    start = shift = 0
    for number, part in enumerate(parts):
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        own, offsets = encoded["input_ids"], encoded["offset_mapping"]
        last = number == len(parts) - 1
        places = _run_of(ids, special - set(own), start, last=last)  # such as [UNK] may stand in a text, too
        after = [ids[place] in special for place in places[len(own) :]]
        if all(after) or not last:
            places = places[: len(own)]
        held = [ids[place] for place in places]
        first = 0 if own[: len(held)] == held else len(own) - len(held)
        if first < 0 or own[first : first + len(held)] != held:
            return None
        for place, (begin, end) in zip(places, offsets[first:], strict=False):
            spans[place] = (begin + shift, end + shift)
        start = places[-1] + 1 if places else start
        shift += len(part) + 1
    return "\n".join(parts), spans


def shared_part(word: Word, is_shared: Sequence[bool]) -> str:
    """What to call a word of which only some tokens are shared with another example: the rest becomes "…".

    Args:
        word: the word.
        is_shared: for each of its tokens.

    Example:
        >>> shared_part(Word("£900", " ", (3, 4), pieces=("£", "900")), (True, False))
        '£…'
    """
    if all(is_shared) or not any(is_shared) or not word.pieces:
        return word.text
    parts = [piece if shared else "…" for piece, shared in zip(word.pieces, is_shared, strict=True)]
    name = "".join(part for place, part in enumerate(parts) if part != "…" or parts[place - 1 : place] != ["…"])
    return name if name.strip("…") else f"␣{word.text}"  # it shares the space before it alone


def shares_of_words(words: Sequence[Word], ids: Sequence[int], terms: Mapping[int, float]) -> list[float]:
    """Each word's part of the terms of an example's token ids; over all words they add up to all terms.

    The term of a token that occurs more than once in the example is divided equally among its occurrences.

    Args:
        words: the example's words.
        ids: the example's token ids.
        terms: of token ids that the example holds.
    """
    counts: dict[int, int] = {}
    for token in ids:
        counts[token] = counts.get(token, 0) + 1
    return [sum(terms.get(ids[place], 0.0) / counts[ids[place]] for place in word.places) for word in words]


@dataclass
class _Growing:
    """A word to which tokens are added, in bytes: a token may hold half a character."""

    before: str
    special: bool = False
    content: bytes = b""
    places: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def with_token(self, content: bytes, place: int) -> _Growing:
        """Itself, longer by a token."""
        self.content += content
        self.places.append(place)
        self.pieces.append(content.decode(errors="replace"))
        return self

    def finished(self) -> Word:
        text = self.content.decode(errors="replace")
        return Word(text, self.before, tuple(self.places), self.special, tuple(self.pieces))


def _read(token: str, marks: Marks) -> tuple[bool, bytes, bool]:
    """Whether a token begins after a space, what it says, and whether the next one may go on with its word."""
    byte = _BYTE.fullmatch(token)
    if byte:
        return False, bytes([int(byte[1], 16)]), True
    if marks == "##":
        goes_on = token.startswith("##") and len(token) > 2
        return not goes_on, token.removeprefix("##").encode() if goes_on else token.encode(), True
    if marks == "Ġ":
        content = bytes(code for sign in token for code in _bytes_of(sign))
        return content[:1].isspace(), content.strip() or content, not content[-1:].isspace()
    if marks == "▁":
        content = token.replace("▁", " ").encode()
        return content[:1].isspace(), content.strip() or content, True
    if marks == "</w>":
        return False, token.removesuffix("</w>").encode(), not token.endswith("</w>")
    if marks == "@@":
        goes_on = token.endswith("@@") and len(token) > 2
        return False, token.removesuffix("@@").encode() if goes_on else token.encode(), goes_on
    return False, token.encode(), marks == "characters"


def _goes_on(word: _Growing, content: bytes, marks: Marks) -> bool:
    """Whether what follows a word without a space belongs to it."""
    before, after = word.content.decode(errors="replace")[-1], content.decode(errors="replace")[:1]
    if not after or "�" in (before, after):  # A token ended in the middle of a character.
        return True
    if unicodedata.category(after).startswith("M"):  # An accent belongs to the letter before it.
        return True
    if is_unspaced(before) or is_unspaced(after):
        return False
    return marks == "##" or _of_word(before) == _of_word(after)


def _tidied(words: list[Word], *, spell: bool) -> list[Word]:
    """Words without the spaces that nobody writes: at the beginning, inside unspaced scripts, before a full stop.

    Args:
        words: of one example.
        spell: whether the tokenizer has lost which of them had a space before.
    """
    tidied: list[Word] = []
    for word in words:
        last = tidied[-1] if tidied else None
        before = word.before if last is not None else ""
        if last is not None and not last.special and not word.special and last.text and word.text:
            unspaced = is_unspaced(last.text[-1]) and is_unspaced(word.text[0])
            punctuated = word.text in _CLOSING or last.text in _OPENING or "'" in (word.text, last.text)
            before = "" if unspaced or (spell and punctuated) else before
        tidied.append(replace(word, before=before))
    return tidied


def _run_of(ids: Sequence[int], special: set[int], start: int, *, last: bool) -> list[int]:
    """The places of the tokens of one text: those between special ones; of the last text, all that are left."""
    places: list[int] = []
    for place in range(start, len(ids)):
        if ids[place] not in special:
            places.append(place)
        elif places and not last:
            break
    return places


def is_unspaced(sign: str) -> bool:
    """Whether a character belongs to a script that puts no space between words."""
    return any(first <= ord(sign) <= last for first, last in _UNSPACED)


def _of_word(sign: str) -> bool:
    return sign.isalnum() or sign in "_'’-"


def _is_byte_level(tokens: Sequence[str]) -> bool:
    """Whether tokens without a space are written in the signs that byte-level BPE has for bytes, and make sense so."""
    signs = {sign for token in tokens for sign in token}
    codes = [_byte_signs().get(sign, 0) for sign in signs]
    return any(ord(sign) > 255 for sign in signs) and all(code >= 32 or code in (9, 10, 13) for code in codes)


@cache
def _bytes_of(sign: str) -> bytes:
    """What a character of a byte-level token stands for; other characters stand for themselves."""
    return bytes([code]) if (code := _byte_signs().get(sign)) is not None else sign.encode()


@cache
def _byte_signs() -> dict[str, int]:
    """The characters that byte-level BPE (GPT-2) writes bytes with: printable ones as they are, others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [code for code in range(256) if code not in printable]
    return {chr(code): code for code in printable} | {chr(256 + number): code for number, code in enumerate(others)}
