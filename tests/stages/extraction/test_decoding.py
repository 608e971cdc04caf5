"""Processes decode as threads do, bit for bit. Whatever happens to one of them, nothing hangs and no row is lost."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, extract, recipe_of, stored
from PIL import Image

from featprobe.datasets.images.framing import ImageKind, Wanted
from featprobe.datasets.images.reading import header_of
from featprobe.errors import BackboneError
from featprobe.geometry import place
from featprobe.specs import FeatureRecipe
from featprobe.stages.extraction import decoding as module
from featprobe.stages.extraction import make_cache
from featprobe.stages.extraction.decoding import DecodedAhead, Decoders, processes_decode
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.frames import Framing
from featprobe.stages.workspace import make_generated

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux shares memory without a name")
FRAME = (32, 64)
DEADLY = """
import os, sys, time
sys.path[:] = sys.argv[5:]
from featprobe.datasets.images.framing import HostFraming
decode = HostFraming.decode
def deadly(self, places, k, wanted):
    if wanted.path.name == "part004_view1.png":
        END
    return decode(self, places, k, wanted)
HostFraming.decode = deadly
"""


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    with closing(Decoders(2)) as found:
        yield found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_generated("xray", tmp_path / "data" / "xray", images=12, size=(32, 32))
    return tmp_path / "data" / "xray"


def images_in(folder: Path, kinds: str, size: tuple[int, int]) -> list[Path]:
    """Seven images of each kind: c colour, g grey, d 16 bits, f fractions, e with a level that is called empty."""
    rng, found = np.random.default_rng(0), []
    for i, kind in enumerate(kinds * 7):
        shape = (*size, 3) if kind == "c" else size
        path = folder / f"{i:02}.{'tif' if kind == 'f' else 'png'}"
        if kind == "f":
            Image.fromarray(rng.normal(0.4, 0.8, shape).astype(np.float32)).save(path)
        else:
            levels = rng.integers(0, 65536 if kind == "d" else 256, shape)
            image = Image.fromarray(levels.astype(np.uint16 if kind == "d" else np.uint8))
            image.save(path, **({"transparency": 7} if kind == "e" else {}))
        found.append(path)
    return found


def wanted_of(path: Path, recipe: FeatureRecipe) -> Wanted:
    header = header_of(path)
    placement = place(header.size, recipe.size, recipe.fit, 32)
    return Wanted(path, placement, header.size, ImageKind.of(header, placement))


def frames_of(recipe: FeatureRecipe, wanted: list[Wanted | None], decoders: Decoders | None) -> list[np.ndarray]:
    """The framed images in batches of three, with what failed in them."""
    framing, batches = Framing(recipe, CPU), [wanted[i : i + 3] for i in range(0, len(wanted), 3)]
    layouts = [framing.layout([own.kind for own in batch if own]) for batch in batches]
    found = []
    for buffer, failed in DecodedAhead(framing, 2, decoders).batches(layouts, batches, 3):
        found.append(framing.images(buffer).numpy().copy())
        found.append(np.array([[k, str(error)] for k, error in failed.items()]))
    return found


@pytest.mark.parametrize(
    ("kinds", "policy", "size", "fit"),
    [
        ("c", "none", FRAME, "resize"),
        ("g", "window:10:200", FRAME, "resize"),
        ("cg", "none", (50, 70), "resize"),
        ("d", "percentile:1:99:image", (20, 64), "letterbox"),
        ("f", "minmax:image", FRAME, "resize"),
        ("e", "window:3:250:log", FRAME, "resize"),
        ("dg", "log:image", (50, 70), "letterbox"),
    ],
)
def test_processes_bring_the_bits_that_threads_bring(
    kinds: str, policy: str, size: tuple[int, int], fit: str, tmp_path: Path, decoders: Decoders
) -> None:
    recipe = replace(recipe_of(frame=FRAME), size=FRAME, fit=fit, intensity=policy)
    recipe = replace(recipe, window=(recipe.policy.low, recipe.policy.high) if recipe.policy.kind == "window" else None)
    wanted: list[Wanted | None] = [wanted_of(path, recipe) for path in images_in(tmp_path, kinds, size)]
    wanted[4] = None
    wanted[5].path.write_bytes(wanted[5].path.read_bytes()[:60])
    wanted[6] = replace(wanted[6], size=(1, 1))  # the image has changed
    by_threads, by_processes = (frames_of(recipe, wanted, how) for how in (None, decoders))
    assert len(by_threads) == 2 * -(-len(wanted) // 3) and [len(own) for own in by_threads[1::2]][1:3] == [1, 1]
    for own, other in zip(by_threads, by_processes, strict=True):
        np.testing.assert_array_equal(own, other)


def test_many_tasks_at_once_wait_for_nobody(tmp_path: Path, decoders: Decoders) -> None:
    """The system holds some hundred messages; neither end may wait for the other to take them."""
    recipe, framing = recipe_of(frame=(32, 32)), Framing(recipe_of(frame=(32, 32)), CPU)
    wanted = [wanted_of(path, recipe) for path in images_in(tmp_path, "g", (32, 32))]
    (buffer,) = decoders.buffers(framing, 1, 7, 32 * 32)
    buffer.begin(7, framing.layout([own.kind for own in wanted]), recipe.frame)
    numbers = [decoders.submit(buffer, i % 7, wanted[i % 7]) for i in range(1500)]
    assert decoders._unsent
    assert all(decoders.seconds(number) > 0 for number in reversed(numbers))
    assert buffer.levels.any(axis=(1, 2, 3)).all()


def test_processes_hear_no_ctrl_c_and_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    recipe = recipe_of(frame=(32, 32))
    wanted: list[Wanted | None] = [wanted_of(path, recipe) for path in images_in(tmp_path, "g", (32, 32))]
    with closing(Decoders(2)) as own:
        before = frames_of(recipe, wanted, own)
        for process in own._processes:
            process.send_signal(signal.SIGINT)
        for one, other in zip(before, frames_of(recipe, wanted, own), strict=True):
            np.testing.assert_array_equal(one, other)
        for end in (own._tasks, own._answers):
            end.close()  # as the system does for a process that is killed
        assert [process.wait(20) for process in own._processes] == [0, 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_kills_a_process_is_named_and_the_same_command_goes_on(
    workers: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one process all have ended; with two the other waits for tasks, as the one that started them for answers."""
    monkeypatch.setattr(make_cache, "processes_decode", lambda *_: True)
    expected = stored(extract(tmp_path / "good", data, workers=workers).path)
    monkeypatch.setattr(module, "LOOKED_AFTER", 0.1)
    with monkeypatch.context() as changed:
        changed.setattr(module, "CHILD", DEADLY.replace("END", "os.kill(os.getpid(), 9)") + module.CHILD)
        with pytest.raises(BackboneError, match=rf"(?s)^1 of {workers} processes .*SIGKILL.* continues") as raised:
            extract(tmp_path, data, workers=workers, batch_size=2)
    (named,) = str(raised.value).splitlines()[1].split(", ")
    assert named.endswith("part004_view1.png")
    report = extract(tmp_path, data, workers=workers, batch_size=2)
    assert report.computed < 12 and report.missing == 0
    assert stored(report.path) == expected


