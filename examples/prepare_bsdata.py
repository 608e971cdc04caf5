"""BSData (pittings on ball screw drives, RGB, instance polygons) as a COCO folder.

    python examples/prepare_bsdata.py ../shared/data/bsdata OUT
    featprobe extract --backbone embedded --data OUT

Source: https://github.com/2Obe/BSData; Schlagenhauf and Landwehr, "Industrial machine tool component surface
defect dataset", arXiv:2103.13003. Licence: CC BY-SA 4.0. SOURCE is a clone, or a part of one: pictures that
image_data.json names and that are not there are counted and left out.

One class, the authors' own train/test split, no validation split (featprobe carves one from train by group).
The same place on the screw was photographed again and again while it wore down. image_data.json lists, for
each picture, the wear chains that it belongs to; chains that share a picture show the same place and become
one group. A picture without a chain is grouped with the other crops of its photograph. Nearly every place
lies on both sides of the official split, so report under `--split group` as well.
"""

import json
import sys
from itertools import pairwise

import numpy as np
from _prepare import arguments, straddling, write_coco
from PIL import Image

from featprobe.datasets.grouping import components


def read_polygons(label_file, image_size):
    """COCO annotations of one labelme file, clipped to the image, and how many points that moved."""
    objects, moved = [], 0
    for shape in json.loads(label_file.read_text())["shapes"]:
        if (shape["label"], shape["shape_type"]) != ("Pitting", "polygon"):
            sys.exit(
                f"{label_file}: wanted polygons of Pitting, "
                f"found a {shape['shape_type']} of {shape['label']}. Nothing was written."
            )
        drawn = np.array(shape["points"])  # (points, 2), pixels, x y
        points = drawn.clip(0, image_size)
        moved += int((points != drawn).any(axis=1).sum())
        (x, y), (width, height) = points.min(axis=0), np.ptp(points, axis=0)
        following = np.roll(points, -1, axis=0)
        area = abs(points[:, 0] @ following[:, 1] - points[:, 1] @ following[:, 0]) / 2
        objects.append(
            {"category_id": 1, "segmentation": [points.ravel().tolist()], "bbox": [x, y, width, height], "area": area}
        )
    return objects, moved


source, out = arguments(__doc__, "image_data.json", "data", "label")
entries = [e for e in json.loads((source / "image_data.json").read_text())["images"] if e["train_test_split"]]
place_of = components(
    (chain for e in entries for chain in e["wear_dev"]), (pair for e in entries for pair in pairwise(e["wear_dev"]))
)

rows, moved, official = [], 0, []
for entry in entries:
    chains, photo = entry["wear_dev"], entry["filename"].split("_crop_")[0]
    group = place_of[chains[0]] if chains else photo
    official.append((group, entry["train_test_split"]))
    path = source / "data" / entry["filename"]
    if path.exists():
        objects, moved_here = read_polygons(source / "label" / entry["annotations"], Image.open(path).size)
        moved += moved_here
        rows.append({"path": path, "split": entry["train_test_split"], "group": group, "objects": objects})

both, groups = straddling(official)
print(
    f"image_data.json: {len(entries)} annotated pictures, "
    f"of which {len(entries) - len(rows)} are not in SOURCE; "
    f"{len(place_of)} wear chains at {len(set(place_of.values()))} places; "
    f"{len(both)} of all its {len(groups)} groups straddle the official split"
)
print(f"polygon points outside of their image, clipped: {moved}")
write_coco(out, rows, {1: "pitting"})
