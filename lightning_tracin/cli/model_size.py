"""What the size of a trace needs of a model, as its configuration tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The classes of transformers that make a model for a task, by the task's name.
TASKS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}

#: How names of architectures in a config.json end, and the task that they are for.
_ENDINGS = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForConditionalGeneration": "seq2seq-lm",
}


@dataclass(frozen=True)
class ModelSize:
    """What the size of a trace needs of a model.

    Attributes:
        parameters: their number, tied ones once.
        hidden: numbers in a row of the word embedding table.
        vocab: rows of that table.
        outputs: of the last layer.
        inputs: of the last layer, its bias counted among them.
        writes: whether the last layer is the head of a language model, which is called at every token.
        is_tied: whether it has the weight of the word embedding table.
        labelled: the share of tokens with a label, where the last layer is called at every token.
    """

    parameters: int
    hidden: int
    vocab: int
    outputs: int
    inputs: int
    writes: bool
    is_tied: bool
    labelled: float = 1.0


def size_of_model(folder: str, task: str | None, classes: int) -> ModelSize:
    """What a Hugging Face model's configuration tells: the model is built without memory, on the "meta" device.

    Args:
        folder: with its config.json.
        task: a key of ``TASKS``; by default what its architecture is for, else "sequence-classification".
        classes: outputs of a classifier.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if transformers has no such model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: pass the folder of a Hugging Face model.")
    import torch
    import transformers
    from torch import nn

    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    named = [(config.architectures or [""])[0]]
    task = task or next((_ENDINGS[end] for name in named for end in _ENDINGS if name.endswith(end)), None)
    task = task or "sequence-classification"
    if task.endswith("classification"):
        config.num_labels = classes
    with torch.device("meta"):
        model: Any = getattr(transformers, TASKS[task]).from_config(config)
    table = model.get_input_embeddings().weight
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    last = model.get_output_embeddings() or linear[-1]
    parameters = {id(each): each.numel() for each in model.parameters()}
    return ModelSize(
        parameters=sum(parameters.values()),
        hidden=table.shape[1],
        vocab=table.shape[0],
        outputs=last.weight.shape[0],
        inputs=last.weight.shape[1] + (last.bias is not None),
        writes=task != "sequence-classification",
        labelled=0.15 if task == "masked-lm" else 1.0,
        is_tied=last.weight is table or bool(config.get_text_config().tie_word_embeddings and task.endswith("-lm")),
    )
