# Everything runs in .venv, which the first target that needs it creates: with uv where that works, else with venv and
# pip. `make demo` puts into it what a user needs, the other targets what a developer needs, too.
# Options: ARGS="..." goes to the command of demo, of those that run tests, of crash and of those that begin with bench;
# PYTHON=... is the Python that .venv is made from; MINIFAST_DATA=... is a folder of real data.

# Emptied, so that settings of another environment do not leak into this one. Bytecode is kept: without it every process
# that a test starts compiles what it imports.
CLEAN = PYTHONPATH= PYTHONHOME= PYTHONDONTWRITEBYTECODE=
RUN = $(CLEAN) .venv/bin/python
USER_READY = .venv/.installed-user
DEV_READY = .venv/.installed-dev
PEERS_READY = .venv-peers/.installed
OLDEST_READY = .venv-oldest/.installed
# A process for each CPU.
PARALLEL = -n auto --maxprocesses 8
ARGS =
PYTHON ?=

.PHONY: help demo test nightly oldest gpu fast check nbs bench bench-peers bench-cifar bench-vision crash clean

help: ## this list
	@echo "minifast: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

demo: $(USER_READY) ## train on real digits, print the results and write the plots (ARGS="--help": options)
	@$(RUN) -m minifast $(ARGS)

test: check ## what must pass before a change is merged: lint, types, all tests but the nightly ones
	@$(RUN) -m pytest $(PARALLEL) -m "not nightly" $(ARGS)

nightly: $(DEV_READY) ## the tests that `make test` leaves out for their time
	@$(RUN) -m pytest $(PARALLEL) -m nightly $(ARGS)

oldest: $(OLDEST_READY) ## the quick tests on the oldest PyTorch that is supported, in .venv-oldest
	@$(CLEAN) .venv-oldest/bin/python -m pytest $(PARALLEL) -m "not slow and not nightly" $(ARGS)

gpu: $(DEV_READY) ## the tests that need a CUDA device, and the benchmarks on it
	@$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu: PyTorch sees no CUDA device")'
	@$(RUN) -m pytest -m gpu $(ARGS)
	@$(RUN) tests/benchmarks/run.py

# A cross-section: the Learner as it is used, layer groups, suggestions. All the rest is for `make test`.
FAST = tests/test_learner.py tests/test_groups.py tests/test_suggest.py

fast: $(DEV_READY) ## lint and a cross-section of the quick tests, in seconds: while coding
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m pytest -q -x -m "not slow and not nightly" $(FAST) $(ARGS)

check: $(DEV_READY) ## ruff and mypy --strict
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy --strict minifast

