"""What is missing from a result or from its page, why, and what would bring it, each in a sentence or two."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from lightning_tracin.gradients.printable import enumerated
from lightning_tracin.report.explanation import Explanation
from lightning_tracin.results.evidence import Evidence
from lightning_tracin.scoring.methods import Method, word_part
from lightning_tracin.scoring.naming import described
from lightning_tracin.scoring.terms import sites_of, stored_site
from lightning_tracin.storage.checkpoint import undrawn

#: Where stop words have more than this share of the weight of the words that are listed, it is said.
_MUCH = 1 / 3


def notes_of_result(
    method: Method, words_of_ids: Mapping[int, str], *, has_evidence: bool, k_held: int | None
) -> list[str]:
    """What cannot be shown of a result.

    Args:
        method: what the scores are.
        words_of_ids: what is printed for token ids.
        has_evidence: whether the trace that the scores were computed from is at hand.
        k_held: of how many proponents and opponents of each test example the result holds texts, labels and words by
            itself; None for none.
    """
    notes = []
    if not has_evidence and k_held is not None:
        notes.append(
            f"Shown without the trace: texts, labels and words are those of the {k_held} strongest of each side, which "
            "the file of the result holds. Load it where its trace is for more, or save it with a larger k."
        )
    if not has_evidence and k_held is None:
        notes.append(
            "The trace of these scores is not at hand, or another fit took its place: training examples are shown "
            "by their index alone. Load the result where its trace is for their texts, labels and words."
        )
    if word_part(method) is None:
        notes.append(f'{described(method)} does not tell words; method="tracin-we" does.')
    if words_of_ids and _are_ids(words_of_ids):
        notes.append(
            "Token ids are shown for words: there is no tokenizer on the module or its datamodule. Name it "
            "self.tokenizer, or override influence_words."
        )
    return notes


def notes_of_trace(evidence: Evidence) -> list[str]:
    """What the scores lack because it could not be recorded."""
    notes = []
    trace = evidence.trace
    if trace.header.candidates:
        notes.append(
            "The scored examples are candidates, not trained on: a score tells what a step on one would have done for "
            "the test example."
        )
    words = word_part(evidence.method)
    n_words = None if words is None else stored_site(words, evidence.checkpoints[0].sites).top_words
    if words is not None and n_words is not None and (words.excluded or words.precondition is not None):
        does = "leaves words out" if words.excluded else "preconditions gradients"
        notes.append(
            f"The trace keeps the {n_words} words of largest gradient norm of each training example (top_words of "
            f"TracInCallback), chosen before {described(words)} {does}: words that would have come in their place are "
            "missing from the scores."
        )
    notes += trace.header.notes
    n_undrawn = len(undrawn(evidence.checkpoints))
    if n_undrawn and len(evidence.checkpoints) < len(trace.checkpoint_folders):
        notes.append(
            f"No batch held {n_undrawn:,} of the {trace.n_train:,} examples in the training data set in the steps that "
            "led to the checkpoints that count here. They are left out."
        )
    elif n_undrawn:
        notes.append(
            f"{n_undrawn:,} of the {trace.n_train:,} examples in the training data set are no training examples: no "
            "batch has held them. They are left out."
        )
    if trace.incomplete is not None:
        notes.append(f"The trace is incomplete. {trace.incomplete} Scores lack what came later.")
    counts: Counter[int] = Counter()
    for checkpoint in evidence.checkpoints:
        sites = sites_of(evidence.method, checkpoint.sites)
        counts.update({example for site in sites for example in checkpoint.gradients(site).not_finite})
    if counts:
        n_checkpoints = len(evidence.checkpoints)
        named = [f"{example} (at {n} of {n_checkpoints} checkpoints)" for example, n in counts.most_common()]
        notes.append(f"Training examples without a finite gradient count zero: {enumerated(named, 10)}.")
    return notes


def notes_of_words(
    evidence: Evidence, explanations: Sequence[Explanation], words_of_ids: Mapping[int, str]
) -> list[str]:
    """That words which say little hide the others, and which setting shows more; or that no words are left.

    Args:
        evidence: what the scores were computed from.
        explanations: those whose words are weighed, each by the magnitude of its term.
        words_of_ids: what is printed for token ids.
    """
    part = word_part(evidence.method)
    words = [word for of in explanations for pushed in (*of.proponents, *of.opponents) for word in pushed.named_terms]
    if part is not None and part.excluded and explanations and not words:
        return [
            "The first test examples share no words with any training example but those that "
            f"exclude_tokens={part.exclude_tokens} leaves out, so that no word adds to a score: leave out fewer."
        ]
    weight = sum(abs(word.term) for word in words)
    of_stops = sum(abs(word.term) for word in words if word.is_stop)
    if part is None or of_stops <= _MUCH * weight:
        return []
    named = ["common"] if _are_ids(words_of_ids) else ["special", "common"]
    setting = f'TracInWE(normalize="cosine", exclude_tokens={json.dumps(named)})'
    return [
        f"{of_stops / weight:.0%} of what words add to the first scores, or take from them, is of special tokens and "
        "tokens that more than a tenth of the training examples hold; they are grey, and listed last. "
        f"method={setting} leaves them out."
    ]


def notes_of_page(*, has_test_texts: bool, has_raw_texts: bool, has_predictions: bool, n_kept: int | None) -> list[str]:
    """What a page could show besides.

    Args:
        has_test_texts: whether anything is known of the texts of the test examples.
        has_raw_texts: whether the texts were given as they were written.
        has_predictions: whether it is known what the model says of the test examples.
        n_kept: how many proponents and opponents were kept, where more were asked for.
    """
    notes = []
    if not has_test_texts:
        notes.append(
            "The words of the test examples were not kept, for this method does not need them: "
            "result.with_texts(test=...) brings their texts."
        )
    if not has_predictions:
        notes.append(
            "What the model says of the test examples is not known: it is seen where the loss comes from one linear "
            "layer, or where the module returns an object with logits, one prediction for each example."
        )
    if n_kept is not None:
        notes.append(f"Only the {n_kept} strongest were kept: call influence with a larger k to list more.")
    if not has_raw_texts:
        notes.append(
            "Texts are put together from tokens: result.with_texts(train=..., test=...) brings them as they were "
            "written."
        )
    return notes


def _are_ids(words_of_ids: Mapping[int, str]) -> bool:
    """Whether only the ids of tokens are known, and not what they say."""
    return all(word == str(token) for token, word in words_of_ids.items())
