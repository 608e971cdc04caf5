"""Run a model of `featprobe export` with onnxruntime, numpy and Pillow alone.

    python runner.py MODEL.onnx OUT IMAGE...

Prints a line of JSON per image: its verdict, its score, the labels, or the boxes. Writes OUT/NAME.png, class indices,
where the model gives classes, and OUT/NAME.tif, float32, where it gives a map of anomalies.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

model, out, *images = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
meta = session.get_modelmeta().custom_metadata_map
wanted, classes = session.get_inputs()[0].shape[1:], json.loads(meta["classes"])
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
