# make demo   install into .venv, train on generated endoscopy scenes, evaluate, print the results
# make test   what continuous integration runs, WORKERS test files at a time; make test-faults tells what became of each
#             fault, and makes 90 more
# make audit  known vulnerabilities of what is installed, where their list can be reached
# make venv   only install; make clean removes it, and never a run

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
MINOR := $(shell sed -n 's/^requires-python = ">=3\.\([0-9]*\)"/\1/p' pyproject.toml)

.PHONY: demo test test-faults audit venv clean

demo: venv
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml -m surgvqa.train recipes/demo.yaml

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not long" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-faults: .venv/dev
	SURGVQA_EVERY_CALL=1 $(BIN)/pytest -m "fault or long"
	cd tests && ../$(BIN)/python -m faults.many --tries 50
	cd tests && ../$(BIN)/python -m faults.many --tries 40 --steps 2000 --apart 50

# pip-audit lives apart, so that it is not among what it looks at.
audit: .venv/dev
	@test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && \
		timeout 120 .venv/audit/bin/python -m pip install --quiet pip-audit; } || true
	@$(BIN)/python .ci/audit.py

venv: .venv/runtime

.venv/runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, $(MINOR)))' || \
		{ echo "$(PYTHON) must be Python 3.$(MINOR) or newer; name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into .venv; the first time this takes some minutes."
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

.venv/dev: .venv/runtime
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
