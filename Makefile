# Every target sets itself up: `make demo` and `make test` need Python >= 3.11, a C++ compiler and make.
#   PYTHON=python3.12   the Python that the virtual environment is made from
#   TORCH=2.13.0        the torch that is installed into it
#   JOBS=2              processes that run the tests

PYTHON ?= python3
TORCH ?= 2.13.0
# More would compile more GPU kernels at once than memory holds on a large machine.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN | awk '{print ($$1 < 4) ? $$1 : 4}')

venv := .venv
python := $(venv)/bin/python
pip := $(python) -m pip --disable-pip-version-check install -qq
sources := setup.py pyproject.toml pyoptim/_version.py $(shell find csrc -type f 2>/dev/null)
sanitized := build/sanitize
# gcc's own copies; preloaded because Python itself is not instrumented.
preload = $(foreach lib,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(lib)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test bench sanitize sanitize-address sanitize-thread lint coverage clean

help:
	@echo "make demo      train a small network with torch's optimizers and with pyoptim's, plot the result"
	@echo "make test      run the test suite"
	@echo "make bench     measure the optimizers beside torch.optim (ARGS='...' is passed on)"
	@echo "make sanitize  run the kernels under the address, undefined-behaviour and thread sanitizers"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make coverage  run the test suite and report the lines of pyoptim that it misses"
	@echo "make clean     remove the virtual environment and everything built"

demo: $(venv)/.installed
	@$(python) -m pyoptim demo $(ARGS)

test: $(venv)/.installed
	@$(python) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

bench: $(venv)/.installed
	@$(python) -m pyoptim bench $(ARGS)

coverage: $(venv)/.installed
	@$(python) -m coverage run -m pytest -q $(ARGS)
	@$(python) -m coverage report

lint: $(venv)/.lint
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy
	@$(venv)/bin/clang-format --dry-run -Werror $(filter %.hpp %.inl %.cpp %.cu %.cuh,$(sources)) tests/sanitize/*.cpp

sanitize: sanitize-address sanitize-thread

sanitize-address: $(venv)/.installed
	@echo "== building _C with the address and undefined-behaviour sanitizers"
	@CXX="$(CXX)" PYOPTIM_CPU=1 PYOPTIM_SANITIZE=address,undefined \
	    $(python) setup.py -q build --build-lib $(sanitized)/address
	@CXX="$(CXX)" PRELOAD="$(preload)" BUILD=$(sanitized)/address PYTHON=$(python) \
	    bash tests/sanitize/address.sh $(ARGS)

sanitize-thread: $(venv)/.installed
	@echo "== building the engine with the thread sanitizer"
	@CXX="$(CXX)" PYOPTIM_CPU=1 PYOPTIM_SANITIZE=thread \
	    $(python) setup.py -q build_ext --build-lib $(sanitized)/thread
	@CXX="$(CXX)" BUILD=$(sanitized)/thread PYTHON=$(python) bash tests/sanitize/threads.sh

clean:
	rm -rf $(venv) build dist .hypothesis .pytest_cache .mypy_cache .ruff_cache .benchmarks .coverage
	rm -rf *.egg-info pyoptim/_C.*.so pyoptim/_cuda.so pyoptim/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: each stage leaves a stamp in the virtual environment, so a stage runs once ----

# An environment that was left half-made, or whose Python is gone or another one, is made anew.
identity := import sys; print(*sys.version_info[:3], sys.base_prefix)
wanted := $(shell $(PYTHON) -c '$(identity)' 2>/dev/null)
found := $(shell test -x $(python) && $(python) -c '$(identity)' 2>/dev/null)
ifneq ($(wanted),$(found))
.PHONY: $(venv)/.created
endif

$(venv)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "pyoptim needs Python >= 3.11, '$(PYTHON)' is not; try: make $(MAKECMDGOALS) PYTHON=python3.12"; \
	    exit 1; }
	@if [ "$(wanted)" != "$(found)" ] || ! $(python) -c 'import pip' 2>/dev/null; then \
	    echo "== creating the virtual environment $(venv)"; \
	    $(PYTHON) -m venv --clear $(venv) || { \
	        echo "on Debian and Ubuntu, virtual environments need: apt-get install python3-venv"; exit 1; }; \
	fi
	@touch $@

# The CPU build where the package index has it; its plain name may bring gigabytes of GPU libraries.
$(venv)/.torch-$(TORCH): $(venv)/.created
	@echo "== installing torch $(TORCH)"
	@$(pip) "torch==$(TORCH)+cpu" 2>$(venv)/torch.log || { \
	    echo "   no CPU build of torch in this package index, installing the plain one"; \
	    $(pip) "torch==$(TORCH)"; } || { cat $(venv)/torch.log; exit 1; }
	@touch $@

$(venv)/.requirements: $(venv)/.torch-$(TORCH) pyproject.toml
	@echo "== installing the libraries that the build, the tests and the demo need"
	@$(python) -c '$(requirements)' test demo bench > $(venv)/requirements.txt
	@$(pip) -r $(venv)/requirements.txt
	@touch $@

$(venv)/.lint: $(venv)/.installed
	@echo "== installing the linters"
	@$(python) -c '$(requirements)' dev > $(venv)/requirements-dev.txt
	@$(pip) -r $(venv)/requirements-dev.txt
	@touch $@

# No stamp is left when there was no compiler, so that the next run tries again.
$(venv)/.installed: $(venv)/.requirements $(sources)
	@echo "== building and installing pyoptim"
	@$(pip) --no-build-isolation --no-deps -e .
	@$(python) -c '$(outcome)' && touch $@ || true

requirements := import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
    extras = p["project"]["optional-dependencies"]; \
    lines = p["build-system"]["requires"] + sum((extras[name] for name in sys.argv[1:]), []); \
    print(*lines, sep="\n")
outcome := import json, sys; info = json.load(open("pyoptim/_build_info.json")); \
    cpu, cuda = info["cpu"], info["cuda"]; \
    print("   kernels:", ", ".join(cpu["isas"]) or "none, the reference will run: " + cpu["reason"]); \
    print("   CUDA engine:", "for " + ", ".join(cuda["archs"]) if cuda["built"] else "none: " + cuda["reason"]); \
    sys.exit(not cpu["built"])
