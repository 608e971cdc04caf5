"""Sandstone (slices of an X-ray microscopy scan, dense masks of four materials) as a mask folder.

    python examples/prepare_sandstone.py ../shared/data/sandstone_xrm OUT
    featprobe extract --backbone embedded --data OUT

Source: https://github.com/bnsreenu/python_for_microscopists, folder images. Licence: MIT for the repository,
which has no separate word on the pictures and does not say who made the masks, or how.

The masks are colour-coded, every pixel has a material, and none is called background: index 0 is air, the
dark one. Materials are named by their grey; the repository does not name the minerals. Slice 0180 comes with
a mask in other codes (greys); the mean grey under each code shows which material it means.
The group is the slice and there is no official split. All ten are slices of one core: what is measured here
holds within that sample and says nothing of another. A look-up of the grey level alone already scores an IoU
of about .96, .37, .94 and .96 (air, mid-dark, grain, bright): only mid-dark asks for texture.
"""

import sys

import numpy as np
from _prepare import arguments, write_masks
from PIL import Image

CLASSES = ["air", "mid-dark", "grain", "bright"]
COLOURS = [0x0000FF, 0x00FF00, 0xFF0000, 0xFFFF00]  # in the order of CLASSES
GREYS_OF_0180 = [33, 201, 231, 65]


def read_mask(path, codes):
    """(height, width) class indices."""
    values = np.asarray(Image.open(path)).astype(int)
    if values.ndim == 3:
        values = values @ [0x10000, 0x100, 1]  # red, green, blue as one number
    found = np.unique(values)
    if not np.isin(found, codes).all():
        sys.exit(f"{path}: wanted the codes {codes}, found {found.tolist()}. Nothing was written.")
    return sum(index * (values == code) for index, code in enumerate(codes))


source, out = arguments(
    __doc__,
    "images/Train_images",
    "images/Train_masks",
    "images/Sandstone_Versa0180_image.tif",
    "images/Sandstone_Versa0180_mask.png",
)
slices = [
    (path, path.name, path.stem, read_mask(source / "images" / "Train_masks" / path.name, COLOURS))
    for path in sorted((source / "images" / "Train_images").glob("*.tif"))
]
other = source / "images" / "Sandstone_Versa0180_image.tif"
slices.append(
    (
        other,
        "Sandstone_Versa0180.tif",
        "Sandstone_Versa0180",
        read_mask(other.with_name("Sandstone_Versa0180_mask.png"), GREYS_OF_0180),
    )
)
write_masks(out, sorted(slices, key=lambda row: row[1]), CLASSES)
