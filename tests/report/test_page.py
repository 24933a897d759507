from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
from chromium import PHONE, opened
from pages import K, data_of, example, explanation, hostile_page, issues_of, number, page_of, shown
from toy import N_TEST, N_TRAIN, fitted, loader, test_texts, texts

from lightning_tracin import TracInWE, apply_corrections
from lightning_tracin.report.explanation import Example, Influential, Word
from lightning_tracin.report.page import write_page


def downloaded(page, button):
    """The rows of a CSV, as a spreadsheet reads them."""
    with page.expect_download() as download:
        page.click(button)
    content = download.value.path().read_bytes().decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(content, newline="")))


def test_the_head_says_what_was_computed(page):
    assert page.title() == f"What {N_TEST} predictions were learned from"
    facts = page.locator(".facts span").all_inner_texts()
    assert facts == [
        "TracIn-WE",
        f"{N_TEST} test examples",
        f"{N_TRAIN} training examples",
        "2 checkpoints (steps 5 to 10)",
    ]
    assert "there is no tokenizer" in page.locator(".notes li").first.text_content()


def test_the_title_and_the_method_are_named(result, tmp_path):
    named = replace(result, method=TracInWE(normalize="train", exclude_tokens=range(9), precondition="adam"))
    html = named.to_html(tmp_path / "page.html", k=1, title="Mine & yours").read_text()
    assert "<title>Mine &amp; yours</title>" in html
    assert "TracIn-WE, normalised by the training example, preconditioned by Adam, without 9 tokens" in html


def test_filters(page, result):
    tests = [each.test for each in result.explanations(k=1)]
    assert shown(page) == list(range(N_TEST))
    for field, name in (("#by-label", "label"), ("#by-prediction", "prediction")):
        for value in {getattr(test, name) for test in tests}:
            page.select_option(field, json.dumps(value))
            assert shown(page) == [test.index for test in tests if getattr(test, name) == value]
        page.select_option(field, "")
    page.check("#mistaken")
    mistaken = [test.index for test in tests if test.is_mistaken]
    assert 0 < len(mistaken) < N_TEST
    assert shown(page) == mistaken
    assert page.inner_text("#tally") == f"{len(mistaken)} of {N_TEST} test examples"


def test_orders(page, result):
    tests = [each.test for each in result.explanations(k=1)]
    strongest = result.scores.abs().max(1).values.tolist()
    page.select_option("#order", "unsure")
    assert shown(page) == sorted(range(N_TEST), key=lambda row: tests[row].confidence)
    page.select_option("#order", "sure")
    assert shown(page) == sorted(range(N_TEST), key=lambda row: -tests[row].confidence)
    page.select_option("#order", "strong")
    assert shown(page) == sorted(range(N_TEST), key=lambda row: -strongest[row])
    page.select_option("#order", "index")
    assert shown(page) == list(range(N_TEST))


def test_searching(page, result):
    texts = [each.test.text for each in result.explanations(k=1)]
    wanted = texts[3][:8]
    page.fill("#search", wanted)
    assert shown(page) == [row for row, text in enumerate(texts) if wanted in text]
    page.fill("#search", "nothing like that")
    assert shown(page) == []
    page.click("text=Clear search and filters")
    assert shown(page) == list(range(N_TEST))


@pytest.mark.parametrize("row", [0, 4])
def test_the_terms_of_a_pair_are_those_of_words_and_add_up_to_its_score(page, result, row):
    page.click(f"#row-{row}")
    expected = next(result.explanations([row], K))
    cards = page.locator("#detail .card")
    for card, pair in zip(cards.all(), (*expected.proponents, *expected.opponents), strict=True):
        assert number(card.locator(".score").text_content()) == pytest.approx(pair.score, rel=1e-2)
        assert card.locator(".link").text_content() == f"example {pair.example.index}"
        terms = []
        for word in card.locator(".word").all():
            word.scroll_into_view_if_needed()
            word.hover()
            terms.append((page.inner_text("#tip b"), number(page.inner_text("#tip .term"))))
        scale = max((abs(term) for _, term in terms), default=0)
        assert sum(term for _, term in terms) == pytest.approx(pair.score, abs=2e-2 * scale)
        listed = [(word.text, term) for word, term in zip(pair.example.words, pair.terms, strict=True) if term]
        assert [word for word, _ in terms] == [word for word, _ in listed]
        assert [term for _, term in terms] == pytest.approx([term for _, term in listed], rel=1e-2)


