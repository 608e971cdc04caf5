"""Features without their place: mean and maximum over an image's own cells."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.features import Features, Pooled, filled_cells, pool
from featprobe.levels import FeatureLevel

STRIDE, CHANNELS = 4, 3
LEVEL = FeatureLevel("stride4", CHANNELS, STRIDE)


def features_of(seed: int, contents: list[tuple[int, int]], cells: tuple[int, int]) -> Features:
    """Random maps, with large values in cells that hold nothing but padding."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(len(contents), CHANNELS, *cells, generator=generator)
    features = Features({LEVEL.name: m}, (cells[0] * STRIDE, cells[1] * STRIDE), torch.tensor(contents))
    share = features.valid_share(STRIDE)
    assert share is not None
    m.masked_fill_(share[:, None] == 0, 6e4)
    return features


def reference(m: torch.Tensor, content: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and maximum of one image by its pixels: each shows the cell in which it lies."""
    pixels = m.double().repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)[:, : content[0], : content[1]]
    return pixels.mean((1, 2)).numpy(), pixels.amax((1, 2)).numpy()


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], tuple[int, int]]:
    cells = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    side = st.tuples(*(st.integers(1, count * STRIDE) for count in cells))
    return draw(st.integers(0, 99)), draw(st.lists(side, min_size=1, max_size=4)), cells


@settings(deadline=None)
@given(made=batches())
def test_each_pixel_of_an_image_counts_once_and_padding_never(made: Any) -> None:
    features = features_of(*made)
    pooled = pool(features, [LEVEL])
    for row, content in enumerate(made[1]):
        mean, maximum = reference(features.maps[LEVEL.name][row], content)
        np.testing.assert_allclose(pooled.mean[LEVEL.name][row], mean, atol=1e-5)
        np.testing.assert_array_equal(pooled.maximum[LEVEL.name][row], maximum.astype(np.float32))
    share = features.valid_share(STRIDE)
    assert share is not None
    torch.testing.assert_close(pooled.cells[LEVEL.name], share.sum((1, 2)))


@settings(deadline=None)
@given(made=batches())
def test_a_row_is_the_same_bits_alone_in_a_batch_and_in_any_order_of_memory(made: Any) -> None:
    features = features_of(*made)
    m, content = features.maps[LEVEL.name].half(), features.content
    assert content is not None
    vectors = pool(Features({LEVEL.name: m}, features.frame, content), [LEVEL]).vectors([LEVEL])
    turned = m.contiguous(memory_format=torch.channels_last)
    assert torch.equal(vectors, pool(Features({LEVEL.name: turned}, features.frame, content), [LEVEL]).vectors([LEVEL]))
    for row in range(len(m)):
        alone = Features({LEVEL.name: m[row : row + 1]}, features.frame, content[row : row + 1])
        assert torch.equal(vectors[row : row + 1], pool(alone, [LEVEL]).vectors([LEVEL]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("whole", [True, False])
def test_few_large_operations_give_what_pieces_give(device: str, whole: bool) -> None:
    level = FeatureLevel("a", 40, 4)
    m = torch.randn(3, 40, 33, 47).half().float()
    content = None if whole else torch.tensor([[132, 188], [50, 188], [131, 7]])
    pieces = pool(Features({"a": m}, (132, 188), content), [level]).vectors([level])
    features = Features({"a": m.requires_grad_(device == "cpu")}, (132, 188), content).to(device)
    together = pool(features, [level]).vectors([level]).cpu()
    assert together.requires_grad == (device == "cpu")
    torch.testing.assert_close(together.detach(), pieces, rtol=0, atol=1e-5 * float(pieces.abs().max()))


def test_images_that_fill_their_frame_need_no_content() -> None:
    m = torch.randn(3, CHANNELS, 5, 7)
    without = pool(Features({LEVEL.name: m}, (20, 28)), [LEVEL])
    beside = pool(Features({LEVEL.name: m}, (20, 28), torch.tensor([[20, 28]] * 3)), [LEVEL])
    assert torch.equal(without.vectors([LEVEL]), beside.vectors([LEVEL]))
    assert torch.equal(without.cells[LEVEL.name], torch.full((3,), 35.0))


def test_an_image_of_one_cell_or_less_is_that_cell() -> None:
    for content in ((STRIDE, STRIDE), (1, 1)):
        m = torch.randn(1, CHANNELS, 2, 2)
        pooled = pool(Features({LEVEL.name: m}, (8, 8), torch.tensor([content])), [LEVEL])
        torch.testing.assert_close(pooled.vectors([LEVEL])[0], m[0, :, 0, 0].repeat(2))
        assert pooled.cells[LEVEL.name].tolist() == [content[0] * content[1] / STRIDE**2]


@settings(deadline=None)
@given(
    seed=st.integers(0, 99),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    side=st.integers(1, 4).map(lambda cells: cells * STRIDE),
)
def test_tiles_that_do_not_overlap_join_to_the_whole_image(seed: int, size: tuple[int, int], side: int) -> None:
    """Also with the tiles of another image between them."""
    cells = tuple(-(-length // STRIDE) for length in size)
    whole = torch.randn(CHANNELS, *cells, generator=torch.Generator().manual_seed(seed))
    tiles, contents = [], []
    for top in range(0, size[0], side):
        for left in range(0, size[1], side):
            content = min(side, size[0] - top), min(side, size[1] - left)
            held = torch.full((CHANNELS, side // STRIDE, side // STRIDE), 6e4)
            a, b = (-(-length // STRIDE) for length in content)
            held[:, :a, :b] = whole[:, top // STRIDE : top // STRIDE + a, left // STRIDE : left // STRIDE + b]
            tiles.append(held)
            contents.append(content)
    order, index = np.arange(2 * len(tiles)) // 2, np.arange(2 * len(tiles)) % 2
    m = torch.stack([tiles[i] for i in order])
    content = torch.tensor([contents[i] for i in order])
    joined = pool(Features({LEVEL.name: m}, (side, side), content), [LEVEL]).joined(torch.from_numpy(index), 2)
    mean, maximum = reference(whole, size)
    for image in (0, 1):
        np.testing.assert_allclose(joined.mean[LEVEL.name][image], mean, atol=1e-5)
        np.testing.assert_array_equal(joined.maximum[LEVEL.name][image], maximum.astype(np.float32))
    torch.testing.assert_close(joined.cells[LEVEL.name], filled_cells(torch.tensor([size] * 2), STRIDE))


def test_vectors_hold_mean_then_maximum_level_by_level_in_the_order_asked_for() -> None:
    one, other = FeatureLevel("a", 2, 4), FeatureLevel("b", 1, 8)
    pooled = Pooled(
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[5.0]])},
        {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[6.0]])},
        {},
    )
    assert pooled.vectors([one, other]).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert pooled.vectors([other, one]).tolist() == [[5, 6, 1, 2, 3, 4]]


@settings(max_examples=20, deadline=None)
@given(made=batches(), joined=st.booleans())
def test_gradients_reach_the_cells_of_the_image_alone(made: Any, joined: bool) -> None:
    features = features_of(*made)
    m = features.maps[LEVEL.name].requires_grad_()
    pooled = pool(features, [LEVEL])
    pooled = pooled.joined(torch.zeros(len(m), dtype=torch.int64), 1) if joined else pooled
    pooled.vectors([LEVEL]).sum().backward()
    share = features.valid_share(STRIDE)
    assert m.grad is not None and share is not None
    assert not m.grad.masked_select((share == 0)[:, None].expand_as(m)).any()
    images = 1 if joined else len(m)
    torch.testing.assert_close(m.grad.sum(), torch.tensor(2.0 * CHANNELS * images))  # 1 for a mean, 1 for a maximum
