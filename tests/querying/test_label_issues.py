"""Label issues of a fit: flipped labels are found, and what is said of labels is what the model said."""

from __future__ import annotations

import csv

import pytest
import torch
from rich.console import Console
from spelled_fits import TEST, batches, spelled
from torch.nn import functional
from torch.utils.data import TensorDataset
from toy import CLASSES, N_TRAIN, VOCABULARY, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import TracInLast, TracInWE, apply_corrections, label_issues
from lightning_tracin.cli.command import main
from lightning_tracin.scoring.label_review import probably_wrong

N, FLIPPED = 150, (3, 11, 20, 34, 41, 55, 70, 88, 99, 103, 126, 140)


def clear_texts():
    """Texts whose words say their class, and their labels, some of which are flipped."""
    generator = torch.Generator().manual_seed(0)
    right = torch.arange(N) % CLASSES
    of_class = torch.randint(0, 12, (N, 6), generator=generator)
    ids = 1 + right[:, None] * 13 + of_class  # words 1 to 39, thirteen of each class
    given = right.clone()
    given[[*FLIPPED]] = (given[[*FLIPPED]] + 1) % CLASSES
    assert int(ids.max()) < VOCABULARY
    return ids, given, right


class Plain(Toy):
    """Without dropout, at a rate that learns in few steps."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Identity()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module", params=["checkpoint", "training"])
def flipped(request, tmp_path_factory):
    """A trainer that was fitted to texts with flipped labels."""
    ids, given, _ = clear_texts()
    data = loader(TensorDataset(ids, given), batch_size=10, shuffle=True)
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("flipped") / "trace"
    return fitted(path, Plain(), data, trainer={"max_epochs": 4}, cache=request.param)


def test_flipped_labels_are_the_first_and_most_issues(flipped):
    _, given, right = clear_texts()
    issues = flipped.label_issues()
    assert {each.example.index for each in issues.issues[: N // 5]} >= set(FLIPPED)
    wrong = [each for each in issues.issues if each.is_label_issue]
    found = [each for each in wrong if each.example.index in FLIPPED]
    assert len(found) > len(FLIPPED) / 2
    assert len(wrong) == issues.n_issues <= 1.25 * len(found)
    for each in found:
        index = each.example.index
        assert (each.example.label, each.predicted_label) == (str(int(given[index])), str(int(right[index])))
        assert each.label_score < 0.5


def test_ranks_are_those_of_self_influence(flipped):
    values = flipped.self_influence(method="tracin-last")
    issues = flipped.label_issues().issues
    assert [each.example.index for each in issues] == values.argsort(descending=True, stable=True).tolist()
    assert [each.self_influence for each in issues] == values.sort(descending=True).values.tolist()
    assert [each.rank for each in issues] == list(range(1, N + 1))
    for label in map(str, range(CLASSES)):
        of_class = [each.rank_in_class for each in issues if each.example.label == label]
        assert of_class == list(range(1, len(of_class) + 1))
    assert [each.rank for each in flipped.label_issues(n=4).issues] == [1, 2, 3, 4]


class Smoothed(Toy):
    def influence_loss(self, batch):
        ids, labels = batch
        return functional.cross_entropy(self(ids), labels, reduction="none", label_smoothing=0.2)


class WithoutBias(Toy):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, CLASSES, bias=False)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (Toy, "float32", 1e-6),
        (Toy, "float16", 1e-3),
        (Toy, "int8", 1e-2),
        (Smoothed, "float32", 1e-6),
        (WithoutBias, "float32", 1e-6),
    ],
)
def test_label_scores_are_the_mean_probabilities_of_the_model(tmp_path, kind, dtype, tolerance):
    trace = fitted(tmp_path / "trace", kind(), trainer={"max_epochs": 3}, dtype=dtype).callbacks[0].trace
    ids, labels = texts().tensors
    said = []
    for checkpoint in trace.checkpoints[:2]:  # the early ones of three
        module = kind().eval()
        module.load_state_dict(checkpoint.weights())
        with torch.no_grad():
            said.append(module(ids).softmax(1))
    mean = torch.stack(said).mean(0)
    issues = quiet().label_issues(trace=trace)
    for each in issues.issues:
        index = each.example.index
        assert each.label_score == pytest.approx(float(mean[index, labels[index]]), abs=tolerance)
        assert each.predicted_label == str(int(mean[index].argmax()))
    wrong = probably_wrong(mean, labels)
    assert {each.example.index for each in issues.issues if each.is_label_issue} == set(wrong.nonzero()[:, 0].tolist())


class Single(Toy):
    """A single logit, for a value."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 1)

    def influence_loss(self, batch):
        ids, labels = batch
        return (self(ids)[:, 0] - labels) ** 2


