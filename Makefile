# Each of these does its own set-up, into .venv.
PY ?= .venv/bin/python
STAMP := .venv/.ready
SOURCES := pyproject.toml setup.py scripts/setup.sh scripts/build_backend.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: setup vllm peers train test bench gpu-check gpu-wheels study study-full torture docs lint artifacts clean
setup: $(STAMP)
$(STAMP): $(SOURCES)
	scripts/setup.sh
	@touch $@

vllm: setup  ## vLLM beside it: its CPU build where there is no GPU
	scripts/vllm.sh

peers: setup  ## verl and OpenRLHF for the tests, into a folder of their own
	scripts/peers.sh

train: setup  ## the demonstration; ARGS="--steps 100 ..." passes options on
	$(PY) -m mgrpo_kernels.train $(ARGS)

test: setup  ## the whole suite, a file at a time in each of two processes
	$(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

bench: setup  ## every op beside its peers
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

# With another PY nothing is set up: that interpreter has torch, triton, pytest, pytest-benchmark and hypothesis.
gpu-check: $(if $(filter .venv/%,$(PY)),setup)  ## tests, benchmarks and tuning on one GPU, in nine minutes: OUT=dir
	$(PY) scripts/gpu_check --out $(or $(OUT),gpu-check) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

gpu-wheels: $(if $(filter .venv/%,$(PY)),setup)  ## the peers' wheels, for a GPU machine without a package index: OUT=dir
	PY=$(PY) scripts/gpu_wheels.sh $(or $(OUT),build/gpu-wheels) $(ARGS)

OF_STUDY := examples/collapse/summary.py --results runs/collapse.jsonl --against examples/collapse/results.jsonl
study: setup  ## the collapse study's main cells with three seeds: some 20 minutes on two free cores; resumable
	$(PY) examples/collapse/study.py $(ARGS)
	$(PY) $(OF_STUDY)

study-full: setup  ## every cell of it with five seeds: hours
	$(PY) examples/collapse/study.py --all --seeds 5 $(ARGS)
	$(PY) $(OF_STUDY)

.PHONY: mutants
mutants: setup  ## the tests against faults of the product, tests/mutations: half an hour on two free cores; resumable
	$(PY) scripts/mutants.py $(ARGS)

torture: setup  ## runs killed at twenty random moments and resumed, to the same bits
	$(PY) tests/torture.py $(ARGS)

docs: setup  ## the documentation as pages, into build/docs; a dead link is an error
	$(PY) -m pip install --quiet 'zensical>=0.0.70' 'mkdocstrings-python>=2'
	$(PY) -m zensical build --strict --clean -f mkdocs.yml

lint: setup  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

artifacts: setup  ## sdist, wheel from it, fresh environment, an op on the native backend
	$(PY) scripts/check_artifacts.py $(ARGS)

clean:
	rm -rf build *.egg-info mgrpo_kernels/*.so mgrpo_kernels/_build_report.py
