# Two commands: `make demo` separates a real song with a real Triton, `make test` runs all tests.
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo test lint bench clean

demo:
	@scripts/setup.sh $(VENV) export,server
	@$(BIN)/stemserve export spleeter_2stems
	@$(BIN)/python -m stemserve_export.song audio_example $(DEMO)
	@$(BIN)/stemserve separate $(DEMO)/audio_example.mp3 --out $(DEMO)/separated

test:
	@scripts/setup.sh $(VENV) export,server,dev
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The figures of the README; takes a quarter of an hour on two cores.
bench:
	@scripts/setup.sh $(VENV) export,server,dev
	@$(BIN)/stemserve export spleeter_2stems
	PYTHONPATH=tests $(BIN)/python -m bench --hour

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
