"""One thread for every test and every process that it starts, so that bits can be compared; named seeds; and paths."""

import gc
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the suite itself runs in two processes
SEED = 20
"""Of whatever randomness a test does not seed itself, as the weights that a head begins with."""

LONG = (
    "test_benchmarks", "test_hostile_caches", "test_object_output", "test_processes", "test_export", "test_tasks",
    "test_finetune", "test_hostile_workspace", "test_attack", "test_parquet_pages", "test_notebook", "test_live",
    "test_race", "test_stopping", "test_old_caches", "test_docs", "test_try_out", "test_durable", "test_study",
    "test_pretended_card", "test_kill", "test_touched",
)  # fmt: skip
"""Files that take more than ten seconds, many of them with few tests. The suite begins with them, so that its
processes end together."""
STARTED = pytest.StashKey[float]()

HERE = Path(__file__).parent
ASIDE = {"archives", "golden", "__pycache__"}  # folders of files, not of tests
FOLDERS = [Path(folder) for folder, *_ in os.walk(HERE) if not ASIDE & {*Path(folder).relative_to(HERE).parts}]
sys.path[:0] = map(str, [*FOLDERS, HERE.parent / "benchmarks"])  # tests share the sets and harnesses of others
settings.register_profile(
    "named",
    derandomize=True,  # the examples follow from the test itself
    print_blob=True,
    deadline=None,  # no test is timed; the first reads the tables of Unicode, a second on a busy machine
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("named")


@pytest.fixture(scope="module")
def forked_hdf5() -> Iterator[None]:
    """Old caches are read by processes that are forked (hdf5_server.py), not started anew."""
    from hdf5_server import forked

    with forked():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """--within: how long `make check` may take."""
    parser.addoption("--within", type=float, metavar="SECONDS", help="Skip the tests that have not begun by then.")


def pytest_sessionstart(session: pytest.Session) -> None:
    """The clock of --within starts."""
    session.config.stash[STARTED] = time.monotonic()


def pytest_collection_finish() -> None:
    """What is loaded by now stays to the end, and is not searched for garbage again: half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed all generators before a test's fixtures are made: no test depends on those before it, nor on its process."""
    within = item.config.getoption("--within")
    if within is not None and time.monotonic() - item.config.stash[STARTED] > within:
        pytest.skip(f"not begun within {within:.0f} seconds: make test runs it")
    random.seed(SEED)
    np.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is about whole processes; skip what needs a card where there is none; order what processes share."""
    if hasattr(config, "workerinput") and config.getoption("--within") is None:
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.stem not in LONG, -tests[item.path], item.path))
    for item in items:
        if HERE / "system" in item.path.parents:
            item.add_marker("process")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))
