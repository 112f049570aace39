# Each target installs what it needs into .venv first; that takes minutes once and nothing afterwards.
# PYTHON names the interpreter to make .venv with, ARGS are passed on to pytest or to the benchmarks.

VENV ?= .venv
BIN := $(VENV)/bin
SETUP := VENV=$(VENV) PYTHON="$(PYTHON)" scripts/setup.sh
OLD_VLLMS ?= 0.27.1 0.29.0 0.31.0
SAY := @printf '==> %s\n'

.PHONY: help demo test test-engines check fix bench docs clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## See a long document being reused by a real vLLM, with numbers and a chart (5 minutes)
	@$(SETUP) demo
	$(SAY) "Unpacking the model (half a minute, the first time)"
	$(BIN)/python examples/model.py
	$(SAY) "Asking questions about long documents, with and without LMCache (a few minutes)"
	$(BIN)/python examples/long_document_qa.py

test: ## Run all tests, those with real engines included (an hour on two cores)
	@$(SETUP) test
	$(SAY) "Running all tests (an hour on two cores; real vLLMs and SGLangs start many times)"
	$(BIN)/python -m pytest $(ARGS)

test-engines: ## Run the tests with a real vLLM for several versions of it (15 minutes each)
	@$(SETUP) test
	@for version in $(OLD_VLLMS); do $(SETUP) engine $$version || exit; done
	@failed=; for version in $(OLD_VLLMS); do \
	    printf '==> Running the engine tests with vLLM %s\n' $$version; \
	    folder=$(CURDIR)/.engines/$$version; \
	    LMCACHE_TEST_VLLM_PATH=$$folder PYTHONPATH=$$folder \
	        $(BIN)/python -m pytest tests/engines $(ARGS) || failed="$$failed $$version"; \
	done; \
	echo '==> Running the engine tests with the installed vLLM'; \
	$(BIN)/python -m pytest tests/engines $(ARGS) || failed="$$failed installed"; \
	if [ -n "$$failed" ]; then echo "failed with vLLM:$$failed"; exit 1; fi

check: ## Lint, check the format, the types and who imports whom (a minute)
	@$(SETUP) check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: ## Repair what the linter and the formatter can
	@$(SETUP) check
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: ## Measure; the results go to bench-results/
	@$(SETUP) test
	$(BIN)/python benchmarks/run.py $(ARGS)

docs: ## Write the generated pages anew
	@$(SETUP) check
	$(BIN)/lmcache config docs > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

clean: ## Remove everything that was built, .venv included
	rm -rf $(VENV) .engines .sglang .triton .cache build dist *.egg-info bench-results demo-results
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
