# make demo   install, then train, evaluate and predict on the built-in data set (minutes on two CPU cores)
# make test   install, then run the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/detres demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The file marks an installation that finished: one that was interrupted is done again.
.venv/installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "detres needs Python >= 3.10, this is " + sys.version.split()[0] + ". Say make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf .venv runs
