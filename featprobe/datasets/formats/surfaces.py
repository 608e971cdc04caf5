"""Readers for public surface sets: KolektorSDD, KolektorSDD2 and MVTec AD."""

from pathlib import Path

import numpy as np

from featprobe.datasets.files import files_below, kept_below
from featprobe.datasets.names import visible
from featprobe.datasets.objects import check_classes, check_size, read_binary
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import Target

KOLEKTOR_MASK = "_GT"
KOLEKTOR_LABEL = "_label.bmp"
GOOD = "good"


def is_kolektor(root: Path) -> bool:
    """Whether a folder holds train/ and test/ with masks ID_GT.png."""
    return all(visible(root, (root / split).glob(f"*{KOLEKTOR_MASK}.png")) for split in ("train", "test"))


def read_kolektor(name: str, root: Path) -> DataSet:
    """The data set of KolektorSDD2: {train,test}/ID.png with ID_GT.png, in its published split."""
    samples = [
        Sample(path.relative_to(root).as_posix(), path, path.relative_to(root).as_posix(), split)
        for split in ("train", "test")
        for path in files_below(root, root / split, (".png",))
        if not path.stem.endswith(KOLEKTOR_MASK)
    ]

    def read_target(sample: Sample, size: Size) -> Target:
        path = kept_below(root, sample.image.with_name(f"{sample.image.stem}{KOLEKTOR_MASK}.png"))
        labels = read_binary(path)
        check_size((labels.shape[0], labels.shape[1]), size, path)
        return Target(labels, None)

    tasks = tasks_of(masks=True, instances=False)
    return DataSet(name, root, ("background", "defect"), samples, tasks, read_target)


def is_commutators(root: Path) -> bool:
    """Whether a folder is the first KolektorSDD: kosNN/PartN.jpg with PartN_label.bmp."""
    return bool(visible(root, root.glob(f"kos*/*{KOLEKTOR_LABEL}")))


def read_commutators(name: str, root: Path) -> DataSet:
    """The data set of the first KolektorSDD. The group is the commutator, a folder kosNN. There is no published split.

    Layout: Tabernik et al., 2019, and the dataset's page at vicos.si. Every value but 0 in a mask is the defect.
    """
    folders = [path for path in visible(root, root.glob("kos*")) if path.is_dir()]
    images = [path for folder in folders for path in files_below(root, folder, (".jpg",))]
    if not images:
        raise DataError(f"{root} holds no images. wanted: kosNN/PartN.jpg with PartN{KOLEKTOR_LABEL}.")

    def read_target(sample: Sample, size: Size) -> Target:
        path = kept_below(root, sample.image.with_name(f"{sample.image.stem}{KOLEKTOR_LABEL}"))
        labels = read_binary(path)
        check_size((labels.shape[0], labels.shape[1]), size, path)
        return Target(labels, None)

    samples = [Sample(path.relative_to(root).as_posix(), path, path.parent.name) for path in images]
    tasks = tasks_of(masks=True, instances=False)
    notes = ("groups are the commutators, a folder each",)
    return DataSet(name, root, ("background", "defect"), samples, tasks, read_target, notes)


def is_mvtec(root: Path) -> bool:
    """Whether a folder is a category of MVTec AD, or holds categories."""
    return _is_category(root) or bool(_categories(root))


def read_mvtec(name: str, root: Path, published: bool = False) -> DataSet:
    """The data set of one category of MVTec AD: test/<defect>/NNN.png with ground_truth/<defect>/NNN_mask.png.

    Its training split has no defects, so a head of classes could learn nothing from it: all images get new splits.
    published: keep its own split, for heads that learn from good images alone.
    """
    if not _is_category(root):
        raise DataError(
            f"{root} holds several categories of MVTec AD. Each is a data set with its own defects.\n"
            f"  wanted  the folder of one\n  found   {listed(_categories(root), 20)}"
        )
    images = [*files_below(root, root / "train", (".png",)), *files_below(root, root / "test", (".png",))]
    kinds = sorted({path.parent.name for path in images} - {GOOD})
    classes = check_classes(["background", *kinds], f"{root}: its folders of defects")

    def read_target(sample: Sample, size: Size) -> Target:
        kind = sample.image.parent.name
        if kind == GOOD:
            return Target(np.zeros(size, dtype=np.uint8), None)
        path = kept_below(root, root / "ground_truth" / kind / f"{sample.image.stem}_mask.png")
        labels = read_binary(path)
        check_size((labels.shape[0], labels.shape[1]), size, path)
        return Target(labels * np.uint8(classes.index(kind)), None)

    identities = {path.relative_to(root).as_posix(): path for path in images}
    samples = [
        Sample(identity, path, identity, path.relative_to(root).parts[0] if published else "")
        for identity, path in identities.items()
    ]
    alone = "all its images are split anew" if not published else "heads of anomalies alone can be trained on it"
    notes = (f"its own training split has no defects: {alone}, and it names no parts to group by",)
    return DataSet(name, root, classes, samples, tasks_of(masks=True, instances=False), read_target, notes)


def _is_category(root: Path) -> bool:
    return (root / "train" / GOOD).is_dir() and (root / "test").is_dir() and (root / "ground_truth").is_dir()


def _categories(root: Path) -> list[str]:
    return [path.name for path in visible(root, root.iterdir()) if _is_category(path)] if root.is_dir() else []
