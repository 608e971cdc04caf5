"""Run a model of `featprobe export` with onnxruntime, numpy and Pillow alone.

    python runner.py MODEL.onnx OUT IMAGE...

Prints a line of JSON per image: its verdict, its score, the labels, or the boxes. Writes OUT/NAME.png, class indices,
where the model gives classes, and OUT/NAME.tif, float32, where it gives a map of anomalies. What needs more than a
graph can do is done here: at an operating point pixels are joined to findings, and small ones are dropped.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def joined(values, classes):
    """Which pixels belong to a finding: (height, width), as values and classes. Corners connect pixels of a class."""
    line = classes.shape[1] + 1  # a column of background keeps the rows apart
    shown, values = (np.pad(own, ((0, 0), (0, 1))).ravel() for own in (classes, values))
    begin = np.flatnonzero(np.append(True, shown[1:] != shown[:-1]))  # of runs of equal pixels
    end, peak = np.append(begin[1:], shown.size), np.maximum.reduceat(values, begin)
    runs = np.flatnonzero(shown[begin])
    b, e, number = begin[runs], end[runs], np.arange(len(runs))
    first, last = np.searchsorted(e, b - line - 1, "right"), np.searchsorted(b, e - line + 1, "left")
    below, above = np.repeat(number, last - first), np.arange((last - first).sum())  # runs that touch, in the row above
    above += np.repeat(last - np.cumsum(last - first), last - first)
    same = shown[b[below]] == shown[b[above]]
    below, above, before = below[same], above[same], None
    while before is None or (before != number).any():  # each takes the highest number beside it, and what that has
        before = number.copy()
        np.maximum.at(number, above, before[below])
        np.maximum.at(number, below, number[above])
        number = number[number]
    area, highest = np.bincount(number, e - b), np.full(len(runs), -np.inf)
    np.maximum.at(highest, number, peak[runs])
    kept = np.zeros(len(begin), dtype=bool)
    kept[runs] = ((highest[: len(area)] >= threshold) & (area >= least))[number]
    return np.repeat(kept, end - begin).reshape(-1, line)[:, :-1]


def area_of(box, mask, height, width):
    """Pixels of an object: of its mask, (side, side), where it has one with any, else of its box, x1 y1 x2 y2."""
    weights = []
    for length, low, high in ((height, box[1], box[3]), (width, box[0], box[2])) if mask is not None else ():
        pixel = np.arange(length)
        place = ((pixel + 0.5 - low) / (high - low) * len(mask) - 0.5).clip(0, len(mask) - 1)
        own = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(len(mask))))
        weights.append(own * ((pixel >= np.floor(low)) & (pixel < np.ceil(high)))[:, None])
    pixels = int((weights[0] @ mask @ weights[1].T >= 0.5).sum()) if weights else 0
    return pixels or (box[2] - box[0]) * (box[3] - box[1])


model, out, *images = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
meta = session.get_modelmeta().custom_metadata_map
wanted, classes = session.get_inputs()[0].shape[1:], json.loads(meta["classes"])
threshold, base, least = (json.loads(meta[name]) for name in ("threshold", "base", "least_area"))
Path(out).mkdir(parents=True, exist_ok=True)
for path in map(Path, images):
    with Image.open(path) as picture:
        grey = picture.mode[0] in "IF" or (picture.mode == "L" and len(wanted) == 2)  # I;16: 16 bits
        levels = np.asarray(picture if grey else picture.convert("RGB"))
    if picture.mode[0] == "I" and meta["input_dtype"] == "uint16" and 0 <= levels.min() <= levels.max() < 2**16:
        levels = levels.astype(np.uint16)  # of the other byte order, or read as 32 bits, as older Pillows do
    if str(levels.dtype) != meta["input_dtype"] or list(levels.shape) != wanted:
        sys.exit(f"{path} is {levels.dtype} {levels.shape}; the model takes {meta['input_dtype']} {tuple(wanted)}")
    found = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"images": levels[None]}), strict=True))
    said = {"image": str(path)}
    if base is not None:  # an operating point of pixels
        values = found["map"][0] if "map" in found else found["probabilities"][0, 1:].max(0)
        kept = joined(values, found["classes"][0] if "classes" in found else values >= np.float32(base))
        found |= {"verdict": [kept.any()]} | ({"classes": found["classes"] * kept} if "classes" in found else {})
    if "boxes" in found and meta["operating_point"] != "null":
        masks = found.get("masks", [None] * len(found["boxes"]))
        areas = [area_of(*own, *wanted[:2]) for own in zip(found["boxes"].tolist(), masks, strict=True)]
        found["verdict"] = [((found["scores"] >= threshold) & (np.array(areas) >= least)).any()]
    if "verdict" in found:
        said["verdict"] = "called" if found["verdict"][0] else "passed"
    if "score" in found:
        said["score"] = float(found["score"][0])
    if "classes" in found:
        Image.fromarray(found["classes"][0]).save(Path(out, f"{path.stem}.png"))
    if "map" in found:
        Image.fromarray(found["map"][0]).save(Path(out, f"{path.stem}.tif"))
    if "decided" in found:
        said["labels"] = [name for name, own in zip(classes, found["decided"][0], strict=True) if own]
    if "boxes" in found:
        listed = zip(*(found[name].tolist() for name in ("boxes", "scores", "labels")), strict=True)
        said["objects"] = [{"box": box, "score": score, "class": classes[label]} for box, score, label in listed]
    print(json.dumps(said))
