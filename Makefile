# `make test` and `make demo` do all the set-up themselves: find a Python, create .venv, install. The second time they
# start at once; pip runs again only when what is to be installed has changed.

PY := .venv/bin/python
STAMP := .venv/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help test nightly demo aot lint format setup clean FORCE

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(STAMP) ## run the tests; ARGS='-k name' is passed to pytest
	@$(PY) -m pytest $(ARGS)

nightly: $(STAMP) ## every pair of passes on every family: compiled on shapes, verified, compared with what is committed
	@$(PY) tests/nightly/legality.py $(ARGS)

demo: $(STAMP) ## compile and run a small real model (fetched the first time)
	@$(PY) examples/quickstart.py $(ARGS)

aot: .venv-cuda/.installed ## compile every GPU kernel with the real assembler, no GPU needed (fetches 4.4 GB of wheels)
	@JAX_PLATFORMS=cpu .venv-cuda/bin/python -m optx.bench.aot $(ARGS)

lint: $(STAMP) ## check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(STAMP) ## fix what lint can fix
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

setup: $(STAMP) ## create .venv and install, nothing else

clean: ## remove .venv, builds and caches of this folder (fetched models stay)
	rm -rf .venv .venv-cuda build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the folder it was installed from: in a moved or copied tree the editable install still points to the
# old one, so it is redone. So it is when the Python that .venv was made with has gone.
ifneq ($(shell test -x $(PY) && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

# .venv/.unfinished marks an environment whose first installation was interrupted: it is built anew.
$(STAMP): pyproject.toml setup.py constraints.txt
	@if [ -e .venv/.unfinished ] || ! $(PY) -c 'import pip, sys; assert sys.version_info >= (3, 12)' 2>/dev/null; then \
	  python=$$(PYTHON='$(PYTHON)' sh .ci/python.sh) || exit 1; \
	  echo "creating .venv with $$python"; \
	  "$$python" -m venv --clear .venv && touch .venv/.unfinished || exit 1; \
	fi
	@echo "installing optx and its dependencies into .venv (a few minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-input -e '.[test,demo]' -c constraints.txt
# The TPU compiler, for tests alone and apart: in the environment itself JAX would look for a TPU at every start.
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(PY) -m pip install --quiet --disable-pip-version-check --no-input \
	  --no-deps --upgrade --target .venv/libtpu libtpu -c constraints.txt; fi
	@rm -f .venv/.unfinished
	@printf '%s\n' '$(CURDIR)' > $@

.venv-cuda/.installed: pyproject.toml constraints.txt
	@python=$$(PYTHON='$(PYTHON)' sh .ci/python.sh) && "$$python" -m venv --clear .venv-cuda
	@.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check --no-input -e '.[cuda13]' nvidia-cuda-nvdisasm -c constraints.txt
	@touch $@
