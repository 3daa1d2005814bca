# Everything starts here: make demo, make test. Both make .venv first; nothing else needs to be installed.
#
#   make demo VENV_FLAGS=--system-site-packages    reuse a torch that is already installed (2.9 or newer, CUDA too)
#   make demo PYTHON=python3.12                    another Python, 3.11 or newer

PYTHON ?= python3
VENV_FLAGS ?=
BIN := .venv/bin

.PHONY: demo test test-long browser check fix build clean

demo: .venv/ready
	$(BIN)/trimtab demo

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadfile

test-long: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadfile -m long

# Debian's chromium, for the tests of the report in a browser; nothing is done where one is there.
browser:
	command -v chromium >/dev/null || { \
	    sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update && $$sudo apt-get install -y chromium; }

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: .venv/ready
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache

# The pinned torch is left out where the environment brings one of 2.9 or newer (VENV_FLAGS above).
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "trimtab needs Python 3.11 or newer: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -c 'import re; from importlib.metadata import version; \
	    assert tuple(map(int, re.findall(r"\d+", version("torch"))[:2])) >= (2, 9)' 2>/dev/null \
	    && grep -v '^torch==' constraints.txt > .venv/constraints.txt || cp constraints.txt .venv/constraints.txt
	@echo "installing what constraints.txt names; takes a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[demo,dev,serve,tune]'
	touch $@
