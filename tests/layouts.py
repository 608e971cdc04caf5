"""Segmentation and defect sets as they lie on the disk once unpacked: small copies of their true folders and names.

They were written down before the reader that finds them. Each is read with the right pairs or refused with the right
reason. Every mask has an area of its own, in pixels, so that a wrong pair shows in the labels.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = SIZE = (12, 16)


class Builder:
    """Writes images and masks below a folder. areas: of each mask's foreground in pixels, by its path from the root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.areas: dict[str, int] = {}

    def image(self, name: str) -> str:
        """A colour image of random levels."""
        levels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(levels).save(self._path(name))
        return name

    def mask(self, name: str, value: int = 255, colour: tuple[int, int, int] | None = None) -> str:
        """A mask whose foreground is larger by a pixel than that of the mask before it."""
        area = len(self.areas) + 1
        labels = np.zeros(HEIGHT * WIDTH, dtype=np.uint8)
        labels[:area] = 1
        labels = labels.reshape(SIZE)
        drawn = labels[..., None] * np.array(colour, dtype=np.uint8) if colour else labels * np.uint8(value)
        Image.fromarray(drawn).save(self._path(name))
        self.areas[name] = area
        return name

    def text(self, name: str, value: str = "as it is passed on\n") -> None:
        """A file that is neither."""
        self._path(name).write_text(value, encoding="utf-8")

    def _path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True)
class Layout:
    """One set. pairs: masks of each image, both as paths from the root; none where the set is refused.

    splits: of images, by what their paths begin with; empty where the set has none. said: parts of the refusal. noted:
    parts of the notes. objects: whether a mask is an object.
    """

    build: Callable[[Builder], None]
    pairs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    objects: bool = False


def deepcrack(to: Builder) -> None:
    """DeepCrack (Liu et al., 2019)."""
    for split in ("train", "test"):
        for i in range(4):
            to.image(f"{split}_img/11{i}.jpg")
            to.mask(f"{split}_lab/11{i}.png")
    to.text("README.md")


def crack500(to: Builder) -> None:
    """CRACK500 (Yang et al., 2019): image and mask beside each other, a folder a split."""
    for split in ("train", "val", "test"):
        for i in range(3):
            to.image(f"CRACK500/{split}crop/20160222_08101{i}_1_361.jpg")
            to.mask(f"CRACK500/{split}crop/20160222_08101{i}_1_361.png")
        to.text(f"CRACK500/{split}.txt", f"{split}crop/20160222_081010_1_361.jpg {split}crop/20160222_081010.png\n")


def mmsegmentation(to: Builder) -> None:
    """What MMSegmentation calls a custom data set."""
    for split in ("train", "val"):
        for i in range(4):
            to.image(f"my_dataset/img_dir/{split}/part{i}.jpg")
            to.mask(f"my_dataset/ann_dir/{split}/part{i}.png", 1)


def crackforest(to: Builder) -> None:
    """CrackForest (Shi et al., 2016): masks are Matlab's."""
    for i in range(4):
        to.image(f"image/00{i}.jpg")
        to.text(f"groundTruth/00{i}.mat")
        to.text(f"seg/00{i}.seg")


def drive(to: Builder) -> None:
    """DRIVE (Staal et al., 2004): masks by hand, and masks of the field of view."""
    for i in range(21, 25):
        to.image(f"training/images/{i}_training.tif")
        to.mask(f"training/1st_manual/{i}_manual1.gif")
        to.mask(f"training/mask/{i}_training_mask.gif")
    for i in range(1, 4):
        to.image(f"test/images/0{i}_test.tif")
        to.mask(f"test/1st_manual/0{i}_manual1.gif")
        to.mask(f"test/mask/0{i}_test_mask.gif")


def neu_seg(to: Builder) -> None:
    """NEU-Seg (Dong et al., 2019)."""
    for split, count in (("training", 5), ("test", 3)):
        for i in range(count):
            to.image(f"NEU-Seg/images/{split}/00020{i}.jpg")
            to.mask(f"NEU-Seg/annotations/{split}/00020{i}.png", 1)


def nuclei(to: Builder) -> None:
    """Data Science Bowl 2018: a folder an image, a mask a nucleus."""
    for i in range(5):
        name = f"00071198d059ba7f{i}"
        to.image(f"stage1_train/{name}/images/{name}.png")
        for k in range(i % 3 + 1):
            to.mask(f"stage1_train/{name}/masks/{(i * 7 + k) * 7919:08x}.png")
    to.text("stage1_train_labels.csv", "ImageId,EncodedPixels\n")