class Tagging(Toy):
    """A label for each token, the same for all of them."""

    def forward(self, ids):
        return self.head(self.embedding(ids))

    def influence_loss(self, batch):
        ids, labels = batch
        logits = self(ids)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), labels[:, None].expand(ids.shape).flatten(), reduction="none"
        )
        return (losses.view(ids.shape) * (ids != 0)).sum(1)


@pytest.mark.parametrize("kind", [Single, Tagging])
def test_where_there_is_no_classifier_of_texts_self_influence_alone_is_told(tmp_path, kind):
    issues = fitted(tmp_path / "trace", kind()).label_issues()
    assert {each.predicted_label for each in issues.issues} == {None}
    assert {each.is_label_issue for each in issues.issues} == {None}
    assert issues.n_issues is None
    expected = torch.arange(1, N_TRAIN + 1) / N_TRAIN  # the share that influences itself at least as much
    assert [each.label_score for each in issues.issues] == pytest.approx(expected.tolist())


def test_a_fit_that_recorded_words_alone_is_asked_by_them(tmp_path):
    fit = fitted(tmp_path / "trace", methods=("tracin-we",))
    with pytest.raises(ValueError, match="did not record the layer of TracInLast"):
        fit.label_issues()
    issues = fit.label_issues(method="tracin-we")
    assert [each.self_influence for each in issues.issues] == fit.self_influence().sort(descending=True).values.tolist()
    assert issues.n_issues is None


def test_gradients_that_are_not_stored_yet_are_computed(tmp_path):
    fit = fitted(tmp_path / "trace", cache="on_demand")
    trace = fit.callbacks[0].trace
    with pytest.raises(ValueError, match="no stored gradients for tracin-last"):
        quiet().label_issues(trace=trace.path)
    asked = quiet().label_issues(Toy(), train_dataloaders=loader(shuffle=True), trace=trace.path)
    assert [row["text"] for row in asked.rows()] == [row["text"] for row in fit.label_issues().rows()]


@pytest.mark.parametrize(
    "ask",
    [
        lambda fit, method: fit.self_influence(method=method),
        lambda fit, method: fit.label_issues(method=method),
        lambda fit, method: label_issues(fit, method=method),
        lambda fit, method: fit.influence(loader(test_texts()), method=method).self_influence(),
        lambda fit, method: fit.influence(loader(test_texts())).label_issues(method),
    ],
)
@pytest.mark.parametrize("method", [TracInWE(normalize="cosine"), TracInLast(normalize="cosine")], ids=repr)
def test_a_self_influence_that_is_the_same_for_all_is_an_error_that_says_what_to_use(toy, ask, method):
    with pytest.raises(
        ValueError, match=r"the cosine of a gradient with itself is 1\. Use \"tracin-last\".*normalize=None"
    ):
        ask(toy, method)


@pytest.mark.parametrize("names", [("special", "common"), ("the",)], ids=str)
def test_tokens_that_a_method_leaves_out_by_name_are_looked_up(tmp_path, names):
    fit, method = spelled(tmp_path / "trace"), TracInWE(exclude_tokens=names)
    result = fit.influence(batches(TEST), method=method)
    by_ids = fit.label_issues(method=TracInWE(exclude_tokens=result.method.excluded.ids)).rows()
    for issues in (fit.label_issues(method=method), result.label_issues(method)):
        assert issues.rows() == by_ids
        assert issues.method.startswith("TracIn-WE, without ")
    whole = fit.label_issues(method=TracInWE()).rows()
    assert [row["self_influence"] for row in whole] != [row["self_influence"] for row in by_ids]


