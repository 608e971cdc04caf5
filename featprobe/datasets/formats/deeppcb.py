"""Reader for DeepPCB: two lists of images and box files (one `x1 y1 x2 y2 type` per line), one folder per board."""

from functools import partial
from pathlib import Path

from featprobe.datasets.files import below, kept_below, leads_out, read_text, start_of, words_of
from featprobe.datasets.objects import box_instance
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.datasets.values import gathered, to_numbers
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import Instance, Target

CLASSES = ("background", "open", "short", "mousebite", "spur", "copper", "pin-hole")
LISTS = {"trainval.txt": "train", "test.txt": "test"}


def is_deeppcb(root: Path) -> bool:
    """Whether a folder, or PCBData in it, holds both lists, and the first names box files."""
    folder = _folder(root)
    if not all((folder / name).is_file() and not leads_out(root, folder / name) for name in LISTS):
        return False
    words = start_of(folder / "trainval.txt", 1000, root).partition(b"\n")[0].split()
    return len(words) == 2 and words[0].endswith(b".jpg") and words[1].endswith(b".txt")


def read_deeppcb(name: str, root: Path) -> DataSet:
    """The data set of DeepPCB's lists. A list names X.jpg where the tested board is X_test.jpg.

    The group is the folder of the board. Images of the lists that are not here are counted and left out.
    """
    folder = _folder(root)
    samples: list[Sample] = []
    known: set[str] = set()
    missing: list[str] = []
    for list_name, split in LISTS.items():
        path = kept_below(root, folder / list_name)
        for number, (image_name, box_name) in enumerate(words_of(read_text(path), path, 2), start=1):
            where = f"{path}, entry {number}"
            image = _image_of(root, folder, image_name, where)
            identity = image.relative_to(folder).as_posix()
            if identity in known:
                raise DataError(f"{where} lists the image {image_name} again.")
            if not image.is_file():
                missing.append(image_name)
                continue
            known.add(identity)
            boxes = below(root, box_name, where, folder)
            samples.append(Sample(identity, image, image_name.replace("\\", "/").split("/")[0], split, str(boxes)))
    if not samples:
        raise DataError(f"{folder} holds none of the {len(missing)} images that its lists name.")

    def read_target(sample: Sample, size: Size) -> Target:
        return Target(None, read_boxes(Path(sample.labels), size))

    notes = ["groups are the folders, a board each"]
    if missing:
        total = len(missing) + len(samples)
        notes.append(f"the lists name {total} images; {len(missing)} of them are not here: {listed(missing, 3)}")
    tasks = tasks_of(masks=False, instances=True)
    return DataSet(name, root, CLASSES, samples, tasks, read_target, tuple(notes))


def read_boxes(path: Path, size: Size) -> tuple[Instance, ...]:
    """The objects of a box file; types count from 1, as classes do. Raises DataError."""

    def read(words: list[str], where: str) -> Instance:
        *box, kind = to_numbers(words, where)
        if kind not in range(1, len(CLASSES)):
            raise DataError(f"{where}: wanted a type of 1 to {len(CLASSES) - 1}, found {words[-1]}.")
        return box_instance(int(kind), box, size, where)

    rows = enumerate(words_of(read_text(path), path, 5), start=1)
    return tuple(gathered(partial(read, words, f"{path}, entry {number}") for number, words in rows))


def _folder(root: Path) -> Path:
    return root / "PCBData" if (root / "PCBData").is_dir() else root


def _image_of(root: Path, folder: Path, named: str, where: str) -> Path:
    """The image of the tested board for a listed name, or the file of exactly that name where it exists instead."""
    plain = below(root, named, where, folder)
    tested = below(root, f"{Path(named).with_suffix('')}_test{Path(named).suffix}", where, folder)
    return plain if plain.is_file() and not tested.is_file() else tested
