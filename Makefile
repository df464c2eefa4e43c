# The targets demo and test first run setup. PYTHON is the interpreter that creates the virtual environment.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: setup demo test

setup: $(READY)

# The stamp file is created last, so that an interrupted installation is repeated. A change to either file reinstalls.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required. Set its path: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[demo,eval,data,dev]"
	@touch $@

demo: setup
	$(PY) -m ldm.train stage=all name=demo overwrite=true
	$(PY) tools/demo.py

test: setup
	$(PY) -m pytest
