# demo and test each set up what they need first. PYTHON names the interpreter of the virtual environment.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: setup demo test

setup: $(READY)

# Made last, so an install that broke off is taken up again; older than either file, and it is renewed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[demo,eval,data,dev]"
	@touch $@

demo: setup
	$(PY) -m ldm.train stage=all name=demo overwrite=true
	$(PY) tools/demo.py

test: setup
	$(PY) -m pytest
