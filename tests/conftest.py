"""One thread for every test and every process that it starts, so that bits can be compared; and paths."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # tests share the benchmarks' harnesses
