# Each target creates .venv on first use.
PY ?= .venv/bin/python
READY := .venv/.ready
READY_DEV := .venv/.ready-dev
SOURCES := pyproject.toml setup.py scripts/setup.sh scripts/build_backend.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: help setup setup-dev vllm peers train real test asan bench gpu-check gpu-wheels study study-full torture docs lint artifacts clean
.DEFAULT_GOAL := help
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r target text; do printf '%-12s %s\n' "$$target" "$$text"; done

setup: $(READY)  ## create .venv with torch and what the trainer needs
$(READY): $(SOURCES)
	scripts/setup.sh train
	@touch $@

setup-dev: $(READY_DEV)  ## add what tests, style checks and benchmarks need
$(READY_DEV): $(SOURCES)
	scripts/setup.sh train,dev
	@touch $(READY) $@

vllm: setup  ## add vLLM to .venv (its CPU build if there is no GPU)
	scripts/vllm.sh

peers: setup-dev  ## install verl and OpenRLHF for the tests, in a separate folder
	scripts/peers.sh

train: setup  ## train on the built-in task; ARGS="--steps 100 ..." passes options to the trainer
	$(PY) -m mgrpo_kernels.train $(ARGS)

real: setup  ## train SmolLM2-135M on products without labels, beside other rewards; resumable; ARGS="--seeds 1 --cells mgrpo" for one run
	$(PY) examples/real_model/real_runs.py $(ARGS)

# With active waiting, threads that wait for each other keep the core that the other process needs.
# The order of the files is that of tests/conftest.py: the longest first.
test: setup-dev  ## run the whole test suite, in two processes that take one file at a time
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

bench: setup-dev  ## benchmark every op against its peers
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

# If PY names another interpreter, .venv is not created; that interpreter needs torch, triton, pytest, pytest-benchmark and hypothesis.
gpu-check: $(if $(filter .venv/%,$(PY)),setup-dev)  ## run tests, benchmarks and tuning on one GPU, in nine minutes; OUT=dir receives the results
	$(PY) scripts/gpu_check --out $(or $(OUT),gpu-check) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

gpu-wheels: $(if $(filter .venv/%,$(PY)),setup-dev)  ## download the peers' wheels to OUT=dir, for a GPU machine without a package index
	PY=$(PY) scripts/gpu_wheels.sh $(or $(OUT),build/gpu-wheels) $(ARGS)

OF_STUDY := examples/collapse/summary.py --results runs/collapse.jsonl --against examples/collapse/results.jsonl
study: setup-dev  ## run the collapse study's main cells with three seeds; resumable; about 20 minutes on two free cores
	$(PY) examples/collapse/study.py $(ARGS)
	$(PY) $(OF_STUDY)

study-full: setup-dev  ## run every cell of the collapse study with five seeds; takes hours
	$(PY) examples/collapse/study.py --all --seeds 5 $(ARGS)
	$(PY) $(OF_STUDY)

.PHONY: mutants
mutants: setup-dev  ## check that the tests catch the planted faults of tests/mutations; resumable; half an hour on two free cores
	$(PY) scripts/mutants.py $(ARGS)

torture: setup-dev  ## kill, stop and starve real runs, resume them, and compare bit for bit; writes docs/torture.json
	$(PY) tests/torture.py --out docs/torture.json $(ARGS)

docs: setup-dev  ## build the documentation into build/docs; a dead link is an error
	$(PY) -m pip install --quiet 'zensical>=0.0.70' 'mkdocstrings-python>=2'
	$(PY) -m zensical build --strict --clean -f mkdocs.yml

lint: setup-dev  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

asan: setup-dev  ## make random calls of every op, with the C++ built for AddressSanitizer and UBSan (CALLS=2000 for each instruction set)
	scripts/asan.sh $(ARGS)

artifacts: setup-dev  ## build the sdist and a wheel from it, and run an op on the native backend in a fresh environment
	$(PY) scripts/check_artifacts.py $(ARGS)

clean:  ## delete build products
	rm -rf build *.egg-info mgrpo_kernels/*.so mgrpo_kernels/_build_report.py
