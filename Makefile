# Two commands do everything: `make demo` and `make test`. Both set up a virtual environment first. `make test-rest` takes longer.
# `make test-versions` runs part of the tests with other versions of torch and transformers, `make test-recipes` those of examples/,
# `make test-gpu` those that need a GPU, `make check-cuda` compiles for one.

PYTHON ?= python3
VENV := .venv

comma := ,

# With which versions, as pip takes them; any two others may be asked for by changing a line.
VERSIONS ?= floor pinned newest
floor := torch==2.11.0 transformers==5.17.0
pinned := --constraint constraints.txt
newest := --upgrade --upgrade-strategy eager

.PHONY: demo test test-rest test-all test-versions test-recipes test-gpu check-cuda fuzz lint types docs clean

demo: $(VENV)/.demo
	$(VENV)/bin/python -m bench.demo

# One thread per test process: the models are small, and two processes share two cores.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --cases quick

# What that leaves out for time: tests that are marked slow, and grids of up to six cases as a whole. CI runs both.
test-rest: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --cases rest

# Every combination of parameters; the two above meet each value of each, in larger grids in some combination.
test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --cases all

# As many random models as wanted, from another seed each time: make fuzz FUZZ="--count 100 --seed 7".
FUZZ ?= --count 500 --workers 2
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz $(FUZZ)

# The constraints pin torch, so that the same versions are installed everywhere.
$(VENV)/.%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo$(if $(filter-out demo,$*),$(comma)$*)]"
	touch $@

# All of them run, whatever fails; then one line each. `make test-versions VERSIONS=floor` is one alone.
test-versions:
	@mkdir -p .venvs; rm -f .venvs/results
	@for name in $(VERSIONS); do \
	    if $(MAKE) --no-print-directory test-with-$$name; then result=passed; else result=FAILED; fi; \
	    echo "$$name: $$(.venvs/$$name/bin/python -c '$(print_versions)'): $$result" >> .venvs/results; \
	done
	@cat .venvs/results
	@! grep -q FAILED .venvs/results

print_versions := from importlib.metadata import version; print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))

# Two of these download torch's builds for GPUs (several GB each, kept in .venvs); they run on CPU all the same.
test-with-floor test-with-pinned test-with-newest: test-with-%:
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install --quiet $($*) --editable ".[demo,test]"
	OMP_NUM_THREADS=1 .venvs/$*/bin/python -m pytest -n 2 -m versions -rs

# Ray Data, servers, lm-eval, lmms-eval, deployment: what docs/recipes.md shows and needs packages for that nothing else does; and
# decoders of other packages than transformers. These need torchvision, of which not every build can be loaded beside every torch;
# nothing else does.
test-recipes:
	$(PYTHON) -m venv .venvs/recipes
	.venvs/recipes/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,test,recipes]"
	$(pytest_recipes) tests/recipes/test_other_packages.py
	.venvs/recipes/bin/python -m pip uninstall --quiet --yes torchvision
	$(pytest_recipes) tests/recipes --ignore tests/recipes/test_other_packages.py

pytest_recipes := OMP_NUM_THREADS=1 .venvs/recipes/bin/python -m pytest -o addopts="-q --strict-markers -p no:logging" -rs --cases all

# What only a GPU can show, with a Python whose torch can use one: make test-gpu GPU_PYTHON=python3. Without a GPU they fail.
GPU_PYTHON ?= $(VENV)/bin/python
test-gpu:
	$(GPU_PYTHON) -m pytest -o addopts="-q --strict-markers -p no:logging" --cases all tests/gpu

# What graphs become on a GPU, without one: lowered for an H100 by a build of torch for CUDA (several GB, kept in .venvs).
check-cuda:
	$(PYTHON) -m venv .venvs/cuda
	.venvs/cuda/bin/python -m pip install --quiet $(floor) --editable ".[demo,test]"
	OMP_NUM_THREADS=1 .venvs/cuda/bin/python -m pytest -o addopts="-q --strict-markers -p no:logging" --cases all -n 2 -rs tests/cuda

# What `make test` does not show: the style, and the types.
lint: $(VENV)/.types
	$(VENV)/bin/python -m ruff check
	$(MAKE) --no-print-directory types

# mypy finds packages by their folders, and passes and backends lie beside parvts_fx: links put them where they are imported.
types: $(VENV)/.types
	rm -rf .types && mkdir -p .types/parvts_fx
	ln -s $(addprefix $(CURDIR)/,$(filter-out %__pycache__,$(wildcard parvts_fx/*)) passes backends) .types/parvts_fx/
	cd .types && ../$(VENV)/bin/python -m mypy --config-file ../pyproject.toml --python-executable ../$(VENV)/bin/python -p parvts_fx

# The pages of docs/ as a site, in site/. A link that leads nowhere is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) .venvs .types site demo_out .pytest_cache
