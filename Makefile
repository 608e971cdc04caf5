# make demo and make test work on a machine with Python 3.11 or newer and a package index.
PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE # the tests start many processes: each would compile all modules again

.PHONY: demo test types suite check cluster dist-check image docs attack clean

demo: .venv/.installed
	$(BIN)/featprobe demo

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs 2 types suite # mypy, which takes a minute of one core, beside the tests that wait for what they start

types: .venv/.installed
	$(BIN)/mypy

suite: .venv/.installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Under a minute: format, types, and the tests that the change touches, nearest first, as far as they begin in time.
check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not process" --within 25 $$($(BIN)/python tests/touched.py)

# Starts a SLURM of this machine, and runs the tests of --launcher slurm on it; says why and skips them where there can be none
# (with REQUIRED=--required that is an error).
cluster: .venv/.installed
	$(BIN)/python tests/cluster/slurm_here.py $(REQUIRED) $(BIN)/pytest tests/cluster

# Builds the source archive and the wheel, and runs the archive's own fast tests on the installed wheel, somewhere else.
dist-check: .venv/.installed
	$(BIN)/python tests/dist_check.py $(TESTS)

# An image for CPUs. INDEX: the package index with PyTorch's builds for CPUs, which are smaller by 5 GB.
image:
	@builder=$$(for name in docker podman buildah; do command -v $$name && break; done); \
	test -n "$$builder" || { echo "No image is built: there is no docker, podman or buildah on this machine."; exit 1; }; \
	$$builder build --tag featprobe --build-arg INDEX="$(INDEX)" .

# The pages of docs/ and beside it as a site, in build/docs; a warning is an error.
docs: .venv/.installed
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html -c docs . build/docs

# Hours on 2 cores; each command prints JSON, and ends with another code than 0 where it finds something.
attack: .venv/.installed
	$(BIN)/python benchmarks/attack/cache_fuzz.py --version 3 --trials 20000
	$(BIN)/python benchmarks/attack/cache_fuzz.py --version 2 --trials 2000
	$(BIN)/python benchmarks/attack/cache_fuzz.py --version 1 --trials 2000
	$(BIN)/python benchmarks/attack/hostile.py
	$(BIN)/python benchmarks/power_loss.py --states 1500
	$(BIN)/python benchmarks/attack/many_writers.py

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[embedded,dev]"
	touch $@

clean:
	rm -rf .venv
