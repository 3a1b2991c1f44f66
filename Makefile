# Each of these does its own set-up, into .venv.
PY ?= .venv/bin/python
STAMP := .venv/.ready
SOURCES := pyproject.toml setup.py scripts/setup.sh $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: setup train test bench gpu-check lint clean
setup: $(STAMP)
$(STAMP): $(SOURCES)
	scripts/setup.sh
	@touch $@

train: setup  ## the demonstration; ARGS="--steps 100 ..." passes options on
	$(PY) -m mgrpo_kernels.train $(ARGS)

test: setup  ## the whole suite
	$(PY) -m pytest $(ARGS)

bench: setup  ## every op beside its peers
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

# With another PY nothing is set up: that interpreter has torch, triton, pytest, pytest-benchmark and hypothesis.
gpu-check: $(if $(filter .venv/%,$(PY)),setup)  ## tests and benchmarks on one GPU, in nine minutes, as JSON: OUT=dir
	$(PY) scripts/gpu_check.py --out $(or $(OUT),gpu-check) $(ARGS)

lint: setup  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf build *.egg-info mgrpo_kernels/*.so mgrpo_kernels/_build_report.py
