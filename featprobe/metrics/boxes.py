"""COCO average precision of boxes and of masks, as pycocotools computes it."""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from featprobe.errors import DataError, ShapeError
from featprobe.geometry import Size
from featprobe.targets import Instance

ApKind = Literal["bbox", "segm"]


@dataclass(frozen=True)
class ApScores:
    """COCO's twelve numbers, in [0, 1]; nan where there is no truth of that kind.

    ap: mean over classes and over IoU 0.50, 0.55, ..., 0.95; ap50, ap75: at one IoU; ap_small, ap_medium,
    ap_large: for objects of up to 32x32, up to 96x96 and more pixels.
    ar1, ar10, ar100: mean of the largest recall with at most 1, 10 or 100 predictions per class and image;
    ar_small, ar_medium, ar_large: with at most 100.
    per_class, per_class_50: ap and ap50 per category, in the order of the truth's `categories`.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: tuple[float, ...]
    per_class_50: tuple[float, ...]


@dataclass(frozen=True)
class TruthImage:
    """The true objects of one image.

    size: (height, width) of the original image in pixels; instances: in pixels of that image.
    """

    image_id: int | str
    size: Size
    instances: tuple[Instance, ...]


def average_precision(truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], kind: ApKind) -> ApScores:
    """Scores of predictions against the truth: the same numbers as pycocotools' for the two as files.

    truth: a dict with images, annotations and categories, as in COCO JSON; annotation ids count from 1, because
    pycocotools never finds an object with id 0. Neither argument is changed.
    predictions: COCO results: image_id, category_id, score, bbox [x, y, width, height] in pixels of the
    original image, and for "segm" `segmentation`, a compressed RLE. If the first prediction has a bbox, the area of
    a prediction (for small, medium and large) is that of its box, also for "segm".
    Predictions of a category that the truth does not list are ignored.
    Raises DataError when a prediction's image is not in the truth, and for "segm" when objects of the truth have no
    mask.
    """
    evaluation = unmatched(truth, predictions, kind)
    with redirect_stdout(StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds, recalls, categories)
    column = {category: i for i, category in enumerate(evaluation.params.catIds)}
    columns = [column[category["id"]] for category in truth["categories"]]
    whole: dict[str, Any] = {  # the fields stand in the order of pycocotools' twelve numbers
        field.name: _known_mean(np.asarray(value))
        for field, value in zip(fields(ApScores), evaluation.stats, strict=False)
    }
    return ApScores(
        **whole,
        per_class=tuple(_known_mean(precision[:, :, i]) for i in columns),
        per_class_50=tuple(_known_mean(precision[0, :, i]) for i in columns),
    )


def unmatched(truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], kind: ApKind) -> COCOeval:
    """pycocotools' evaluation object of copies of both, before its first step. Arguments and errors: average_precision.

    pycocotools prints its progress: redirect the standard output.
    """
    _check(truth, predictions, kind)
    with redirect_stdout(StringIO()):
        return COCOeval(*_load(truth, predictions), kind)


def truth_of(images: Sequence[TruthImage], classes: Sequence[str], category_ids: Sequence[int]) -> dict[str, Any]:
    """The COCO dict of labelled images.

    classes: names, the background first; category_ids: the COCO ids of all classes but the background.
    An object's area is that of the data set, else that of its mask, else that of its box.

    >>> image = TruthImage(7, (20, 30), (Instance(1, (2.0, 3.0, 6.0, 8.0)),))
    >>> truth_of([image], ["background", "pore"], [5])["annotations"]  # doctest: +NORMALIZE_WHITESPACE
    [{'id': 1, 'image_id': 7, 'category_id': 5, 'bbox': [2.0, 3.0, 4.0, 5.0], 'area': 20.0, 'iscrowd': 0}]
    """
    if len(category_ids) != len(classes) - 1:
        raise ShapeError(f"{len(category_ids)} category ids do not fit the {len(classes) - 1} classes of {classes}.")
    objects = [(image, instance) for image in images for instance in image.instances if instance.category > 0]
    return {
        "images": [{"id": i.image_id, "height": i.size[0], "width": i.size[1]} for i in images],
        "annotations": [
            {"id": number, "image_id": image.image_id, "category_id": category_ids[instance.category - 1]}
            | _shape_of(instance)
            for number, (image, instance) in enumerate(objects, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in zip(category_ids, classes[1:], strict=True)],
    }


def _shape_of(instance: Instance) -> dict[str, Any]:
    x1, y1, x2, y2 = instance.box_xyxy
    area = instance.area
    if area is None:
        area = (x2 - x1) * (y2 - y1) if instance.rle is None else float(coco_mask.area(instance.rle))
    shape = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": int(instance.crowd)}
    return shape if instance.rle is None else shape | {"segmentation": dict(instance.rle)}


def _check(truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], kind: ApKind) -> None:
    unknown = {p["image_id"] for p in predictions} - {image["id"] for image in truth["images"]}
    if unknown:
        raise DataError(
            f"Predictions name {len(unknown)} images that the truth does not list, such as {min(unknown, key=str)!r}.\n"
            "Nothing was scored. Predict for the images of the truth, and use its image ids."
        )
    bare = sum("segmentation" not in a for a in truth["annotations"])
    if bare and kind == "segm":
        raise DataError(
            f"{bare} of {len(truth['annotations'])} objects have no mask, so masks can't be scored.\n"
            "Nothing was scored. Score boxes, or use a data set with masks."
        )


def _load(truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> tuple[COCO, COCO]:
    """Truth and predictions as pycocotools' objects, from copies, because it writes ids, areas, masks and flags into
    its input."""
    true = COCO()
    true.dataset = {**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]}
    true.createIndex()
    if predictions:
        return true, true.loadRes([_result(prediction) for prediction in predictions])
    found = COCO()  # loadRes reads the first prediction, so it needs one
    found.dataset = {**truth, "annotations": []}
    found.createIndex()
    return true, found


def _result(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the box as a list, because pycocotools does not accept a tuple."""
    return {**prediction, "bbox": list(prediction["bbox"])} if "bbox" in prediction else dict(prediction)


def _known_mean(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not -1 (pycocotools' value where there is no truth); nan where there are none."""
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
