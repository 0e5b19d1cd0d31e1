# Two commands: `make demo` separates a real song with a real Triton, `make test` runs all tests.
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build/demo

ALL := build/all-models
TEST_EXTRAS := export,server,evaluate,tensorrt-check,dev

.PHONY: demo test lint bench bench-models verify-models check-tensorrt prove-gpu clean

demo:
	@scripts/setup.sh $(VENV) export,server
	@$(BIN)/stemserve export spleeter_2stems
	@$(BIN)/python -m stemserve_export.song audio_example $(DEMO)
	@$(BIN)/stemserve separate $(DEMO)/audio_example.mp3 --out $(DEMO)/separated

test:
	@scripts/setup.sh $(VENV) $(TEST_EXTRAS)
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest tests/unit -n 2 --dist worksteal
	$(BIN)/python -m pytest tests/server

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The figures of the README; takes a quarter of an hour on two cores.
bench:
	@scripts/setup.sh $(VENV) $(TEST_EXTRAS)
	@$(BIN)/stemserve export spleeter_2stems
	PYTHONPATH=tests $(BIN)/python -m bench --hour

# Every model against its own package, chunk by chunk; a quarter of an hour.
bench-models:
	@scripts/setup.sh $(VENV) $(TEST_EXTRAS)
	PYTHONPATH=tests $(BIN)/python -m bench.models

# The release gate, and TensorRT's acceptance, of every model in both precisions. Where weights
# cannot be downloaded they are seeded, in the published formats. Takes about an hour.
$(ALL)/done:
	@scripts/setup.sh $(VENV) $(TEST_EXTRAS)
	PYTHONPATH=tests $(BIN)/python -m support.seeded $(ALL)
	@touch $@

verify-models: $(ALL)/done
	$(BIN)/stemserve verify --repository $(ALL)/model_repository

check-tensorrt: $(ALL)/done
	$(BIN)/stemserve check-tensorrt --repository $(ALL)/model_repository

# For a machine with a GPU: engines, three ways of serving, dB against the CPU, throughput.
prove-gpu:
	@scripts/setup.sh $(VENV) export,server
	$(BIN)/python -m stemserve_export.gpu_proof $(if $(IMAGE),--image $(IMAGE))

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
