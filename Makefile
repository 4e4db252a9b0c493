# make report   the article, from nothing:  .venv, install, train and score the demo, publish to _site/
# make test     install what the tests need, run them
# make check    lint, format, types
# make reliability   break runs in every way that the article lists, and record what they did

PYTHON ?= python3
# Other pip options, for example: make report PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# Any torch in pyproject's range works; this is the one the results on a CPU were made with.
TORCH ?= torch==2.13.0

BIN := .venv/bin
# Most of what is installed is never imported; what is, Python compiles once, if it may keep it.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS)
unexport PYTHONDONTWRITEBYTECODE

.PHONY: report test check reliability install install-dev browser clean

report: .venv/installed .venv/quarto-tried
	@$(BIN)/fp8lab run --jobs 2 runs/plans/demo.yaml
	@$(BIN)/fp8lab publish

# Test processes fill the cores by themselves. Threads beside them spin while they wait for a core, which makes the
# linear algebra of a test up to twenty times slower.
test reliability: export OMP_NUM_THREADS = 1

test: .venv/installed-dev browser
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

reliability: .venv/installed-dev
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests/faults tests/training/test_checkpoint.py \
	  tests/training/test_distributed.py tests/training/test_trainer.py --record-faults runs/records

check: .venv/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

install: .venv/installed

install-dev: .venv/installed-dev

.venv/installed: pyproject.toml constraints.txt
	@echo "fp8lab: making .venv and installing (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "fp8lab: installing $(TORCH)"
	@$(PIP) -c constraints.txt "$(TORCH)"
	@echo "fp8lab: installing fp8lab and what it needs"
	@$(PIP) -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "fp8lab: installing what tests and checks need"
	@$(PIP) -c constraints.txt -e ".[dev,gpt2]"
	@touch $@

# PyPI's quarto-cli downloads Quarto while it installs; without it the article is published through pandoc.
.venv/quarto-tried: .venv/installed
	@command -v quarto >/dev/null || { echo "fp8lab: trying to install Quarto"; \
	  timeout 180 $(PIP) --retries 0 quarto-cli >/dev/null 2>&1 || true; }
	@touch $@

# The tests look at the published pages with Debian's Chromium.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  echo "fp8lab: installing chromium and chromium-driver"; \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$SUDO apt-get install -y -qq --no-install-recommends \
	    chromium chromium-driver >/dev/null; }

clean:
	rm -rf .venv _site build data checkpoints runs/records/demo runs/records/data/demo
