"""DeepPCB (printed boards, binarised line scans) as folders of classes: small crops, each with one label.

    python examples/prepare_deeppcb_classes.py ../shared/data/deeppcb OUT
    featprobe extract --backbone embedded --data OUT --size 128x128
    featprobe probe --task classify --data OUT

Source: https://github.com/tangsanli5201/DeepPCB. Licence: MIT (file LICENSE), while its README asks for
research use only. SOURCE is a clone, or a part of one: pictures that the lists name and that are not there
are counted and left out.

A crop has 64x64 pixels. One of a defect lies around the middle of its box, moved by up to 12 pixels so that
the defect is not always in the centre, and shows boxes of no other class. Each board gives at most one crop for
each of the six classes, and up to two crops of the class good: of places that no box touches, where copper and
ground both cover a tenth or more, so that an empty place is not what says good. The boards are those with
defects: a place without a box is taken for good, as the authors' labels say.
samples.csv holds the authors' split (trainval.txt is train, test.txt is test), and the folder of the board as
the group. Most folders stand in both lists: --split group asks for a new board.
"""

import csv
import sys

import numpy as np
from _prepare import arguments, say_next, straddling
from PIL import Image

CLASSES = {1: "open", 2: "short", 3: "mousebite", 4: "spur", 5: "copper", 6: "pin-hole"}
SIDE, SHIFT, CLEAN, TRIES = 64, 12, 2, 200  # pixels, pixels, good crops of a board, places that are tried for them


def read_boxes(box_file):
    """(boxes, 5): x1 y1 x2 y2 type, from lines that separate them by spaces or by commas."""
    lines = box_file.read_text().splitlines()
    boxes = np.array([[int(word) for word in line.replace(",", " ").split()] for line in lines]).reshape(-1, 5)
    x1, y1, x2, y2, kind = boxes.T
    if not ((0 <= x1) & (x1 < x2) & (0 <= y1) & (y1 < y2) & np.isin(kind, list(CLASSES))).all():
        sys.exit(f"{box_file}: wanted x1 < x2, y1 < y2 and a type of 1 to 6 in each line. Nothing was written.")
    return boxes


def shown(boxes, left, top):
    """Which boxes a crop touches."""
    x1, y1, x2, y2, _ = boxes.T
    return (x1 < left + SIDE) & (x2 > left) & (y1 < top + SIDE) & (y2 > top)


def crops_of(board, boxes, random):
    """(label, left, top) of the crops of a board, (height, width)."""
    last = np.array(board.shape)[::-1] - SIDE  # x, y
    found, done = [], set()
    for x1, y1, x2, y2, kind in boxes.tolist():
        middle = np.array([(x1 + x2) // 2, (y1 + y2) // 2]) - SIDE // 2
        left, top = np.clip(middle + random.integers(-SHIFT, SHIFT + 1, 2), 0, last).tolist()
        if kind not in done and set(boxes[shown(boxes, left, top), 4].tolist()) == {kind}:
            done.add(kind)
            found.append((CLASSES[kind], left, top))
    good = []
    for left, top in random.integers(0, last + 1, (TRIES, 2)).tolist():
        bright = (board[top : top + SIDE, left : left + SIDE] > 127).mean()
        apart = all(abs(left - x) >= SIDE or abs(top - y) >= SIDE for _, x, y in good)
        if len(good) < CLEAN and apart and 0.1 <= bright <= 0.9 and not shown(boxes, left, top).any():
            good.append(("good", left, top))
    return found + good


source, out = arguments(__doc__, "PCBData/trainval.txt", "PCBData/test.txt")
jobs, listed = [], 0
for split, list_name in (("train", "trainval.txt"), ("test", "test.txt")):
    for line in (source / "PCBData" / list_name).read_text().splitlines():
        image_name, box_name = line.split()
        listed += 1
        path = source / "PCBData" / image_name.replace(".jpg", "_test.jpg")
        if path.exists():
            jobs.append((path, split, image_name.split("/")[0], read_boxes(source / "PCBData" / box_name)))

for name in (*CLASSES.values(), "good"):
    (out / name).mkdir(parents=True)
samples = []
for number, (path, split, group, boxes) in enumerate(jobs):
    with Image.open(path) as picture:
        board = np.asarray(picture.convert("L"))
    for label, left, top in crops_of(board, boxes, np.random.default_rng([17, number])):
        name = f"{label}/{path.stem.removesuffix('_test')}_{left}_{top}.png"
        Image.fromarray(board[top : top + SIDE, left : left + SIDE]).save(out / name)
        samples.append((name, split, group))
with open(out / "samples.csv", "w", newline="") as file:
    csv.writer(file, lineterminator="\n").writerows([("image", "split", "group"), *samples])

print(f"lists: {listed} pictures, of which {listed - len(jobs)} are not in SOURCE")
for label in ("good", *CLASSES.values()):
    splits = [split for name, split, _ in samples if name.startswith(f"{label}/")]
    print(f"  {label:12}{splits.count('train'):5} of train {splits.count('test'):5} of test")
both, groups = straddling((group, split) for _, split, group in samples)
print(f"groups that straddle the official split: {len(both)} of {len(groups)}")
say_next(out)
