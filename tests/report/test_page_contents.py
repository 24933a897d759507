"""What pages hold: no text does harm, nothing is missing silently, and all of it can be read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from chromium import DESKTOP, PHONE, opened
from contrasts import contrast
from pages import HOSTILE, Table, data_of, example, explanation, hostile_page, issues_of, number, page_of, shown
from toy import N_TRAIN, fitted, loader, test_texts
from training_examples import examples_of_training

from lightning_tracin import InfluenceResult, TracInLast
from lightning_tracin.report.explanation import Example, Influential, Word
from lightning_tracin.report.page import json_in_html, page_html, write_page


def test_hostile_texts_are_only_texts(browser, tmp_path):
    with opened(browser, write_page(hostile_page(), tmp_path / "page.html")) as page:
        for tab in ("suspects", "words", "tests"):
            page.click(f"#tab-{tab}")
            assert page.locator("img, body script:not(#data)").count() == 1
            assert "<script>alert(1)</script>" in page.text_content(f"#{tab}")
        assert page.title() == "</title><script>alert(3)</script>"
        page.click(".card .link >> nth=0")
        assert "<img src=x onerror=alert(1)>" in page.inner_text("#follow")
        assert page.locator(".chip", has_text="<b>label</b>").first.is_visible()


def test_only_the_scripts_and_styles_of_the_package_may_run(path, browser):
    html = path.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert "default-src 'none'" in policy
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy.replace("&#43;", "+")
    with pytest.raises(AssertionError, match="Content Security Policy"):
        try_to_add_a_script(browser, path)


def try_to_add_a_script(browser, path):
    with opened(browser, path) as page:
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
        assert page.evaluate("window.ran") is None


@pytest.mark.parametrize("text", [*HOSTILE, "\ud800", "é ü 漢", '"\\'])
def test_json_in_html_is_the_same_json_and_ends_nothing(text):
    dumped = json_in_html({text: [text]})
    assert json.loads(dumped) == {text: [text]}
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", dumped)


def test_the_page_holds_each_training_example_and_each_word_once(path, result):
    data = data_of(path.read_text())
    assert len(data["train"]) == N_TRAIN  # all are suspects
    assert len({json.dumps(word) for word in data["vocabulary"]}) == len(data["vocabulary"])
    for index, (label, words, _) in data["train"].items():
        mine = examples_of_training(result, [int(index)])[int(index)]
        assert (label, [data["vocabulary"][word][0] for word in words]) == (mine.label, [w.text for w in mine.words])


def test_numbers_that_are_none(browser, tmp_path):
    test = example(0, ("a",), prediction="news", confidence=float("nan"))
    pair = Influential(example(1, ("a",)), float("nan"), float("inf"), (float("nan"),))
    other = Influential(example(2, ("a",)), 1.0, None, (1.0,))
    path = write_page(page_of([explanation(0, test, other, pair)], suspects=issues_of(pair)), tmp_path / "page.html")
    with opened(browser, path) as page:
        assert page.locator(".card .score").all_text_contents() == ["+1.00", "unknown"]
        page.click("#tab-suspects")
        assert page.text_content("#suspects .score") == "unknown"


def notes_and_texts(browser, path):
    with opened(browser, path) as page:
        page.locator(".card .link").first.click()
        page.keyboard.press("Escape")
        texts = " ".join(page.locator(".card .text").all_text_contents())
        notes = page.locator(".notes").text_content() if page.locator(".notes").count() else ""
        shades = page.locator("#detail .card .word").count()
        page.click("#tab-suspects")
        return notes, texts, shades, page.text_content("#suspects")


def test_without_its_trace_the_page_says_what_is_missing(browser, tmp_path):
    result = fitted(tmp_path / "trace").influence(loader(test_texts()))
    saved = result.save(tmp_path / "result.safetensors", k=0)
    shutil.rmtree(tmp_path / "trace")
    path = InfluenceResult.load(saved).to_html(tmp_path / "page.html")
    notes, texts, shades, suspects = notes_and_texts(browser, path)
    assert "The trace of these scores is not at hand" in notes
    assert "(no text stored)" in texts
    assert shades == 0
    assert "Self-influence is not known" in suspects
    assert "Put the trace back" in suspects


def test_a_method_without_words(browser, toy, tmp_path):
    result = toy.influence(loader(test_texts()), method=TracInLast())
    notes, texts, shades, suspects = notes_and_texts(browser, result.to_html(tmp_path / "page.html", k=3))
    assert 'method="tracin-we" does' in notes
    assert result.to_pandas(1).train_text[0] in texts
    assert shades == 0
    assert "TracIn-Last" in suspects
    assert "result.with_texts(test=...)" not in notes


def test_a_fit_of_the_last_layer_alone_does_not_know_what_was_read(browser, tmp_path):
    fit = fitted(tmp_path / "trace", methods=("tracin-last",))
    result = fit.influence(loader(test_texts()), method="tracin-last")
    notes, texts, _, _ = notes_and_texts(browser, result.to_html(tmp_path / "page.html", k=3))
    assert "result.with_texts(test=...)" in notes
    assert "(no text stored)" in texts


def test_words_that_say_little_are_grey_and_parts_are_named(browser, tmp_path):
    words = (
        Word("[CLS]", "", (0,), special=True),
        Word("the", " ", (1,), is_common=True),
        Word("£900", " ", (2, 3), pieces=("£", "900")),
    )
    train = Example(4, words, "news", ids=(1, 2, 3, 4))
    pair = Influential(train, 1.0, 0.9, (0.1, 0.6, 0.3), ("[CLS]", "the", "£…"), (True, True, False), (7, 9))
    test = Example(0, (Word("£800", "", (0, 1)),), "news", ids=(3, 5))
    with opened(browser, write_page(page_of([explanation(0, test, pair)]), tmp_path / "page.html")) as page:
        card = page.locator(".card")
        shown = [word.get_attribute("class").split() for word in card.locator(".word").all()]
        assert [("special" in of, "stop" in of) for of in shown] == [(True, False), (False, True), (False, False)]
        ground = "word => getComputedStyle(word).backgroundColor"
        the, amount = (card.locator(f".word >> text={text}") for text in ("the", "£900"))
        assert the.evaluate(ground) == "rgba(0, 0, 0, 0)" != amount.evaluate(ground)
        amount.hover()
        assert page.inner_text("#tip b") == "£…"
        assert "all that it shares of £900" in page.inner_text("#tip")
        assert "30\u00a0% of what all words add" in page.inner_text("#tip")
        the.hover()
        assert "in more than a tenth of the training texts" in page.inner_text("#tip")
        assert card.locator(".equal").text_content() == "3 equal texts"
        assert card.locator(".equal").get_attribute("title") == "also 7, 9"
        assert (
            page.locator("section[aria-label=Opponents]").inner_text().split("\n")[-1].startswith("None: no training")
        )


def test_prompts_are_grey_and_tags_stand_beside_their_words(browser, tmp_path):
    words = (Word("Ask", "", (0,), is_prompt=True), Word("Paris", " ‖ ", (1,), tag="<b>LOC"), Word("now", " ", (2,)))
    train = Example(4, words, "news", ids=(1, 2, 3))
    test = Example(0, words, "news", ids=(1, 2, 3))
    pair = Influential(train, 1.0, 0.9, (0.0, 0.7, 0.3))
    with opened(browser, write_page(page_of([explanation(0, test, pair)]), tmp_path / "page.html")) as page:
        for text in (page.locator(".card .text"), page.locator(".subject .text")):
            assert text.text_content() == "Ask ‖ Paris<b>LOC now"
            assert text.locator(".prompt").text_content() == "Ask"
            assert text.locator(".tag").text_content() == "<b>LOC"
        page.fill("#search", "ask ‖ paris now")
        assert shown(page) == [0]
        page.locator(".card .word >> text=Paris").hover()
        assert page.inner_text("#tip b") == "Paris"
        assert "all that it shares" not in page.inner_text("#tip")


def test_a_text_whose_words_are_not_known_is_shown_as_it_was_given(browser, tmp_path):
    test = Example(0, (), "sport", unread="A cup final " * 100)
    pair = Influential(Example(1, (), "sport", unread="A league"), 1.0, 0.5)
    with opened(browser, write_page(page_of([explanation(0, test, pair)]), tmp_path / "page.html")) as page:
        assert page.inner_text(".subject .text").strip() == test.unread.strip()
        assert page.text_content(".card .text") == "A league"
        assert page.inner_text(".row .start").startswith("A cup final")
        page.fill("#search", "final")
        assert shown(page) == [0]


def test_the_strongest_only(browser, toy, result, tmp_path):
    kept = toy.influence(loader(test_texts()), k=3)
    with opened(browser, kept.to_html(tmp_path / "page.html", k=5)) as page:
        listed = [len(side) for of in result.explanations([0], k=3) for side in (of.proponents, of.opponents)]
        assert page.locator(".card").count() == sum(listed)
        assert "Only the 3 strongest were kept" in page.locator(".notes").text_content()
        assert page.text_content(".card .link >> nth=0") == f"example {int(result.proponents(1).indices[0, 0])}"


def test_unknown_predictions(browser, result, tmp_path):
    unknown = replace(result, predictions=torch.full_like(result.predictions, torch.nan))
    with opened(browser, unknown.to_html(tmp_path / "page.html", k=2)) as page:
        assert "What the model says of the test examples is not known" in page.locator(".notes").text_content()
        assert page.locator("#by-prediction").is_hidden()
        assert page.locator("#mistaken-field").is_hidden()
        assert page.locator("#order option").all_inner_texts() == ["By index", "Strongest score first"]
        assert page.locator(".percent").count() == 0


def test_words_over_the_whole_test_set_are_sorted_by_any_column(browser, tmp_path):
    values = torch.tensor([[[3.0, -1.0], [0.5, 0.0]], [[-2.0, 4.0], [0.0, 9.0]], [[1.0, 2.0], [-3.0, 1.0]]])
    table = Table(("apple", "pear", "fig"), ("fruit", "tree"), ("ripe", "raw"), values)
    test = example(0, ("apple",))
    path = write_page(page_of([explanation(0, test)], word_table=table), tmp_path / "page.html")
    with opened(browser, path) as page:
        page.click("#tab-words")
        words = page.locator("#words tbody th")
        assert words.all_inner_texts() == ["pear", "fig", "apple"]  # by the sum of magnitudes
        for column in range(4):
            expected = sorted(range(3), key=lambda word: -values[word].flatten()[column].item())
            page.locator("#words thead tr:nth-child(2) button").nth(column).click()
            assert words.all_inner_texts() == [table.words[word] for word in expected]
            page.locator("#words thead tr:nth-child(2) button").nth(column).click()
            assert words.all_inner_texts() == [table.words[word] for word in expected[::-1]]
        page.click("#words .corner button")
        assert words.all_inner_texts() == ["pear", "fig", "apple"]
        page.select_option("#words select", "1")
        assert page.locator("#words tbody tr >> nth=0 >> td").all_inner_texts() == ["", "+9.00"]
        page.fill("#words input", "IG")
        assert words.all_inner_texts() == ["fig"]
        assert words.first.get_attribute("class") == "little"


def test_the_word_table_of_a_result(page, result):
    table = result.word_table(200)
    page.click("#tab-words")
    assert page.locator("#words tbody th").all_inner_texts() == list(table.words)
    said = [f"Model says {name}" for name in table.classes]
    assert page.locator("#words th.group").all_inner_texts() == said
    cells = [number(text or "0") for text in page.locator("#words tbody td").all_inner_texts()]
    assert cells == pytest.approx(table.values.flatten().tolist(), rel=1e-2)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Texts that are long, right to left, of one endless word or empty; labels that are long or have empty names."""
    long = example(0, [f"word{number}" for number in range(2000)], "", prediction="a", confidence=0.5)
    endless = example(1, ["w" * 5000], "label " * 40, prediction=" ", confidence=1.0)
    hebrew = example(2, ["שלום", "עולם"], "עברית", prediction="עברית", confidence=0.0)
    empty = example(3, [], None)
    pairs = [Influential(each, 1.0 - each.index, 0.1, (0.5,) * len(each.words)) for each in (long, endless, hebrew)]
    table = Table(("w" * 300, "שלום"), ("a" * 50,) * 6, ("b" * 50,) * 6, torch.randn(2, 6, 6))
    tests = [explanation(row, test, *pairs) for row, test in enumerate((long, endless, hebrew, empty))]
    page = page_of(tests, suspects=issues_of(*pairs), word_table=table, title="t" * 300, notes=["w" * 300, "note"])
    return write_page(page, tmp_path_factory.mktemp("odd") / "page.html")


