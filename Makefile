# Two commands do everything: `make demo` and `make test`. Both set up a virtual environment first.

PYTHON ?= python3
VENV := .venv

comma := ,

.PHONY: demo test clean

demo: $(VENV)/.demo
	$(VENV)/bin/python -m bench.demo

# One thread per test process: the models are small, and two processes share two cores.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

# The constraints pin torch, so that the same versions are installed everywhere.
$(VENV)/.%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo$(if $(filter test,$*),$(comma)test)]"
	touch $@

clean:
	rm -rf $(VENV) demo_out .pytest_cache
