# Each of these does its own set-up, into .venv.
PY := .venv/bin/python
STAMP := .venv/.ready
SOURCES := pyproject.toml setup.py scripts/setup.sh $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: setup train test bench lint clean
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

lint: setup  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf build *.egg-info mgrpo_kernels/*.so mgrpo_kernels/_build_report.py