@pytest.mark.parametrize("size", [DESKTOP, PHONE, {"width": 800, "height": 500}], ids=["desktop", "phone", "small"])
def test_nothing_is_wider_than_the_screen(browser, odd, size):
    with opened(browser, odd, viewport=size) as page:

        def check():
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            for name in (".list", ".detail", "#suspects", "#words", "#follow"):
                extra = page.evaluate(f"(e => e.scrollWidth - e.clientWidth)(document.querySelector('{name}'))")
                assert extra <= 0, name

        check()
        for row in range(4):
            page.evaluate(f"location.hash = '#test-{row}'")
            page.wait_for_function(f"document.querySelector('h2').textContent === 'Test example {row}'")
            check()
        page.evaluate("document.querySelector('.card .link').click()")
        check()
        page.keyboard.press("Escape")
        for tab in ("suspects", "words"):
            page.click(f"#tab-{tab}")
            check()


def test_long_texts_are_shown_in_part_and_empty_names_are_named(browser, odd):
    with opened(browser, odd) as page:
        card = page.locator(".card").first
        assert card.locator(".word").count() == 160
        card.locator("text=1,840 more words, 92 % of what its words add").click()
        assert card.locator(".word").count() == 2000
        assert page.locator(".chip", has_text="(empty name)").first.is_visible()
        page.select_option("#by-label", "null")
        assert shown(page) == [3]
        page.select_option("#by-label", '""')
        assert shown(page) == [0]


