"""Files about many images that are written image by image, so that memory holds none of them."""

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from featprobe.io.texts import cell

T = TypeVar("T")
Json = dict[str, Any]


class StreamedFile(ABC, Generic[T]):
    """The texts of a file in their order: `begin` once, `of` for each image, `end` once. T: is known of an image."""

    name: str

    @abstractmethod
    def begin(self) -> str:
        """What stands before the first image."""

    @abstractmethod
    def of(self, one: T) -> str:
        """What stands there of an image."""

    def end(self) -> str:
        """What stands after the last image."""
        return ""


class CsvFile(StreamedFile[T]):
    """A CSV file. header: names of columns. lines: the lines of an image."""

    def __init__(self, name: str, header: Sequence[str], lines: Callable[[T], Sequence[Sequence[object]]]) -> None:
        self.name, self.header, self.lines = name, header, lines

    def begin(self) -> str:
        """The line of names."""
        return csv_text([self.header])

    def of(self, one: T) -> str:
        """The lines of an image."""
        return csv_text(self.lines(one))


class CocoFile(StreamedFile[T]):
    """A COCO JSON file. categories: COCO's id and name of each class.

    image: COCO's record of an image, without its id. annotations: those of an image; id, image_id and iscrowd are set
    here. Ids count from 1: a 0 means "no class" or "no object" to some programs.
    """

    def __init__(
        self,
        name: str,
        info: Json,
        categories: Sequence[tuple[int, str]],
        image: Callable[[T], Json],
        annotations: Callable[[T], Sequence[Json]],
    ) -> None:
        self.name, self.info, self.image, self.annotations = name, info, image, annotations
        self.categories = [{"id": number, "name": own, "supercategory": ""} for number, own in categories]
        self._images: list[str] = []
        self._written = 0

    def begin(self) -> str:
        """All that is known before the first image."""
        first = {"info": self.info, "licenses": [], "categories": self.categories}
        return json.dumps(first)[:-1] + ', "annotations": ['

    def of(self, one: T) -> str:
        """The annotations of an image; its own record comes at the end."""
        number = len(self._images) + 1
        self._images.append(json.dumps({"id": number, **self.image(one)}))
        texts = []
        for own in self.annotations(one):
            self._written += 1
            texts.append(json.dumps({**own, "id": self._written, "image_id": number, "iscrowd": 0}))
        before = ", " if texts and self._written > len(texts) else ""
        return before + ", ".join(texts)

    def end(self) -> str:
        """The records of all images, those without annotations too."""
        return '], "images": [' + ", ".join(self._images) + "]}\n"


def csv_text(lines: Sequence[Sequence[object]]) -> str:
    """Lines of a CSV file, in which no spreadsheet computes a text."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([[cell(value) for value in line] for line in lines])
    return stream.getvalue()
