# Each target creates .venv on first use.
PY ?= .venv/bin/python
STAMP := .venv/.ready
SOURCES := pyproject.toml setup.py scripts/setup.sh scripts/build_backend.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: help setup vllm peers train test asan bench gpu-check gpu-wheels study study-full torture docs lint artifacts clean
.DEFAULT_GOAL := help
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r target text; do printf '%-12s %s\n' "$$target" "$$text"; done

setup: $(STAMP)  ## create .venv with torch and everything that training and tests need
$(STAMP): $(SOURCES)
	scripts/setup.sh
	@touch $@

vllm: setup  ## add vLLM to .venv (its CPU build if there is no GPU)
	scripts/vllm.sh

peers: setup  ## install verl and OpenRLHF for the tests, in a separate folder
	scripts/peers.sh

train: setup  ## train on the built-in task; ARGS="--steps 100 ..." passes options to the trainer
	$(PY) -m mgrpo_kernels.train $(ARGS)

test: setup  ## run the whole test suite, in two processes that take one file at a time
	$(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

bench: setup  ## benchmark every op against its peers
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

# If PY names another interpreter, .venv is not created; that interpreter needs torch, triton, pytest, pytest-benchmark and hypothesis.
gpu-check: $(if $(filter .venv/%,$(PY)),setup)  ## run tests, benchmarks and tuning on one GPU, in nine minutes; OUT=dir receives the results
	$(PY) scripts/gpu_check --out $(or $(OUT),gpu-check) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

gpu-wheels: $(if $(filter .venv/%,$(PY)),setup)  ## download the peers' wheels to OUT=dir, for a GPU machine without a package index
	PY=$(PY) scripts/gpu_wheels.sh $(or $(OUT),build/gpu-wheels) $(ARGS)

OF_STUDY := examples/collapse/summary.py --results runs/collapse.jsonl --against examples/collapse/results.jsonl
study: setup  ## run the collapse study's main cells with three seeds; resumable; about 20 minutes on two free cores
	$(PY) examples/collapse/study.py $(ARGS)
	$(PY) $(OF_STUDY)

study-full: setup  ## run every cell of the collapse study with five seeds; takes hours
	$(PY) examples/collapse/study.py --all --seeds 5 $(ARGS)
	$(PY) $(OF_STUDY)

.PHONY: mutants
mutants: setup  ## check that the tests catch the planted faults of tests/mutations; resumable; half an hour on two free cores
	$(PY) scripts/mutants.py $(ARGS)

torture: setup  ## kill, stop and starve real runs, resume them, and compare bit for bit; writes docs/torture.json
	$(PY) tests/torture.py --out docs/torture.json $(ARGS)

docs: setup  ## build the documentation into build/docs; a dead link is an error
	$(PY) -m pip install --quiet 'zensical>=0.0.70' 'mkdocstrings-python>=2'
	$(PY) -m zensical build --strict --clean -f mkdocs.yml

lint: setup  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

asan: setup  ## make random calls of every op, with the C++ built for AddressSanitizer and UBSan (CALLS=2000 for each instruction set)
	scripts/asan.sh $(ARGS)

artifacts: setup  ## build the sdist and a wheel from it, and run an op on the native backend in a fresh environment
	$(PY) scripts/check_artifacts.py $(ARGS)

clean:  ## delete build products
	rm -rf build *.egg-info mgrpo_kernels/*.so mgrpo_kernels/_build_report.py
