"""Reader for GDXray's series: C0001/C0001_0001.png and ground_truth.txt of `image x1 x2 y1 y2`, from 1 on.

The masks of the welds W0001 are the images of W0002 (Mery et al., 2015, table 5).
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

from featprobe.datasets.files import files_below, kept_below, read_text, words_of
from featprobe.datasets.names import visible
from featprobe.datasets.objects import Tally, box_instance, check_size, partly, read_binary
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.datasets.values import gathered, to_numbers
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import Target

TRUTH = "ground_truth.txt"
CLASSES = ("background", "defect")
WELDS, WELD_MASKS = "W0001", "W0002"


def find_series(root: Path) -> list[Path]:
    """Folders with a series' ground truth: the folder itself, or folders one or two levels down; each once."""
    if not root.is_dir():
        return []
    patterns = (TRUTH, f"*/{TRUTH}", f"*/*/{TRUTH}")
    found = [path.parent for pattern in patterns for path in visible(root, root.glob(pattern))]
    once = {folder.resolve(): folder for folder in reversed(found)}  # a link to one of them does not count
    distinct = [folder for folder in found if once[folder.resolve()] == folder]
    return [folder for folder in distinct if visible(root, folder.glob(f"{folder.resolve().name}_*.png"))]


def read_gdxray(name: str, root: Path) -> DataSet:
    """The data set of GDXray's series that have a ground truth; the group is the series.

    An image of such a series without a row has no defect. A row with its two x or y in the wrong order is corrected,
    and counted in a note. Where only the welds W0001 have a ground truth, their masks are read instead.
    """
    welds = find_welds(root)
    if welds is not None and {folder.resolve().name for folder in find_series(root)} <= {WELDS}:
        return read_welds(name, root)
    samples: list[Sample] = []
    mended, gone = 0, 0
    at_zero, others = Tally(), Tally()
    for folder in find_series(root):
        path = kept_below(root, folder / TRUTH)
        rows, swapped = read_truth(path)
        mended += swapped
        for where, (x1, y1, _, _) in (row for of_image in rows.values() for row in of_image):
            (at_zero if min(x1, y1) < 0 else others).add(where)
        for image in files_below(root, folder, (".png",)):
            if image.parent == folder and image.stem.rpartition("_")[2].isdecimal():
                identity = image.relative_to(root).as_posix()
                boxes = rows.pop(int(image.stem.rpartition("_")[2]), [])
                samples.append(Sample(identity, image, folder.resolve().name, labels=json.dumps(boxes)))
        gone += sum(map(len, rows.values()))
    bare = _without_truth(root, {sample.group for sample in samples})
    notes = ["groups are the series"]
    if mended:
        notes.append(f"{mended} boxes had their sides in the wrong order and were corrected")
    notes += partly("boxes count pixels from 1 and are clipped", at_zero, "with a corner at 0", others)
    if gone:
        notes.append(f"{gone} boxes belong to images that are not here")
    if bare:
        notes.append(f"{len(bare)} series have no {TRUTH} and are left out: {listed(bare)}")
    if welds is not None:
        notes.append(f"the masks of {WELDS}, in {WELD_MASKS}, are not read: --format gdxray:masks reads only them")

    def read_target(sample: Sample, size: Size) -> Target:
        rows = json.loads(sample.labels)
        return Target(None, tuple(gathered(partial(box_instance, 1, box, size, where) for where, box in rows)))

    tasks = tasks_of(masks=False, instances=True)
    return DataSet(name, root, CLASSES, samples, tasks, read_target, tuple(notes))


def find_welds(root: Path) -> Path | None:
    """The folder that holds W0001 and W0002: the folder itself, or one in it."""
    if not root.is_dir():
        return None
    found = [path.parent for pattern in (WELDS, f"*/{WELDS}") for path in visible(root, root.glob(pattern))]
    images = (folder for folder in found if next((folder / WELDS).glob(f"{WELDS}_*.png"), None) is not None)
    return next((folder for folder in images if (folder / WELD_MASKS).is_dir()), None)


def read_welds(name: str, root: Path) -> DataSet:
    """The data set of the welds W0001 with the masks W0002, where every value but 0 is a defect.

    The ten images are one series, so each must be its own group.
    """
    folder = find_welds(root)
    if folder is None:
        raise DataError(f"{root} holds no welds with masks. wanted: {WELDS}/ and {WELD_MASKS}/, at most a folder down.")
    images = [path for path in files_below(root, folder / WELDS, (".png",)) if path.stem.startswith(f"{WELDS}_")]

    def read_target(sample: Sample, size: Size) -> Target:
        path = kept_below(root, folder / WELD_MASKS / sample.image.name.replace(WELDS, WELD_MASKS, 1))
        labels = read_binary(path)
        check_size((labels.shape[0], labels.shape[1]), size, path)
        return Target(labels, None)

    identities = {path.relative_to(root).as_posix(): path for path in images}
    samples = [Sample(identity, path, identity) for identity, path in identities.items()]
    notes = (f"labels are the masks {WELD_MASKS} of {WELDS}", "it names no parts to group by")
    return DataSet(name, root, CLASSES, samples, tasks_of(masks=True, instances=False), read_target, notes)


def read_truth(path: Path) -> tuple[dict[int, list[tuple[str, tuple[float, ...]]]], int]:
    """Boxes x1 y1 x2 y2 by image number, in pixels from 0, with their place in the file; and the number of corrections.

    Rows of the file count pixels from 1 and include their last. Raises DataError.
    """
    found: dict[int, list[tuple[str, tuple[float, ...]]]] = defaultdict(list)
    mended = 0
    for entry, words in enumerate(words_of(read_text(path), path, 5), start=1):
        number, x1, x2, y1, y2 = to_numbers(words, f"{path}, entry {entry}")
        if number < 1 or number != int(number):
            raise DataError(f"{path}, entry {entry}: wanted an image's number from 1 on, found {words[0]}.")
        mended += x1 > x2 or y1 > y2
        (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
        found[int(number)].append((f"{path}, entry {entry}", (x1 - 1, y1 - 1, x2, y2)))
    return found, mended


def _without_truth(root: Path, known: set[str]) -> list[str]:
    """Series beside the given ones that have no ground truth."""
    patterns = ("*/*_0001.png", "*/*/*_0001.png")
    folders = {path.parent for pattern in patterns for path in visible(root, root.glob(pattern))}
    return sorted(folder.name for folder in folders if folder.name not in known)
