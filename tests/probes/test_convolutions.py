"""The convolutions and the normalisation of heads on a CPU are torch's, in value and gradient."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from featprobe.probes.operations import convolutions
from featprobe.probes.operations.convolutions import convolved, few_outputs, upsampled_and_convolved, weight_gradient
from featprobe.probes.operations.norms import group_norm


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(own: Callable[..., Tensor], of_torch: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Assert that two functions have the same values and the same gradients of all inputs that have one."""
    pair = []
    for function in (own, of_torch):
        found = function(*inputs)
        above = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).square().view(found.shape)
        pair.append([found, *torch.autograd.grad(found, [i for i in inputs if i.requires_grad], above)])
    for one, other in zip(*pair, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of these tests are computed in several pieces, the last of which has fewer rows."""
    torch.manual_seed(0)
    monkeypatch.setattr(convolutions, "CELLS", 14)


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


def test_frozen_features_and_frozen_weights_get_no_gradient() -> None:
    x, weight = random(2, 4, 5, 7), random(6, 4, 3, 3)
    for inputs in ((x.detach(), weight), (x, weight.detach())):
        same(convolved, lambda x, weight: conv2d(x, weight, padding=1), inputs)


def test_the_gradient_of_weights_stands_for_itself() -> None:
    x, gradient = random(2, 3, 6, 16).detach(), random(2, 5, 6, 16).detach()  # a row is larger than a piece
    weight = random(5, 3, 3, 3)
    (expected,) = torch.autograd.grad(conv2d(x, weight, padding=1), weight, gradient)
    torch.testing.assert_close(weight_gradient(x, gradient), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize("cells", [(5, 4), (1, 1), (2, 20)])
def test_upsampling_and_convolving_are_one_function(times: int, cells: tuple[int, int]) -> None:
    x, weight = random(2, 3, *cells), random(5, 3, 3, 3)
    for inputs in ((x, weight), (x.detach(), weight)):
        same(
            lambda x, weight: upsampled_and_convolved(x, weight, times),
            lambda x, weight: conv2d(interpolate(x, scale_factor=times, mode="nearest"), weight, padding=1),
            inputs,
        )


@pytest.mark.parametrize("cells", [(5, 4), (1, 1)])
def test_few_outputs_of_several_maps_are_their_convolutions(cells: tuple[int, int]) -> None:
    x, first, second = random(2, 7, *cells), random(2, 4, 3, 3), random(5, 3, 3, 3)
    same(
        lambda x, *weights: few_outputs(x.contiguous(memory_format=torch.channels_last), weights),
        lambda x, one, other: torch.cat(
            [conv2d(x[:, :4], one, padding=1), conv2d(x[:, 4:], other, padding=1)], 1
        ).flatten(2),
        (x, first, second),
    )


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
