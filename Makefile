# make demo   sets up .venv and runs the main job: no GPU, no download of weights or data
# make test   sets up .venv and runs the tests: less than half an hour on two cores
# make test-quick  runs those that start no training: a few minutes
# make test-faults  runs every pairing of a fault with a strategy: the better part of an hour
# make docs   sets up .venv and builds the documentation site in build/docs; broken links are errors
# make lint   sets up .venv and runs ruff, mypy and import-linter
# make clean  removes what these and builds leave behind (not runs/)

.PHONY: demo test test-quick test-faults docs lint setup clean

# Two processes; one where there is exactly one GPU. Offline: a W&B key in the environment is not used.
demo: export WANDB_MODE = offline
demo: export HF_HUB_OFFLINE = 1
demo: .venv/runs
	@n=$$(.venv/bin/python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))'); set -x; \
	  .venv/bin/distft train recipe=tiny --nproc $$n

# The embedded model is built first, once: otherwise one worker would build it while the others wait for it. Three workers
# keep two cores busy, for one waits for SLURM most of the time.
test: setup
	@DISTFT_CACHE=.pytest_cache/distft .venv/bin/python -c 'from distft.models.tiny import tiny_model; tiny_model()'
	@.venv/bin/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

test-quick: setup
	@DISTFT_CACHE=.pytest_cache/distft .venv/bin/python -c 'from distft.models.tiny import tiny_model; tiny_model()'
	@.venv/bin/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder -m "not (thorough or slow)"

test-faults: setup
	@.venv/bin/python -m pytest -m "not gpu" tests/faults

docs: export NO_MKDOCS_2_WARNING = 1
docs: setup
	@.venv/bin/mkdocs build --quiet --strict && echo "open build/docs/index.html"

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

setup: .venv/installed

# Both run again only where one of the two files has changed since. What the demo needs is part of what tests need.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv/runs: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/bin/python:
	@if [ ! -x .venv/bin/python ]; then \
	  for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make: distft needs Python 3.11 or newer, and none of python3, python3.13, python3.12, python3.11 is;" \
	      "install one, or name it: make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=/path/to/python3.11" >&2; exit 2; \
	  fi; \
	  if ! $$python -c 'import venv, ensurepip' 2>/dev/null; then \
	    echo "make: $$python has no venv module; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 2; \
	  fi; \
	  $$python -m venv .venv || exit; \
	fi

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
