# One command runs all checks: make check (in an environment with `pip install -e '.[test]'`).
PYTHON ?= python

.PHONY: check lint types test long generate

check: lint types test

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -n 2

# The same tests with many more examples, and the ones marked slow: about an hour on 2 cores.
long:
	EXAMPLES=200 $(PYTHON) -m pytest -n 2 -m ''

generate:
	$(PYTHON) -m maskserve.describe
	$(PYTHON) -m maskserve.settings > configs/default.toml
	$(PYTHON) -m maskserve_api.pages > docs/errors.md
