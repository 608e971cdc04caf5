"""Framing whole batches on the device gives, bit for bit, what framing image by image on the host gives."""

import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, recipe_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from featprobe.datasets.images.framing import ImageKind
from featprobe.datasets.images.pixels import DTYPE_OF
from featprobe.datasets.images.reading import frame_image, header_of, image_size, read_levels, training_window
from featprobe.geometry import Part, Placement, place, place_tile
from featprobe.intensity import Intensity
from featprobe.specs import FeatureRecipe
from featprobe.stages.extraction.frames import Framing, ImageBuffer

DATA = Path(os.environ.get("FEATPROBE_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
MEAN = (0.485, 0.456, 0.406)
POLICIES = {
    "uint8": ["none", "window:10:200", "window:-5:300", "percentile:1:99:image", "window:3:250:log", "log:image"],
    "uint16": [
        "none",
        "window:900.5:40000",
        "percentile:1:99:image",
        "minmax:image",
        "window:7:60000:log",
        "log:image",
    ],
    "float32": ["window:-0.5:1.25", "minmax:image", "window:0.01:2:log", "log:image"],
}


def recipe_with(policy: str, frame: tuple[int, int] = (32, 32)) -> FeatureRecipe:
    parsed = Intensity.parse(policy)
    window = (parsed.low, parsed.high) if parsed.kind == "window" else None
    return replace(recipe_of(frame=frame), intensity=policy, window=window, mean=MEAN)


def levels_of(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> NDArray:
    if dtype == "float32":
        return rng.normal(0.4, 0.8, shape).astype(np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def same_bits(framing: Framing, levels: list, placements: list[Placement]) -> None:
    """Raise AssertionError where the batch differs from the images framed one by one."""
    recipe = framing.recipe
    found = framing.together(levels, placements)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (len(levels), 3, *recipe.frame))
    for own, placement, image in zip(levels, placements, found.numpy(), strict=True):
        np.testing.assert_array_equal(image, frame_image(own, placement, recipe))


@pytest.mark.parametrize(("dtype", "policy"), [(d, p) for d, policies in POLICIES.items() for p in policies])
@given(seed=st.integers(0, 2**32 - 1))
def test_any_levels_under_any_policy(dtype: str, policy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    framing = Framing(recipe_with(policy), CPU)
    levels, placements = [], []
    for _ in range(4):
        height, width = (int(side) for side in rng.integers(1, 33, 2))
        own = levels_of(rng, dtype, (height, width, 3) if rng.random() < 0.5 else (height, width))
        if rng.random() < 0.3:
            own[:] = own.flat[0]  # one level: an image's own window has no width
        if rng.random() < 0.5:
            mask = rng.random((height, width)) < 0.3
            own = np.ma.MaskedArray(own, mask if own.ndim == 2 else np.repeat(mask[:, :, None], 3, axis=2))
        content = (32, 17) if rng.random() < 0.2 else (height, width)  # some are resized
        levels.append(own)
        placements.append(Placement((height, width), content, (32, 32)))
    same_bits(framing, levels, placements)
    for own, placement in zip(levels, placements, strict=True):
        same_bits(framing, [own], [placement])


def test_a_batch_goes_raw_wherever_the_device_can_do_the_rest() -> None:
    small, whole = Placement((9, 9), (9, 9), (32, 32)), Placement((64, 64), (32, 32), (32, 32))

    def raw(policy: str, *kinds: ImageKind) -> bool:
        return Framing(recipe_with(policy), CPU).layout(kinds).raw

    eight, deep, fractions = (ImageKind(dtype, 1, False, False) for dtype in ("uint8", "uint16", "float32"))
    assert (
        ImageKind.of(np.zeros((9, 9), np.uint8), small) == eight
        and ImageKind.of(np.zeros((64, 64), np.uint8), whole).resized
    )
    assert (
        raw("none", eight)
        and raw("window:1:9:log", deep)
        and raw("minmax:image", deep)
        and raw("minmax:image", fractions)
    )
    assert not raw("window:1:9:log", fractions) and not raw("log:image", deep)
    assert not raw("none", eight, replace(eight, resized=True)) and not raw("none", eight, deep)
    assert raw("window:1:9", replace(deep, empty=True)) and not raw("window:-1:9", replace(deep, empty=True))
    assert raw("window:-1:9", replace(fractions, empty=True))


def test_a_buffer_that_is_used_again_keeps_nothing_of_the_batch_before() -> None:
    rng = np.random.default_rng(0)
    framing = Framing(recipe_with("none"), CPU)
    buffer = ImageBuffer(3, 32 * 32 * 3 * 4, CPU)
    for images, side, channels in ((3, 32, 3), (2, 9, 1), (3, 20, 3), (1, 1, 1)):
        levels = [levels_of(rng, "uint8", (side, side, 3) if channels == 3 else (side, side)) for _ in range(images)]
        placement = Placement((side, side), (side, side), (32, 32))
        buffer.begin(images, framing.layout([ImageKind.of(own, placement) for own in levels]), (32, 32))
        for k, own in enumerate(levels):
            framing.put(buffer, k, own, placement)
        found = framing.images(buffer).numpy()
        for k, own in enumerate(levels):
            np.testing.assert_array_equal(found[k], frame_image(own, placement, framing.recipe))
    framing.blank(buffer, 0)
    assert not framing.images(buffer).any()


def real_images() -> list[Path]:
    """A few images of every real set."""
    found = []
    for pattern in ("bsdata/data/*.jpg", "mt_defect/*/Imgs/*.jpg", "deeppcb/PCBData/*/*/*.jpg"):
        files = sorted(DATA.glob(pattern))
        found += files[:: max(1, len(files) // 6)][:6]
    return found


REAL, SCANS = real_images(), sorted(DATA.glob("sandstone_xrm/images/Train_images/*"))[:2]
needs_data = pytest.mark.skipif(not (REAL and SCANS), reason=f"no real images in {DATA} (FEATPROBE_SHARED_DATA)")


def written(tmp_path: Path) -> list[Path]:
    """Real pixels as the formats that are decoded into buffers: JPEG of all kinds, PNG of 8 and 16 bits."""
    found = []
    for i, source in enumerate(REAL[::6]):
        with Image.open(source) as image:
            shown = image.convert("RGB").crop((0, 0, 75, 61))
        for kind in ("L", "RGB"):
            for quality, sampling, progressive in ((50, 2, False), (95, 1, True), (100, 0, False)):
                path = tmp_path / f"{i}-{kind}-{quality}.jpg"
                shown.convert(kind).save(path, quality=quality, subsampling=sampling, progressive=progressive)
                found.append(path)
            shown.convert(kind).save(tmp_path / f"{i}-{kind}.png")
            found.append(tmp_path / f"{i}-{kind}.png")
        Image.fromarray(np.asarray(shown.convert("L"), dtype=np.uint16) * 257).save(tmp_path / f"{i}-deep.png")
        found.append(tmp_path / f"{i}-deep.png")
    return found


@needs_data
def test_what_is_decoded_into_a_buffer_is_what_is_read_and_what_pillow_reads(tmp_path: Path) -> None:
    for path in [*REAL, *SCANS, *written(tmp_path)]:
        header, (height, width) = header_of(path), image_size(path)
        place = np.full((height, width, 3) if header.channels == 3 else (height, width), 7, DTYPE_OF[header.bits])
        levels = read_levels(path, place)
        np.testing.assert_array_equal(levels, read_levels(path))
        assert levels is place or path.suffix not in (".jpg", ".png")
        if path.suffix in (".jpg", ".png"):
            with Image.open(path) as image:
                np.testing.assert_array_equal(levels, np.asarray(image))
        for other in (place[1:], place.astype(np.int32), np.zeros((*place.shape, 1), place.dtype), place[::1, ::-1]):
            assert read_levels(path, other) is not other


@needs_data
@pytest.mark.parametrize("size", [(61, 75), (64, 96), (33, 40)])
@pytest.mark.parametrize("fit", ["resize", "letterbox"])
def test_real_images_in_buffers_are_framed_as_on_the_host(size: tuple[int, int], fit: str, tmp_path: Path) -> None:
    by_bits: dict[int, list[Path]] = {}
    for path in written(tmp_path):
        by_bits.setdefault(header_of(path).bits, []).append(path)
    for paths in by_bits.values():
        placements = [place(image_size(path), size, fit, 32) for path in paths]
        framing = Framing(recipe_with("none", placements[0].frame), CPU)
        layout = framing.layout([ImageKind.of(header_of(p), own) for p, own in zip(paths, placements, strict=True)])
        buffer = ImageBuffer(len(paths), layout.image_bytes(framing.frame), CPU)
        buffer.begin(len(paths), layout, framing.frame)
        for k, (path, own) in enumerate(zip(paths, placements, strict=True)):
            framing.put(buffer, k, read_levels(path, framing.place_of(buffer, k, own)), own)
        for image, path, own in zip(framing.images(buffer).numpy(), paths, placements, strict=True):
            np.testing.assert_array_equal(image, frame_image(read_levels(path), own, framing.recipe))


@needs_data
def test_scans_by_their_own_windows_and_tiles_and_views_of_them() -> None:
    for policy in ("percentile:0.01:99.99", "percentile:0.01:99.99:image", "percentile:0.01:99.99:log"):
        recipe = recipe_with(policy, (64, 64))
        recipe = replace(recipe, window=training_window(SCANS, recipe.policy))
        parts = [
            Part(5, 9, 64, 64),
            Part(0, 30, 64, 50, "hflip"),
            Part(40, 0, 50, 64, "rot90"),
            Part(7, 7, 20, 31, "vflip"),
        ]
        shown = [part.take(read_levels(path)) for path in SCANS for part in parts]
        same_bits(Framing(recipe, CPU), shown, [place_tile(part.size, 64, (64, 64), 32) for part in parts] * 2)


def test_a_truncated_jpeg_is_refused_whatever_preview_it_carries(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8))
    preview = io.BytesIO()
    picture.resize((16, 16)).save(preview, "JPEG")
    whole = io.BytesIO()
    picture.save(whole, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + preview.getvalue())
    data = whole.getvalue()
    assert data.index(b"\xff\xd9") < len(data) // 2  # the preview's end
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_levels(path), np.asarray(image))
    for length in (len(data) - 2, len(data) * 3 // 4):
        path.write_bytes(data[:length])
        with pytest.raises(Exception, match=r"a\.jpg is truncated or damaged"):
            read_levels(path, np.zeros((64, 80, 3), np.uint8))
    path.write_bytes(data + b"\0" * 100)  # what stands behind the end is nobody's concern
    assert read_levels(path).shape == (64, 80, 3)
