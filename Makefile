# `make demo` and `make test` work on a fresh machine: they first make .venv and install the pinned versions.
# A CPU-only torch (Linux, most of the download saved): make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV = .venv
EXTRAS = rewards,dev
DEMO_FLAGS = --prompt "white duck" --objective black --gamma 10 --lr 0.005 --opt_steps 50 --seed 3 \
	--evaluate sprites/judge.py:judge_loss_fn

comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
VENV_PYTHON := $(VENV)/bin/python

.PHONY: help demo test lint install clean

help:
	@echo 'make demo      optimize the noise of the embedded model, and say where the pictures are'
	@echo 'make test      lint, then run the tests'
	@echo 'make lint      lint only'
	@echo 'make install   set up $(VENV) only (the others do it themselves); EXTRAS=$(EXTRAS)'
	@echo 'make clean     remove $(VENV), build files and caches; pictures in output/ stay'
	@echo 'Another Python: make demo PYTHON=python3.12. Other flags: make demo DEMO_FLAGS="--seed 1"'

demo: $(STAMP)
	$(VENV_PYTHON) dno_stable_diffusion.py --model sprites $(DEMO_FLAGS)

test: lint
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff check .

install: $(STAMP)

# constraints-notebook.txt includes constraints.txt; what it has besides matters only for EXTRAS=notebook.
# A parity test uses HPS v2's own package, whose pins (protobuf < 4, pytest 7.2.0) would break the others'; therefore it
# comes without its dependencies, and without it that test is skipped.
# The stamp is written last, so an interrupted installation is repeated. An environment without a working pip
# (interrupted, or its Python is gone) is made again.
$(STAMP): pyproject.toml constraints.txt constraints-notebook.txt
	@python=$(PYTHON); \
	if $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then python=$(VENV_PYTHON); fi; \
	fail() { echo "make: $$*" >&2; exit 1; }; \
	command -v $$python >/dev/null 2>&1 \
	  || fail "$$python is not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; \
	version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$$python does not start."; \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || fail "$$python is Python $$version; the pinned versions need 3.11 or newer." \
	    "Run 'make clean' if it is an old $(VENV), and name a newer one: make PYTHON=python3.12"; \
	test $$python = $(VENV_PYTHON) && exit 0; \
	$$python -c 'import ensurepip, venv' 2>/dev/null \
	  || fail "$$python cannot make virtual environments. On Debian or Ubuntu: sudo apt install python$$version-venv"; \
	echo "Making $(VENV) with Python $$version"; \
	$$python -m venv --clear $(VENV)
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -c constraints-notebook.txt -e ".[$(EXTRAS)]"
	-$(VENV_PYTHON) -m pip install --disable-pip-version-check --no-deps hpsv2==1.2.0
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
