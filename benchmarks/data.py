"""Reading image files and labels, against the bare decoding of the same files by Pillow and tifffile.

    python benchmarks/data.py
    python benchmarks/data.py --scale

Each kind of file is read by the product (`read_levels`: what is in the file is told by its content, and checked,
turned, kept at its depth) and by the library alone, in turn, by two threads each. Before that all must give the same
arrays. Beside it stand readers of labels: what an image costs with its boxes and polygons as instances and as a mask,
over the bare decoding of the image; for folders of masks, of the image and its mask. --scale counts instead the memory
that the index of a large set takes.
"""

import argparse
import gc
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from _bench import Timings, interleave, positive, quartile_text, report, timed
from extract import texture
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from featprobe.datasets import DataSet, Sample, read_data
from featprobe.datasets.images.reading import read_levels

TARGET = 0.9
BUDGET = 1280  # bytes of an image in an index, the text of its five polygons included
WORKERS = 2
OBJECTS = 5  # an image, triangles
SHARE = 0.06  # of an image's sides that an object has: 0.03 to 0.08 in BSData and DeepPCB
RGB, FOLDERS = "PNG, 8-bit RGB", "folders"

Triangles = NDArray[np.float64]  # (objects, 3, 2): pixels, x y
Decode = Callable[[Path], NDArray[Any]]


def pillow(path: Path) -> NDArray[Any]:
    """An image as Pillow alone gives it."""
    with Image.open(path) as image:
        return np.asarray(image)


KINDS: Mapping[str, tuple[str, Decode]] = {
    RGB: ("rgb.png", pillow),
    "PNG, 16-bit grey": ("deep.png", pillow),
    "JPEG": ("rgb.jpg", pillow),
    "TIFF, 16-bit grey": ("deep.tif", tifffile.imread),
    "TIFF, 16-bit grey, LZW": ("lzw.tif", partial(tifffile.imread, maxworkers=1)),
    "TIFF, float32": ("float.tif", tifffile.imread),
}
"""Kind of file -> its name behind the image's number, and the library's own way to read it."""


