"""DeepPCB (defects of printed boards, binarised line scans, boxes) as a COCO folder.

    python examples/prepare_deeppcb.py ../shared/data/deeppcb OUT
    featprobe extract --backbone embedded --data OUT

Source: https://github.com/tangsanli5201/DeepPCB. Licence: MIT (file LICENSE), while its README asks for
research use only. SOURCE is a clone, or a part of one: pictures that the lists name and that are not there
are counted and left out.

The authors' lists become the split: trainval.txt is train, test.txt is test. A list line names X.jpg; the
tested board is X_test.jpg (X_temp.jpg, its clean template, is not used). Boxes only, six classes.
The group is the folder, apparently one large scan each, cut into tiles of 640x640. Most folders stand in both
lists, though no test tile here is a near copy of a train tile. Folders are few and of very unequal size
(seven tiles or hundreds): a split by group asks for a new board, and its intervals are wide.
"""

import sys

from _prepare import arguments, straddling, write_coco

CLASSES = {1: "open", 2: "short", 3: "mousebite", 4: "spur", 5: "copper", 6: "pin-hole"}


def read_boxes(box_file):
    """COCO annotations from lines of `x1 y1 x2 y2 type`, separated by spaces or by commas."""
    objects = []
    for line in box_file.read_text().splitlines():
        x1, y1, x2, y2, kind = (int(word) for word in line.replace(",", " ").split())
        if not (0 <= x1 < x2 and 0 <= y1 < y2 and kind in CLASSES):
            sys.exit(f"{box_file}: wanted x1 < x2, y1 < y2 and a type of 1 to 6, found {line!r}. Nothing was written.")
        width, height = x2 - x1, y2 - y1
        objects.append({"category_id": kind, "bbox": [x1, y1, width, height], "area": width * height})
    return objects


source, out = arguments(__doc__, "PCBData/trainval.txt", "PCBData/test.txt")
rows, official = [], []
for split, list_name in (("train", "trainval.txt"), ("test", "test.txt")):
    for line in (source / "PCBData" / list_name).read_text().splitlines():
        image_name, box_name = line.split()
        group = image_name.split("/")[0]
        official.append((group, split))
        path = source / "PCBData" / image_name.replace(".jpg", "_test.jpg")
        if path.exists():
            objects = read_boxes(source / "PCBData" / box_name)
            rows.append({"path": path, "split": split, "group": group, "objects": objects})

both, groups = straddling(official)
print(
    f"lists: {len(official)} pictures, of which {len(official) - len(rows)} are not in SOURCE; "
    f"{len(both)} of all their {len(groups)} groups straddle the official split"
)
write_coco(out, rows, CLASSES)
