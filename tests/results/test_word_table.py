from __future__ import annotations

import io
import re
import shutil
from collections import Counter, defaultdict

import pytest
import pytorch_lightning as pl
import topics
import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader, Dataset
from toy import N_TRAIN, VOCABULARY, Toy, fitted, loader, test_texts, texts
from training_examples import examples_of_training
from transformers import PreTrainedTokenizerFast

from lightning_tracin import InfluenceResult, TracInCallback, TracInLast, TracInWE, Trainer
from lightning_tracin.report.word_table import WordTable
from lightning_tracin.results.evidence import Evidence
from lightning_tracin.results.word_sums import groups_of
from lightning_tracin.results.words import shares_of_words

TOKENS = ["[PAD]", "[CLS]", *(f"w{number}" for number in range(2, 15)), *(f"##p{n}" for n in range(15, VOCABULARY))]


class Spelling(Toy):
    """Has a WordPiece tokenizer: most token ids go on with the word before."""

    def __init__(self) -> None:
        super().__init__()
        vocabulary = {token: number for number, token in enumerate(TOKENS)}
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[PAD]"))
        )


def spelled(path, data=None, **options):
    """A trainer that has fitted a module with a tokenizer, each time the same."""
    pl.seed_everything(0, verbose=False)
    return fitted(path, Spelling(), data, **options)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    return spelled(tmp_path_factory.mktemp("spelling") / "trace")


@pytest.fixture(scope="module")
def result(spelling):
    return spelling.influence(loader(test_texts()))


def by_class_and_label(result, train_labels) -> torch.Tensor:
    """The scores of all pairs, summed by the model's class and by the training example's label."""
    said, labels = result.predictions[:, 0].long(), torch.as_tensor(train_labels).long()
    classes, numbers = said.unique().tolist(), labels.unique().tolist()
    return torch.tensor(
        [[float(result.scores[said == a][:, labels == b].double().sum()) for b in numbers] for a in classes]
    )


def word_sums(result, train_labels) -> dict[tuple[str, str, str], float]:
    """The terms of the whole words of all pairs, summed by word, class and label."""
    evidence = Evidence.require(result)
    examples = examples_of_training(result, range(len(train_labels)))
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    for row, said in enumerate(result.predictions[:, 0].long().tolist()):
        for index, terms in evidence.terms_of_pairs({row: range(len(train_labels))})[row].items():
            example, label = examples[index], str(int(train_labels[index]))
            for word, term in zip(example.words, shares_of_words(example.words, example.ids, terms), strict=True):
                sums[word.text, str(said), label] += term
            for token in terms.keys() - set(example.ids):
                sums[result.words_of_ids[token], str(said), label] += terms[token]
    return sums


def assert_tables_hold(table: WordTable, sums: dict[tuple[str, str, str], float]) -> None:
    """The table's values are those, and it lists every word that has one."""
    size = max(map(abs, sums.values()))
    assert {word for (word, _, _), term in sums.items() if abs(term) > 1e-6 * size} <= set(table.words)
    frame = table.to_pandas()
    assert len(frame) == len(table.words) * len(table.classes) * len(table.labels)
    for row in frame.itertuples(index=False):
        expected = sums.get((row.word, row[2], row.label), 0.0)
        assert row.influence == pytest.approx(expected, rel=1e-4, abs=1e-6 * size)


