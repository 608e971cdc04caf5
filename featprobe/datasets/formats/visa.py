"""Reader for VisA: split_csv/2cls_*.csv of `object,split,label,image,mask`, OBJECT/Data/Images and OBJECT/Data/Masks.

Layout: github.com/amazon-science/spot-diff (Zou et al., 2022).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featprobe.datasets.files import below, is_missing, kept_below, read_csv
from featprobe.datasets.lookup import Lookup
from featprobe.datasets.objects import check_size, read_binary
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import Target

SHOTS = ("highshot", "fewshot")
COLUMNS = ("object", "split", "label", "image", "mask")
CLASSES = ("background", "anomaly")


def find_visa(root: Path, shots: Sequence[str] = SHOTS) -> Path | None:
    """The CSV file of the first of these splits that exists: in the folder of all objects, or beside that of one."""
    own = [root / "split_csv" / f"2cls_{shot}.csv" for shot in shots]
    beside = [root.resolve().parent / "split_csv" / path.name for path in own] if _is_object(root) else []
    return next((path for path in (*own, *beside) if not is_missing(path)), None)


def read_visa(name: str, root: Path, shots: Sequence[str] = SHOTS) -> DataSet:
    """The data set of a split with defects in its training images, of all objects, or of the object of the folder.

    Masks number the kinds of anomaly for each object from 1, or hold 0 and 255: every value but 0 is one class.
    """
    table = find_visa(root, shots)
    if table is None:
        raise DataError(f"{root} has no split_csv/2cls_{' or 2cls_'.join(shots)}.csv, in it or beside it.")
    one = root.resolve().name if _is_object(root) else None
    samples: list[Sample] = []
    known: set[str] = set()
    gone: set[str] = set()
    there: dict[str, bool] = {}
    look = Lookup(root)
    rows = read_csv(kept_below(table.parent.parent, table), COLUMNS)
    for number, row in enumerate(rows, start=2):
        where = f"{table}, row {number}"
        if one is None and row["object"] not in there:
            there[row["object"]] = below(root, row["object"], where).is_dir()
        if one is None and not there[row["object"]]:
            gone.add(row["object"])
        elif one in (None, row["object"]):
            image = _place(look, row["image"], one, where)
            identity = image.relative_to(root).as_posix()
            if identity in known:
                raise DataError(f"{where} lists the image {row['image']} again.")
            if (row["label"].lower() == "normal") != (not row["mask"]):
                raise DataError(f"{where}: wanted a mask for each image that isn't normal, found {list(row.values())}.")
            known.add(identity)
            mask = str(_place(look, row["mask"], one, where)) if row["mask"] else ""
            samples.append(Sample(identity, image, identity, row["split"], mask))
    if not samples:
        raise DataError(f"{table} lists no image that belongs to {root}.")

    def read_target(sample: Sample, size: Size) -> Target:
        if not sample.labels:
            return Target(np.zeros(size, dtype=np.uint8), None)
        path = Path(sample.labels)
        labels = read_binary(path)
        check_size((labels.shape[0], labels.shape[1]), size, path)
        return Target(labels, None)

    notes = [f"the split is that of {table.name}; it names no parts to group by", "all kinds of anomaly are one class"]
    if gone:
        notes.append(f"{len(gone)} objects of {table.name} are not here: {listed(sorted(gone))}")
    return DataSet(name, root, CLASSES, samples, tasks_of(masks=True, instances=False), read_target, tuple(notes))


def _is_object(root: Path) -> bool:
    return (root / "Data" / "Images").is_dir()


def _place(look: Lookup, text: str, one: str | None, where: str) -> Path:
    """The path for a name in the table, which begins at the folder of all objects; also where only one is here."""
    return look.path(text if one is None else text.removeprefix(f"{one}/"), where)
