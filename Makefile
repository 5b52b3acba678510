# Set-up and checks. `make demo` and `make test` need Python >= 3.10 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
FRESH := .venv-dist

.PHONY: demo test lint types tests docs fuzz test-oldest bench gpu dist browser screenshots clean

demo: $(VENV)/.installed
	$(BIN)/python recipes/quickstart.py

test: $(VENV)/.installed-dev lint types tests docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

tests: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Not with --quiet, which keeps warnings from --strict.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tests that draw examples, at random and FUZZ times as many: `make fuzz FUZZ=100 TESTS=tests/compression`.
FUZZ ?= 20
TESTS ?= tests
fuzz: $(VENV)/.installed-dev
	LBGM_FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m hypothesis $(TESTS)

# The fast tests with the lowest versions that pyproject.toml allows, in an environment of their own.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --dist loadfile -m "not slow and not browser"

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

# Tests and measures on the GPU, if there is one, and writes outputs/gpu.json; at most eight minutes.
gpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu

# A release: wheel and sdist in dist/, and the quickstart run by what the wheel installs into an environment of its own.
dist: $(VENV)/.installed-dev
	rm -rf dist $(FRESH)
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install --quiet "$$(ls "$(CURDIR)"/dist/*.whl)[cli]"
	mkdir -p outputs/dist
	cd outputs/dist && "$(CURDIR)/$(FRESH)/bin/python" "$(CURDIR)/recipes/quickstart.py"
	cd outputs/dist && "$(CURDIR)/$(FRESH)/bin/python" -c "import lightning_lbgm as l; print(l.__version__, l.__file__)"
	rm -rf $(FRESH)

# For the tests that look at pages; where it cannot be installed they are skipped.
browser:
	command -v chromium && command -v chromedriver || { test "$$(id -u)" = 0 && apt-get update -qq && \
	apt-get install -qq --no-install-recommends chromium chromium-driver >/dev/null; } || echo "no browser installed"

screenshots: $(VENV)/.installed-dev
	LBGM_SCREENSHOTS=docs/images $(BIN)/python -m pytest -m browser

# One resolution for everything, so that pip chooses a torch and a torchvision that match.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[cli]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# pip cannot resolve to the lowest versions, uv can.
$(OLDEST)/.installed: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --upgrade --resolution lowest-direct --python $(OLDEST)/bin/python \
		--editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(FRESH) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
