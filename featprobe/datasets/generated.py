"""Two generated inspection data sets, written as ordinary image files with COCO annotations.

`xray` holds radiographs of castings (16-bit grey PNG), `surface` photographs of metal and painted surfaces
(8-bit RGB PNG). A group is a part: one geometry and texture, seen in two poses. The defects are drawn anew
for each picture, as on two specimens from one mould. A picture is a function of the data set's name, the
seed, the part, the view and the picture's size alone.

Lengths are in reference pixels unless a docstring says otherwise: pixels of a picture whose shorter side is
256. A larger picture of a view shows the same part sampled more finely, with other defects.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from scipy import fft, ndimage
from scipy.spatial import cKDTree

from featprobe.datasets.samples import GENERATED
from featprobe.errors import DataError, nearest

VERSION = "1"  # raised whenever the same arguments give other pictures
VIEWS = 2  # pictures of one part
REFERENCE_SIDE = 256
PITCH = 0.2  # mm per reference pixel

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Rng = np.random.Generator
Point = tuple[float, float]
EffectOf = Callable[[Rng, int, Array], tuple[Array, Mask]]  # category and shape: see Defect
Pixels = NDArray[np.uint16] | NDArray[np.uint8]

_SHORTEST_SIDE = 32  # pixels
_CANVAS_SIDE = 360  # reference pixels; the textures repeat beyond
_MARGIN = 3.0  # reference pixels kept free around each defect
_SMALLEST_HALF_WIDTH = 1.1  # pixels: the sampling breaks no line's mask
_VISIBLE_PATH = 0.2  # mm: less material than that gained or lost is not marked
_AIR_COUNTS = 52_000.0  # the detector's signal with no part in the beam
_COUNTS_PER_PHOTON = 3.5
_READ_NOISE = 25.0  # counts
_BACKGROUND = 0.12  # reflectance of what lies behind a surface
_PART, _POSE, _DEFECTS, _LIGHT, _SENSOR = range(5)  # purposes of the random streams


@dataclass(frozen=True)
class View:
    """One picture to be taken: which part (from 0), which view of it (from 0), (height, width) in pixels."""

    name: str
    seed: int
    part: int
    index: int
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Pixels of this picture per reference pixel."""
        return min(self.size) / REFERENCE_SIDE

    def stream(self, purpose: int) -> Rng:
        """The random stream of this picture for one purpose; the views of a part share its `_PART` stream."""
        key = (GENERATED.index(self.name), purpose, self.part, 0 if purpose == _PART else self.index)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


@dataclass(frozen=True)
class Kind:
    """A class of defects: a line (`extent` is its length) or a blob (`extent` is its longer half axis).

    `breadth` is a line's full width in reference pixels or a blob's ratio of half axes; `waviness` is how far
    a line's heading (in radians) or a blob's radius (as a share) strays.
    """

    name: str
    is_line: bool
    extent: tuple[float, float]
    breadth: tuple[float, float]
    waviness: float


@dataclass(frozen=True)
class Defect:
    """One defect instance; `category` is its 1-based place in KINDS, `mask` is (height, width).

    `effect` is what it changes: mm of material added, (height, width), in a radiograph; the relative change
    of the reflectance, (height, width, 3), on a surface.
    """

    category: int
    effect: Array
    mask: Mask


KINDS = {
    "xray": (
        Kind("void", False, (3, 14), (0.6, 1.0), 0.0),
        Kind("inclusion", False, (2.5, 8), (0.5, 1.0), 0.0),
        Kind("crack", True, (30, 110), (1.5, 4), 0.4),
    ),
    "surface": (
        Kind("scratch", True, (30, 110), (1.5, 4), 0.1),
        Kind("pit", False, (3, 10), (0.6, 1.0), 0.0),
        Kind("stain", False, (8, 28), (0.6, 1.0), 0.12),
    ),
}
_DESCRIPTIONS = {
    "xray": "Generated radiographs of castings with voids, inclusions and cracks. No real part is shown.",
    "surface": "Generated photographs of surfaces with scratches, pits and stains. No real part is shown.",
}


