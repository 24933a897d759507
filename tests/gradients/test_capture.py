"""What is known after the first batch saves backward passes and memory, and changes no gradient."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import dense_gradients
from torch import nn
from torch.nn import functional
from toy import CLASSES, VOCABULARY, Toy, fitted, loader, test_texts, texts

from lightning_tracin import TracInMixin
from lightning_tracin.bridge.module_gradients import ModuleGradients
from lightning_tracin.gradients.capture import capture
from lightning_tracin.gradients.eval_mode import gradients_enabled
from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.sites import Site

WORDS = Site("words", "tracin-we", "embedding", "words")
LAST = Site("linear-0", "tracin-last", "head", "factors", is_last=True)
SITES = [WORDS, LAST]


class Square(Toy):
    """As many words as examples; may read them column by column, and remembers which parameters were learning."""

    time_first = False

    def forward(self, ids):
        self.learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        words = ids != 0
        vectors = self.embedding(ids.T).movedim(0, 1) if self.time_first else self.embedding(ids)
        return self.head(torch.tanh(self.hidden((vectors * words[..., None]).sum(1))))


class Mixing(TracInMixin, pl.LightningModule):
    """A transformer of torch, whose fused kernels would leave out padding; the mean is over padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, CLASSES)

    def influence_loss(self, batch):
        ids, labels = batch
        hidden = self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)
        return functional.cross_entropy(self.head(hidden.mean(1)), labels, reduction="none")


def rows(captured):
    of_blocks = [each for block in captured.gradients.values() for each in vars(block).values()]
    return [*of_blocks, captured.token_ids, captured.token_owners]


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("sites", [[WORDS], [LAST], SITES], ids=["words", "last", "both"])
def test_the_first_batch_tells_what_the_others_need_not_ask(monkeypatch, sites, time_first):
    """One backward pass for each of the others, none of them through weights; gradients to the last bit."""
    pl.seed_everything(0, verbose=False)
    module = Square()
    module.time_first = time_first
    batches = [texts(7, seed=seed, length=7).tensors for seed in range(3)]
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: passes.append(1) or grad(*args, **options))
    gradients = ModuleGradients(module, sites, recorded=SITES)
    with gradients_enabled(module):
        for number, batch in enumerate(batches):
            passes.clear()
            found = gradients.capture(batch)
            assert len(passes) == (2 if number == 0 else 1)
            assert bool(module.learning) == (number == 0)
            assert all(parameter.requires_grad for parameter in module.parameters())
            assert found.gradients.keys() == {site.key for site in sites}
            assert len(found.token_ids)
            alone = ModuleGradients(module, sites, recorded=SITES).capture(batch)
            for one, other in zip(rows(found), rows(alone), strict=True):
                assert one is other or one == other if isinstance(one, int | None) else torch.equal(one, other)
    assert gradients.layouts[module.embedding].dim == int(time_first)


def test_parameters_learn_again_after_an_error():
    module = Square()
    batch = texts(7, length=7).tensors
    layouts = {}
    with gradients_enabled(module):
        places = sites_on_module(module, [WORDS])
        capture(module.influence_loss, batch, places, layouts=layouts, module=module)
        module.embedding.requires_grad_(False)
        with pytest.raises(ValueError, match="one unreduced loss for each example"):
            capture(lambda each: module.influence_loss(each).mean(), batch, places, layouts=layouts, module=module)
    assert module.head.weight.requires_grad
    assert not module.embedding.weight.requires_grad


def test_a_mean_that_the_module_repeats_is_no_loss_of_single_examples(tmp_path):
    class Repeated(Toy):
        def influence_loss(self, batch):
            losses = super().influence_loss(batch)
            return losses.mean().expand(len(losses))

    with pytest.raises(ValueError, match="depends on the other examples of its batch"):
        fitted(tmp_path, Repeated())


@pytest.mark.parametrize("site", SITES, ids=["words", "last"])
def test_a_transformer_computes_what_it_computes_in_training(site):
    """In every batch; by brute force, one example at a time, padded as in its batch."""
    pl.seed_everything(0, verbose=False)
    module = Mixing()
    fast = torch.backends.mha.get_fastpath_enabled()
    gradients = ModuleGradients(module, [site], recorded=SITES)
    layer = module.get_submodule(site.layer)
    for batch in loader(test_texts(), batch_size=3):
        with gradients_enabled(module):
            block = gradients.capture(batch).gradients[site.key]
        singles = [[part[row : row + 1] for part in batch] for row in range(len(batch[0]))]
        expected = dense_gradients(module, layer, singles, module.influence_loss)
        found = torch.zeros_like(expected)
        if site.has_words:
            found[block.examples, block.tokens] = (block.factors[:, None] * block.directions).double()
        else:
            products = torch.einsum("po,pi->poi", block.deltas, block.inputs)
            products *= (block.delta_norms * block.input_norms)[:, None, None]
            found.index_add_(0, block.examples, products.double())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled() == fast
