"""What the prepare_*.py scripts share: arguments and refusals, groups, and the two formats they write."""

import argparse
import csv
import json
import shutil
import sys
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image


def arguments(doc, *wanted):
    """SOURCE and OUT from the command line; `wanted` are the paths that make SOURCE the right data set."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help=f"the folder that holds {', '.join(wanted)}")
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder to make; may exist if it is empty")
    args = parser.parse_args()
    missing = [name for name in wanted if not (args.source / name).exists()]
    if missing:
        sys.exit(
            f"{args.source} is not the data set that this script reads.\n"
            f"  wanted   {', '.join(wanted)}\n  missing  {', '.join(missing)}\n"
            "Nothing was written. Name the folder that holds them as SOURCE."
        )
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        sys.exit(
            f"{args.out} exists and is not an empty folder.\n"
            "Nothing was written. Name a new folder as OUT, or remove this one first."
        )
    return args.source, args.out


def straddling(pairs):
    """From (group, split) pairs: the groups that lie in more than one split, and all groups."""
    splits = {}
    for group, split in pairs:
        splits.setdefault(group, set()).add(split)
    return [group for group, where in splits.items() if len(where) > 1], list(splits)


def write_coco(out, rows, classes):
    """A COCO folder: images/*, annotations/{split}.json.

    rows: dicts of path, split, group, objects (a list of COCO annotations that lack only their ids).
    classes: {category id: name}.
    """
    (out / "images").mkdir(parents=True)
    (out / "annotations").mkdir()
    splits, annotation_ids = {}, count(1)
    for image_id, row in enumerate(rows, start=1):
        shutil.copyfile(row["path"], out / "images" / row["path"].name)
        width, height = Image.open(row["path"]).size
        images, annotations = splits.setdefault(row["split"], ([], []))
        images.append(
            {"id": image_id, "file_name": row["path"].name, "height": height, "width": width, "group": row["group"]}
        )
        annotations += [
            {"id": next(annotation_ids), "image_id": image_id, "iscrowd": 0, **thing} for thing in row["objects"]
        ]
    categories = [{"id": number, "name": name} for number, name in classes.items()]
    for split, (images, annotations) in splits.items():
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"{split}.json").write_text(json.dumps(coco))
        print(
            f"{split:6}{len(images):5} images {len(annotations):6} instances "
            f"{len({image['group'] for image in images}):4} groups"
        )
    both, groups = straddling((row["group"], row["split"]) for row in rows)
    print(f"groups that straddle the official split: {len(both)} of {len(groups)}")
    say_next(out)


def write_masks(out, rows, classes):
    """A mask folder: images/*, masks/STEM.png, classes.txt, samples.csv with an empty split.

    rows: (image path, file name in images/, group, mask), the mask as (height, width) class indices.
    """
    (out / "images").mkdir(parents=True)
    (out / "masks").mkdir()
    samples, pixels = [], []  # pixels: (images, classes) once stacked
    for path, name, group, mask in rows:
        shutil.copyfile(path, out / "images" / name)
        Image.fromarray(mask.astype(np.uint8)).save(out / "masks" / Path(name).with_suffix(".png"))
        samples.append((name, "", group))
        pixels.append(np.bincount(mask.ravel(), minlength=len(classes)))
    (out / "classes.txt").write_text("\n".join(classes) + "\n")
    with open(out / "samples.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "split", "group"), *samples])
    print(f"{len(samples)} images, {len({group for _, _, group in samples})} groups, no official split")
    pixels = np.stack(pixels)
    for name, column in zip(classes, pixels.T, strict=True):
        share = 100 * column.sum() / pixels.sum()
        print(f"  {name:12}in {(column > 0).sum():4} images, {share:5.2f} % of all pixels")
    say_next(out)


def say_next(out):
    print(f"next: featprobe extract --backbone embedded --data {out}")
