"""Magnetic tile defects (grey pictures of many sizes, pixel masks, five kinds) as a mask folder.

    python examples/prepare_mt_defect.py ../shared/data/mt_defect OUT
    featprobe extract --backbone embedded --data OUT

Source: https://github.com/abin24/Magnetic-tile-defect-datasets. (the full stop belongs to it); Huang, Qiu and
Yuan, "Surface defect saliency of magnetic tile", The Visual Computer, 2020. Licence: none stated ("welcomed
to use our dataset", cite the paper): treat it as research only.

The class of a mask is that of its folder, MT_Free is background alone. Masks are meant to be 0 and 255 but
have smoothed edges: grey 128 and above is the defect. There is no official split.

The group is the tile. A name like exp3_num_4764.jpg holds an exposure (brighter from 1 to 6) and a running
frame number, and the frames of one tile follow each other, whatever folder they lie in: neighbours of rising
exposure are the same picture in another light. So pictures up to 400 frames apart are one group; that joins
a few different tiles, which does no harm. Two tiles came back after a longer pause, so near-identical
pictures are one group as well.
"""

import re
from itertools import pairwise

import numpy as np
from _prepare import arguments, write_masks
from PIL import Image

from featprobe.datasets.grouping import components

CLASSES = ["background", "blowhole", "break", "crack", "fray", "uneven"]
FRAME_GAP = 400  # frames; beyond it, neighbours of rising exposure look no more alike than others
SAME_PICTURE = 0.985  # correlation of thumbnails; of pictures far apart, median 0.33 and 0.945 in one of 1000


def thumbnail(path):
    """(1024,) grey levels of mean 0 and norm 1."""
    levels = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BOX), dtype=float).ravel()
    levels -= levels.mean()
    return levels / np.linalg.norm(levels)


def read_mask(path):
    """(height, width) class indices, uint8."""
    defect = np.asarray(Image.open(path.with_suffix(".png"))) >= 128
    kind = path.parent.parent.name.removeprefix("MT_").lower()
    return defect * np.uint8(0 if kind == "free" else CLASSES.index(kind))


source, out = arguments(__doc__, *(f"MT_{name.capitalize()}" for name in CLASSES[1:]), "MT_Free")
path_of = {int(re.search(r"num_(\d+)", path.name)[1]): path for path in source.glob("MT_*/Imgs/*.jpg")}
frames = sorted(path_of)
close = [(a, b) for a, b in pairwise(frames) if b - a <= FRAME_GAP]
thumbnails = np.stack([thumbnail(path_of[frame]) for frame in frames])
alike = np.argwhere(np.triu(thumbnails @ thumbnails.T > SAME_PICTURE, k=1))
tile_of = components(frames, close + [(frames[a], frames[b]) for a, b in alike])

masks = {frame: read_mask(path_of[frame]) for frame in frames}
unmarked = [path_of[f].name for f in frames if "MT_Free" not in path_of[f].parts and not masks[f].any()]
print(f"pictures in a defect folder with nothing marked, kept as background: {', '.join(unmarked) or 'none'}")
write_masks(out, ((path_of[f], path_of[f].name, f"tile-{tile_of[f]}", masks[f]) for f in frames), CLASSES)
