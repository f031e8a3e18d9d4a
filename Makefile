# `make demo` and `make test` are all a newcomer needs; both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions that are installed. Of torch it names no build: pip takes what its index has, and leaves alone what .venv
# has already in that version, for another CUDA, say. `make install LOCK=/dev/null` takes the newest of the ranges.
LOCK ?= requirements/lock.txt
STAMP := $(VENV)/.installed
EXTRAS := train plot pareto demo test bench
comma := ,
empty :=
space := $(empty) $(empty)

.PHONY: help install lock demo test test-fast test-slow fuzz test-oldest test-newest lint docs structures bench device \
	wheels-for-device clean

# Every target has a line of help behind ##.
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(STAMP) ## make .venv, from requirements/lock.txt; every target but device does this first

# torch first, then the package without build isolation: otherwise pip would fetch another torch to build with.
$(STAMP): pyproject.toml setup.py $(LOCK) requirements/no_deps.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --upgrade --group build
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) torch
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --no-build-isolation \
		-e ".[$(subst $(space),$(comma),$(EXTRAS))]"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/no_deps.txt
	$(BIN)/mopo doctor
	cp $(LOCK) $(VENV)/lock.txt
	touch $@

# The newest versions that pyproject.toml and requirements/held.txt allow, for every Python and platform.
RESOLVE = $(BIN)/uv pip compile --quiet --no-header --no-annotate --no-python-downloads pyproject.toml \
	--group build --group docs --extra qlora $(addprefix --extra ,$(EXTRAS))
lock: install ## renew requirements/lock.txt
	$(RESOLVE) --universal --python-version 3.10 --constraint requirements/held.txt --upgrade -o requirements/lock.txt

demo: install ## tune a 135M chat model under thresholds, and check what the demo claims
	$(BIN)/python examples/demo/run.py

# A process a core; a file's tests stay together, as its fixtures are made once.
PYTEST := python -m pytest -q -n auto --dist loadfile

# bitsandbytes is for the tests alone: on a CPU it asks, whenever peft is imported, for a package that downloads kernels.
test: install lint ## lint, and every test that needs no GPU; about 13 minutes on 2 cores
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) bitsandbytes
	$(BIN)/$(PYTEST)

# What needs seconds a file: no training, compilers, Triton's interpreter, benchmarks or studies, and few other processes.
FAST := structure versions core/arguments core/autograd_modes core/checks core/edges core/functional core/import \
	core/mappings core/unusual_inputs backends/backends data/chat_templates data/collator data/columns data/loaders \
	data/report data/schema data/sources dual/dual tabular/front tabular/solver evaluation/certify evaluation/evaluation \
	evaluation/labelling evaluation/rewards
test-fast: install ## the tests for the inner loop: about a minute on 2 cores
	$(BIN)/$(PYTEST) $(foreach name,$(FAST),tests/$(dir $(name))test_$(notdir $(name)).py)

# A model of 1.4 billion parameters, trained for two steps in less than 12 GB; every causal architecture of transformers.
test-slow: install ## a model of 1.4 billion parameters, every causal architecture of transformers
	$(BIN)/python -m pytest -q -m slow

# The property tests with examples that `make test` has not seen, and many more of them: about an hour on 2 cores.
fuzz: install ## the property tests on fresh examples; about an hour
	HYPOTHESIS_PROFILE=fuzz $(BIN)/$(PYTEST) --timeout 0 tests/*/test_fuzz_*.py

# What other versions of packages can change: not the benchmarks and studies, what other compilers build, or the demo.
BESIDE_VERSIONS := bench/% gpu/% studies/test_c% examples/test_demo% kernels/test_cuda% docs/test_docs.py \
	trainer/test_estimate.py trainer/test_large.py
ANY_VERSIONS = $(filter-out $(addprefix tests/,$(BESIDE_VERSIONS)),$(wildcard tests/test_*.py tests/*/test_*.py))
# In a copy of the tree with an environment of its own, as the extension is built for one version of torch. $(1): its
# name; $(2): its lock.
define test_versions
	mkdir -p .versions/$(1)
	find .versions/$(1) -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -r {} +
	git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents --target-directory .versions/$(1)
	$(if $(2),$(RESOLVE) $(2) -o .versions/$(1)/lock.txt,touch .versions/$(1)/lock.txt)
	$(MAKE) -C .versions/$(1) install LOCK=lock.txt
	cd .versions/$(1) && $(BIN)/$(PYTEST) $(ANY_VERSIONS)
endef

# The lower ends of the ranges in pyproject.toml. Where pip's index has CUDA builds of torch only, 6 GB.
test-oldest: install ## the tests on the oldest versions that pyproject.toml allows
	$(call test_versions,oldest,--resolution lowest-direct)

# Their upper ends, as far as pip's index has them today. Red may be somebody else's fault.
test-newest: install ## the tests on the newest versions that pyproject.toml allows
	$(call test_versions,newest,)

lint: install ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in docs/_build/html.
docs: install ## the site, in docs/_build/html; warnings are errors
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --group docs
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going docs docs/_build/html

# Every table and picture of studies/canonical_structures/results: about 20 minutes on 2 cores.
structures: install ## every table and picture of studies/canonical_structures; about 20 minutes
	$(BIN)/python -m studies.canonical_structures

# Every figure of bench/results: an hour and a half on 2 cores, we estimate. `mopo bench --quick` takes three minutes.
bench: install ## every figure of bench/results; about an hour and a half
	$(BIN)/python -m bench.run

# On a CUDA machine, with its own python and what is installed there; `python -m bench.device --help` for ARGS.
device: ## on a CUDA machine: GPU tests, and times beside every peer
	$(PYTHON) -m bench.device $(ARGS)

# Peers that a borrowed CUDA machine without a package index lacks, for its Python: docs/gpu.md. 2.7 MB.
DEVICE_PYTHON ?= 3.12
wheels-for-device: ## peers for a CUDA machine without a package index
	rm -rf .wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(DEVICE_PYTHON) --dest .wheels \
		--constraint requirements/lock.txt --constraint requirements/no_deps.txt \
		trl liger-kernel cut-cross-entropy datasets dill multiprocess

clean: ## remove what was built
	rm -rf build docs/_build *.egg-info mopo_kernels/*.so runs .pytest_cache .mypy_cache .ruff_cache
