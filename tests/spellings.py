"""Texts in several scripts, and tokenizers of several kinds."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The Federal Reserve's tariffs, 10-year notes & U.S. stocks (NYSE) fell 3.5% — again!",
    "Il a mangé à l'hôtel naïvement; déjà-vu.",
    "你好世界。今天天气很好",
    "東京は日本の首都です。",
    "สวัสดีชาวโลก",
    "Привет, мир! Как дела?",
    "مرحبا بالعالم",
    "emoji 🙂🙂 and new\nlines  double  spaces ",
]


SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind, trained on the texts."""
    options = {"vocab_size": 400, "special_tokens": list(SPECIAL.values()), "show_progress": False}
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    elif kind == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "SentencePiece":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", **options)
    elif kind == "BPE":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", **options)
    elif kind == "characters":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        trainer = trainers.BpeTrainer(**options)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(**options)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


KINDS = ["WordPiece", "byte-level BPE", "SentencePiece", "BPE", "characters", "whitespace"]
