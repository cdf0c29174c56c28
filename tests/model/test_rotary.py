"""Three axes: positions of packed rows, by their words, and what the model makes of them."""

import numpy as np
import pytest
import torch

from mmpt.model.rotary import Rotary, axes_of
from mmpt.stream import Rows, StreamBuilder
from mmpt.vocab import Modality


def _in_words(document) -> list[list[int]]:
    # ids count on; a grid's codes are at (time, row, column) from where it begins
    grids = {s.start: s for s in document.spans if s.modality != Modality.SPEECH}
    out, count = [], 0
    while len(out) < len(document):
        if len(out) in grids:
            grid = grids[len(out)].grid
            out += [[count + int(at) for at in place] for place in np.ndindex(*grid)]
            count += max(grid)
        else:
            out.append([count] * 3)
            count += 1
    return out


def test_a_packed_row_counts_each_document_by_its_grids(make_document, make_rows):
    axes, rows = axes_of(make_rows()), make_rows()
    for row, seeds in enumerate([(0, 1), (2,)]):
        expected = [place for seed in seeds for place in _in_words(make_document(seed, 2 + seed))]
        assert axes[row, : len(expected)].tolist() == expected
        assert (axes[row, len(expected) :] == 0).all()  # pads
    assert (axes[..., 0] <= rows.position).all()
    assert (axes[..., 0] < rows.position).any()


def test_text_alone_turns_as_on_one_axis(make_model, vocabulary, run):
    codes = np.arange(18)
    streams = [StreamBuilder(vocabulary).structure("<bod>").text(codes[i:]).build() for i in (0, 5)]
    rows = Rows.pack([streams], 40, 0)
    models = [make_model(rope=rope, head_width=12) for rope in ("1d", "3d")]
    flat, deep = (run(model, rows) for model in models)
    assert torch.equal(flat, deep)
    assert torch.equal(run(models[1], rows, axes=None), deep)


def test_a_code_is_told_by_its_row_and_its_column(make_model, make_rows, run):
    rows = make_rows()
    flat, deep = (run(make_model(rope=rope, head_width=12), rows) for rope in ("1d", "3d"))
    first = int((rows.modality[0] == Modality.IMAGE).int().argmax())
    assert torch.equal(flat[0, : first + 1], deep[0, : first + 1])
    assert (flat[0, first + 1] - deep[0, first + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("axis", range(3))
def test_scores_depend_on_distances_along_each_axis(make_config, axis):
    config = make_config(head_width=12, rope="3d")
    q, k = torch.randn(2, 1, 1, 1, 12, generator=torch.Generator().manual_seed(0)).double()

    def score(at_q: tuple[int, ...], at_k: tuple[int, ...]) -> torch.Tensor:
        turned = [
            Rotary.at(torch.tensor([[at]]), config, x.dtype).turn(x)
            for at, x in ((at_q, q), (at_k, k))
        ]
        return (turned[0] * turned[1]).sum()

    here, there, far = [5, 5, 5], [5, 5, 5], [5, 5, 5]
    there[axis], far[axis] = 7, 9
    torch.testing.assert_close(score(there, here), score(far, there))
    assert (score(there, here) - score(here, here)).abs() > 1e-3
