"""Which example a position belongs to: found, and checked, by the gradients of single losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toy import CLASSES, Toy, fitted

from lightning_tracin.gradients.attention_masks import attended_ids
from lightning_tracin.gradients.calls import recorded_calls
from lightning_tracin.gradients.layouts import Layout, find_layouts

SIZE = 4


def rows_of(order: str, n_examples: int, n_rows: int) -> Tensor:
    """The example of each row."""
    examples = torch.arange(n_examples)
    return examples.repeat_interleave(n_rows) if order == "view" else examples.repeat(n_rows)


def found_in(values: Tensor, owners: Tensor, known=None, *, n_examples: int, transposed: bool = False, check=True):
    """The layout of a layer that is called on values (R, T, F) or (T, R, F), where losses are sums over rows."""
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, 3)

    def losses(value: Tensor) -> Tensor:
        outputs = layer(value)
        by_row = (outputs.transpose(0, 1) if transposed else outputs).flatten(1).tanh().sum(1)
        return torch.zeros(n_examples).index_add(0, owners, by_row)

    known = {} if known is None else {layer: known}
    with recorded_calls(losses, values, [layer]) as (per_example, calls):
        found = find_layouts(per_example, calls, known, check=check)[layer]
        positions = calls[0].positions
    return found, found.owners(n_examples, positions), known.get(layer)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 8])
@pytest.mark.parametrize(("n_examples", "n_rows"), [(2, 2), (2, 3), (4, 2), (5, 3), (3, 1)])
@pytest.mark.parametrize("order", ["view", "cat"])
def test_rows_are_found(order, n_examples, n_rows, length, transposed):
    owners = rows_of(order, n_examples, n_rows)
    values = torch.randn(len(owners), length, SIZE, generator=torch.Generator().manual_seed(1))
    values = values.transpose(0, 1) if transposed else values
    found, of_positions, known = found_in(values, owners, n_examples=n_examples, transposed=transposed)
    expected = owners[:, None].expand(-1, length)
    assert torch.equal(of_positions, expected.T if transposed else expected)
    assert known is not None
    assert found.dim == int(transposed)


def test_a_single_example_has_all_positions_and_teaches_nothing():
    owners = torch.zeros(3, dtype=torch.long)
    _, of_positions, known = found_in(torch.randn(3, 5, SIZE), owners, n_examples=1)
    assert not of_positions.any()
    assert not known.fits(2, torch.Size([2, 5]))
    values, owners = torch.randn(5, 4, SIZE), rows_of("cat", 2, 2)
    _, of_positions, _ = found_in(values, owners, known, n_examples=2, transposed=True, check=False)
    assert torch.equal(of_positions, owners.expand(5, 4))


@pytest.mark.parametrize("owners", [[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
def test_rows_in_other_numbers_or_orders_are_refused(owners):
    with pytest.raises(ValueError, match="depends on the other examples"):
        found_in(torch.randn(4, 5, SIZE), torch.tensor(owners), n_examples=2)


def test_rows_that_are_uneven_in_a_later_batch_are_refused():
    """As many rows for each example as before, on the mean."""
    known = Layout(checked=frozenset({1, 3}))
    owners = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="called on 8 rows for 4 examples, which do not belong to them in equal"):
        found_in(torch.randn(8, 5, SIZE), owners, known, n_examples=4, check=False)


def test_rows_that_no_number_divides_are_refused():
    with pytest.raises(ValueError, match=r"positions of shape \(5, 3\).*or a multiple of it, 2"):
        found_in(torch.randn(5, 3, SIZE), torch.tensor([0, 0, 0, 1, 1]), n_examples=2)


def test_what_was_seen_needs_no_further_backward_pass(monkeypatch):
    owners = rows_of("cat", 4, 2)
    _, _, known = found_in(torch.randn(8, 5, SIZE), owners, n_examples=4)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a backward pass"))
    _, of_positions, _ = found_in(torch.randn(8, 4, SIZE), owners, known, n_examples=4, check=False)
    assert torch.equal(of_positions, owners[:, None].expand(8, 4))


def test_masks_are_found_for_texts_that_are_put_together():
    ids, mask = torch.arange(24).view(2, 3, 4), torch.tensor([1, 1, 1, 0]).expand(2, 3, 4)
    choices = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    assert attended_ids(choices, ids.view(6, 4)).tolist() == [[True, True, True, False]] * 6
    pair = {"input_ids_a": ids[0], "attention_mask_a": mask[0], "input_ids_b": ids[1], "attention_mask_b": 1 - mask[1]}
    both = torch.cat([ids[0], ids[1]])
    assert attended_ids(pair, both).tolist() == [[True, True, True, False]] * 3 + [[False, False, False, True]] * 3
    assert attended_ids(pair, ids[1]).tolist() == [[False, False, False, True]] * 3
    assert attended_ids(pair, both.flip(0)) is None
    assert attended_ids({"input_ids": ids[0], "attention_mask": torch.ones(3, 1, 4, 4)}, ids[0]) is None


@pytest.mark.parametrize(("n_shared", "why"), [(4, "depends on the other"), (5, "neither the first nor")])
def test_a_layer_that_reads_what_examples_share_is_named(tmp_path, n_shared, why):
    class Related(Toy):
        def forward(self, ids):
            shared = self.hidden(torch.ones(n_shared, 8))  # batches are of 4
            return super().forward(ids) * shared.tanh().sum()

    with pytest.raises(
        ValueError, match=rf"layer hidden.*positions of shape \({n_shared},.*{why}.*leave it out of the"
    ):
        fitted(tmp_path, Related(), methods=("hidd*",))


def test_layers_without_gradients_are_left_out_of_patterns(tmp_path):
    class Taught(Toy):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(8, CLASSES)

        def forward(self, ids):
            with torch.no_grad():
                taught = self.teacher(torch.ones(5, 8)).mean(0)
            return super().forward(ids) + taught

    fit = fitted(tmp_path, Taught(), methods=("tracin-last", "*"))
    assert [site.layer for site in fit.callbacks[0].trace.sites] == ["head", "hidden"]