METHODS = [
    TracInWE(),
    TracInWE(normalize="cosine", exclude_tokens=[3, 20]),
    TracInWE(top_words=3, normalize="train"),
    TracInWE(precondition="adam"),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_values_are_the_words_of_all_pairs_and_add_up_to_their_scores(spelling, method):
    result = spelling.influence(loader(test_texts()), method=method)
    labels = texts().tensors[1]
    table = result.word_table(n=None)
    assert_tables_hold(table, word_sums(result, labels))
    expected = by_class_and_label(result, labels)
    torch.testing.assert_close(table.values.sum(0), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert table.n_left == 0
    torch.testing.assert_close(table.magnitudes, table.values.abs().sum((0, 2)))


def test_pieces_are_joined_into_words(result):
    words = result.word_table(n=None).words
    assert any(re.fullmatch(r"w\d+(p\d+)+", word) for word in words)
    assert not any(word.startswith("##") for word in words)


def test_the_strongest_come_first_and_the_others_are_counted(result):
    whole, part = result.word_table(n=None), result.word_table(n=5)
    strengths = whole.values.abs().sum((1, 2)).tolist()
    assert strengths == sorted(strengths, reverse=True)
    assert part.words == whole.words[:5]
    assert torch.equal(part.values, whole.values[:5])
    assert part.n_left == len(whole.words) - 5
    assert torch.equal(part.magnitudes, whole.magnitudes)


def test_counts_of_training_examples_are_those_of_the_texts(result):
    counted: Counter[tuple[str, str]] = Counter()
    for example in examples_of_training(result, range(N_TRAIN)).values():
        counted.update({(word.text, example.label) for word in example.words})
    table = result.word_table(n=None)
    for word, counts in zip(table.words, table.examples.tolist(), strict=True):
        assert counts == [counted[word, label] for label in table.labels]
    frequent = result.word_table(n=None, min_examples=2)
    assert frequent.words == tuple(
        word for word, counts in zip(table.words, table.examples.tolist(), strict=True) if sum(counts) >= 2
    )
    assert 0 < len(frequent.words) == len(table.words) - frequent.n_left


def test_sizes_of_classes_and_labels(result):
    table = result.word_table()
    said = Counter(str(each) for each in result.predictions[:, 0].long().tolist())
    labels = Counter(str(each) for each in texts().tensors[1].tolist())
    assert dict(zip(table.classes, table.class_sizes.tolist(), strict=True)) == said
    assert dict(zip(table.labels, table.label_sizes.tolist(), strict=True)) == labels


def test_special_tokens_are_marked_and_those_that_are_excluded_are_not_listed(spelling, result):
    table = result.word_table(n=None)
    assert [word for word, special in zip(table.words, table.special, strict=True) if special] == ["[CLS]"]
    without = spelling.influence(loader(test_texts()), method=TracInWE(exclude_tokens=[1])).word_table(n=None)
    assert "[CLS]" not in without.words


def test_pieces_and_shards_do_not_matter(tmp_path, result, monkeypatch):
    expected = result.word_table(n=None)
    monkeypatch.setattr("lightning_tracin.gradients.memory.NUMBERS_AT_ONCE", 21)
    monkeypatch.setattr("lightning_tracin.storage.shards.MOST_SHARD_EXAMPLES", 6)
    again = spelled(tmp_path / "trace").influence(loader(test_texts()))
    assert again.trace.shard_examples == 6
    found = again.word_table(n=None)
    size = float(expected.values.abs().max())
    values = {word: found.values[place] for place, word in enumerate(found.words)}
    for word, of_word in zip(expected.words, expected.values, strict=True):
        torch.testing.assert_close(values[word], of_word, rtol=1e-4, atol=1e-6 * size)


def test_of_the_strongest_only_and_of_a_saved_result_it_is_the_same(spelling, result, tmp_path):
    expected = result.word_table()
    for each in (
        spelling.influence(loader(test_texts()), k=2),
        InfluenceResult.load(result.save(tmp_path / "result.safetensors")),
    ):
        table = each.word_table()
        assert table.words == expected.words
        assert torch.equal(table.values, expected.values)


def test_gradients_taken_in_training(tmp_path):
    result = spelled(tmp_path / "trace", cache="training").influence(loader(test_texts()))
    labels = texts().tensors[1]
    table = result.word_table(n=None)
    assert_tables_hold(table, word_sums(result, labels))


class Drifting(Dataset):
    """Says something else each time that it is asked."""

    def __init__(self) -> None:
        self.ids, self.labels = texts(length=5).tensors
        self.asked = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        self.asked += 1
        ids = self.ids[index].clone()
        ids[0] = 2 + self.asked % 30
        return ids, self.labels[index]


@pytest.mark.filterwarnings("ignore:Drifting gives other examples each time")
def test_tokens_that_were_not_in_the_stored_texts_stand_for_themselves(tmp_path):
    data = Drifting()
    result = spelled(tmp_path / "trace", loader(data, shuffle=True)).influence(loader(test_texts()))
    expected = by_class_and_label(result, data.labels)
    table = result.word_table(n=None)
    size = float(expected.abs().max())
    torch.testing.assert_close(table.values.sum(0), expected, rtol=1e-4, atol=1e-6 * size)


def test_groups():
    nothing = torch.full((3,), torch.nan)
    assert groups_of(nothing, str).names == ("all",)
    assert groups_of(torch.tensor([0.5, 1.0, torch.nan]), str).names == ("all",)
    assert groups_of(torch.tensor([2.0, 1.0]), {1.0: "one", 2.0: "two"}.get).of.tolist() == [1, 0]


def test_without_predictions_the_classes_are_the_test_labels_and_without_those_all(spelling):
    result = spelling.influence(loader(test_texts()))
    result.predictions.fill_(torch.nan)
    labels = test_texts().tensors[1]
    assert result.word_table().classes == tuple(str(each) for each in labels.unique().tolist())
    assert result.word_table().class_sizes.tolist() == torch.bincount(labels)[labels.unique()].tolist()
    result.test_texts.labels.fill_(torch.nan)
    table = result.word_table(n=None)
    assert table.classes == ("all",)
    assert float(table.values.sum()) == pytest.approx(float(result.scores.double().sum()), rel=1e-4)


def test_what_has_no_words(toy, tmp_path):
    with pytest.raises(ValueError, match="no word terms"):
        toy.influence(loader(test_texts()), method=TracInLast()).word_table()
    with pytest.raises(ValueError, match="n must be None or a whole number of at least 1, but got 0"):
        toy.influence(loader(test_texts())).word_table(n=0)
    result = fitted(tmp_path / "trace").influence(loader(test_texts()))
    shutil.rmtree(tmp_path / "trace")
    with pytest.raises(FileNotFoundError, match="trace"):
        result.word_table()


def made(values: torch.Tensor, **changes) -> WordTable:
    """A table of these values."""
    n_words, n_classes, n_labels = values.shape
    content = {
        "words": tuple(f"word{number}" for number in range(n_words)),
        "special": (False,) * n_words,
        "classes": tuple(f"class {number}" for number in range(n_classes)),
        "labels": tuple(f"label {number}" for number in range(n_labels)),
        "values": values,
        "examples": torch.full((n_words, n_labels), 7),
        "class_sizes": torch.full((n_classes,), 10),
        "label_sizes": torch.full((n_labels,), 20),
        "magnitudes": values.abs().sum((0, 2)),
        "n_left": 0,
    }
    return WordTable(**{**content, **changes})


def printed(table: WordTable, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().splitlines()


def test_a_printed_row_has_the_net_influence_and_the_label_that_most_of_it_comes_from():
    values = torch.zeros(2, 2, 2)
    values[0] = torch.tensor([[0.0045, -0.0005], [0.0, -0.003]])
    values[1, 0] = torch.tensor([0.0, 0.0001])
    lines = printed(made(values, words=("cup", "[CLS]")))
    assert lines[0] == "Words by their influence on 20 test examples, in units of 1e-04"
    cup, cls = (next(line for line in lines if word in line) for word in ("cup", "[CLS]"))
    assert cup.split() == ["cup", "14", "+40.0", "label", "0", "-30.0", "label", "1"]
    assert cls.split() == ["[CLS]", "14", "+1.0", "label", "1"]


@pytest.mark.parametrize("n_classes", [1, 2, 5, 30])
@pytest.mark.parametrize("width", [80, 120])
def test_printing_keeps_to_the_width_and_says_what_is_left(n_classes, width):
    values = torch.randn(40, n_classes, 3, generator=torch.Generator().manual_seed(0))
    words = tuple(word * 9 for word in ("[bold]", "杯", "straße", "$x_1$")) + ("w",) * 36
    lines = printed(made(values, words=words, labels=("entertainment" * 3,) * 3, n_left=12), width)
    assert max(map(len, lines)) <= width
    assert "20 of 40 words; to_pandas() has all" in lines
    assert any(line.startswith("12 words of less influence") for line in lines)
    assert any("[bold]" in line for line in lines)
    assert any("of 30 classes" in line for line in lines) == (n_classes == 30)


def test_an_empty_table_prints():
    assert "word" in str(made(torch.zeros(0, 2, 2)))


def test_shortcuts_are_words_that_one_label_alone_pushes_a_class_with():
    values = torch.zeros(4, 2, 2)
    values[0, 0] = torch.tensor([5.0, -5.0])  # a word of both labels
    values[1, 0] = torch.tensor([9.5, -0.5])  # of one
    values[2, 1] = torch.tensor([0.0, 3.0])  # of one, but special
    values[3, 1] = torch.tensor([-2.0, 0.1])  # of one, but against
    table = made(values, special=(False, False, True, False))
    (found,) = table.shortcuts()
    assert found[:3] == ("word1", "class 0", "label 0")
    assert found[3:] == pytest.approx((9.5, 9.5 / 20, 0.95))
    assert [each.word for each in table.shortcuts(purity=0.5)] == ["word1", "word0"]
    with pytest.raises(ValueError, match="several labels"):
        made(torch.ones(2, 2, 1)).shortcuts()


@pytest.mark.slow
def test_values_of_minilm_are_the_words_of_all_pairs(tmp_path):
    articles, names = topics.bbc_news()
    tokenizer = topics.AutoTokenizer.from_pretrained(topics.packaged_minilm())
    train, test = (topics.Tokenized(part, tokenizer, 48) for part in (articles[::120], articles[60::600]))

    def batches(data):
        return DataLoader(data, batch_size=8, collate_fn=lambda rows: tokenizer.pad(rows, return_tensors="pt"))

    model = topics.Classifier(topics.packaged_minilm(), names, tokenizer, total_steps=3)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[TracInCallback(tmp_path / "t")]
    )
    trainer.fit(model, batches(train))
    result = trainer.influence(batches(test), method=TracInWE(normalize="cosine"))
    labels = result.trace.texts(range(len(train))).labels
    table = result.word_table(n=None)
    named = {
        (word, names[int(said)], names[int(float(label))]): term
        for (word, said, label), term in word_sums(result, labels.long()).items()
    }
    assert_tables_hold(table, named)
    expected = by_class_and_label(result, labels)
    torch.testing.assert_close(table.values.sum(0), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
