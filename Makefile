# Each target works on a fresh clone: it makes .venv from pyproject.toml and constraints.txt when that is missing or old.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# A run of tests or of the example shares the machine with its data-loading workers; more threads only get in the way.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo study test test-long lint check golden schema docs outputs bench bench-quick

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY) ## make .venv with everything in it

$(READY): pyproject.toml setup.py constraints.txt .ci/install
	$(PYTHON) -m venv .venv
	.ci/install $(BIN)/python
	touch $(READY)

EXAMPLE := example
RUN := $(BIN)/python -m rslp.main helios
LAUNCH := $(RUN) launch_finetune --config_paths+=$(EXAMPLE)/OUT_multi_dataset.yaml --rslp_project demo --experiment_id first --local true

demo: $(READY) ## the main job on the built-in example: data, config, joint training, evaluation
	$(RUN) make_example --path $(EXAMPLE)/
	$(BIN)/python make_multidataset_config.py --cfg $(EXAMPLE)/multi_dataset.yaml
	$(LAUNCH)
	$(LAUNCH) --do_eval true

study: $(READY) ## joint against single models on the built-in example, 3 seeds (about an hour; may be stopped and started again)
	$(RUN) make_example --path $(EXAMPLE)/
	test -e $(EXAMPLE)/study.yaml || cp rslp/example/configs/study.yaml $(EXAMPLE)/
	$(RUN) study --cfg $(EXAMPLE)/study.yaml

test: $(READY) ## the tests that CI runs
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-long: $(READY) ## all tests, also those of many minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## format, style, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## lint and test

golden: $(READY) ## accept today's plans of all engines as the right ones (tests/launch/golden)
	RSLP_ACCEPT=1 $(BIN)/python -m pytest tests/launch/test_plans.py tests/launch/test_plan_beaker.py -k accepted

schema: $(READY) ## make the shipped tables anew: argument names, the JSON schema of multi-dataset configs
	$(BIN)/python docs/make_vocabulary.py
	$(BIN)/python docs/make_schema.py

docs: $(READY) ## make the generated parts of the docs anew
	$(BIN)/python docs/make_tree.py

outputs: $(READY) ## make the shipped run configs (data/helios/v3_multitask/OUT_*.yaml) anew
	for name in small_v1 small_v2 medium large; do \
		$(BIN)/python make_multidataset_config.py --cfg data/helios/v3_multitask/$$name.yaml || exit 1; done

bench: $(READY) ## run the benchmarks and write docs/performance.md (30 minutes)
	$(BIN)/python benchmarks/all.py

bench-quick: $(READY) ## a little of every benchmark, to see that they work
	$(BIN)/python benchmarks/all.py --quick
