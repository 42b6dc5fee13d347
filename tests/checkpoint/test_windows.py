"""Constants that published models with windows store."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from efficient_detr.checkpoint.windows import (
    relative_position_index,
    shifted_window_mask,
    window_side,
)


@pytest.mark.parametrize("window", [1, 2, 7])
def test_index_counts_displacements(window: int) -> None:
    cells = list(product(range(window), repeat=2))
    index = relative_position_index(window)
    width = 2 * window - 1
    for (number, (row, column)), (other, (key_row, key_column)) in product(
        enumerate(cells), repeat=2
    ):
        expected = (row - key_row + window - 1) * width + column - key_column + window - 1
        assert index[number, other] == expected
    assert index.dtype == torch.int64
    assert window_side(width**2) == window


def test_mask_separates_what_shifting_brought_together() -> None:
    """Of 6 x 6 cells in windows of 3, rolled by 2, the last two of each side were the first."""
    mask = shifted_window_mask(6, 3, 2)
    assert mask.shape == (4, 9, 9) and mask.dtype == torch.float32
    assert not mask[0].any()
    # Right of it the first column of a window is apart from the other two.
    apart = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 0, 0]]).bool().repeat(3, 3)
    assert torch.equal(mask[1] == -100, apart)
    # Below it the first row.
    assert torch.equal(
        mask[2].reshape(3, 3, 3, 3) == -100, apart[:3, :3][:, None, :, None].expand(3, 3, 3, 3)
    )
    assert len(mask[3][0].unique()) == 2 and (mask[3][0] == 0).sum() == 1