def test_a_word_is_marked_in_the_test_text_by_its_tokens(browser, tmp_path):
    test = example(0, ("tariffs", "on", "steel", "tall"), prediction="news", confidence=0.9)
    pair = Influential(example(7, ("Steel", "tariff", "up")), 2.0, None, (0.5, 1.5, 0.0))
    with opened(browser, write_page(page_of([explanation(0, test, pair)]), tmp_path / "page.html")) as page:
        page.locator(".card .word", has_text="tariff").hover()
        assert page.locator(".subject .lit").all_inner_texts() == ["tariffs", "tall"]  # both begin with that token
        assert "75\u00a0% of what all words add" in page.inner_text("#tip")
        page.mouse.move(1, 1)
        assert page.locator(".lit").count() == 0
        assert page.locator("#tip").is_hidden()
        page.locator(".subject .word", has_text="tariffs").hover()
        assert page.locator(".card .lit").all_text_contents() == ["tariff"]


def test_what_the_tokenizer_added_is_dim_and_not_exported(browser, tmp_path):
    words = (Word("[CLS]", "", (0,), special=True), Word("goal", " ", (1,)), Word("!", "", (2,)))
    test = Example(0, words, "sport", ids=(101, 7, 8))
    pair = Influential(Example(1, words, "sport", ids=(101, 7, 8)), 3.0, None, (1.0, 2.0, 0.0))
    with opened(browser, write_page(page_of([explanation(0, test, pair)]), tmp_path / "page.html")) as page:
        assert page.text_content(".card .text") == "[CLS] goal!"
        inks = [word.evaluate("e => getComputedStyle(e).color") for word in page.locator(".card .word").all()]
        muted = page.locator(".card .share").evaluate("e => getComputedStyle(e).color")
        assert [ink == muted for ink in inks] == [True, False]
        assert downloaded(page, "#csv-one")[0]["train_text"] == "goal!"


def test_the_keyboard_is_enough(page, result):
    page.keyboard.press("j")
    assert page.inner_text("h2") == "Test example 1"
    page.keyboard.press("k")
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("h2") == "Test example 2"
    assert page.get_attribute("#list", "aria-activedescendant") == "row-2"
    text = next(each for each in page.locator(".card .text").all() if each.locator(".word").count() > 1)
    text.focus()
    page.keyboard.press("ArrowRight")
    first = page.inner_text("#tip")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip") != first
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.locator("#tab-tests").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#suspects").is_visible()
    page.locator("#suspects .link").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#follow").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#follow").is_hidden()
    page.keyboard.press("/")
    page.go_back()
    assert page.inner_text("h2 >> visible=true") == "Test example 2"


def test_tapping_a_word_shows_its_term(browser, path):
    with opened(browser, path, viewport=PHONE, has_touch=True) as page:
        page.tap(".row >> nth=0")
        page.locator(".card .word").first.tap()
        assert page.locator("#tip .term").is_visible()
        page.click(".back")
        assert page.locator("#list").is_visible()


