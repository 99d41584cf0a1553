PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test faults intruders mutations bench bench-gpu check containers docs install install-test clean

# Targets with a line after ## are listed by `make help`.
help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Two ranks where there is no GPU (deepspeed's default is one per NUMA node): each trains four of the eight clients.
demo: install  ## install; fetch the demo's model and data; train and evaluate eight clients
	$(BIN)/python launch/prepare_demo.py
	LOCAL_SIZE=2 $(BIN)/deepspeed launch/run.py --config launch/recipes/demo.yaml
	LOCAL_SIZE=2 $(BIN)/deepspeed launch/evaluate.py --run runs/demo

# Two files at a time: most of a test is one process that imports, or a wait. In this order the long files come first.
test: install-test  ## install; run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Do harm to real runs, start them again, and look whether anything is lost. MODE=launcher: N runs under one launcher
# are killed at random moments (a minute each on two cores); MODE=elastic: N kills of groups with launchers of their
# own, at named steps of a round (20 s each); MODE=disk: N writes find the disk full (6 s each).
N ?= 20
MODE ?= launcher
faults: install-test  ## harm N real runs (N=20, MODE=launcher, elastic or disk): nothing may be lost
	$(BIN)/python -m tests.faults --mode $(MODE) --trials $(N)

# Each must be taken, or refused in one line with nothing half-written (a second or two each on two cores).
mutations: install-test  ## give N mutated inputs (N=20) to every program of launch/
	$(BIN)/python -m tests.mutations --inputs $(N)

# Ratios of docs/performance.md, in minutes on two cores; the demo's model and data must be there (make demo).
bench: install-test  ## the ratios of docs/performance.md, on a CPU
	$(BIN)/python benchmarks/train_step.py --device cpu --threads 1 --clock cpu --steps 1 --repeats 3
	$(BIN)/python benchmarks/padding.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/planner.py --cases 0 3
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/checkpoint.py --steps 4

# The same questions on one large GPU, in less than nine minutes (docs/gpu.md). DRY=1: tiny, on a CPU.
bench-gpu: install-test  ## the same questions on one large GPU (DRY=1: a trial on a CPU)
	$(BIN)/python -m benchmarks.gpu

intruders: install-test  ## send N intruders of each kind to running jobs (N=20), and compare with undisturbed ones
	$(BIN)/python -m tests.intruders --number $(N)

# What CI checks beside the tests.
check: install-test  ## format, lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/interrogate dpa_ds launch benchmarks

# The steps of the containers, but for the packages of the system, on this machine: build/containers/dpa_ds is what
# /opt/dpa_ds is there. TORCH_INDEX: where pip finds the build of torch. Minutes, and a package index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
containers:  ## try the install steps of containers/ without a container engine
	rm -rf build/containers
	mkdir -p build/containers/wheels
	PYTHON=$(PYTHON) sh containers/install.sh wheel . build/containers/wheels
	PYTHON=$(PYTHON) PREFIX=build/containers/dpa_ds sh containers/install.sh package build/containers/wheels \
	  torch==2.13.0 $(TORCH_INDEX) all
	cd build && containers/dpa_ds/bin/dpa-init --list

# The site of the documentation, in build/site. It fails on a warning, a broken link, or a reference that is not current.
docs: $(VENV)/.installed-docs  ## build the documentation's site
	$(BIN)/python docs/generate_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

install: $(VENV)/.installed  ## make the environment (.venv)
install-test: $(VENV)/.installed-test

# torch first, because deepspeed needs it at build time. Which build (CPU, CUDA) that is depends on your package index:
# to choose another, install it into $(VENV) beforehand; it is kept.
$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install setuptools wheel ninja py-cpuinfo numpy packaging psutil
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation -e ".[docs]"
	touch $@

clean:  ## remove the environment, caches and builds
	rm -rf $(VENV) .cache build *.egg-info
