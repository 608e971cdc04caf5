"""Find what would spoil a study on a data set: leaks, copies, unusable files and labels; and its balance."""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from featprobe.datasets import DataSet, Sample
from featprobe.datasets.duplicates import Look, exact_copies, in_several_splits, look_of, near_copies, two_labels
from featprobe.datasets.images.pixels import counted_levels
from featprobe.datasets.images.reading import Header, hash_image, header_of, pixel_notes, read_levels, to_unit
from featprobe.datasets.label_sets import NO_LABEL, check_held, label_counts, mixed_verdicts, verdicts
from featprobe.datasets.samples import SPLITS, listed
from featprobe.datasets.set_notes import copies_in
from featprobe.datasets.splits import complete_splits, leaks
from featprobe.errors import DataError, LabelSizeError, OutOfImageError, counted
from featprobe.geometry import Fit, Size, default_size, place, place_tile
from featprobe.io.threads import in_threads
from featprobe.report.check_page import write_check_page
from featprobe.report.sheets import Panel, save_sheet
from featprobe.stages.progress import counting
from featprobe.stages.upkeep.describe import contact_sheet, share_text, spread
from featprobe.targets import Target, pixels_of_each

STRIDES = (4, 8, 16, 32)
FAULTS: Mapping[str, str] = {
    "unreadable_image": "images can't be read",
    "label_size": "images have a mask or an annotation of another size",
    "out_of_image": "images have a box or a polygon that is empty or leaves the image",
    "bad_labels": "images have labels that can't be used",
}
"""Faults that one sample can have, and how a finding names several."""
SHOWN = 12  # images, and pairs of copies, on a page's sheets


@dataclass(frozen=True)
class Looked:
    """The contents of one sample's files. fault: one of FAULTS, "" if there is none; reason: its first error.

    pixels: (classes,) how many pixels each has, None without masks; objects: class and box side lengths (width,
    height) in pixels, crowds left out; own_objects: whether they are the set's, not connected components of its masks;
    labels: of the image as a whole, see `Target`; copies: objects that stand there more than once.
    """

    sample: Sample
    image_hash: str = ""
    header: Header | None = None
    size: Size | None = None
    depth: str = ""
    look: Look | None = None
    pixels: NDArray[np.int64] | None = None
    objects: tuple[tuple[int, float, float], ...] = ()
    own_objects: bool = False
    labels: tuple[int, ...] | None = None
    copies: tuple[str, ...] = ()
    fault: str = ""
    reason: str = ""

    @property
    def classes(self) -> set[int]:
        """Classes that occur, the background left out."""
        seen = set() if self.pixels is None else set(np.flatnonzero(self.pixels).tolist())
        return (seen | {category for category, _, _ in self.objects}) - {0}


@dataclass(frozen=True)
class Finding:
    """One thing that was found. spoils: whether it would spoil a study.

    kind: a word for machines; text: for people; entries: what it concerns, ids and pairs, all of them.
    """

    kind: str
    spoils: bool
    text: str
    entries: tuple[Any, ...]


@dataclass(frozen=True)
class Objects:
    """Side lengths of objects, the square root of the box area, in pixels of images, or tiles, resized to `frame`.

    of: `instances` of the set, or `components` of its masks. tile: side of the tiles in pixels of the original image,
    None for whole images. smaller_than_cell: how many are, by stride.
    """

    of: str
    count: int
    frame: Size
    tile: int | None
    median: float
    smaller_than_cell: dict[int, int]


@dataclass(frozen=True)
class DataCheck:
    """A data set, looked through. images, instances: of the whole set; None where it has no instances.

    splits: images, groups, images without objects and, by class, how many images hold it, its instances and its share
    of the labelled pixels.
    sizes: smallest and largest (height, width); depths: images by bit depth and colour. serves: all tasks that its
    labels serve. labels: images of each label of the whole image, by split, see `label_counts`.
    """

    name: str
    root: str
    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    images: int
    instances: int | None
    splits: dict[str, dict[str, Any]]
    sizes: tuple[Size, Size] | None
    depths: dict[str, int]
    objects: Objects | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    spoiled: bool
    serves: tuple[str, ...] = ()
    labels: dict[str, dict[str, int]] | None = None


