# make demo    train a small GPT with clipping: a table and demo.png (STEPS=, DEVICE=, SEEDS= ...)
# make test    lint, types and tests
# make quick   lint, types and the tests that say most in two minutes
# make integrations  install the trainers and run the recipes of docs/trainers.md with them
# make mutants break the code on purpose and see the tests fail
# make bench   clip and step by every way, beside the limit: tables and JSON (ten minutes, CPU)
# make gpu     the GPU tests and the benchmark, with the torch that is there (at most nine minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STEPS ?= 100
DEVICE ?= cpu
SEEDS ?= 0
OUT ?= demo.png
WORKERS ?= 2
# Short steps differ the most from process to process, and cost the least.
TOGETHER := --processes 6 --repetitions 40 --minutes 8

.PHONY: help demo test quick lint types pytest integrations mutants bench gpu gpu-first-steps clean

# What is said of each above.
help:
	@grep '^# make' Makefile | sed 's/^# //'

demo: $(VENV)/ready
	$(BIN)/python -m bench demo --steps $(STEPS) --device $(DEVICE) --seeds $(SEEDS) --out $(OUT)

test: lint types pytest

QUICK = tests/test_*.py tests/eager/test_functional.py \
    tests/wrapper/test_wrapper.py \
    tests/wrapper/test_wrapper_gradients.py \
    tests/wrapper/test_nonfinite.py \
    tests/wrapper/test_amp.py \
    tests/wrapper/test_refusals.py \
    tests/multi_tensor/test_plans.py \
    tests/multi_tensor/test_multi_tensor.py \
    tests/multi_tensor/test_bucket_refusals.py \
    tests/multi_tensor/test_steady_on_a_stub.py \
    tests/wrapper/test_found_by_users.py \
    tests/lowering/test_lowering_cpp.py
quick: lint types
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile \
	    $(QUICK)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy compileclip passes bench

# Each worker has all threads: whoever waits for the other's is not to keep a core busy with that.
pytest: $(VENV)/ready
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Into .venv; without them, "make test" skips these tests.
integrations: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[integrations]"
	$(BIN)/python -m pytest tests/integrations

mutants: $(VENV)/ready
	$(BIN)/python tests/mutants.py

# Into build/bench/DEVICE. No case begins when the minutes are over.
bench: $(VENV)/ready
	$(BIN)/python -m bench \
	    train --rows torch "torch, fused" compileclip "compileclip, eager" \
	    + scaling --tensors 10 100 1000 5000 --sizes 1e4 1e5 1e6 1e7 \
	    --rows "clip + fused,multi_tensor,limit" $(TOGETHER) --processes 9 --no-first-steps \
	    + scaling --name compilation --tensors 10 30 --sizes \
	    --rows "clip + fused,one graph,multi_tensor,limit" $(TOGETHER) \
	    + step --name optimizers --optimizer SGD RMSprop NAdam RAdam \
	    --shapes 2000x32x32 resnet50 --rows "clip +,multi_tensor,limit" $(TOGETHER) --no-first-steps \
	    + step --shapes 1x1000 2000x32x32 resnet50 64x1024x1024 \
	    --compile-tensors 0 $(TOGETHER) --no-first-steps

# No virtual environment: on a GPU machine the torch that fits its driver is installed already.
# Sixteen tests at a time have no core for more than one thread each.
# What fails, or takes too long, does not keep the rest from running. After each part, all results
# so far are packed into the folder OUT of the environment.
SAVE = if [ -n "$$OUT" ]; then mkdir -p "$$OUT" && tar czf "$$OUT/bench.tar.gz" -C build bench; fi
GPU_BENCH = $(PYTHON) -m bench
GPU_METHOD = --device cuda --compile-tensors 0 --no-first-steps --repetitions 20
XDIST = $$($(PYTHON) -c "import xdist" 2> /dev/null && echo "-n 16")
gpu:
	-timeout 30 $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	mkdir -p build/bench
	failed=; \
	OMP_NUM_THREADS=1 timeout -s INT 240 $(PYTHON) -m pytest -q --tb=short -m gpu $(XDIST) > build/bench/gpu-tests.txt 2>&1 \
	    || failed="$$failed tests"; tail -n 40 build/bench/gpu-tests.txt; $(SAVE); \
	timeout 100 $(GPU_BENCH) \
	    step --name step-bfloat16 --dtype bfloat16 --shapes gpt2 $(GPU_METHOD) \
	    + step --shapes gpt2 2000x32x32 1x1000 resnet50 llama-1b $(GPU_METHOD) --minutes 1.0 \
	    || failed="$$failed step"; $(SAVE); \
	timeout 75 $(GPU_BENCH) train --device cuda \
	    --rows torch "torch, fused" compileclip "compileclip, eager" \
	    + train --name train-6-layers --device cuda --layers 6 --width 256 --block 128 \
	    --batch 8 --steps 300 --rows torch "torch, fused" compileclip \
	    || failed="$$failed train"; $(SAVE); \
	timeout 80 $(GPU_BENCH) scaling --tensors 10 1000 5000 --sizes 1e5 1e7 1e9 $(GPU_METHOD) \
	    --rows "clip + fused,multi_tensor,limit" --minutes 1.0 || failed="$$failed scaling"; $(SAVE); \
	echo; echo "Failed or out of time: $${failed:-nothing}"; \
	[ -z "$$failed" ]

# How long first steps take.
gpu-first-steps:
	$(GPU_BENCH) scaling --device cuda --name compilation --tensors 10 30 --sizes \
	    --rows "clip + fused,one graph,multi_tensor,limit" --minutes 1

# Made anew when what it installs changes; afterwards no target needs a network.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo.png