def generate(name: str, out: Path, *, images: int = 240, size: tuple[int, int] = (256, 256), seed: int = 0) -> None:
    """Write the generated data set `name` into the folder `out`.

    `images` pictures of `size` (height, width) pixels go to `out/images`, two per part; COCO files of the
    train, val and test parts (60, 20 and 20 percent) go to `out/annotations`. The bytes depend only on the
    arguments. Raises DataError for a name not in GENERATED, fewer pictures than three parts need, a
    side under 32 pixels, a negative seed, or an `out` that is not a folder.
    """
    _check(name, out, images, size, seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    info = {"description": _DESCRIPTIONS[name], "generator": f"featprobe {name}", "version": VERSION,
            "seed": seed, "size": size, "license": "CC0-1.0"}  # fmt: skip
    categories = [{"id": number, "name": kind.name} for number, kind in enumerate(KINDS[name], 1)]
    annotation_id = 1
    for split, parts in split_parts(math.ceil(images / VIEWS), seed).items():
        coco: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        for view in [View(name, seed, part, index, size) for part in parts for index in range(VIEWS)]:
            image = VIEWS * view.part + view.index
            if image == images:  # an odd number: the last part has one view
                continue
            (pixels, defects), group = render(view), f"part{view.part:03d}"
            file_name = f"{group}_view{view.index}.png"
            Image.fromarray(pixels).save(out / "images" / file_name, compress_level=1)
            coco["images"].append(
                {"id": image + 1, "file_name": file_name, "height": size[0], "width": size[1], "group": group}
            )
            for defect in defects:
                coco["annotations"].append(_annotation(defect, annotation_id, image + 1))
                annotation_id += 1
        text = json.dumps({"info": info, **coco, "categories": categories})
        (out / "annotations" / f"{split}.json").write_bytes(text.encode())
    (out / "README.txt").write_bytes(
        f"{_DESCRIPTIONS[name]}\n\n{images} pictures of {size[0]} x {size[1]} pixels, two of each part, "
        f"seed {seed}, generator version {VERSION}.\n"
        "The splits in annotations/ (COCO JSON) share no part.\n\n"
        "Licence: generated by featprobe and dedicated to the public domain (CC0 1.0).\n".encode()
    )


def split_parts(parts: int, seed: int) -> dict[str, list[int]]:
    """Parts 0 .. parts-1 drawn at random into train, val and test, 60, 20 and 20 percent; no split is empty."""
    order = np.random.default_rng((seed, parts)).permutation(parts).tolist()
    held_out = max(1, round(0.2 * parts))
    test, val, train = order[:held_out], order[held_out : 2 * held_out], order[2 * held_out :]
    return {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def render(view: View, *, with_defects: bool = True, noise: bool = True) -> tuple[Pixels, list[Defect]]:
    """The picture of one view, uint16 (height, width) or uint8 (height, width, 3), and the defects in it.

    Where it is asked, the same view without its defects or without the sensor's noise.
    """
    return (_radiograph if view.name == "xray" else _photograph)(view, with_defects, noise)


# ---- files -------------------------------------------------------------------------------------------------


def _check(name: str, out: Path, images: int, size: tuple[int, int], seed: int) -> None:
    if name not in GENERATED:
        raise DataError(f"There is no generated data set {name!r}. {nearest(name, GENERATED)}")
    if math.ceil(images / VIEWS) < 3:
        raise DataError(f"{images} images are too few: three splits need three parts of {VIEWS} views each.")
    if min(size) < _SHORTEST_SIDE:
        raise DataError(f"{size[0]} x {size[1]} pixels are too few: a side must be {_SHORTEST_SIDE} or more.")
    if seed < 0:
        raise DataError(f"The seed of a generated data set must be 0 or more, and it is {seed}.")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is not a folder, so no data set can be written into it.")


def _annotation(defect: Defect, annotation_id: int, image_id: int) -> dict[str, object]:
    rle = coco_mask.encode(np.asfortranarray(defect.mask, dtype=np.uint8))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": defect.category,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "iscrowd": 0,
        "segmentation": {"size": list(defect.mask.shape), "counts": rle["counts"].decode("ascii")},
    }


# ---- geometry: a scene is drawn in part coordinates (u, v), reference pixels from its middle ---------------


def _part_coordinates(view: View) -> tuple[Array, Array]:
    """(u, v) of every pixel, each (height, width), for the random pose of this view."""
    rng = view.stream(_POSE)
    turn, zoom = rng.uniform(0, 2 * math.pi), view.scale * rng.uniform(1.02, 1.3)
    shift = rng.uniform(-18, 18, 2)
    rows, columns = np.indices(view.size, dtype=np.float64)
    y = (rows - view.size[0] / 2) / zoom - shift[0]
    x = (columns - view.size[1] / 2) / zoom - shift[1]
    return math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y


def _field(view: View) -> Array:
    """Row and column of every pixel as shares of the sides, from the middle: (2, height, width)."""
    return np.indices(view.size) / np.reshape(view.size, (2, 1, 1)) - 0.5


def _fill(distance: Array, wall: float = 1.5) -> Array:
    """1 inside (negative signed distance), 0 outside, with a slanted wall of that width between."""
    return np.clip(0.5 - distance / wall, 0, 1)


def _box(u: Array, v: Array, half_u: float, half_v: float, corner: float = 10.0) -> Array:
    """Signed distance to a box with rounded corners."""
    du, dv = np.abs(u) - half_u + corner, np.abs(v) - half_v + corner
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - corner


def _disc(u: Array, v: Array, centre: Point, radius: float) -> Array:
    """Signed distance to a disc."""
    return np.hypot(u - centre[0], v - centre[1]) - radius


def _circle(count: int, radius: float, start: float = 0.0) -> list[Point]:
    """(u, v) of points evenly spaced on a circle."""
    turns = start + 2 * math.pi * np.arange(count) / count
    return [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]


def _texture(rng: Rng, u: Array, v: Array, along: float, across: float, power: float = 0.0) -> Array:
    """Gaussian noise of unit deviation fixed to the part: |f|**power, smoothed `along` u and `across` v."""
    fv = fft.fftfreq(_CANVAS_SIDE)[:, None].astype(np.float32)
    fu = fft.rfftfreq(_CANVAS_SIDE)[None, :].astype(np.float32)
    gain = np.exp(-2 * math.pi**2 * ((fu * along) ** 2 + (fv * across) ** 2))
    gain *= np.maximum(np.hypot(fu, fv), 1 / _CANVAS_SIDE) ** power
    gain[0, 0] = 0
    white = rng.standard_normal((_CANVAS_SIDE, _CANVAS_SIDE), dtype=np.float32)  # v, u
    canvas = fft.irfft2(fft.rfft2(white) * gain)
    at = np.stack([v, u]) + _CANVAS_SIDE / 2
    noise = ndimage.map_coordinates(canvas, at, np.float64, order=1, mode="grid-wrap")
    return np.asarray(noise / canvas.std())


def _lettering(rng: Rng, u: Array, v: Array) -> Array:
    """A part number somewhere near the middle: 1 on its strokes, 0 elsewhere."""
    text = "".join(rng.choice(list("ABCDEFHKLNPRTX0123456789"), 5))
    tile = Image.new("L", (100, 34))
    font = ImageFont.load_default(size=int(rng.integers(14, 24)))
    ImageDraw.Draw(tile).text((6, 4), text, fill=255, font=font)
    at = np.stack([v + rng.uniform(-30, 60), u + rng.uniform(20, 80)])
    return np.asarray(ndimage.map_coordinates(np.asarray(tile) / 255, at, order=1))


# ---- defects: a shape is a map of rho, 1 on its outline and less inside ------------------------------------


def _place_defects(view: View, inside: Mask, effect_of: EffectOf) -> list[Defect]:
    """1 to 4 defects (in a part's first view; none in half of the others) that keep clear of one another."""
    rng = view.stream(_DEFECTS)
    count = int(rng.integers(1, 5)) * (view.index == 0 or rng.random() < 0.5)
    free = np.pad(inside[1:-1, 1:-1], 1)
    defects = []
    for category in rng.integers(1, 4, count).tolist():
        rho = _place(rng, free, KINDS[view.name][category - 1], view.scale)
        if rho is not None:
            effect, mask = effect_of(rng, category, rho)
            defects.append(Defect(category, effect, mask))
            free &= ~(mask | (rho < 1))
    return defects


def _place(rng: Rng, free: Mask, kind: Kind, scale: float) -> Array | None:
    """The rho map, (height, width), of a shape of that kind in the free pixels; None where no try fits."""
    clearance = ndimage.distance_transform_edt(free)
    for _ in range(60):
        extent, breadth = scale * rng.uniform(*kind.extent), rng.uniform(*kind.breadth)
        half_width = max(scale * breadth / 2, _SMALLEST_HALF_WIDTH) if kind.is_line else max(extent, 1.5)
        reach = half_width * (1 + 2 * kind.waviness * (not kind.is_line)) + _MARGIN * scale
        room = np.argwhere(clearance > reach)
        if not len(room):
            continue
        centre = rng.choice(room).astype(np.float64)
        if not kind.is_line:
            return _blob_rho(rng, free.shape, centre, half_width, half_width * breadth, kind.waviness)
        spine = centre + _spine(rng, extent, kind.waviness)
        cells = np.rint(spine).astype(int)
        if (cells >= 0).all() and (cells < free.shape).all() and (clearance[tuple(cells.T)] > reach).all():
            return _line_rho(free.shape, spine, half_width)
    return None


def _blob_rho(rng: Rng, shape: tuple[int, ...], centre: Array, a: float, b: float, waviness: float) -> Array:
    """rho of an ellipse with half axes a and b in pixels, turned at random, lobed by `waviness`."""
    rows, columns = np.indices(shape) - centre[:, None, None]
    turn = rng.uniform(0, math.pi)
    x = (math.cos(turn) * columns + math.sin(turn) * rows) / a
    y = (math.cos(turn) * rows - math.sin(turn) * columns) / b
    radius = np.hypot(x, y)
    if waviness:
        around = np.arctan2(y, x)
        lobes = [rng.normal(0, waviness) * np.cos(k * around + rng.uniform(0, 6)) / k for k in (2, 3, 5)]
        radius /= np.clip(1 + 1.5 * sum(lobes), 0.5, 1 + 2 * waviness)
    return radius


def _spine(rng: Rng, length: float, waviness: float) -> Array:
    """A curved line about the origin: (row, column) of points a quarter of a pixel apart, in pixels."""
    count = max(int(4 * length), 8)
    along, knots = np.linspace(-0.5, 0.5, count), np.linspace(-0.5, 0.5, 12)
    heading = rng.uniform(0, 2 * math.pi) + rng.normal(0, 0.9) * along
    heading += np.interp(along, knots, rng.normal(0, waviness, len(knots)))
    points = np.cumsum(np.stack([np.sin(heading), np.cos(heading)], axis=1), axis=0) / 4
    return points - points[count // 2]


def _line_rho(shape: tuple[int, ...], spine: Array, half_width: float) -> Array:
    """rho of a line along `spine`, `half_width` pixels in its middle and the smallest allowed at its ends."""
    taper = 1 - np.linspace(-1, 1, len(spine)) ** 2
    widths = _SMALLEST_HALF_WIDTH + (half_width - _SMALLEST_HALF_WIDTH) * taper
    start = np.maximum(np.floor(spine.min(axis=0) - 2 * half_width).astype(int), 0)
    stop = np.ceil(spine.max(axis=0) + 2 * half_width).astype(int)
    window = np.indices(shape)[:, start[0] : stop[0], start[1] : stop[1]]
    distance, nearest = cKDTree(spine).query(np.moveaxis(window, 0, -1))
    rho = np.full(shape, np.inf)
    rho[start[0] : stop[0], start[1] : stop[1]] = distance / widths[nearest]
    return rho


# ---- radiographs -------------------------------------------------------------------------------------------


def _radiograph(view: View, with_defects: bool, noise: bool) -> tuple[Pixels, list[Defect]]:
    """Counts after Beer-Lambert attenuation, I = I0 exp(-mu t), scatter, blur and, if asked, noise."""
    part, light = view.stream(_PART), view.stream(_LIGHT)
    u, v = _part_coordinates(view)
    thickness, attenuation = _casting(part, u, v), part.uniform(0.045, 0.065)  # mm, 1/mm
    defects = []
    if with_defects:
        defects = _place_defects(view, thickness > 4, lambda *drawn: _flaw(thickness, view, *drawn))
    path = thickness + sum(defect.effect for defect in defects)
    primary = _beam(light, view) * np.exp(-attenuation * path)
    scatter_share = light.uniform(0.15, 0.4)
    reach = max(round(56 * view.scale), 3)  # pixels
    scatter = primary
    for _ in range(2):
        scatter = ndimage.uniform_filter(scatter, reach, mode="nearest")
    fluence = (primary + scatter_share * scatter) / (1 + scatter_share)
    signal = ndimage.gaussian_filter(fluence, 0.8 * view.scale)
    if noise:
        signal = _detect(view, signal)
    return np.clip(np.rint(signal), 0, 65_535).astype(np.uint16), defects


def _beam(rng: Rng, view: View) -> Array:
    """Unattenuated counts, (height, width): exposure, heel effect to one side, fall-off to the corners."""
    rows, columns = _field(view)
    turn = rng.uniform(0, 2 * math.pi)
    heel = rng.uniform(0.05, 0.2) * (math.cos(turn) * rows + math.sin(turn) * columns)
    return _AIR_COUNTS * rng.uniform(0.75, 1.0) * (1 + heel - 0.15 * (rows**2 + columns**2))


def _detect(view: View, signal: Array) -> Array:
    """Counts read out: photon noise, read noise, and what gain differences of columns and pixels remain."""
    rng = view.stream(_SENSOR)
    gain = rng.normal(1, 0.002, view.size[1]) + rng.normal(0, 0.003, view.size)
    counts = _COUNTS_PER_PHOTON * rng.poisson(signal / _COUNTS_PER_PHOTON)
    return gain * counts + rng.normal(0, _READ_NOISE, view.size)


def _flaw(thickness: Array, view: View, rng: Rng, category: int, rho: Array) -> tuple[Array, Mask]:
    """mm of material added, (height, width), and the mask, for a void, an inclusion or a crack."""
    if category == 3:
        path = math.exp(rng.uniform(math.log(1.6), math.log(4.5))) * np.clip(1.4 - rho, 0, 1)
        path = np.minimum(path, 0.6 * thickness)
        return -path, rho <= 1
    radius = PITCH * math.sqrt((rho < 1).sum() / math.pi) / view.scale  # mm
    dome = np.sqrt(np.clip(1 - rho**2, 0, None))
    if category == 1:
        path = np.minimum(max(2 * radius * rng.uniform(0.4, 1.0), 0.9) * dome, 0.6 * thickness)
        return -path, path > _VISIBLE_PATH
    path = np.clip(2 * radius * math.exp(rng.uniform(-0.7, 1.2)), 1.1, 5) * dome
    return path, path > _VISIBLE_PATH


def _casting(rng: Rng, u: Array, v: Array) -> Array:
    """Thickness in mm, (height, width), of a casting of one of four families, with skin and number."""
    family = (_plate, _flange, _housing, _wedge)[rng.integers(4)]
    body = family(rng, u, v)
    skin = rng.uniform(0.05, 0.14) * _texture(rng, u, v, 1.5, 1.5, -0.6)
    number = rng.choice([-0.7, 0.9, 1.4]) * _lettering(rng, u, v)
    return np.where(body > 3, body + skin + number, body)


def _plate(rng: Rng, u: Array, v: Array) -> Array:
    """A plate with parallel ribs, sometimes a cross rib, ejector marks and corner holes."""
    half_u, half_v = rng.uniform(95, 120), rng.uniform(70, 105)
    outline = _fill(_box(u, v, half_u, half_v), 3)
    body = np.full_like(u, rng.uniform(7, 13))
    width, height = rng.uniform(3, 7), rng.uniform(3, 8)
    for middle in np.linspace(-0.6, 0.6, rng.integers(2, 5)) * half_u:
        body = np.maximum(body, body[0, 0] + height * _fill(np.abs(u - middle) - width, 4))
    if rng.random() < 0.6:
        body = body + 0.7 * height * _fill(np.abs(v - rng.uniform(-30, 30)) - width, 4)
    for middle in _circle(4, rng.uniform(45, 65), rng.uniform(0, 1)):
        body = body + rng.uniform(0.5, 1.0) * _fill(_disc(u, v, middle, 6))
    holes = _fill(_disc(np.abs(u), np.abs(v), (half_u - 18, half_v - 18), rng.uniform(5, 10)))
    return outline * body * (1 - holes)


def _flange(rng: Rng, u: Array, v: Array) -> Array:
    """A flange: a disc with a bore, a raised hub, bolt holes and radial ribs."""
    outer, bore = rng.uniform(100, 125), rng.uniform(18, 36)
    hub, bolts = bore + rng.uniform(12, 24), int(rng.integers(4, 9))
    body = rng.uniform(7, 12) + rng.uniform(5, 10) * _fill(_disc(u, v, (0, 0), hub), 5)
    body += rng.uniform(2, 5) * _fill(np.abs(_disc(u, v, (0, 0), outer - 10)) - 8, 3)
    spread = np.abs((np.arctan2(v, u) * bolts / (2 * math.pi)) % 1 - 0.5) * 2 * math.pi / bolts
    body += rng.uniform(2, 5) * _fill(np.hypot(u, v) * np.sin(spread) - rng.uniform(3, 5), 3)
    for middle in _circle(bolts, (hub + outer) / 2):
        body = body * (1 - _fill(_disc(u, v, middle, 6.5)))
    return body * _fill(_disc(u, v, (0, 0), outer), 3) * (1 - _fill(_disc(u, v, (0, 0), bore)))


def _housing(rng: Rng, u: Array, v: Array) -> Array:
    """A housing: a thin floor in thick walls, bored bosses and a bearing seat."""
    half_u, half_v = rng.uniform(95, 118), rng.uniform(80, 105)
    edge = _box(u, v, half_u, half_v, 20)
    body = rng.uniform(6, 10) + rng.uniform(7, 12) * _fill(np.abs(edge + 10) - 8, 4)
    seat = (rng.uniform(-25, 25), rng.uniform(-20, 20))
    body += rng.uniform(4, 8) * _fill(np.abs(_disc(u, v, seat, rng.uniform(24, 34))) - rng.uniform(5, 8), 4)
    pins = [(side * (half_u - 34), end * (half_v - 32)) for side in (-1, 1) for end in (-1, 1)]
    for middle in pins[: rng.integers(2, 5)]:
        body = np.maximum(body, rng.uniform(14, 18) * _fill(_disc(u, v, middle, rng.uniform(12, 15)), 3))
        body = body * (1 - _fill(_disc(u, v, middle, 5)))
    return body * _fill(edge, 3)


def _wedge(rng: Rng, u: Array, v: Array) -> Array:
    """A stepped wedge, its steps rising along u, with a row of holes and a groove."""
    half_u, half_v, steps = rng.uniform(105, 125), rng.uniform(60, 95), int(rng.integers(4, 8))
    body = np.full_like(u, rng.uniform(5, 8))
    rise = rng.uniform(14, 20) / steps
    for start in np.linspace(-half_u, half_u, steps + 1)[1:-1]:
        body += rise * _fill(start - u, rng.uniform(2, 8))
    body -= rng.uniform(1, 2) * _fill(np.abs(v - rng.uniform(-0.5, 0.5) * half_v) - rng.uniform(2, 4), 2)
    for place in np.linspace(-0.8, 0.8, rng.integers(2, 5)):
        body = body * (1 - _fill(_disc(u, v, (place * half_u, 0.78 * half_v), 5)))
    return body * _fill(_box(u, v, half_u, half_v, 4), 3)


# ---- surfaces ----------------------------------------------------------------------------------------------


def _photograph(view: View, with_defects: bool, noise: bool) -> tuple[Pixels, list[Defect]]:
    """8-bit colours: reflectance under uneven light with a highlight, dust and, if asked, noise."""
    light = view.stream(_LIGHT)
    turn = light.uniform(0, 2 * math.pi)
    towards = (math.sin(turn), math.cos(turn))  # row, column
    reflectance, inside = _surface(view, towards)
    defects = []
    if with_defects:
        defects = _place_defects(view, inside, lambda *drawn: _blemish(towards, view, *drawn))
    for defect in defects:
        reflectance = reflectance * (1 + defect.effect)
    colours = _illuminate(light, reflectance, towards, view)
    if noise:
        colours += 0.012 * view.stream(_SENSOR).standard_normal(colours.shape, dtype=np.float32)
    return np.clip(np.rint(255 * colours), 0, 255).astype(np.uint8), defects


def _relief(height: Array, towards: Point, view: View) -> Array:
    """How much a height map in reference pixels is turned to the light: minus its slope along `towards`."""
    rise_rows, rise_columns = np.gradient(height, 1 / view.scale)
    return np.asarray(-(towards[0] * rise_rows + towards[1] * rise_columns))


def _surface(view: View, towards: Point) -> tuple[Array, Mask]:
    """Reflectance (height, width, 3) without defects, and the mask of where the surface is."""
    rng, (u, v) = view.stream(_PART), _part_coordinates(view)
    shade, height, colour = (_brushed, _cast, _coated)[rng.integers(3)](rng, u, v)
    if rng.random() < 0.4:  # machining marks: evenly spaced lines right across
        pitch = rng.uniform(18, 45)
        shade = shade + rng.uniform(-0.12, 0.12) * _fill(np.abs((v + 0.1 * u) % pitch - pitch / 2) - 0.7)
    if rng.random() < 0.4:
        height = height - 0.25 * _lettering(rng, u, v)
    hole = _disc(u, v, (rng.uniform(-170, 170), rng.uniform(-170, 170)), rng.uniform(8, 15))
    border = np.minimum(rng.uniform(75, 190) - u, hole)  # reference pixels to the nearest end of the surface
    shade = shade + _relief(height, towards, view) + 0.2 * _fill(np.abs(border - 1.5) - 1)  # with a bevel
    lit = np.clip(shade, 0.05, None)[..., None] * np.asarray(colour)
    return np.where(border[..., None] > 0, lit, _BACKGROUND), border > 4


# Each finish gives the shade (relative), the height (reference pixels) and the colour (red, green, blue).
Finish = tuple[Array, Array, tuple[float, float, float]]


def _brushed(rng: Rng, u: Array, v: Array) -> Finish:
    """Brushed metal: streaks along u in steel, brass, copper, blue anodised and dark colours."""
    steel, brass, copper = (0.62, 0.63, 0.65), (0.70, 0.60, 0.38), (0.70, 0.48, 0.38)
    colour = (steel, brass, copper, (0.42, 0.50, 0.62), (0.45, 0.44, 0.42))[rng.integers(5)]
    streaks = rng.uniform(0.05, 0.1) * _texture(rng, u, v, 22, 0.6) + 0.04 * _texture(rng, u, v, 60, 4)
    return 1 + streaks, np.zeros_like(u), colour


def _cast(rng: Rng, u: Array, v: Array) -> Finish:
    """A cast skin: rough at many scales, with pores smaller than any pit."""
    grey, warmth = rng.uniform(0.35, 0.6), rng.uniform(-0.04, 0.06)
    rough, pores = _texture(rng, u, v, 1.2, 1.2, -0.6), np.clip(_texture(rng, u, v, 1, 1) - 2.7, 0, 1)
    colour = (grey + warmth, grey, grey - warmth)
    return 1 + 0.06 * rough - 0.6 * pores, rng.uniform(0.1, 0.25) * rough, colour


def _coated(rng: Rng, u: Array, v: Array) -> Finish:
    """A painted or powder-coated sheet of any colour, with orange peel."""
    red, green, blue = rng.uniform(0.15, 0.7, 3).tolist()
    peel = rng.uniform(0.05, 0.15) * _texture(rng, u, v, 2.2, 2.2, 1)
    return 1 + 0.02 * _texture(rng, u, v, 12, 12), peel, (red, green, blue)


def _blemish(towards: Point, view: View, rng: Rng, category: int, rho: Array) -> tuple[Array, Mask]:
    """Relative change of the reflectance, (height, width, 3), and the mask, of a scratch, pit or stain."""
    if category == 3:
        rust, oil = (-0.1, -0.35, -0.6), (-0.4, -0.35, -0.25)
        heat, salt = (-0.4, -0.15, 0.1), (0.3, 0.25, 0.1)
        alpha = np.clip((1.2 - rho) / 0.5, 0, 1)
        rim = 0.75 + 0.25 * np.clip(rho, 0, 1) ** 4
        tint = np.asarray((rust, oil, heat, salt)[rng.integers(4)])
        return (rng.uniform(0.4, 1.0) * alpha * rim)[..., None] * tint, alpha > 0.3
    if category == 1:
        depth = np.clip(1.4 - rho, 0, 1)
        change = rng.choice([-1, 1]) * rng.uniform(0.18, 0.5) * depth + _relief(-0.12 * depth, towards, view)
    else:
        depth = np.sqrt(np.clip(1 - rho**2, 0, 1))
        change = _relief(-rng.uniform(0.3, 0.9) * depth, towards, view) - rng.uniform(0.15, 0.5) * depth
    return np.repeat(np.maximum(change, -0.9)[..., None], 3, axis=2), rho <= 1


def _illuminate(rng: Rng, reflectance: Array, towards: Point, view: View) -> Array:
    """Colours 0..1, (height, width, 3): side light, vignetting, a highlight, dust, the lens's blur."""
    rows, columns = _field(view)
    light = 1 + rng.uniform(0.1, 0.5) * (towards[0] * rows + towards[1] * columns)
    light -= rng.uniform(0.2, 0.6) * (rows**2 + columns**2)
    spot = rng.uniform(-0.5, 0.5, 2)
    glare = rng.uniform(0, 0.22) * np.exp(-((rows - spot[0]) ** 2 + (columns - spot[1]) ** 2) / 0.06)
    specks = np.zeros(view.size)
    dusty = rng.integers(0, specks.size, rng.poisson(7))
    specks.flat[dusty] = view.scale**2 * rng.uniform(-1.2, 1.6, len(dusty))
    glare += ndimage.gaussian_filter(specks, 0.8 * view.scale)
    colours = rng.uniform(0.85, 1.1) * light[..., None] * reflectance + glare[..., None]
    return np.asarray(ndimage.gaussian_filter(colours, 0.6 * view.scale, axes=(0, 1)))
