"""The convolutions and the normalisation of heads on a CPU are torch's, in value and gradient."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from featprobe.probes.operations import convolutions, winograd
from featprobe.probes.operations import towers as towers_of
from featprobe.probes.operations.convolutions import (
    add_upsampled_and_convolved,
    convolved,
    few_outputs,
    weight_gradient,
)
from featprobe.probes.operations.norms import group_norm
from featprobe.probes.operations.towers import towers


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(own: Callable[..., Tensor], of_torch: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Assert that two functions have the same values and the same gradients of all inputs that have one."""
    pair = []
    for function in (own, of_torch):
        found = function(*inputs)
        above = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).square().view(found.shape)
        pair.append(
            [found, *torch.autograd.grad(found, [i for i in inputs if i.requires_grad], above, materialize_grads=True)]
        )
    for one, other in zip(*pair, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of these tests are computed in several pieces, the last of which has fewer rows."""
    torch.manual_seed(0)
    monkeypatch.setattr(convolutions, "CELLS", 14)


@pytest.fixture(params=[False, True], ids=["neighbourhoods", "fewer products"])
def either_gradient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of weights is computed in one of its two ways, whatever this machine takes."""
    monkeypatch.setattr(winograd, "suits", lambda: request.param)


@pytest.mark.usefixtures("either_gradient")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(4, 6, 1), (6, 4, 1), (4, 4, 2), (6, 2, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_torchs(
    rows: int, channels: int, outputs: int, groups: int, layout: torch.memory_format
) -> None:
    x, weight = random(2, channels, rows, 7), random(outputs, channels // groups, 3, 3)
    same(
        lambda x, weight: convolved(x.contiguous(memory_format=layout), weight, groups),
        lambda x, weight: conv2d(x, weight, padding=1, groups=groups),
        (x, weight),
    )


@pytest.mark.usefixtures("either_gradient")
def test_frozen_features_and_frozen_weights_get_no_gradient() -> None:
    x, weight = random(2, 4, 5, 7), random(6, 4, 3, 3)
    for inputs in ((x.detach(), weight), (x, weight.detach())):
        same(convolved, lambda x, weight: conv2d(x, weight, padding=1), inputs)


@pytest.mark.usefixtures("either_gradient")
def test_the_gradient_of_weights_stands_for_itself() -> None:
    x, gradient = random(2, 3, 6, 16).detach(), random(2, 5, 6, 16).detach()  # a row is larger than a piece
    weight = random(5, 3, 3, 3)
    (expected,) = torch.autograd.grad(conv2d(x, weight, padding=1), weight, gradient)
    torch.testing.assert_close(weight_gradient(x, gradient), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize("cells", [(5, 4), (1, 1), (2, 20)])
def test_upsampling_and_convolving_are_one_function_that_adds(times: int, cells: tuple[int, int]) -> None:
    total, x, weight = random(2, 5, *(times * n for n in cells)), random(2, 3, *cells), random(5, 3, 3, 3)
    for inputs in ((total, x, weight), (total, x.detach(), weight), (total.detach(), x, weight)):
        same(
            lambda total, x, weight: add_upsampled_and_convolved(total.clone(), x, weight, times),
            lambda total, x, weight: (
                total + conv2d(interpolate(x, scale_factor=times, mode="nearest"), weight, padding=1)
            ),
            inputs,
        )


@pytest.mark.parametrize("cells", [(5, 4), (1, 1)])
def test_few_outputs_are_their_convolution(cells: tuple[int, int]) -> None:
    x, weight = random(2, 7, *cells).detach(), random(5, 2, 3, 3).detach()
    own = x.contiguous(memory_format=torch.channels_last)[:, 4:6]  # of a wider map
    out = torch.empty(2, 5, cells[0] * cells[1], dtype=x.dtype)
    few_outputs(own, weight, out)
    torch.testing.assert_close(out, conv2d(x[:, 4:6], weight, padding=1).flatten(2), rtol=1e-10, atol=1e-10)


def plain_towers(
    x: Tensor, inside: Tensor | None, places: Tensor, named: Tensor, placed: Tensor, *own: Tensor
) -> tuple[Tensor, Tensor]:
    """What `towers` computes, by torch's operations on the cells inside of each image."""
    convs, norms, pairs = own[: len(own) // 3], own[len(own) // 3 :], []
    for step in range(len(norms) // 2):
        x = x if step == 0 else conv2d(x, convs[step - 1], padding=1, groups=2)
        maps = []
        for image, m in enumerate(x):
            rows, columns = m.shape[1:] if inside is None else (int(inside[image].any(d).sum()) for d in (1, 0))
            cells = torch.group_norm(m[None, :, :rows, :columns], 4, *norms[2 * step : 2 * step + 2]).relu()
            maps.append(pad(cells, (0, m.shape[2] - columns, 0, m.shape[1] - rows)))
        x = torch.cat(maps)
    for half, weight in zip(x.chunk(2, 1), (named, placed), strict=True):
        pairs.append(conv2d(half, weight, padding=1).flatten(2))
    return pairs[0], pairs[1].transpose(1, 2).flatten(0, 1)[places]


@pytest.mark.usefixtures("either_gradient")
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_two_towers_are_torchs(steps: int, padded: bool, every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of two images, the last of which is one alone; boxes at corners, beside each other, in no cell."""
    monkeypatch.setattr(towers_of, "CELLS", 2 * 5 * 7)
    inside = torch.zeros(3, 5, 7, dtype=torch.bool)
    inside[0], inside[1, :3], inside[2, :, :4] = True, True, True
    places = torch.arange(105) if every else torch.tensor([0, 6, 28, 34, 45, 46])
    x, outs = random(3, 8, 5, 7), [random(2, 4, 3, 3), random(5, 4, 3, 3)]
    convs, norms = [random(8, 4, 3, 3) for _ in range(steps - 1)], [random(8) for _ in range(2 * steps)]
    given = inside if padded else None

    def own(x: Tensor, named: Tensor, placed: Tensor, *rest: Tensor) -> Tensor:
        pairs = list(zip(rest[steps - 1 :: 2], rest[steps::2], strict=True))
        found = towers(x, given, places, pairs, rest[: steps - 1], (named, placed), 4, 1e-5)
        return torch.cat([part.flatten() for part in found])

    def of_torch(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in plain_towers(x, given, places, *rest)])

    same(own, of_torch, (x, *outs, *convs, *norms))


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_a_rectified_norm_is_torchs(images: int, groups: int) -> None:
    x, weight, bias = random(images, 12, 5, 7), random(12), random(12)
    same(
        lambda x, *own: group_norm(
            x.contiguous(memory_format=torch.channels_last), None, groups, *own, 1e-5, rectify=True
        ),
        lambda x, *own: torch.group_norm(x, groups, *own).relu(),
        (x, weight, bias),
    )


def test_a_rectified_norm_leaves_padding_out() -> None:
    x, weight, bias = random(2, 12, 5, 7), random(12), random(12)
    inside = torch.zeros(2, 5, 7, dtype=torch.bool)
    inside[0, :3], inside[1, :, :4] = True, True

    def of_torch(x: Tensor, *own: Tensor) -> Tensor:
        parts = [torch.group_norm(part, 3, *own).relu() for part in (x[:1, :, :3], x[1:, :, :, :4])]
        return torch.cat([pad(parts[0], (0, 0, 0, 2)), pad(parts[1], (0, 3))])

    same(
        lambda x, *own: group_norm(
            x.contiguous(memory_format=torch.channels_last), inside, 3, *own, 1e-5, rectify=True
        ),
        of_torch,
        (x, weight, bias),
    )
