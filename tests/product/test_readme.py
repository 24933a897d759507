"""The README's complete script runs as it stands, but for the model and the data."""

from __future__ import annotations

import csv

import torch
from fences import blocks
from spellings import TEXTS, trained
from transformers import BertConfig, BertForSequenceClassification


def test_from_your_own_data_to_a_page(forks, tmp_path):
    (script,) = blocks("README.md", "python")
    tokenizer = trained("WordPiece")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with (tmp_path / "messages.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        messages = [*TEXTS * 6, *(word for text in TEXTS for word in text.split())]  # so that few words are common
        writer.writerows([text, ("ham", "spam")[place % 2]] for place, text in enumerate(messages))
    (tmp_path / "train.py").write_text(script.text.replace("distilbert-base-uncased", "model"), encoding="utf-8")
    done = forks.run("train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of all proponents  label " in done.stdout
    assert "Test example 0, label " in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert TEXTS[0].split()[2].removesuffix("'s") in page