def test_a_training_example_is_followed_to_all_test_examples_that_it_pushed(page, result):
    tops = torch.cat([result.proponents(K).indices, result.opponents(K).indices], dim=1)

    def expected_of(index):
        rows = [row for row in range(N_TEST) if index in tops[row] and result.scores[row, index]]
        return sorted(rows, key=lambda row: -abs(float(result.scores[row, index])))

    index = next(each for each in range(N_TRAIN) if expected_of(each) != sorted(expected_of(each)))
    expected = expected_of(index)
    first = min(expected)
    page.click(f"#row-{first}")
    page.select_option("#by-label", json.dumps(result._test_example(first).label))
    page.click(f".link >> text=/^example {index}$/ >> nth=0")
    assert page.inner_text("#follow h2") == f"Training example {index}"
    found = [int(text.split()[-1]) for text in page.locator(".go .end > span:nth-child(2)").all_inner_texts()]
    assert found == expected
    scores = [number(text) for text in page.locator(".go .score").all_inner_texts()]
    assert scores == pytest.approx([float(result.scores[row, index]) for row in expected], rel=1e-2)
    page.locator(".go").last.click()
    assert page.inner_text("#detail h2") == f"Test example {expected[-1]}"
    assert page.locator(f"#row-{expected[-1]}").get_attribute("aria-selected") == "true"


def suspected(page):
    """The training examples of the tab, in its order."""
    return [int(text.split(",")[0].split()[-1]) for text in page.locator("#suspects .link").all_text_contents()]


def test_suspects_are_those_of_highest_self_influence(page, toy):
    values = toy.self_influence(method="tracin-last")
    page.click("#tab-suspects")
    assert suspected(page) == values.argsort(descending=True).tolist()
    scores = [number(text) for text in page.locator("#suspects .score").all_text_contents()]
    assert scores == pytest.approx(values.sort(descending=True).values.tolist(), rel=1e-2)


def test_suspects_are_searched_and_filtered(page, result):
    issues = result.label_issues().issues
    page.click("#tab-suspects")
    page.select_option("#suspects .table-tools select", json.dumps("1"))
    assert suspected(page) == [each.example.index for each in issues if each.example.label == "1"]
    page.check("#suspects .check input")
    wrong = [each.example.index for each in issues if each.example.label == "1" and each.is_label_issue]
    assert suspected(page) == wrong
    page.uncheck("#suspects .check input")
    page.select_option("#suspects .table-tools select", "")
    wanted = issues[4].example.text[:5]
    page.fill("#suspects .table-tools input", wanted)
    assert suspected(page) == [each.example.index for each in issues if wanted in each.example.text]


def test_the_csv_of_suspects_is_a_review_that_corrects_the_data(page, result):
    issues = result.label_issues()
    page.click("#tab-suspects")
    (first, label), other = (issues.issues[0].example.index, issues.issues[0].example.label), issues.issues[1]
    right = next(name for name in ("0", "1", "2") if name != label)
    page.select_option(f"[aria-label='What is right for example {first}']", right)
    page.select_option(f"[aria-label='What is right for example {other.example.index}']", "drop")
    rows = downloaded(page, "#csv-suspects")
    frame = issues.to_pandas()
    assert list(rows[0]) == list(frame.columns)
    for name in ("train_index", "is_label_issue", "given_label", "predicted_label", "rank", "rank_in_class", "text"):
        assert [row[name] for row in rows] == frame[name].astype(str).tolist()
    for name in ("label_score", "self_influence"):
        assert [float(row[name]) for row in rows] == pytest.approx(frame[name].tolist(), rel=1e-5)
    assert [row["corrected_label"] for row in rows] == [right, "drop", *[""] * (len(rows) - 2)]
    dropped = other.example.index
    expected = [int(right) if index == first else int(given) for index, (_, given) in enumerate(texts())]
    assert [int(label) for _, label in apply_corrections(texts(), rows)] == [
        label for index, label in enumerate(expected) if index != dropped
    ]


def test_suspects_of_cosines_are_those_without_normalising(tmp_path):
    fit = fitted(tmp_path / "trace", methods=("tracin-we",))
    cosine = fit.influence(loader(test_texts()), method=TracInWE(normalize="cosine"))
    rows = data_of(cosine.to_html(tmp_path / "page.html", k=1, suspects=5).read_text())["suspects"]["rows"]
    assert [row[0] for row in rows] == fit.self_influence().topk(5).indices.tolist()