def check(
    named: DataSet,
    *,
    size: Size | None = None,
    fit: Fit | None = None,
    tile: int | None = None,
    page: Path | None = None,
    workers: int = 2,
    quiet: bool = False,
) -> DataCheck:
    """Read every image and label of a data set, and say what would spoil a study on it.

    named: the set with the splits that it names itself, if any. size, fit, tile: as images are brought to features,
    default `extract`'s. page: where to write it as HTML. Raises FeatprobeError when the page can't be written.
    """
    data, findings = named, []
    try:
        data = complete_splits(named)
    except DataError as error:
        findings.append(Finding("no_splits", True, str(error), ()))
    with in_threads(lambda sample: _look_at(data, sample), data.samples, workers) as results:
        found = list(counting(results, len(data.samples), "checking", "img", quiet=quiet))
    near = _near_pairs(found)
    findings += [
        *_faults(found),
        *_object_copies(found),
        *_leaks(data),
        *_copies(found),
        *_near(near),
        *_mixed(found),
        *_missing(data, found),
        *_of_labels(data, found),
    ]
    own_leak = leaks([sample.group for sample in data.samples], [sample.split for sample in data.samples])
    splits = {split: _of_split(data, found, split) for split in [*SPLITS, *_other_splits(data)]}
    sizes = sorted(f.size for f in found if f.size)
    headers = [(f.sample.id, replace(f.header, bits=0)) for f in found if f.header]  # of depths there is a finding
    result = DataCheck(
        name=data.name,
        root=str(data.root),
        classes=data.classes,
        tasks=data.tasks,
        images=len(data.samples),
        instances=sum(len(f.objects) for f in found) if data.has_objects else None,
        splits=splits,
        sizes=(sizes[0], sizes[-1]) if sizes else None,
        depths=dict(Counter(f.depth for f in found if f.depth)),
        objects=_objects(found, size, fit or "resize", tile or None) if sizes and data.tasks else None,
        findings=tuple(findings),
        notes=(*(note for note in data.notes if note not in own_leak), *pixel_notes(headers)),
        spoiled=any(finding.spoils for finding in findings),
        serves=data.serves,
        labels=label_counts(data.label_names, [f.sample.split for f in found], [f.labels for f in found]),
    )
    if page:
        _write_page(page, result, data, found, near)
    return result


def label_table(checked: DataCheck) -> pd.DataFrame:
    """Images of each label per split."""
    by_split = checked.labels or {}
    names = next(iter(by_split.values()), {})
    counts = [
        {"label": name or NO_LABEL, **{s or "no split": own[name] for s, own in by_split.items()}} for name in names
    ]
    return pd.DataFrame(counts)


def class_table(checked: DataCheck) -> pd.DataFrame:
    """Classes per split: how many images hold them, instances, share of the labelled pixels."""
    splits = [own["classes"] for own in checked.splits.values()]
    names = "/".join(split or "no split" for split in checked.splits)
    table = {"class": list(checked.classes)}
    for part, said in (("images", str), ("instances", str), ("pixels", share_text)):
        values = [[own[name][part] for own in splits] for name in checked.classes]
        if any(value is not None for row in values for value in row):
            texts = [" / ".join(said(v) for v in row if v is not None) for row in values]
            table[f"{part} ({names})"] = texts
    return pd.DataFrame(table)


def object_table(objects: Objects) -> pd.DataFrame:
    """How many objects are smaller than one cell, by stride."""
    return pd.DataFrame(
        {"stride": stride, "objects smaller than a cell": count, "share": f"{count / max(1, objects.count):.1%}"}
        for stride, count in objects.smaller_than_cell.items()
    )


def entry_texts(finding: Finding) -> list[str]:
    """The entries of a finding as lines for people."""
    return [" | ".join(map(str, entry)) if isinstance(entry, tuple | list) else str(entry) for entry in finding.entries]