def dagm(to: Builder) -> None:
    """DAGM 2007: masks of the defective images alone, in a folder below these."""
    for kind in (1, 2):
        for split, first in (("Train", 576), ("Test", 1)):
            folder = f"Class{kind}/{split}"
            for i in range(first, first + 4):
                to.image(f"{folder}/{i:04d}.PNG")
            for i in range(first, first + 2):
                to.mask(f"{folder}/Label/{i:04d}_label.PNG")
            to.text(f"{folder}/Label/Labels.txt", "1\n")


def aitex(to: Builder) -> None:
    """AITEX (Silvestre-Blanes et al., 2019)."""
    for i in range(5):
        to.image(f"Defect_images/000{i}_002_00.png")
        to.mask(f"Mask_images/000{i}_002_00_mask.png")
    for i in range(3):
        to.image(f"NODefect_images/2306881-210020u/000{i}_000_01.png")


def isic(to: Builder) -> None:
    """ISIC 2018, its first task."""
    for split, first, count in (("Training", 0, 4), ("Validation", 12, 3)):
        for i in range(first, first + count):
            to.image(f"ISIC2018_Task1_{split}_Input/ISIC_00000{i:02d}.jpg")
            to.mask(f"ISIC2018_Task1_{split}_GroundTruth/ISIC_00000{i:02d}_segmentation.png")
        to.text(f"ISIC2018_Task1_{split}_Input/ATTRIBUTION.txt")
        to.text(f"ISIC2018_Task1_{split}_Input/LICENSE.txt")


def deepglobe(to: Builder) -> None:
    """DeepGlobe's roads (Demir et al., 2018): both names have a suffix; two splits have no masks."""
    for i in range(4):
        to.image(f"train/10{i}034_sat.jpg")
        to.mask(f"train/10{i}034_mask.png")
    for i in range(3):
        to.image(f"valid/20{i}040_sat.jpg")


def camvid(to: Builder) -> None:
    """CamVid as SegNet's authors pass it on."""
    for split in ("train", "val", "test"):
        for i in range(3):
            to.image(f"CamVid/{split}/0001TP_00669{i}.png")
            to.mask(f"CamVid/{split}annot/0001TP_00669{i}.png", 1)
        to.text(f"CamVid/{split}.txt")


def massachusetts(to: Builder) -> None:
    """Massachusetts' roads (Mnih, 2013): masks in a folder beside that of the split."""
    for split in ("train", "val", "test"):
        for i in range(3):
            to.image(f"tiff/{split}/1082868{i}_15.tiff")
            to.mask(f"tiff/{split}_labels/1082868{i}_15.tif")
    to.text("metadata.csv", "image_id,split,tiff_image_path,tif_label_path\n")
    to.text("label_class_dict.csv", "name,r,g,b\n")


def supervisely(to: Builder) -> None:
    """An export of Supervisely with masks for people and masks for machines."""
    for i in range(4):
        to.image(f"ds0/img/part_{i}.png")
        to.mask(f"ds0/masks_machine/part_{i}.png", 1)
        to.mask(f"ds0/masks_human/part_{i}.png")
        to.text(f"ds0/ann/part_{i}.png.json", "{}")
    to.text("meta.json", "{}")


def stripped(to: Builder) -> None:
    """A set of our making: a top folder, prefixes of both kinds, classes by colour, and things that are no labels."""
    for i in range(6):
        to.image(f"release-1.2/data/img_{i:03d}.png")
        to.mask(f"release-1.2/gt/gt_{i:03d}.png", colour=(255, 0, 0))
        to.image(f"release-1.2/visualization/img_{i:03d}.png")
        to.image(f"release-1.2/depth/img_{i:03d}.png")
    to.text("release-1.2/README.txt")
    to.text("release-1.2/index.csv", "name,site\n")


def _same(
    folders: Mapping[str, str], stems: Mapping[str, list[str]], image: str, mask: str
) -> dict[str, tuple[str, ...]]:
    """Pairs of an image in a folder and a mask in another; image, mask: the file's name around its stem."""
    return {
        f"{images}/{image.format(stem)}": (f"{masks}/{mask.format(stem)}",)
        for images, masks in folders.items()
        for stem in stems[images]
    }


def _each(stem: str, numbers: range) -> list[str]:
    return [stem.format(i) for i in numbers]


_CRACK = {f"CRACK500/{s}crop": s for s in ("train", "val", "test")}
_CAMVID = {s: f"CamVid/{s}" for s in ("train", "val", "test")}
_ROADS = {s: f"tiff/{s}" for s in ("train", "val", "test")}
_DAGM = {f"Class{k}/{s}": n for k in (1, 2) for s, n in (("Train", 576), ("Test", 1))}
_ISIC = {f"ISIC2018_Task1_{s}": r for s, r in (("Training", range(4)), ("Validation", range(12, 15)))}

