# The house's words. Each makes or completes .venv by itself; what is installed already is not installed again,
# and then nothing asks the network.
#
#   make demo                     the laptop recipe on text that this machine has; CORPUS=folder for your own,
#                                 FRESH=1 to start anew
#   make test | check | parity    unit tests | format, lint, types, floors, spelling | logits against transformers
#   make interop                  others load what we write: transformers, llama.cpp
#
# pip's own settings hold: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares a machine without a
# GPU the CUDA libraries. PYTHON=python3.12 chooses the Python that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m
# One stamp an extra, named after what would have to be installed: a changed pin or dependency makes them stale.
READY := .venv/ready-$(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
SHAPES := --jaxtyping-packages=gemwright,beartype.beartype
# Eager tests take one thread each, so two files at a time; a file's tests share what they make.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile

# Without this, pyright asks npm for its newest version on every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
ifneq ($(wildcard ../shared/data),)
export GEMWRIGHT_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := test
.PHONY: demo test slow check parity interop bench docs lock
.NOTPARALLEL:

demo: $(READY)/core
	$(BIN)/gemwright run laptop $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(FRESH),--fresh)

test: $(READY)/test $(READY)/parity $(READY)/bench
	$(RUN) pytest $(SHAPES) $(SIDE_BY_SIDE) -m "not (compiled or slow or parity or interop)"
	$(RUN) pytest -m "compiled and not (slow or parity or interop)"

# pytest's 5 means that no test is marked so.
slow: $(READY)/test $(READY)/parity $(READY)/bench
	$(RUN) pytest -m "slow and not (parity or interop)" || [ $$? = 5 ]

parity: $(READY)/test $(READY)/parity
	$(RUN) pytest -m parity

interop: $(READY)/test $(READY)/parity $(READY)/interop
	$(RUN) pytest -m interop

check: $(READY)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: $(READY)/bench $(READY)/parity $(READY)/interop
	$(RUN) bench.curate
	$(RUN) bench.evaluate
	$(RUN) bench.filters
	$(RUN) bench.tokenizer
	$(RUN) bench.head_loss
	$(RUN) bench.targets
	$(RUN) bench.generate
	$(RUN) bench.merge
	$(RUN) bench.posttrain
	$(RUN) bench.train_step

docs: $(READY)/core
	$(RUN) gemwright.cli.reference

# Everything that the core and the extras come to, as constraints for pip. CUDA's libraries are left to torch's own
# wheel; triton is the one that torch's CUDA build asks for, as liger-kernel would take a newer one.
lock: $(BIN)/pip
	$(RUN) pip install --quiet --dry-run --ignore-installed --report .venv/lock.json triton==3.7.1 \
	    ".[serve,eval,gguf,gpu,hub,ray,track,test,parity,interop,bench]"
	$(BIN)/python -c "$$LOCK" > requirements.lock

define LOCK
import json, platform, re
found = [item["metadata"] for item in json.load(open(".venv/lock.json"))["install"]]
pins = {re.sub("[-_.]+", "-", item["name"]).lower(): item["version"].split("+")[0] for item in found}
print("# Constraints for pip: the core and every extra, as resolved together.")
print(f"# Made by `make lock` with Python {platform.python_version()} on {platform.system()}; do not edit.")
print(*(f"{n}=={v}" for n, v in sorted(pins.items()) if not re.match("nvidia|cuda|gemwright", n)), sep="\n")
endef
export LOCK

$(READY)/core: | $(BIN)/pip
	$(RUN) pip install -e . -c requirements.lock
	@mkdir -p $(@D) && touch $@

# The core brought setuptools, so that no extra needs a build environment of its own.
$(READY)/%: $(READY)/core
	$(RUN) pip install --quiet --no-build-isolation -e ".[$*]" -c requirements.lock
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	    echo "gemwright needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name a newer one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
