"""What a model says at masked places is explained at these, and not at others that a later pass masks."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from toy import fitted, loader


def masked(rows, places):
    """A batch whose texts have one masked token each, which is their only label."""
    ids, at = torch.stack(rows), torch.as_tensor(places)[:, None]
    labels = torch.full_like(ids, -100).scatter_(1, at, ids.gather(1, at))
    return {"input_ids": ids.scatter(1, at, 4), "attention_mask": torch.ones_like(ids), "labels": labels}


def at_random(rows):
    return masked(rows, torch.randint(8, (len(rows),)))


def by_text(rows):
    return masked(rows, [int(row.sum()) % 8 for row in rows])


def test_masks_that_are_drawn_again_are_refused(tmp_path):
    torch.manual_seed(0)
    texts = list(torch.randint(5, 30, (12, 8)))
    module = FAMILIES["bert-masked"].build()
    fit = fitted(tmp_path, module, loader(texts[:8], collate_fn=by_text), trainer={"max_epochs": 1})
    with pytest.raises(ValueError, match=r"has other tokens, or labels at other places.*at_random, or its data set"):
        fit.influence(loader(texts[8:], collate_fn=at_random), target="prediction")
    batch = by_text(texts[8:])
    with torch.no_grad():
        said = module.eval()(**batch).logits.argmax(-1)
    of_said = {**batch, "labels": torch.where(batch["labels"] == -100, -100, said)}
    expected = fit.influence(loader([0, 1, 2, 3], collate_fn=lambda rows: of_said)).scores
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        data = loader(texts[8:], 3, collate_fn=by_text, sampler=order)
        torch.testing.assert_close(fit.influence(data, target="prediction").scores, expected, rtol=1e-4, atol=1e-9)