LAYOUTS: Mapping[str, Layout] = {
    "DeepCrack": Layout(
        deepcrack,
        _same(
            {"train_img": "train_lab", "test_img": "test_lab"},
            {f"{s}_img": _each("11{}", range(4)) for s in ("train", "test")},
            "{}.jpg",
            "{}.png",
        ),
        {"train_img/": "train", "test_img/": "test"},
    ),
    "CRACK500": Layout(
        crack500,
        _same(
            {folder: folder for folder in _CRACK},
            {folder: _each("20160222_08101{}_1_361", range(3)) for folder in _CRACK},
            "{}.jpg",
            "{}.png",
        ),
        _CRACK,
    ),
    "MMSegmentation": Layout(
        mmsegmentation,
        _same(
            {f"my_dataset/img_dir/{s}": f"my_dataset/ann_dir/{s}" for s in ("train", "val")},
            {f"my_dataset/img_dir/{s}": _each("part{}", range(4)) for s in ("train", "val")},
            "{}.jpg",
            "{}.png",
        ),
        {"my_dataset/img_dir/train": "train", "my_dataset/img_dir/val": "val"},
    ),
    "CrackForest": Layout(crackforest, said=("image/", "groundTruth/", ".mat", "4")),
    "DRIVE": Layout(drive, said=("1st_manual/", "/mask/", "7 pairs", "--images", "--masks")),
    "NEU-Seg": Layout(
        neu_seg,
        {
            f"NEU-Seg/images/{s}/00020{i}.jpg": (f"NEU-Seg/annotations/{s}/00020{i}.png",)
            for s, n in (("training", 5), ("test", 3))
            for i in range(n)
        },
        {"NEU-Seg/images/training/": "train", "NEU-Seg/images/test/": "test"},
    ),
    "nuclei": Layout(
        nuclei,
        {
            f"stage1_train/{name}/images/{name}.png": tuple(
                f"stage1_train/{name}/masks/{(i * 7 + k) * 7919:08x}.png" for k in range(i % 3 + 1)
            )
            for i, name in enumerate(_each("00071198d059ba7f{}", range(5)))
        },
        objects=True,
    ),
    "DAGM": Layout(
        dagm,
        {
            f"{folder}/{i:04d}.PNG": (f"{folder}/Label/{i:04d}_label.PNG",) if i < first + 2 else ()
            for folder, first in _DAGM.items()
            for i in range(first, first + 4)
        },
        {f"Class{k}/{s}/": split for k in (1, 2) for s, split in (("Train", "train"), ("Test", "test"))},
        noted=("8 images have no mask",),
    ),
    "AITEX": Layout(
        aitex,
        {f"Defect_images/000{i}_002_00.png": (f"Mask_images/000{i}_002_00_mask.png",) for i in range(5)},
        noted=("3 of NODefect_images/2306881-210020u/",),
    ),
    "ISIC": Layout(
        isic,
        {
            f"{s}_Input/ISIC_00000{i:02d}.jpg": (f"{s}_GroundTruth/ISIC_00000{i:02d}_segmentation.png",)
            for s, numbers in _ISIC.items()
            for i in numbers
        },
        {"ISIC2018_Task1_Training_Input/": "train", "ISIC2018_Task1_Validation_Input/": "val"},
    ),
    "DeepGlobe": Layout(
        deepglobe,
        {f"train/10{i}034_sat.jpg": (f"train/10{i}034_mask.png",) for i in range(4)},
        noted=("3 of valid/",),
    ),
    "CamVid": Layout(
        camvid,
        _same(
            {folder: f"{folder}annot" for folder in _CAMVID.values()},
            {folder: _each("0001TP_00669{}", range(3)) for folder in _CAMVID.values()},
            "{}.png",
            "{}.png",
        ),
        {f"{folder}/": split for split, folder in _CAMVID.items()},
    ),
    "Massachusetts": Layout(
        massachusetts,
        _same(
            {folder: f"{folder}_labels" for folder in _ROADS.values()},
            {folder: _each("1082868{}_15", range(3)) for folder in _ROADS.values()},
            "{}.tiff",
            "{}.tif",
        ),
        {f"{folder}/": split for split, folder in _ROADS.items()},
    ),
    "Supervisely": Layout(supervisely, said=("masks_machine/", "masks_human/", "4 pairs", "--masks")),
    "stripped": Layout(
        stripped,
        {f"release-1.2/data/img_{i:03d}.png": (f"release-1.2/gt/gt_{i:03d}.png",) for i in range(6)},
        noted=("6 of release-1.2/depth/", "6 of release-1.2/visualization/"),
    ),
}
