from __future__ import annotations

import io
import re

import pytest
from contrasts import contrast
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from toy import loader, test_texts

from lightning_tracin import TracInLast
from lightning_tracin.report.explanation import Example, Explanation, Influential, Word
from lightning_tracin.report.label_issues import LabelIssue, LabelIssues
from lightning_tracin.report.palette import TERMINAL_AGAINST, TERMINAL_FOR
from lightning_tracin.report.tables import explained, shaded


def printed(*renderables, width: int = 80, terminal: bool = False) -> str:
    file = io.StringIO()
    options = {"force_terminal": True, "color_system": "truecolor"} if terminal else {}
    console = Console(file=file, width=width, **options)
    for each in renderables:
        console.print(each)
    return file.getvalue()


def example(text: str, *, index: int = 7, **options) -> Example:
    words = tuple(Word(word, " ", (place,)) for place, word in enumerate(text.split(" ")))
    return Example(index, words, **{"label": "sport", **options})


def explanation(test: Example, *proponents: Influential, opponents=()) -> Explanation:
    return Explanation(0, test, (), proponents, tuple(opponents))


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_nothing_is_wider_than_the_screen(width):
    long = example("w" * 300 + " cup" * 500, label="label " * 30)
    shown = printed(explained(explanation(long, Influential(long, 1.0, 0.5, (1.0,) * 501))), width=width)
    assert max(map(len, shown.splitlines())) <= width


def test_piped_output_has_no_colour_and_names_the_words():
    pushed = Influential(example("the world cup the"), 2.0, 0.25, (0.1, 0.5, 1.8, -0.4))
    shown = printed(explained(explanation(example("a cup", prediction="art", confidence=0.713), pushed)))
    assert "\x1b" not in shown
    assert "Test example 7, label sport, prediction art (71%)" in shown
    assert "+2  train 7  25.0% of all proponents  label sport" in shown
    assert "words: cup 69%, world 19%, the −12%" in shown  # repeated words are added up; all make 100 %
    pushed = Influential(example("the world cup"), 2.0, 0.25, (0.001, 0.5, 1.5))
    shown = printed(explained(explanation(example("a cup"), pushed)))
    assert "words: cup 75%, world 25%\n" in "\n".join(map(str.rstrip, shown.splitlines()))  # none has 0 %


def test_words_are_shaded_by_their_share_and_direction():
    terms = (0.001, -0.3, 0.7)
    shown = shaded(example("a world cup"), terms, 1.0)
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert "blue" in styles["cup"]
    assert "orange" in styles["world"]
    assert not styles.get("a")
    assert (
        "blue"
        in {
            shown.plain[span.start : span.end]: str(span.style)
            for span in shaded(example("a world cup"), terms, -1.0).spans
        }["world"]
    )


@pytest.mark.parametrize("theme", [DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME], ids=["light", "dark"])
@pytest.mark.parametrize("styles", [TERMINAL_FOR, TERMINAL_AGAINST], ids=["for", "against"])
def test_colours_are_legible_on_light_and_dark_terminals(theme, styles):
    def legibility(style):
        ground = style.bgcolor.get_truecolor(theme, foreground=False) if style.bgcolor else theme.background_color
        return contrast(style.color.get_truecolor(theme), ground)

    assert min(legibility(Style.parse(style)) for style in (styles.strong, styles.medium)) >= 4.5
    assert legibility(Style.parse(styles.number)) >= 3.5  # one colour for both terminals; its sign is printed, too


def test_of_a_long_text_the_part_that_matters_is_shown():
    text = " ".join(f"w{number}" for number in range(400))
    terms = [0.0] * 400
    terms[250], terms[251] = 1.0, -0.5
    shown = shaded(example(text), terms, 1.0, room=100).plain
    assert " w250 w251" in shown
    assert shown.startswith("… ")
    assert shown.endswith(" …")
    assert len(shown) <= 104
    assert shaded(example(text), (), 1.0, room=100).plain.startswith("w0 w1 ")
    assert shaded(example(text), [1.0, *terms[1:]], 1.0, room=3000).plain == text


def test_texts_cannot_steer_the_terminal():
    bad = example("\x1b[31mred \x07 [bold]x[/bold] a\nb", label="[red]l\x1b[0m")
    shown = printed(explained(explanation(bad, Influential(bad, 1.0, None, (1.0, 0.0, 0.0, 0.0)))))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[bold]x[/bold] a b" in shown
    assert "label [red]l�[0m" in shown


def test_what_the_model_was_not_given_is_shown_in_part():
    read = printed(explained(explanation(example("read this", unread=" but not" + " that" * 100))), width=200)
    assert re.search(r"read this but not( that){14} t …", read)


def test_a_result_says_what_it_does_not_have(toy, tmp_path):
    result = toy.influence(loader(test_texts()))
    assert any("no tokenizer" in note for note in result.notes)
    assert "Token ids are shown" in printed(result, width=300)
    assert any("does not tell words" in note for note in toy.influence(loader(test_texts()), method=TracInLast()).notes)
    result.trace = None
    assert any("trace of these scores is not at hand" in note for note in result.notes)
    assert "no text stored" in printed(result)


def test_wide_characters_leave_the_numbers_whole():
    issue = LabelIssue(example("fine", index=12345, label="\u985e" * 20), True, 0.25, "\u6a19" * 20, 1.0, 1, 1)
    shown = printed(LabelIssues([issue], 9, 1, "TracIn-Last"), width=70)
    assert re.search(r"1 +12345 +0\.25 +\u985e{7} +\u6a19{7} +fine", shown)