def test_right_to_left_texts_are_read_so_by_eye_and_by_arrow_keys(browser, odd):
    with opened(browser, odd) as page:
        page.click("#row-2")
        text = page.locator(".subject .text")
        assert text.evaluate("e => getComputedStyle(e).direction") == "rtl"
        text.focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.textContent") == "עולם"


def test_on_a_phone_what_is_said_of_an_example_stays_with_its_name(browser, tmp_path):
    test = example(0, ("goal",), "entertainment", prediction="politics and more", confidence=0.6, target="politics")
    pair = Influential(example(1, ("goal",)), 1.0, 0.5, (1.0,))
    path = write_page(page_of([explanation(0, test, pair)], target="prediction"), tmp_path / "page.html")
    top = "element => element.getBoundingClientRect().top + element.getBoundingClientRect().height / 2"
    with opened(browser, path, viewport=PHONE) as page:
        page.click(".row")
        for fact in page.locator(".fact").all():
            tops = [part.evaluate(top) for part in fact.locator("> *").all()]
            assert max(tops) - min(tops) < 2
        head = [page.locator(name).evaluate(top) for name in (".back", "h2", "#next")]
        assert max(head) - min(head) < 2
        assert page.locator("h1").is_visible()  # what is read aloud first, though it takes no room


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shaded_words_are_legible_and_told_apart_without_colour(browser, tmp_path, scheme):
    terms = (0.5, 0.2, 0.1, 0.05, 0.02)
    words = [f"w{number}" for number in range(5)]
    pairs = [Influential(example(1, words), 1.0, 0.1, tuple(sign * term for term in terms)) for sign in (1, -1)]
    path = write_page(page_of([explanation(0, example(0, words), *pairs)]), tmp_path / "page.html")
    measure = """word => {
        const style = getComputedStyle(word), rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        return [rgb(style.color), rgb(style.backgroundColor), style.textDecorationStyle, style.textDecorationThickness];
    }"""
    with opened(browser, path, color_scheme=scheme) as page:
        found = [word.evaluate(measure) for word in page.locator(".card .word").all()]
    assert min(contrast(ink, ground) for ink, ground, _, _ in found) >= 4.5
    assert [style for _, _, style, _ in found] == ["solid"] * 5 + ["dotted"] * 5
    thickness = [float(width.removesuffix("px")) for _, _, _, width in found]
    assert thickness[:5] == thickness[5:]
    assert thickness[:5] == sorted(set(thickness), reverse=True)


