"""Names of classes, tokens and answers: which a target means, and what is printed for it."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_tracin.bridge.target_names import TargetNames
from lightning_tracin.gradients.outputs import Output


def named(name, kind, n_classes):
    """The names of a family whose words are w0, w1, ..."""
    module = FAMILIES[name].build()
    words = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"[UNK]": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    module.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    return TargetNames(module, Output(kind, torch.zeros(1, 2, n_classes)))


BATCH = {"input_ids": torch.arange(10).view(2, 5)}


def test_tokens_of_a_language_model_are_named_as_the_tokenizer_writes_them():
    names = named("gpt2-causal", "tokens", VOCABULARY)
    assert (names.number("w7"), names.number(7), names.label(7)) == (7, 7, "w7")
    assert names.of([3, 4], BATCH, 0) == "w3 w4"
    assert names.of(range(20), BATCH, 0).endswith("w11 …")
    for wrong in ("nowhere", "w1 w2"):
        with pytest.raises(ValueError, match=f"The target '{wrong}' is no single token"):
            names.number(wrong)


def test_tags_sets_answers_and_values():
    assert named("bert-tokens", "tokens", 3).of([2, 0], BATCH, 0) == "LABEL_2, LABEL_0"
    assert named("bert-multi-label", "set", 3).of([1.0, 0.0, 1.0], BATCH, 0) == "LABEL_0, LABEL_2"
    assert named("bert-multi-label", "set", 3).of([0.0, 0.0, 0.0], BATCH, 0) == "no class"
    assert named("bert-answers", "answer", 5).of([1, 3], BATCH, 1) == "w6 w7 w8"
    assert named("bert-regression", "value", 1).of([0.12345], BATCH, 0) == "0.123"
