# Everything runs in .venv, which the first target that needs it creates: with uv where that works, else with venv and pip.
# Options: ARGS="..." goes to the command of demo, test, fast, crash and those that begin with bench; PYTHON=... is the
# Python that .venv is made from.

# Emptied, so that settings of another environment do not leak into this one.
RUN = PYTHONPATH= PYTHONHOME= .venv/bin/python
READY = .venv/.installed
PEERS_READY = .venv-peers/.installed
ARGS =
PYTHON ?=

.PHONY: help demo test fast check nbs bench bench-peers bench-cifar bench-vision crash clean

help:
	@echo "minifast: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## train on real digits, print the results and write the plots (ARGS="--help": options)
	@$(RUN) -m minifast $(ARGS)

test: check ## all that must pass: lint, types, quick tests, slow tests
	@$(RUN) -m pytest $(ARGS)

# A cross-section: the Learner as it is used, layer groups, suggestions. All the rest is for `make test`.
FAST = tests/test_learner.py tests/test_groups.py tests/test_suggest.py

fast: $(READY) ## lint and a cross-section of the quick tests, in seconds: while coding
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m pytest -q -x -m "not slow" $(FAST) $(ARGS)

check: $(READY) ## ruff and mypy --strict
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy --strict minifast

# Timings are left out of the files, so that a run which changes no output changes no notebook.
nbs: $(READY) ## run every notebook in nbs/ in place
	@for nb in nbs/*.ipynb; do \
	  if [ ! -e "$$nb" ]; then echo "nbs: no notebook in nbs/"; break; fi; \
	  echo "nbs: $$nb"; \
	  $(RUN) -c 'import sys, nbclient, nbformat; \
	    path = sys.argv[1]; nb = nbformat.read(path, 4); \
	    nbclient.NotebookClient(nb, timeout=600, kernel_name="python3", record_timing=False, \
	      skip_cells_with_tag="", resources={"metadata": {"path": "nbs"}}).execute(); \
	    nbformat.write(nb, path)' "$$nb" || exit 1; \
	done

bench: $(READY) ## compare with the hand-written loop (ARGS="steps --rounds 5"; --list: what there is)
	@$(RUN) tests/benchmarks/run.py $(ARGS)

bench-peers: $(PEERS_READY) ## compare with other frameworks, in an environment of their own (.venv-peers)
	@PYTHONPATH= PYTHONHOME= .venv-peers/bin/python tests/benchmarks/run.py peers $(ARGS)

bench-cifar: $(READY) ## a CIFAR-10 speed run: Learner and plain script (ARGS="--data DIR": where cifar10_jpeg.npz is)
	@$(RUN) tests/benchmarks/cifar10.py $(ARGS)

bench-vision: $(READY) ## train on CIFAR-10 beside a loop by hand; fine-tune (ARGS="--data DIR --seeds 5"; --quick)
	@$(RUN) tests/benchmarks/vision.py $(ARGS)

# Memory of 100,000 steps, 150 kills of trainers with workers, 200 kinds of junk for each argument.
FULL = $(addprefix tests/reliability/test_,resources.py workers.py signals.py fuzz.py)

crash: $(READY) ## kill training thousands of times, resume it, compare bits (ARGS="--kills 300 --worker-kills 60")
	@$(RUN) tests/reliability/crash_table.py $(ARGS)
	@MINIFAST_FULL=1 $(RUN) -m pytest -q $(FULL)

clean: ## remove .venv, .venv-peers, caches, build results and the plots of the demo
	rm -rf .venv .venv-peers .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist minifast-demo
	find minifast tests nbs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The environment that $@ lies in, and `install`, a command that installs into it.
define ENVIRONMENT
set -e; unset VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME; env=$(@D); \
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
  echo "Setting up $$env (once; PyTorch is large, so this can take minutes)"; \
  rm -rf $$env; \
  if [ -n "$$uv" ]; then uv venv --quiet --python "$$python" $$env; else "$$python" -m venv $$env; fi; \
fi; \
if [ -n "$$uv" ]; then \
  install="uv pip install --python $$env/bin/python"; \
else \
  $$env/bin/python -m pip --version >/dev/null 2>&1 || $$env/bin/python -m ensurepip; \
  install="$$env/bin/python -m pip install"; \
fi
endef

# Written last, so an installation that was interrupted is taken up again.
$(READY): pyproject.toml
	@$(ENVIRONMENT); \
	$$install -e '.[dev]'; \
	touch $@

PEERS = fastai lightning pytorch-ignite skorch accelerate

# Together, so that their versions fit; if that fails one by one: the table then names those that are missing.
$(PEERS_READY): pyproject.toml
	@$(ENVIRONMENT); \
	$$install -e . torch torchvision $(PEERS) || { \
	  $$install -e . torch torchvision; \
	  for peer in $(PEERS); do $$install $$peer || echo "bench-peers: $$peer cannot be installed" >&2; done; \
	}; \
	touch $@