# Timings are left out of the files, so that a run which changes no output changes no notebook.
nbs: $(DEV_READY) ## run every notebook in nbs/ in place
	@for nb in nbs/*.ipynb; do \
	  if [ ! -e "$$nb" ]; then echo "nbs: no notebook in nbs/"; break; fi; \
	  echo "nbs: $$nb"; \
	  $(RUN) -c 'import sys, nbclient, nbformat; \
	    path = sys.argv[1]; nb = nbformat.read(path, 4); \
	    nbclient.NotebookClient(nb, timeout=600, kernel_name="python3", record_timing=False, \
	      skip_cells_with_tag="", resources={"metadata": {"path": "nbs"}}).execute(); \
	    nbformat.write(nb, path)' "$$nb" || exit 1; \
	done

bench: $(DEV_READY) ## compare with the hand-written loop (ARGS="steps --rounds 5"; --list: what there is)
	@$(RUN) tests/benchmarks/run.py $(ARGS)

bench-peers: $(PEERS_READY) ## compare with other frameworks, in an environment of their own (.venv-peers)
	@$(CLEAN) .venv-peers/bin/python tests/benchmarks/run.py peers $(ARGS)

bench-cifar: $(DEV_READY) ## a CIFAR-10 speed run: Learner and plain script (cifar10_jpeg.npz in MINIFAST_DATA)
	@$(RUN) tests/benchmarks/cifar10.py $(ARGS)

bench-vision: $(DEV_READY) ## train on CIFAR-10 beside a loop by hand; fine-tune (ARGS="--seeds 5", "--quick")
	@$(RUN) tests/benchmarks/vision.py $(ARGS)

# Memory of 100,000 steps, 150 kills of trainers with workers, 200 kinds of junk for each argument.
FULL = $(addprefix tests/reliability/test_,resources.py workers.py signals.py fuzz.py)

crash: $(DEV_READY) ## kill training thousands of times, resume it, compare bits (ARGS="--kills 300 --worker-kills 60")
	@$(RUN) tests/reliability/crash_table.py $(ARGS)
	@MINIFAST_FULL=1 $(RUN) -m pytest -q $(FULL)

clean: ## remove the environments, caches, build results and the plots of the demo
	rm -rf .venv .venv-peers .venv-oldest .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist minifast-demo
	find minifast tests nbs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The environment that $@ lies in; `say`, which tells what is done, and `install`, a command that installs into it and
# is silent but for errors.
define ENVIRONMENT
set -e; unset VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE; env=$(@D); \
say() { echo "$$env: $$*"; }; \
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
uv=; if uv --version >/dev/null 2>&1; then uv=uv; fi; \
if ! $$env/bin/python -c "$$new_enough" 2>/dev/null; then \
  set -- "$(PYTHON)"; \
  if [ -z "$(PYTHON)" ]; then set -- python3 python3.13 python3.12 python3.11 python3.14 python; fi; \
  python=; for p do \
    if "$$p" -c "$$new_enough" >/dev/null 2>&1; then python=$$p; break; fi; \
  done; \
  if [ -z "$$python" ]; then \
    echo "minifast needs Python 3.11 or newer, and this is not it or not there: $$*" >&2; \
    echo "Install one, or say where it is: make PYTHON=/path/to/python3" >&2; \
    exit 1; \
  fi; \
  say "an environment of $$("$$python" --version), made with $${uv:-venv}"; \
  rm -rf $$env; \
  if [ -n "$$uv" ]; then uv venv --quiet --python "$$python" $$env; else "$$python" -m venv $$env; fi; \
fi; \
if [ -n "$$uv" ]; then \
  install="uv pip install --quiet --compile-bytecode --python $$env/bin/python"; \
else \
  $$env/bin/python -m pip --version >/dev/null 2>&1 || $$env/bin/python -m ensurepip; \
  install="$$env/bin/python -m pip install -qq --no-input"; \
fi
endef

# Stamps are written last, so an installation that was interrupted is taken up again.
$(USER_READY): pyproject.toml
	@$(ENVIRONMENT); \
	say "installing minifast and what it needs (PyTorch is large: the first time this can take minutes)"; \
	$$install -e .; \
	touch $@; say "ready"

$(DEV_READY): pyproject.toml
	@$(ENVIRONMENT); \
	say "installing minifast, what it needs and what tests it (PyTorch is large: the first time this can take minutes)"; \
	$$install -e '.[dev]'; \
	touch $(USER_READY) $@; say "ready"

# The first version of the range in pyproject.toml, and the torchvision of its time.
OLDEST = 'torch==2.10.*' 'torchvision==0.25.*'

$(OLDEST_READY): pyproject.toml
	@$(ENVIRONMENT); \
	say "installing minifast, what tests it and $(OLDEST) (the first time this can take minutes)"; \
	$$install -e '.[dev]' $(OLDEST); \
	touch $@; say "ready"

PEERS = fastai lightning pytorch-ignite skorch accelerate

# Together, so that their versions fit; if that fails one by one: the table then names those that are missing.
$(PEERS_READY): pyproject.toml
	@$(ENVIRONMENT); \
	say "installing minifast and $(PEERS) (the first time this can take minutes)"; \
	$$install -e . torch torchvision $(PEERS) || { \
	  $$install -e . torch torchvision; \
	  for peer in $(PEERS); do $$install $$peer || echo "bench-peers: $$peer cannot be installed" >&2; done; \
	}; \
	touch $@; say "ready"
