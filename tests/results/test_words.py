from __future__ import annotations

import random

import pytest
from spellings import KINDS, TEXTS, trained
from tokenizers import normalizers

from lightning_tracin.report.explanation import Example, Word
from lightning_tracin.results.words import is_special, marks_of, shares_of_words, spans_of, words_in, words_of


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    tokenizer = trained(request.param)
    tokenizer.kind = request.param
    return tokenizer


def read(tokenizer, text: str) -> tuple[list[int], list[Word]]:
    """A text's ids, and the words that they make, by the marks of the whole vocabulary."""
    ids = tokenizer(f"[CLS]{text}[SEP]")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return ids, words_of(tokens, marks_of(tokenizer.get_vocab()))


@pytest.mark.parametrize("text", TEXTS)
def test_the_words_of_a_text_are_the_text(tokenizer, text):
    ids, words = read(tokenizer, text)
    assert sorted(place for word in words for place in word.places) == list(range(len(ids)))
    assert [word.text for word in words if word.special] == ["[CLS]", "[SEP]"]
    raw, spans = spans_of(tokenizer, text, ids)
    assert raw == text
    joined = "".join(word.before + word.text for word in words_in(raw, spans, words) if not word.special)
    assert joined.strip() == text.strip()


def plain(text: str) -> str:
    """A text without what tokenizers lose: spaces, and with BERT's normalisation case and accents."""
    return "".join(normalizers.BertNormalizer(lowercase=True).normalize_str(text).split())


@pytest.mark.parametrize("text", TEXTS)
def test_without_the_raw_text_words_are_put_together_from_tokens(tokenizer, text):
    _, words = read(tokenizer, text)
    assert plain("".join(word.text for word in words if not word.special)) == plain(text)
    if tokenizer.kind == "whitespace":
        assert [word.text for word in words if not word.special] == text.split()


def test_words_are_whole_and_punctuation_stands_alone(tokenizer):
    _, words = read(tokenizer, TEXTS[0])
    texts = [word.text for word in words]
    wanted = {"whitespace": ["tariffs,", "(NYSE)", "3.5%"], "WordPiece": ["tariffs", ",", "reserve", "nyse", "("]}
    assert set(wanted.get(tokenizer.kind, ["tariffs", ",", "Federal", "NYSE", "("])) <= set(texts)


def test_scripts_without_spaces_are_cut_where_the_tokenizer_cuts(tokenizer):
    _, words = read(tokenizer, TEXTS[2])
    shown = [word for word in words if not word.special]
    assert len(shown) == 1 if tokenizer.kind == "whitespace" else len(shown) > 2
    assert all(word.before == "" for word in shown[1:])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_that_was_cut_off(tokenizer, side):
    ids = tokenizer(TEXTS[0])["input_ids"]
    kept = ids[:5] if side == "right" else ids[-5:]
    text, spans = spans_of(tokenizer, TEXTS[0], kept)
    whole = tokenizer(TEXTS[0], return_offsets_mapping=True)["offset_mapping"]
    assert spans == (whole[:5] if side == "right" else whole[-5:])
    assert text == TEXTS[0]


def test_a_pair_of_texts_of_which_the_first_was_cut_off():
    tokenizer = trained("WordPiece")
    first, second = (tokenizer(text)["input_ids"] for text in TEXTS[:2])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [cls, *first[:4], sep, *second, sep]
    text, spans = spans_of(tokenizer, (TEXTS[0], TEXTS[1]), ids)
    shown = words_in(text, spans, words_of(tokenizer.convert_ids_to_tokens(ids), "##"))
    assert [word.text for word in shown if not word.special][:4] == ["The", "Federal", "Reserve", "'"]
    assert [word.text for word in shown if not word.special][4:8] == ["Il", "a", "mangé", "à"]


def test_ids_of_another_text_have_no_spans():
    tokenizer = trained("WordPiece")
    assert spans_of(tokenizer, TEXTS[0], tokenizer(TEXTS[1])["input_ids"]) is None
    assert spans_of(object(), TEXTS[0], [1, 2]) is None


def test_marks_are_told_by_a_vocabulary_of_any_language():
    for kind, marks in zip(KINDS, ["##", "Ġ", "▁", "</w>", "characters", None], strict=True):
        assert marks_of(trained(kind).get_vocab()) == marks
    bpe = trained("byte-level BPE")
    assert marks_of(bpe.convert_ids_to_tokens(bpe(TEXTS[2])["input_ids"])) == "Ġ"  # Chinese, without any space
    assert marks_of(["ść", "był", "mówić", "ąę"]) is None  # Polish letters are among the signs of byte-level BPE
    assert marks_of(["fianc@@", "é"]) == "@@"
    assert marks_of([]) is None
    assert marks_of(["17", "4"]) is None


def test_other_marks():
    assert [word.text for word in words_of(["th@@", "e", "cat"], "@@")] == ["the", "cat"]
    assert [word.text for word in words_of(["▁", "<0xE4>", "<0xBD>", "<0xA0>", "b"], "▁")] == ["你", "b"]
    assert [word.text for word in words_of(["12", "7"], None)] == ["12", "7"]
    assert words_of([], "##") == []


@pytest.mark.parametrize("token", ["[CLS]", "<s>", "</s>", "<pad>", "<|endoftext|>", "<extra_id_0>", "[UNK]"])
def test_special_tokens(token):
    assert is_special(token)


@pytest.mark.parametrize("token", ["[", "[]", "a", "<", "<3", "< b>", "<0x0A>", "[1]", ""])
def test_tokens_that_are_not_special(token):
    assert not is_special(token)


def test_parts_of_words_add_up_to_the_terms(tokenizer):
    generator = random.Random(0)
    for text in TEXTS:
        ids, words = read(tokenizer, text)
        terms = {token: generator.gauss(0, 1) for token in set(ids) if generator.random() < 0.7}
        assert sum(shares_of_words(words, ids, terms)) == pytest.approx(sum(terms.values()), abs=1e-12)
    assert shares_of_words([Word("a", "", (0,)), Word("ba", " ", (1, 2))], [5, 6, 5], {5: 3.0, 6: 1.0}) == [1.5, 2.5]


def test_a_text_keeps_what_the_vocabulary_lacks_but_not_what_the_tokenizer_added():
    tokens = ["[CLS]", "nice", "[UNK]", "one", "[SEP]", "[PAD]"]
    assert Example(0, tuple(words_of(tokens, "##")), None).text == "nice [UNK] one"
    assert Example(0, tuple(words_of(["<unk>", "<pad>"], None)), None).text == "<unk>"