def test_only_the_checkpoints_that_are_asked_for_count(toy):
    scores = toy.self_influence(method="tracin-last", checkpoints="last")
    issues = label_issues(toy, checkpoints="last").issues
    assert [each.self_influence for each in issues] == [float(scores[each.example.index]) for each in issues]
    assert [each.label_score for each in issues] != [each.label_score for each in toy.label_issues().issues]


def test_other_wrong_arguments(toy):
    with pytest.raises(ValueError, match="n must be None or a whole number of at least 0, but got -1"):
        toy.label_issues(n=-1)
    with pytest.raises(ValueError, match="texts must have a text for each of 20 examples, but has 2"):
        toy.label_issues(texts=["a", "b"])


def test_texts_as_they_were_written_and_names_of_labels(toy, monkeypatch):
    monkeypatch.setattr(Toy, "influence_label_names", lambda self: {0: "calm", 1: "angry", 2: "odd"})
    issues = toy.label_issues(texts=[(f"First {index}", "second") for index in range(N_TRAIN)])
    assert {row["text"] for row in issues.rows()} == {f"First {index}\nsecond" for index in range(N_TRAIN)}
    assert {row["given_label"] for row in issues.rows()} == {"calm", "angry", "odd"}


def test_examples_that_training_never_drew_are_left_out(tmp_path):
    drawn = [index for index in range(N_TRAIN) if index % 3]
    fit = fitted(tmp_path / "trace", data=loader(sampler=torch.utils.data.SubsetRandomSampler(drawn)))
    issues = fit.label_issues()
    assert sorted(each.example.index for each in issues.issues) == drawn
    assert {each.label_score is None for each in issues.issues} == {False}
    assert fit.influence(loader(test_texts())).label_issues().rows() == issues.rows()


def test_a_review_is_corrected_and_next_to_no_issues_are_left(flipped, tmp_path):
    ids, given, right = clear_texts()
    path = flipped.label_issues().to_csv(tmp_path / "review.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows[: N // 5]:  # as a person who knows what is right
        truth = str(int(right[int(row["train_index"])]))
        row["corrected_label"] = "" if truth == row["given_label"] else truth
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    corrected = apply_corrections(TensorDataset(ids, given), path)
    assert [int(label) for _, label in corrected] == right.tolist()
    again = fitted(
        tmp_path / "again", Plain(), loader(corrected, batch_size=10, shuffle=True), trainer={"max_epochs": 4}
    )
    assert again.label_issues().n_issues <= len(FLIPPED) / 4


def test_the_table_prints_and_reads_back(toy, tmp_path):
    issues = toy.label_issues(n=7)
    printed = str(issues)
    assert "20 training examples by self-influence (TracIn-Last)" in printed
    assert printed.count("\n") < 20
    assert repr(issues) == f"LabelIssues(n=7, n_train=20, n_issues={issues.n_issues})"
    with issues.to_csv(tmp_path / "a" / "review.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    for row, found in zip(issues.rows(), read, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == found
    pytest.importorskip("pandas")
    assert issues.to_pandas().to_dict("records") == issues.rows()
    console = Console(width=60, record=True)
    console.print(issues)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 60
    numbers = [line.split()[:3] for line in lines if line.strip()[:1].isdecimal()][1:]
    assert numbers == [[str(each.rank), str(each.example.index), f"{each.label_score:.2f}"] for each in issues.issues]


def test_the_command_line(toy, tmp_path, capsys):
    result = toy.influence(loader(test_texts())).save(tmp_path / "result.safetensors")
    assert main(["labels", str(result), "--csv", "-"]) == 0
    read = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [int(row["train_index"]) for row in read] == [each.example.index for each in toy.label_issues().issues]
    assert main(["labels", str(result), "-n", "3"]) == 0
    assert "20 training examples by self-influence (TracIn-Last)" in capsys.readouterr().out