def _look_at(data: DataSet, sample: Sample) -> Looked:
    """Everything about one sample, and what is wrong with it."""
    try:
        image_hash, header, levels = hash_image(sample.image), header_of(sample.image), read_levels(sample.image)
    except DataError as error:
        return Looked(sample, fault="unreadable_image", reason=str(error))
    size = (levels.shape[0], levels.shape[1])
    depth = f"{8 * levels.dtype.itemsize}-bit {'grey' if levels.ndim == 2 else 'colour'}"
    found = Looked(sample, image_hash, header, size, depth, look_of(levels))
    try:
        target = data.read_target(sample, size)
        held = target.labels
        check_held(held, data.label_names, f"{data.root}, image {sample.id}")
    except DataError as error:
        kinds = {LabelSizeError: "label_size", OutOfImageError: "out_of_image"}
        return replace(found, fault=kinds.get(type(error), "bad_labels"), reason=str(error))
    count = len(data.classes)
    pixels = None if target.semantic is None else pixels_of_each(target.semantic)[:count]
    here = [] if pixels is None else [i for i in range(1, len(data.classes)) if pixels[i]]
    return replace(
        found, pixels=pixels, objects=_sides(target, here), own_objects=target.instances is not None, labels=held,
        copies=tuple(copies_in(target, data.classes)),
    )  # fmt: skip


def _sides(target: Target, classes: Sequence[int]) -> tuple[tuple[int, float, float], ...]:
    """Class, width and height of every object; of these classes' connected components where there are only masks."""
    if target.instances is not None:
        boxes = ((i.category, i.box_xyxy) for i in target.instances if not i.crowd)
        return tuple((category, x2 - x1, y2 - y1) for category, (x1, y1, x2, y2) in boxes)
    found: list[tuple[int, float, float]] = []
    if target.semantic is not None:
        for category in classes:
            numbered, _ = ndimage.label(target.semantic == category, structure=np.ones((3, 3)))
            places = ndimage.find_objects(numbered)
            found += [(category, float(x.stop - x.start), float(y.stop - y.start)) for y, x in places]
    return tuple(found)


def _objects(found: Sequence[Looked], size: Size | None, fit: Fit, tile: int | None) -> Objects:
    sides = []
    frame = size or ((tile, tile) if tile else default_size([f.size for f in found if f.size]))
    for f in found:
        if f.size:
            placed = place_tile((tile, tile), tile, frame, 1) if tile else place(f.size, frame, fit, 1)
            (scale_x, _, _), (_, scale_y, _) = placed.affine
            sides += [(width * scale_x * height * scale_y) ** 0.5 for _, width, height in f.objects]
    smaller = {stride: sum(side < stride for side in sides) for stride in STRIDES}
    of = "instances" if any(f.own_objects for f in found) else "components"
    return Objects(of, len(sides), frame, tile, float(np.median(sides)) if sides else 0.0, smaller)


def _other_splits(data: DataSet) -> list[str]:
    return sorted({sample.split for sample in data.samples} - set(SPLITS))


def _of_split(data: DataSet, found: Sequence[Looked], split: str) -> dict[str, Any]:
    own = [f for f in found if f.sample.split == split]
    masks = [f.pixels for f in own if f.pixels is not None]
    labelled = np.sum(masks, axis=0) if masks else np.zeros(len(data.classes))
    holding = Counter(index for f in own for index in f.classes)
    objects = Counter(category for f in own for category, _, _ in f.objects)
    return {
        "images": len(own),
        "groups": len({f.sample.group for f in own}),
        "without_objects": sum(not f.fault and not f.classes for f in own),
        "classes": {
            name: {
                "images": holding[i] if i else None,
                "instances": objects[i] if i and data.has_objects else None,
                "pixels": float(labelled[i] / max(1, labelled.sum())) if data.has_masks else None,
            }
            for i, name in enumerate(data.classes)
        },
    }


def _faults(found: Sequence[Looked]) -> list[Finding]:
    by_kind = {kind: [(f.sample.id, f.reason) for f in found if f.fault == kind] for kind in FAULTS}
    return [
        Finding(kind, True, f"{len(own)} of {len(found)} {FAULTS[kind]}", tuple(own))
        for kind, own in by_kind.items()
        if own
    ]


def _object_copies(found: Sequence[Looked]) -> list[Finding]:
    """Images in which an object stands more than once; what is found can match one of them alone."""
    entries = tuple((f.sample.id, text) for f in found for text in f.copies)
    if not entries:
        return []
    held = len({own for own, _ in entries})
    text = f"{counted(held, 'image holds', 'images hold')} an object more than once: same class, same box, same mask"
    return [Finding("object_copies", True, text, entries)]


