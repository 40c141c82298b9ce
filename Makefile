# Needs Python 3.11 or newer and make, nothing else. `make demo` shows the main job, `make test` runs every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
READY := $(VENV)/.installed

# Waiting threads that spin make every step several times slower as soon as two processes share the cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help demo test lint check bench bench-quick lock audit sbom clean install

help:
	@echo "make install into .venv, and no more; all others do it where it is needed"
	@echo "make demo    train, compare and save an adapter on the built-in base and data"
	@echo "make test    lint, types, import contracts and all tests"
	@echo "make lint    the first three only"
	@echo "make bench   the benchmarks, side by side with their references; make bench-quick only sees whether they run"
	@echo "make lock    exact versions and hashes of what the image installs, anew from pyproject.toml and constraints.txt"
	@echo "make audit   known vulnerabilities of these; make sbom writes their list in CycloneDX's form to build/"
	@echo "make clean   remove the virtual environment and everything that can be made again"

demo: $(READY)
	$(BIN)/atoll train examples/demo.toml

test: lint check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread for each of the two workers: together they fill two cores, and no thread waits for another.
check: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench-quick: SIZE := --quick
bench bench-quick: $(READY)
	$(PIP) --editable '.[bench]'
	@rm -rf build/quick
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script $(SIZE) || test $$? = 77 || exit 1; done

# For all systems and Pythons that the image may have. INDEX=URL: where else packages come from, such as torch's own index for CPUs.
lock: $(READY)
	$(BIN)/uv pip compile --quiet --upgrade pyproject.toml --extra host --constraint constraints.txt --universal --python-version 3.11 \
		--generate-hashes --no-annotate --custom-compile-command "make lock" $(if $(INDEX),--index-strategy unsafe-best-match --index $(INDEX)) \
		--output-file deploy/lock.txt

audit: $(READY)
	$(BIN)/python scripts/audit.py

sbom: $(READY)
	@mkdir -p build
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements deploy/lock.txt --output-reproducible --output-file build/sbom.json

clean:
	rm -rf $(VENV) build src/atoll.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find src tests scripts benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

install: $(READY)

# torch comes first and alone, so that nothing else can ask for another build of it. Done again only when the files it depends on change.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "python3 -m venv does not work here; install the venv package of this system's Python"; exit 1; }
	@echo "installing into $(VENV): a few minutes the first time"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --editable '.[dev]'
	@touch $@
