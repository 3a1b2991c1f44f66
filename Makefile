# Each of these does its own set-up, into .venv.
PY ?= .venv/bin/python
STAMP := .venv/.ready
SOURCES := pyproject.toml setup.py scripts/setup.sh $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: setup vllm train test bench gpu-check study study-full torture docs lint clean
setup: $(STAMP)
$(STAMP): $(SOURCES)
	scripts/setup.sh
	@touch $@

vllm: setup  ## vLLM beside it: its CPU build where there is no GPU
	scripts/vllm.sh

train: setup  ## the demonstration; ARGS="--steps 100 ..." passes options on
	$(PY) -m mgrpo_kernels.train $(ARGS)

test: setup  ## the whole suite, a file at a time in each of two processes
	$(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

bench: setup  ## every op beside its peers
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

# With another PY nothing is set up: that interpreter has torch, triton, pytest, pytest-benchmark and hypothesis.
gpu-check: $(if $(filter .venv/%,$(PY)),setup)  ## tests and benchmarks on one GPU, in nine minutes, as JSON: OUT=dir
	$(PY) scripts/gpu_check.py --out $(or $(OUT),gpu-check) $(ARGS)

OF_STUDY := examples/collapse/summary.py --results runs/collapse.jsonl --against examples/collapse/results.jsonl
study: setup  ## the collapse study's main cells with three seeds: some 20 minutes on two free cores; resumable
	$(PY) examples/collapse/study.py $(ARGS)
	$(PY) $(OF_STUDY)

study-full: setup  ## every cell of it with five seeds: hours
	$(PY) examples/collapse/study.py --all --seeds 5 $(ARGS)
	$(PY) $(OF_STUDY)

torture: setup  ## runs killed at twenty random moments and resumed, to the same bits
	$(PY) tests/torture.py $(ARGS)

docs: setup  ## the documentation as pages, into build/docs; a dead link is an error
	$(PY) -m pip install --quiet 'zensical>=0.0.70' 'mkdocstrings-python>=2'
	$(PY) -m zensical build --strict --clean -f mkdocs.yml

lint: setup  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf build *.egg-info mgrpo_kernels/*.so mgrpo_kernels/_build_report.py
