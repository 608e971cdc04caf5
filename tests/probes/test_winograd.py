"""Fewer products give the gradient of a convolution's weights that torch gives, for any size and in pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d

from featprobe.probes.operations import winograd
from featprobe.probes.operations.convolutions import weight_gradient


def of_torch(x: Tensor, gradient: Tensor, groups: int) -> Tensor:
    """torch's own gradient of the weights."""
    shape = (gradient.shape[1], x.shape[1] // groups, 3, 3)
    weight = torch.zeros(shape, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(conv2d(x, weight, padding=1, groups=groups), weight, gradient)[0]


@given(
    images=st.integers(0, 3),
    sides=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    channels=st.integers(1, 3),
    outputs=st.integers(1, 3),
    groups=st.integers(1, 3),
    tiles=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_it_is_torchs_for_any_size(
    images: int, sides: tuple[int, int], channels: int, outputs: int, groups: int, tiles: int, seed: int
) -> None:
    """In float64 to 1e-10, in float32 to 1e-5 of the largest sum of magnitudes; each image adds its own part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels * groups, *sides, dtype=torch.float64, generator=generator)
    above = torch.randn(images, outputs * groups, *sides, dtype=torch.float64, generator=generator)
    x, above = (m.contiguous(memory_format=torch.channels_last) for m in (x, above))
    expected, largest = of_torch(x, above, groups), of_torch(x.abs(), above.abs(), groups).max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "TILES", tiles)
        found = winograd.weight_gradient(x, above, groups)
        single = winograd.weight_gradient(x.float(), above.float(), groups)
        parts = [winograd.weight_gradient(x[i : i + 1], above[i : i + 1], groups) for i in range(images)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(parts, torch.zeros_like(found)), found, rtol=1e-10, atol=1e-10)
    assert float((single - expected).abs().max()) <= 1e-5 * float(largest)


@pytest.mark.parametrize(("capability", "fewer"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_only_machines_that_gain_take_it(capability: str, fewer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    taken: list[int] = []
    monkeypatch.setattr(winograd, "weight_gradient", lambda x, gradient, groups: taken.append(groups))
    x = torch.randn(1, 4, 5, 7)
    weight_gradient(x, x, 2)
    assert taken == ([2] if fewer else [])