def _leaks(data: DataSet) -> list[Finding]:
    """Groups that stand in several splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    for sample in data.samples:
        splits[sample.group].add(sample.split)
    entries = tuple((group, ", ".join(sorted(own))) for group, own in splits.items() if len(own) > 1)
    if not entries:
        return []
    text = f"{len(entries)} of {len(splits)} groups stand in more than one split; --split group makes one without"
    return [Finding("group_leak", True, text, entries)]


def _copies(found: Sequence[Looked]) -> list[Finding]:
    """Files with equal bytes, across splits and within them."""
    sets = exact_copies([f.sample for f in found], [f.image_hash for f in found])
    across = [own for own in sets if in_several_splits(own)]
    within = [own for own in sets if not in_several_splits(own)]
    findings = []
    if across:
        text = f"{counted(len(across), 'image stands', 'images stand')} in more than one split, byte for byte"
        findings.append(Finding("copy_leak", True, text, tuple(tuple(_placed(s) for s in own) for own in across)))
    if within:
        text = f"{counted(len(within), 'image stands', 'images stand')} more than once in one split, byte for byte"
        findings.append(Finding("copies", False, text, tuple(tuple(_placed(s) for s in own) for own in within)))
    return findings


def _near_pairs(found: Sequence[Looked]) -> list[tuple[Sample, Sample]]:
    """Images that look the same but differ in their bytes; pairs of one group in one split are omitted."""
    seen = [f for f in found if f.look]
    pairs = [(seen[a], seen[b]) for a, b in near_copies([f.look for f in seen if f.look])]
    others = [(a.sample, b.sample) for a, b in pairs if a.image_hash != b.image_hash]
    return [(a, b) for a, b in others if a.group != b.group or a.split != b.split]


def _near(pairs: Sequence[tuple[Sample, Sample]]) -> list[Finding]:
    across = [pair for pair in pairs if in_several_splits(pair)]
    within = [pair for pair in pairs if not in_several_splits(pair)]
    findings = []
    if across:
        text = f"{counted(len(across), 'pair')} of images that look the same in two splits"
        findings.append(Finding("near_copy_leak", True, text, tuple((_placed(a), _placed(b)) for a, b in across)))
    if within:
        text = f"{counted(len(within), 'pair')} of images that look the same within one split"
        findings.append(Finding("near_copies", False, text, tuple((_placed(a), _placed(b)) for a, b in within)))
    return findings


def _placed(sample: Sample) -> str:
    return f"{sample.split}: {sample.id}"


def _mixed(found: Sequence[Looked]) -> list[Finding]:
    """8-bit and 16-bit images in one set: no single intensity window fits both."""
    by_depth: dict[str, list[str]] = defaultdict(list)
    for f in found:
        if f.depth:
            by_depth[f.depth.split()[0]].append(f.sample.id)
    if len(by_depth) < 2:
        return []
    text = f"images of {' and '.join(f'{depth} ({len(own)})' for depth, own in sorted(by_depth.items()))} in one set"
    fewest = sorted(by_depth.values(), key=len)[0]
    return [Finding("mixed_depths", True, text, tuple(fewest))]


def _missing(data: DataSet, found: Sequence[Looked]) -> list[Finding]:
    entries = []
    for split in SPLITS:
        own = [f.classes for f in found if f.sample.split == split and not f.fault]
        seen = set().union(*own)
        entries += [(name, split) for i, name in enumerate(data.classes) if i and own and i not in seen]
    if not entries:
        return []
    text = f"classes are missing in a split: {listed([f'{name} in {split}' for name, split in entries], 8)}"
    return [Finding("missing_class", False, text, tuple(entries))]


def _of_labels(data: DataSet, found: Sequence[Looked]) -> list[Finding]:
    """What would spoil labels of whole images: two for one image, a split without a label, groups of both verdicts."""
    names, sound = data.label_names, [f for f in found if not f.fault]
    if names is None:
        return []
    samples, held = [f.sample for f in sound], [f.labels for f in sound]
    findings = []
    twice = two_labels(samples, [f.image_hash for f in sound], held, names)
    if twice:
        text = f"{counted(len(twice), 'image stands', 'images stand')} in two classes, byte for byte"
        entries = tuple(tuple(f"{own} ({label})" for own, label in same) for same in twice)
        findings.append(Finding("two_labels", True, text, entries))
    unknown = tuple(f.sample.id for f in sound if f.labels is None)
    if unknown:
        findings.append(
            Finding("no_label", False, f"{counted(len(unknown), 'image has', 'images have')} no label", unknown)
        )
    counts = label_counts(names, [sample.split for sample in samples], held) or {}
    given = sorted({name or NO_LABEL for own in counts.values() for name, count in own.items() if count})
    if len(given) == 1 and not data.tasks:
        text = f"all images have the label {given[0]}: there is nothing to tell apart, and no defect to test on"
        findings.append(Finding("one_label", True, text, ()))
    lacking = [(name or NO_LABEL, split) for split, own in counts.items() for name, count in own.items() if not count]
    if lacking:
        text = f"labels are missing in a split: {listed([f'{name} in {split}' for name, split in lacking], 8)}"
        findings.append(Finding("missing_label", False, text, tuple(lacking)))
    groups, splits = [sample.group for sample in samples], [sample.split for sample in samples]
    mixed = mixed_verdicts(groups, splits, verdicts(names, held))
    return findings + [Finding("mixed_verdicts", False, text, ()) for text in mixed]


def _write_page(
    path: Path, checked: DataCheck, data: DataSet, found: Sequence[Looked], near: Sequence[tuple[Sample, Sample]]
) -> None:
    """The check as one HTML page, with images beside their labels and pairs that look the same."""
    sound = [f for f in found if not f.fault]
    chosen = spread([f.sample for f in sound if f.classes] or [f.sample for f in sound], SHOWN)
    pairs = [pair for pair in near if in_several_splits(pair)] or near
    tables = [("Classes", class_table(checked))] if checked.tasks else []
    tables += [("Labels of images", label_table(checked))] if checked.labels else []
    tables += [(object_line(checked.objects), object_table(checked.objects))] if checked.objects else []
    notes = list(checked.notes)
    with tempfile.TemporaryDirectory() as folder:
        sheets: list[tuple[str, Path]] = []
        if chosen:
            shown = replace(data, samples=tuple(replace(sample, split="train") for sample in chosen))
            try:
                contact_sheet(shown, Path(folder) / "sheet.png", SHOWN)
                sheets.append(("Images and labels", Path(folder) / "sheet.png"))
            except DataError as error:
                notes.append(f"no contact sheet could be drawn: {error}")
        if pairs:
            rows = [(f"{_placed(a)}   {_placed(b)}", [_panel(a), _panel(b)]) for a, b in pairs[:SHOWN]]
            save_sheet(Path(folder) / "pairs.png", rows, ["image", "looks the same"], data.classes[:1])
            sheets.append(("Pairs that look the same", Path(folder) / "pairs.png"))
        findings = [(finding.spoils, finding.text, entry_texts(finding)) for finding in checked.findings]
        write_check_page(path, f"Data set {checked.name}", head_lines(checked), findings, tables, notes, sheets)


def _panel(sample: Sample) -> Panel:
    levels = read_levels(sample.image)
    own = counted_levels(levels)
    low, high = (float(own.min()), float(own.max())) if own.size else (0.0, 1.0)
    return Panel(to_unit(levels, (low, max(high, low + 1))))


def head_lines(checked: DataCheck) -> list[str]:
    """The set's counts in a few sentences."""
    depths = ", ".join(f"{count} {depth}" for depth, count in checked.depths.items()) or "none that can be read"
    low, high = ("x".join(map(str, size)) for size in checked.sizes) if checked.sizes else ("", "")
    sizes = f", {low if low == high else f'{low} to {high}'} (height x width)" if checked.sizes else ""
    instances = "" if checked.instances is None else f", {counted(checked.instances, 'instance')}"
    return [
        f"{counted(checked.images, 'image')}{instances}: {depths}{sizes}",
        f"labels for {', '.join(checked.serves)}",
        *(
            f"{split or 'no split'}: {counted(own['images'], 'image')}, {counted(own['groups'], 'group')}"
            + (f", {counted(own['without_objects'], 'image')} without objects" if checked.tasks else "")
            for split, own in checked.splits.items()
        ),
    ]


def object_line(objects: Objects) -> str:
    """The title of the table of objects."""
    parts = ("connected component of the masks", "connected components of the masks")
    kind = counted(objects.count, *(("object",) if objects.of == "instances" else parts))
    height, width = objects.frame
    tiles = f" from tiles of {objects.tile}" if objects.tile else ""
    return f"{kind}, at {height}x{width} pixels{tiles}: median side {objects.median:.1f} pixels"
