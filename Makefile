# `make demo` and `make test` work on a fresh clone: each sets up .venv and builds what it needs.
PYTHON ?= python3
PY := .venv/bin/python
OP ?= sigmoid_loss
DEVICE ?= cpu
# `make demo TILEWISE_REQUIRE_EXTENSION=0` goes on without a compiler, on the slow reference.
export TILEWISE_REQUIRE_EXTENSION ?= 1
BUILD := $(PY) setup.py --quiet build_ext --inplace

VERB := ^\([a-z-]*\):.*  \#\# *
.PHONY: $(shell sed -n 's/$(VERB).*/\1/p' $(MAKEFILE_LIST))

help:  ## list the verbs
	@sed -n 's/$(VERB)/\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# An editable install: `import tilewise` finds this tree. pip shows errors only (-qq). The extension
# is built before pip looks for it, where its progress is seen.
.venv/installed: requirements-dev.txt pyproject.toml
	@echo "setting up .venv: about 3 minutes (torch $$(sed -n 's/^torch==//p' $<), test tools)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install -qq --disable-pip-version-check -r $<
	@$(BUILD)
	@$(PY) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

build: .venv/installed  ## build the C++ extension in place; an unchanged tree rebuilds nothing
	@$(BUILD)

demo: build  ## train SigLIP on real image-caption pairs, our loss beside the eager one
	$(PY) -m examples.siglip

demo-distributed: build  ## the same training by two processes, their pairs joined
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node=2 -m examples.siglip \
	    --out out/siglip-distributed

vqvae: build  ## train a VQ-VAE on digits and on pictures, our quantiser beside the eager one
	$(PY) -m examples.vqvae

distances: build  ## fit the same targets by six distances, beside their known optimum
	$(PY) -m examples.distances

vae: build  ## train VAEs and a GAN on digits, our sampling beside eager operations
	$(PY) -m examples.vae

blip: build  ## train BLIP on scenes: search, matching, captions, answers, and a pool that it cleans
	$(PY) -m examples.blip

recipes: build  ## run all examples, or RECIPES="bias dfn", and collect all in out/recipes/index.html
	$(PY) -m examples.recipes $(RECIPES)

# `make vqgan VQGAN=--resume` goes on from the checkpoints of a run that was stopped.
vqgan: build  ## train a VQGAN and a transformer over its codes: new pictures from captions
	$(PY) -m examples.vqgan_train $(VQGAN)
	$(PY) -m examples.vqgan_sample $(VQGAN)

test: build  ## run the tests, on every core
	$(PY) -m pytest -n auto -m "not slow"

test-all: build  ## the tests, with those that take long
	$(PY) -m pytest -n auto

# With PYTHON=… on the command line these two run in that environment, and install nothing.
GPU_PY := $(if $(filter command,$(origin PYTHON)),PYTHONPATH=pyext $(PYTHON),$(PY))
GPU_BUILD := $(if $(filter command,$(origin PYTHON)),,build)

test-gpu: $(GPU_BUILD)  ## the same tests on a CUDA device, and those that need one
	$(GPU_PY) -m tools.gpu_environment
	$(GPU_PY) -m tools.precompile
	TILEWISE_TEST_DEVICE=cuda $(GPU_PY) -m pytest tests

first-gpu: $(GPU_BUILD)  ## all that a GPU has to show, in 8 minutes, into out/first_gpu
	PYTHON="$(if $(GPU_BUILD),$(PY),$(PYTHON))" tools/first_gpu.sh

sanitize: build  ## tests of the C++ backend with the address and undefined behaviour sanitizers
	$(PY) -m tools.sanitize

test-arm: build  ## tests of the C++ backend on an emulated aarch64 (sets up build/arm: 1 GB)
	$(PY) -m tools.test_arm

test-torch: build  ## tests with another torch: make test-torch VERSION=2.9.1 (sets up build/torch-…)
	$(PY) -m tools.test_torch $(VERSION) $(TESTS)

compilers: build  ## build with every g++ and clang++ that is installed, and test each
	$(PY) -m tools.compilers

mutants: build  ## plant faults in copies of the tree: each must be found by a test
	$(PY) -m tests.mutants

gate: build  ## compile all Triton kernels; GATE="--changed --write": renew what is out of date
	$(PY) -m tests.triton_tools.gate $(GATE)

launches: build  ## count what each op launches on a GPU, into kernels/launches.csv
	$(PY) -m tests.triton_tools.launches

fuzz: build  ## the random tests for minutes instead of seconds
	HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest tests -k random --timeout=0

statistics: build  ## the random ops against their laws, on a thousand times as many draws
	TILEWISE_STATISTICS=long $(PY) -m pytest tests/ops/test_random_statistics.py --timeout=0

bench: build  ## measure, into out/bench: make bench OP=sigmoid_loss DEVICE=cpu
	$(PY) -m benchmarks.run --op $(OP) --device $(DEVICE)

bench-record: build  ## the same into benchmarks/results, of a clean and fully tested commit
	$(PY) -m benchmarks.run --op $(OP) --device $(DEVICE) --record

bench-quick: build  ## a minute of every op, into out/bench; fails where a small call is slow
	$(PY) -m benchmarks.run --op all --device $(DEVICE) --quick --no-verify

check: build  ## lint, format and types
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror $$(git ls-files csrc)

format: build  ## let clang-format and ruff mend what they can
	$(PY) -m ruff check --fix .
	.venv/bin/clang-format -i $$(git ls-files csrc)

docs: build  ## draw the pages' pictures anew; run their snippets and follow their links
	for picture in draw hero house receptive_field; do $(PY) -m docs.figures.$$picture || exit 1; done
	$(PY) -m pytest tests/tools/test_readme.py

wheel: build  ## a wheel for this Python and torch, in dist/
	$(PY) -m pip wheel -qq --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## remove what make made
	rm -rf .venv build dist out .cache pyext/*.egg-info pyext/tilewise/*.so pyext/tilewise/_build.json
