"""A process that decodes images into memory that it shares with the one that started it.

Tasks and answers are messages of two sockets that all such processes share: whichever is free takes the next task. The
memory begins with the number of the task that each process is at, so that it is known what was lost where one ends.
"""

import json
import mmap
import socket
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np

from featprobe.datasets.images.framing import HostFraming, ImageKind, Layout, Places, Wanted
from featprobe.errors import DataError
from featprobe.geometry import Placement
from featprobe.specs import FeatureRecipe

LONGEST = 1 << 17  # bytes of a message
NUMBER = np.dtype(np.int64)  # of a task, where each process says at which it is
MOST_TEXT = 4000  # characters of an error


class Task(NamedTuple):
    """A whole image to be decoded, and where to. recipe: in JSON, since all tasks have the same.

    start: of the batch's memory. capacity, images, layout: of the batch, see `Places`. k: the place.
    """

    number: int
    recipe: str
    start: int
    capacity: int
    images: int
    layout: Layout
    k: int
    wanted: Wanted

    def encode(self) -> bytes:
        """The message for a process."""
        own = self.wanted
        image = str(own.path), vars(own.placement), own.size, vars(own.kind)
        return json.dumps((*self[:5], vars(self.layout), self.k, *image)).encode()

    @classmethod
    def of(cls, message: bytes) -> "Task":
        """The task of a message."""
        number, recipe, start, capacity, images, layout, k, path, sizes, size, kind = json.loads(message)
        placement = Placement(**{name: tuple(values) for name, values in sizes.items()})
        wanted = Wanted(Path(path), placement, tuple(size), ImageKind(**kind))
        return cls(number, recipe, start, capacity, images, Layout(**layout), k, wanted)


class Answer(NamedTuple):
    """The end of a task: how many seconds it took, and what failed. is_data: whether that is a DataError."""

    number: int
    seconds: float
    error: str = ""
    is_data: bool = False

    def encode(self) -> bytes:
        """The message for the one that asked."""
        return json.dumps(self).encode()

    @classmethod
    def of(cls, message: bytes) -> "Answer":
        """The answer of a message."""
        return cls(*json.loads(message))


class Decoder:
    """Does tasks. memory: descriptor of the shared memory, which never shrinks."""

    def __init__(self, memory: int) -> None:
        self.descriptor = memory
        self.memory = np.empty(0, np.uint8)
        self.recipe = ""

    def do(self, task: Task) -> Answer:
        """Decode an image to its place."""
        begun, found = time.perf_counter(), ("", False)
        try:
            if task.recipe != self.recipe:
                self.framing, self.recipe = HostFraming(FeatureRecipe.from_json(json.loads(task.recipe))), task.recipe
            image_bytes = task.layout.image_bytes(self.framing.frame)
            if task.start + Places.bytes_of(task.capacity, image_bytes) > len(self.memory):
                self.memory = np.frombuffer(mmap.mmap(self.descriptor, 0), np.uint8)
            places = Places(self.memory, task.capacity, task.start)
            places.begin(task.images, task.layout, self.framing.frame)
            self.framing.decode(places, task.k, task.wanted)
        except DataError as error:
            found = str(error)[:MOST_TEXT], True
        except Exception:  # the one that started this process raises it
            found = traceback.format_exc()[-MOST_TEXT:], False
        return Answer(task.number, time.perf_counter() - begun, *found)


def serve(tasks: int, answers: int, memory: int, k: int) -> None:
    """Do tasks until the other end of their socket is closed. All but k, the process's own number, are descriptors."""
    decoder, at = Decoder(memory), np.frombuffer(mmap.mmap(memory, 0), NUMBER)
    with socket.socket(fileno=tasks) as asked, socket.socket(fileno=answers) as answered:
        while message := asked.recv(LONGEST):
            task = Task.of(message)
            at[k] = task.number
            answer = decoder.do(task)
            try:
                answered.send(answer.encode())
            except OSError:  # nobody waits any more
                return