def test_csv_is_what_pandas_has(page, result):
    frame = result.to_pandas(K)
    page.click("#row-3")
    of_all, of_one = downloaded(page, "#csv-all"), downloaded(page, "#csv-one")
    assert of_one == [row for row in of_all if row["test_index"] == "3"]
    assert list(of_all[0]) == list(frame.columns)
    frame = frame.sort_values(["test_index", "role", "rank"], ascending=[True, False, True])
    numbers = ("score", "share", "confidence")
    for name in frame.columns.difference([*numbers, "words"]):
        assert [row[name] for row in of_all] == frame[name].astype(str).tolist()
    for name in numbers:
        assert [float(row[name]) for row in of_all] == pytest.approx(frame[name].tolist(), rel=1e-5)
    words = [dict(each.rsplit(" ", 1) for each in row["words"].split(", ") if each) for row in of_all]
    for found, expected in zip(words, frame["words"], strict=True):
        terms = {each["word"]: each["term"] for each in expected}
        assert {word: float(term) for word, term in found.items()} == pytest.approx(terms, rel=1e-2)


def test_examples_of_several_loaders_are_named_by_them(browser, toy, tmp_path):
    result = toy.influence({"=news": loader(test_texts()), "<b>": loader(texts(2))})
    with opened(browser, result.to_html(tmp_path / "page.html", k=K)) as page:
        assert page.inner_text("#row-5 .number") == "5 of =news"
        page.fill("#search", "#1 of <b>")
        page.click("#row-7")
        assert page.inner_text("#detail h2") == "Test example 1 of <b>"
        frame, names = result.to_pandas(K), ["test_row", "test_index"]
        frame = frame.sort_values(["test_row", "role", "rank"], ascending=[True, False, True])
        rows = downloaded(page, "#csv-all")
        assert [[row[name] for name in names] for row in rows] == frame[names].astype(str).to_numpy().tolist()
        rows = downloaded(page, "#csv-all")
    assert list(rows[0]) == list(result.to_pandas(K).columns)
    names = [row["test_loader"].replace("=news", "'=news") for row in result.rows(K)]
    assert [row["test_loader"] for row in rows] == names
    assert set(names) == {"'=news", "<b>"}


def test_csv_holds_no_formulas_and_every_text(browser, tmp_path):
    with opened(browser, write_page(hostile_page(), tmp_path / "page.html")) as page:
        rows = downloaded(page, "#csv-all")
        page.click("#tab-suspects")
        (suspect,) = downloaded(page, "#csv-suspects")
    assert [row["train_label"] for row in rows] == ["'=cmd()", '\'-a "quoted", label']
    assert rows[0]["train_text"].startswith("<script>alert(1)</script> </script>")
    assert rows[1]["train_text"] == "'@sum x"
    assert (suspect["given_label"], suspect["predicted_label"]) == ("'=cmd()", "'=<b>1</b>")
    assert [float(row["score"]) for row in rows] == [28, -1]  # a number may begin with a minus


def test_csv_lists_words_of_a_prompt_by_their_terms_and_labels_that_are_numbers(browser, tmp_path):
    words = (Word("small", " ", (0,)), Word("big", " ", (1,), is_prompt=True))
    said = Influential(Example(1, words, "-1", ids=(3, 4)), 4.0, 0.5, (1.0, 3.0))
    issues = replace(issues_of(said, predicted="+2.5"), agreement=0.9996)
    shown = page_of([explanation(0, said.example, said)], suspects=issues)
    with opened(browser, write_page(shown, tmp_path / "page.html")) as page:
        (row,) = downloaded(page, "#csv-all")
        page.click("#tab-suspects")
        (suspect,) = downloaded(page, "#csv-suspects")
        assert "has said the label of 99.9% of all" in page.inner_text("#suspects")
    assert (row["train_label"], row["words"]) == ("-1", "big +3, small +1")
    assert (suspect["given_label"], suspect["predicted_label"]) == ("-1", "+2.5")
