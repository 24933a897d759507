"""Which token ids a method leaves out that names them by word, or as special or common ones, in one trace."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from lightning_tracin.results.words import is_special, marks_of, word_of_token
from lightning_tracin.scoring.excluded_tokens import COMMON, SPECIAL, ExcludedTokens
from lightning_tracin.scoring.methods import Method, TracInSum, TracInWE
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.common_tokens import common_tokens
from lightning_tracin.storage.trace import Trace


def with_ids_of(method: Method, trace: Trace, checkpoints: Sequence[Checkpoint], tokenizer: Any = None) -> Method:
    """The same method, with the token ids that its ``exclude_tokens`` stand for in a trace whose texts are stored.

    Args:
        method: may name tokens by word, "special" or "common"; then ids of an earlier lookup do not count.
        trace: has the vocabulary and the texts.
        checkpoints: those that count.
        tokenizer: of the module, if it has one: tells its special tokens, and the pieces of a word.

    Raises:
        ValueError: if the vocabulary has no words, or not one that is named.
    """
    if isinstance(method, TracInRidge):
        return replace(method, method=with_ids_of(method.method, trace, checkpoints, tokenizer))  # type: ignore[arg-type]
    if isinstance(method, TracInSum):
        return replace(method, parts=[with_ids_of(part, trace, checkpoints, tokenizer) for part in method.parts])  # type: ignore[misc]
    if not isinstance(method, TracInWE) or not method.excluded.words:
        return method
    named = set(method.excluded.words)
    ids: set[int] = set()
    if COMMON in named:
        ids.update(common_tokens(trace, checkpoints).tolist())
    if named != {COMMON}:
        vocabulary = _words_of(trace, method)
        if SPECIAL in named:
            ids.update(token for token, word in vocabulary.items() if is_special(word))
            ids.update(getattr(tokenizer, "all_special_ids", ()))
        ids |= _ids_of_words(named - {SPECIAL, COMMON}, vocabulary, tokenizer)
    return replace(method, exclude_tokens=ExcludedTokens(method.excluded, ids))


def require_words(method: Method, tokenizer: Any) -> None:
    """Check, before there is a trace, that the words that a method leaves out can be looked up in it.

    Args:
        method: what will score.
        tokenizer: what will say the words of token ids; None if only the ids will be known.

    Raises:
        ValueError: if there is no tokenizer, or not one of the words.
    """
    parts = [summand.method for summand in method.summands]
    named = {word for part in parts if isinstance(part, TracInWE) for word in part.excluded.words} - {COMMON}
    if not named:
        return
    if tokenizer is None:
        raise ValueError(
            f"exclude_tokens names {sorted(named)}, but neither the module nor its "
            "datamodule has a tokenizer. Name it self.tokenizer, override influence_words, or pass token ids."
        )
    if hasattr(tokenizer, "get_vocab"):
        vocabulary = {token: called for called, token in tokenizer.get_vocab().items()}
        _ids_of_words(named - {SPECIAL}, vocabulary, tokenizer)


def _words_of(trace: Trace, method: TracInWE) -> Mapping[int, str]:
    """The tokens of the training set, by id.

    Raises:
        ValueError: if only the ids are known.
    """
    vocabulary = trace.vocabulary
    if all(word == str(token) for token, word in vocabulary.items()):
        raise ValueError(
            f"exclude_tokens={method.exclude_tokens} names tokens by what they say, but the trace in {trace.path} has "
            "only their ids: the module and its datamodule had no tokenizer. Pass token ids, or fit again with "
            'self.tokenizer, or with influence_words; "common" needs neither.'
        )
    return vocabulary


def _ids_of_words(words: Collection[str], vocabulary: Mapping[int, str], tokenizer: Any) -> set[int]:
    """The ids of every token that prints as one of the words, or is called so in the vocabulary."""
    marks = marks_of(vocabulary.values())
    ids: dict[str, set[int]] = {word: set() for word in words}
    for token, called in vocabulary.items():
        for name in {called, word_of_token(called, marks)} & ids.keys():
            ids[name].add(token)
    for word in sorted(word for word, found in ids.items() if not found):
        _require_token(word, vocabulary, tokenizer)
    return set().union(*ids.values())


def _require_token(word: str, vocabulary: Mapping[int, str], tokenizer: Any) -> None:
    """Check that a word that no training example holds is a token all the same.

    Raises:
        ValueError: if it is none; the message names its pieces, or words that are written like it.
    """
    if hasattr(tokenizer, "get_vocab") and word in tokenizer.get_vocab():
        return
    pieces = tokenizer.tokenize(word) if hasattr(tokenizer, "tokenize") else []
    if len(pieces) > 1:
        raise ValueError(
            f"exclude_tokens names {word!r}, which is not one token but {len(pieces)}: {', '.join(map(repr, pieces))}. "
            "Name those of them that are to be left out, wherever they stand."
        )
    marks = marks_of(vocabulary.values())
    near = get_close_matches(word, {word_of_token(called, marks) for called in vocabulary.values()})
    advice = f"Near it are: {', '.join(map(repr, near))}." if near else "See trace.vocabulary."
    raise ValueError(f"exclude_tokens names {word!r}, but no token of the training set prints so. {advice}")