def write_images(folder: Path, count: int, side: int) -> dict[str, list[Path]]:
    """Every picture as every kind of file: kind -> paths."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        colour = texture(rng, side)
        deep = colour[:, :, 0].astype(np.uint16) * 200 + rng.integers(0, 200, (side, side), dtype=np.uint16)
        Image.fromarray(colour).save(folder / f"{i:04}-rgb.png")
        Image.fromarray(colour).save(folder / f"{i:04}-rgb.jpg", quality=92)
        Image.fromarray(deep).save(folder / f"{i:04}-deep.png")
        tifffile.imwrite(folder / f"{i:04}-deep.tif", deep)
        tifffile.imwrite(folder / f"{i:04}-lzw.tif", deep, compression="lzw", predictor=True, rowsperstrip=64)
        tifffile.imwrite(folder / f"{i:04}-float.tif", (deep / 7).astype(np.float32))
    return {kind: [folder / f"{i:04}-{name}" for i in range(count)] for kind, (name, _) in KINDS.items()}


def triangles(rng: np.random.Generator, side: int, share: float = SHARE) -> Triangles:
    """Objects of an image; share: of its sides."""
    corners = rng.uniform(0, (1 - share) * side, (OBJECTS, 1, 2)).round(2)
    return corners + np.array([(0, 0), (1, 0), (0.5, 1)]) * share * side


def write_coco(root: Path, drawn: Mapping[str, Triangles], side: int) -> None:
    """annotations.json of images in images/."""
    images = [{"id": i, "file_name": name, "height": side, "width": side} for i, name in enumerate(drawn)]
    annotations = [
        {"id": len(drawn) * k + i, "image_id": i, "category_id": 1, "segmentation": [t.ravel().tolist()],
         "bbox": [*t.min(0).tolist(), *np.ptp(t, axis=0).tolist()], "iscrowd": 0}
        for i, objects in enumerate(drawn.values()) for k, t in enumerate(objects)
    ]  # fmt: skip
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "flaw"}]}
    (root / "annotations.json").write_text(json.dumps(data))


def write_labelme(root: Path, drawn: Mapping[str, Triangles], side: int) -> None:
    """A JSON file beside each image."""
    for name, objects in drawn.items():
        shapes = [{"label": "flaw", "points": t.tolist(), "shape_type": "polygon"} for t in objects]
        data = {"imagePath": name, "imageHeight": side, "imageWidth": side, "shapes": shapes}
        (root / "images" / name).with_suffix(".json").write_text(json.dumps(data))


def write_yolo(root: Path, drawn: Mapping[str, Triangles], side: int) -> None:
    """data.yaml, two lists, and labels/ of polygons."""
    (root / "labels").mkdir()
    (root / "data.yaml").write_text("names: [flaw]\ntrain: train.txt\nval: val.txt\n")
    lists = {"train.txt": list(drawn)[1:], "val.txt": list(drawn)[:1]}
    for listed, names in lists.items():
        (root / listed).write_text("".join(f"images/{name}\n" for name in names))
    for name, objects in drawn.items():
        lines = ["0 " + " ".join(f"{v:.6f}" for v in (t / side).ravel()) for t in objects]
        (root / "labels" / name).with_suffix(".txt").write_text("\n".join(lines))


def write_voc(root: Path, drawn: Mapping[str, Triangles], side: int) -> None:
    """Annotations/ of boxes."""
    (root / "Annotations").mkdir()
    for name, objects in drawn.items():
        boxes = [np.concatenate([t.min(0) + 1, t.max(0)]).round() for t in objects]
        parts = [
            f"<object><name>flaw</name><bndbox><xmin>{b[0]:g}</xmin><ymin>{b[1]:g}</ymin><xmax>{b[2]:g}</xmax>"
            f"<ymax>{b[3]:g}</ymax></bndbox></object>"
            for b in boxes
        ]
        size = f"<size><width>{side}</width><height>{side}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}{''.join(parts)}</annotation>"
        (root / "Annotations" / name).with_suffix(".xml").write_text(text)


def write_folders(root: Path, drawn: Mapping[str, Triangles], side: int) -> None:
    """masks/ of one class."""
    (root / "masks").mkdir()
    for name, objects in drawn.items():
        mask = Image.new("L", (side, side))
        for corners in objects:
            ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=1)
        mask.save(root / "masks" / name)


READERS = {
    "coco": write_coco, "labelme": write_labelme, "yolo": write_yolo, "voc": write_voc, "folders": write_folders,
}  # fmt: skip
"""Format -> what writes a set of it."""


def label_sets(folder: Path, pictures: Sequence[Path], side: int, share: float) -> dict[str, DataSet]:
    """The same pictures with the same objects in every format: format -> its data set."""
    rng = np.random.default_rng(0)
    drawn = {path.name: triangles(rng, side, share) for path in pictures}
    sets = {}
    for name in READERS:
        root = folder / name
        (root / "images").mkdir(parents=True)
        for path in pictures:
            os.link(path, root / "images" / path.name)
        READERS[name](root, drawn, side)
        sets[name] = read_data(name, root, name)
        targets = [sets[name].read_target(sample, (side, side)) for sample in sets[name].samples]
        found = {len(t.instances) if t.instances is not None else "a mask of" for t in targets}
        if found != {"a mask of" if name == "folders" else OBJECTS} or len(targets) != len(pictures):
            raise RuntimeError(f"{name} reads {found} objects an image, not {OBJECTS}")
    return sets


def check_equal(files: Mapping[str, Sequence[Path]]) -> None:
    """Raise RuntimeError when the product reads other values than the library does."""
    for kind, paths in files.items():
        for path in paths:
            found, wanted = read_levels(path), KINDS[kind][1](path)
            if found.dtype != wanted.dtype or not np.array_equal(found, wanted):
                raise RuntimeError(f"{path} is read as other values than {kind} holds")


def measure(folder: Path, options: argparse.Namespace) -> Timings:
    """Seconds of every arm in turn, each over all files of its kind."""
    files = write_images(folder / "files", options.images, options.side)
    check_equal(files)
    sets = label_sets(folder, files[RGB], options.side, options.share)

    def labelled(data: DataSet, sample: Sample) -> None:
        height, width = read_levels(sample.image).shape[:2]
        data.read_target(sample, (height, width))

    with ThreadPoolExecutor(WORKERS) as pool:

        def over(work: Callable[[Any], object], items: Sequence[Any]) -> Callable[[], float]:
            return timed(lambda: sum(1 for _ in pool.map(work, items)))

        arms: dict[str, Callable[[], float]] = {}
        for kind, paths in files.items():
            arms[f"{kind}: bare"] = over(KINDS[kind][1], paths)
            arms[kind] = over(read_levels, paths)
        arms |= {name: over(partial(labelled, data), data.samples) for name, data in sets.items()}
        masked = [(s.image, folder / "folders" / "masks" / s.image.name) for s in sets["folders"].samples]
        arms[f"{FOLDERS}: bare"] = over(lambda pair: [pillow(path) for path in pair], masked)
        return interleave(arms, options.rounds)


def index_of(name: str, root: Path, count: int, picture: Path) -> tuple[float, float]:
    """Bytes of an image in the index of a set of this many images, and the seconds to make it."""
    (root / "images").mkdir(parents=True)
    names = [f"part{i // 10:06}/view{i % 10}.png" for i in range(count)]
    for folder in {Path(name).parent for name in names}:
        (root / "images" / folder).mkdir()
        (root / "masks" / folder).mkdir(parents=True)
    for one in names:
        os.symlink(picture, root / "images" / one)
        if name == "folders":
            os.symlink(picture, root / "masks" / one)
    if name == "coco":
        rng = np.random.default_rng(0)
        write_coco(root, {one: triangles(rng, 64) for one in names}, 64)
    begun = time.perf_counter()
    read_data(name, root, name, follow_links=True)
    seconds = time.perf_counter() - begun
    tracemalloc.start()
    held, indices = [], []
    for _ in range(2):  # the first also grows tables of the interpreter's own
        indices.append(read_data(name, root, name, follow_links=True))
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    if {len(index.samples) for index in indices} != {count}:
        raise RuntimeError(f"{name} finds {len(indices[0].samples)} images, not {count}")
    return (held[1] - held[0]) / count, seconds


def scale(folder: Path, options: argparse.Namespace) -> None:
    """Print what the index of a large set takes: folders of masks, and COCO with five objects an image."""
    picture = folder / "picture.png"
    Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save(picture)
    found = {name: index_of(name, folder / name, options.scale, picture) for name in ("folders", "coco")}
    rows = [
        {"format": name, "bytes per image": f"{held:.0f}", "seconds to read": f"{seconds:.1f}"}
        for name, (held, seconds) in found.items()
    ]
    most = max(held for held, _ in found.values())
    figures = {f"{name}_bytes": held for name, (held, _) in found.items()}
    report("data_scale", BUDGET / most, 1.0, rows, images=options.scale, budget_bytes=BUDGET, **figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=32, help="of each kind")
    parser.add_argument("--side", type=positive, default=640, help="pixels")
    parser.add_argument("--share", type=float, default=SHARE, help="of an image's sides that an object has")
    parser.add_argument("--rounds", type=positive, default=11)
    parser.add_argument(
        "--scale", type=positive, nargs="?", const=20_000, help="count the index of this many images instead"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.scale:
            return scale(Path(folder), options)
        timings = measure(Path(folder), options)
    bare = {arm: f"{arm}: bare" if arm in (*KINDS, FOLDERS) else f"{RGB}: bare" for arm in (*KINDS, *READERS)}
    rows = [
        {
            "arm": arm if arm in KINDS else f"PNG and {arm} labels",
            "images/s": f"{options.images / timings.median(arm):.0f}",
            "bare images/s": f"{options.images / timings.median(own):.0f}",
            "of bare": quartile_text(timings.quartiles(own, arm)),
        }
        for arm, own in bare.items()
    ]
    ratios = {arm: timings.ratio(own, arm) for arm, own in bare.items()}
    report(
        "data",
        min(ratios.values()),
        TARGET,
        rows,
        workers=WORKERS,
        rounds=options.rounds,
        ratios={arm: float(f"{ratio:.4g}") for arm, ratio in ratios.items()},
    )


if __name__ == "__main__":
    main()