def test_an_error_in_a_process_sets_no_image_aside(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_cache, "processes_decode", lambda *_: True)
    monkeypatch.setattr(module, "CHILD", DEADLY.replace("END", "raise KeyError('of no image')") + module.CHILD)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'of no image'"):
        extract(tmp_path, data, skip_bad=True)


def test_the_end_of_a_process_that_had_nothing_to_do_stops_nothing_but_a_lost_task_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task is lost in between where a process ends after it took it, and before it said so."""
    monkeypatch.setattr(module, "LOOKED_AFTER", 0.05)
    slow = DEADLY.replace("END", "pass").replace("    return", "    time.sleep(0.5)\n    return")
    monkeypatch.setattr(module, "CHILD", slow + module.CHILD)
    recipe = recipe_of(frame=(32, 32))
    (wanted, *_) = (wanted_of(path, recipe) for path in images_in(tmp_path, "g", (32, 32)))
    with closing(Decoders(2)) as own:
        (buffer,) = own.buffers(Framing(recipe, CPU), 1, 1, 32 * 32)
        buffer.begin(1, Framing(recipe, CPU).layout([wanted.kind]), recipe.frame)
        number = own.submit(buffer, 0, wanted)
        while number not in own._at.tolist():
            assert all(process.poll() is None for process in own._processes)
        own._processes[1 - own._at.tolist().index(number)].kill()
        assert own.seconds(number) > 0.4
        own._asked[99] = wanted
        with pytest.raises(BackboneError, match=rf"(?s)^1 of 2 .*{wanted.path.name}"):
            own.seconds(99)
        del own._asked[99]


def test_buffers_that_are_given_up_are_written_to_no_more(tmp_path: Path, decoders: Decoders) -> None:
    recipe, framing = recipe_of(frame=(32, 32)), Framing(recipe_of(frame=(32, 32)), CPU)
    wanted = [wanted_of(path, recipe) for path in images_in(tmp_path, "g", (32, 32))]
    (buffer,) = decoders.buffers(framing, 1, 7, 32 * 32)
    buffer.begin(7, framing.layout([wanted[0].kind]), recipe.frame)
    for i in range(400):
        decoders.submit(buffer, i % 7, wanted[i % 7])
    (again,) = decoders.buffers(framing, 1, 7, 32 * 32)
    again.begin(7, framing.layout([wanted[0].kind]), recipe.frame)
    again.levels[:] = 0
    decoders.seconds(decoders.submit(again, 3, wanted[3]))
    assert np.flatnonzero(again.levels.any(axis=(1, 2, 3))).tolist() == [3] and not decoders._found


def test_a_process_finds_modules_where_this_one_does_and_bears_a_default_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.setattr(module, "PATH", [*module.PATH, str(tmp_path)])
    monkeypatch.setattr(module, "CHILD", module.CHILD.replace("\nserve(", "\nimport only_here\nserve("))
    socket.setdefaulttimeout(0.2)
    try:
        with closing(Decoders(1)) as own:
            recipe = recipe_of(frame=(32, 32))
            wanted: list[Wanted | None] = [wanted_of(path, recipe) for path in images_in(tmp_path, "g", (32, 32))]
            assert len(frames_of(recipe, wanted, own)) == 6
            time.sleep(0.4)
            assert own._processes[0].poll() is None
    finally:
        socket.setdefaulttimeout(None)


def test_processes_decode_whole_images_for_a_gpu_and_nothing_else() -> None:
    cuda, two = torch.device("cuda:1"), ExtractOptions(workers=2)
    assert processes_decode(two, cuda)
    assert not any(processes_decode(two, torch.device(name)) for name in ("cpu", "mps"))
    for how in ({"workers": 1}, {"tile": 64}, {"views": ("hflip",)}):
        assert not processes_decode(replace(two, **how), cuda), how  # type: ignore[arg-type]


def test_extraction_leaves_no_process_and_sets_aside_what_cant_be_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated = sorted((data / "images").iterdir())[5]
    truncated.write_bytes(truncated.read_bytes()[:-200])
    by_threads = extract(tmp_path / "threads", data, skip_bad=True)
    started: list[Decoders] = []
    monkeypatch.setattr(make_cache, "processes_decode", lambda *_: True)
    monkeypatch.setattr(make_cache, "Decoders", lambda count: started.append(Decoders(count)) or started[0])
    report = extract(tmp_path / "processes", data, skip_bad=True)
    assert stored(report.path) == stored(by_threads.path) and report.unreadable == by_threads.unreadable
    assert [process.poll() for process in started[0]._processes] == [-signal.SIGKILL] * len(started[0]._processes)
    assert report.seconds["decoding"] > 0


def test_processes_that_can_not_be_started_are_refused_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackboneError, match=r"(?s)3 processes .* can't be started: Resource temporarily.*--workers"):
        Decoders(3)
    assert len(os.listdir("/proc/self/fd")) == open_before
