"""A tiny classifier of texts that people can read, with a tokenizer of a few words and pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy import Toy, fitted
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[CLS]", "[UNK]"]

WORDS = ["the", "a", "cup", "goal", "team", "match", "bank", "loan", "rates", "cut", "unused", "film", "star", "song"]

PIECES = ["##s", "£", "##800", "##900"]

RARE = [f"w{number}" for number in range(13)]

TOKENS = [*SPECIAL, *WORDS, *PIECES, *RARE]

TRAIN = [
    "the cup ##s goal",
    "the team match",
    "the bank loan £ ##900",
    "the bank rates cut",
    "the film star",
    "a song the star",
    "the cup team",
    "the loan rates",
    "the match goal ##s",
    "the song film",
    "the team goal",
    "a bank cut",
    *(f"the {first} {second}" for first, second in pairwise(RARE)),
]

TEST = ["the cup match", "the loan £ ##800", "the film song"]

LENGTH = 7


class Spelled(Toy):
    """Has a WordPiece tokenizer of a few words."""

    def __init__(self) -> None:
        super().__init__()
        pieces = models.WordPiece({token: number for number, token in enumerate(TOKENS)}, unk_token="[UNK]")
        tokenizer = Tokenizer(pieces)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "unk_token": "[UNK]"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        self.embedding = nn.Embedding(len(TOKENS), 8, padding_idx=0)


def batches(texts: Sequence[str], labels: Sequence[int] | None = None, **options) -> DataLoader:
    """A loader of texts, written as tokens between spaces; by default their labels take turns."""
    rows = [[TOKENS.index(token) for token in f"[CLS] {text}".split()] for text in texts]
    ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    classes = torch.tensor([number % 3 for number in range(len(texts))] if labels is None else list(labels))
    return DataLoader(TensorDataset(ids, classes), batch_size=4, **options)


def spelled(path, texts: Sequence[str] = TRAIN, labels: Sequence[int] | None = None, **options):
    """A trainer that has fitted the classifier on texts, each time the same."""
    pl.seed_everything(0, verbose=False)
    return fitted(path, Spelled(), batches(texts, labels), **options)
