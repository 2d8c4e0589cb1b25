# make demo: the main job, SLIDE=file on your own.  make test: the tests.  Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# The version that the tests run with. Another build, such as one for a GPU: make setup TORCH=...
TORCH ?= torch==2.13.0
WORK ?= bench
# Processes that share the tests, a file each at a time.
WORKERS ?= 2

.PHONY: setup demo test test-all readers lint types imports house docs site wheel lowest notebooks workflows benchmark clean

setup: .venv/.done

.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable . --group dev
	touch $@

demo: setup
	$(BIN)/wsi-pipeline demo --output demo-output $(if $(SLIDE),--slide "$(SLIDE)")

test: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -q

# anndata and spatialdata ask for a pandas before 3, so they are by themselves.
readers: .venv-readers/.done
	.venv-readers/bin/python -m pytest -q tests/test_scverse.py

.venv-readers/.done: pyproject.toml
	$(PYTHON) -m venv .venv-readers
	.venv-readers/bin/pip install --quiet $(TORCH)
	.venv-readers/bin/pip install --quiet --editable ".[anndata,spatialdata]" \
		"spatialdata>=0.7.3" geopandas hypothesis pytest pytest-timeout
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python .ci/write_schemas.py
	$(BIN)/python .ci/write_api.py

site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

house: setup
	$(BIN)/python .ci/house.py

wheel: setup
	$(BIN)/python .ci/check_wheel.py

lowest: setup
	$(BIN)/python .ci/check_lowest.py

notebooks: setup
	$(BIN)/python .ci/run_notebooks.py

workflows: setup
	$(BIN)/python .ci/check_workflows.py

benchmark: setup
	$(BIN)/python benchmarks/run.py all report --work $(WORK) $(ARGS)

clean:
	rm -rf .venv .venv-readers build dist demo-output *.egg-info