def test_a_page_appears_whole_or_not_at_all(result, tmp_path):
    assert result.to_html(str(tmp_path / "a" / "page.html"), k=1) == tmp_path / "a" / "page.html"
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["page.html"]
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError, match=r"could not be written to .*folder\.html: Is a directory"):
        result.to_html(tmp_path / "folder.html", k=1)
    with pytest.raises(OSError, match=r"could not be written to .*page\.html/page: Not a directory|File exists"):
        result.to_html(tmp_path / "a" / "page.html" / "page", k=1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "folder.html"]


@pytest.mark.parametrize(("arguments", "message"), [({"k": 0}, "k must"), ({"suspects": -1}, "suspects must")])
def test_wrong_arguments(result, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        result.to_html(tmp_path / "page.html", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_page_of_few_training_examples_lists_each_that_pushed_on_one_side(browser, result, tmp_path):
    with opened(browser, result.to_html(tmp_path / "page.html", k=50)) as page:
        assert page.locator(".card").count() == int((result.scores[0] != 0).sum())
        page.click(".card .link >> nth=0")
        index = int(page.inner_text("#follow-title").split()[-1])
        assert page.locator(".go").count() == int((result.scores[:, index] != 0).sum())  # once each
    assert "lightning_tracin" not in page_html(page_of([]))
