# Everything a contributor runs. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# The first interpreter that is new enough; `make PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python3.14; do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$p"; break; fi; done)

VENV := .venv
BIN := $(VENV)/bin
STUBS_VENV := .venv-stubs
S3_VENV := .venv-s3
GMQTT := .venv-gmqtt
NODE_CLIENT := .venv-node
NODE_DEVICE := .venv-node-device
MOBILE := .venv-mobile-ts
PEERS := .venv-peers
STUBS_OUT ?= .
PROTOS := $(wildcard proto/nearcast/wire/v1/*.proto)
STUBS := nearcast/wire/v1
SOURCES := nearcast router edge_node cloud_core model_sync simulations benchmarks tests
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(BIN)/python:
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "$(if $(PYTHON),$(PYTHON) is no Python 3.11 or newer,No Python 3.11 or newer found); install one, or 'make PYTHON=/path/to/python $(MAKECMDGOALS)'" >&2; exit 69; fi
	@if ! "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null; then \
		echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 69; fi
	"$(PYTHON)" -m venv $(VENV)

# The stamps say which locks are installed. A development environment holds all that the demo needs.
$(VENV)/.demo: constraints/demo.txt constraints/build.txt pyproject.toml | $(BIN)/python
	@if [ -e $(VENV)/.dev ]; then $(MAKE) -s $(VENV)/.dev; else \
		echo "installing from constraints/demo.txt (a minute or two)"; \
		$(BIN)/python $(PIP) --require-hashes -r constraints/demo.txt; \
		$(BIN)/python $(PIP) --require-hashes -r constraints/build.txt; \
		$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .; fi
	@touch $@

$(VENV)/.dev: constraints/dev.txt constraints/build.txt pyproject.toml | $(BIN)/python
	@echo "installing from constraints/dev.txt (a minute or two)"
	@$(BIN)/python $(PIP) --require-hashes -r constraints/dev.txt
	@$(BIN)/python $(PIP) --require-hashes -r constraints/build.txt
	@$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(STUBS_VENV)/.stubs: constraints/stubs.txt | $(BIN)/python
	@$(BIN)/python -m venv $(STUBS_VENV)
	@$(STUBS_VENV)/bin/python $(PIP) --require-hashes -r constraints/stubs.txt
	@touch $@

$(S3_VENV)/.s3: constraints/s3-server.txt | $(BIN)/python
	@$(BIN)/python -m venv $(S3_VENV)
	@$(S3_VENV)/bin/python $(PIP) --require-hashes -r constraints/s3-server.txt
	@touch $@

$(GMQTT)/.gmqtt: constraints/gmqtt.txt | $(BIN)/python
	@$(BIN)/python -m venv $(GMQTT)
	@$(GMQTT)/bin/python $(PIP) --require-hashes -r constraints/gmqtt.txt
	@touch $@

$(PEERS)/%/.peer: constraints/peers-%.txt | $(BIN)/python
	@echo "installing from $< (a minute)"
	@$(BIN)/python -m venv $(PEERS)/$*
	@$(PEERS)/$*/bin/python $(PIP) --require-hashes -r $<
	@touch $@

# A client on Node.js, for the tests. Where npm is missing they say so and skip it.
$(NODE_CLIENT)/.npm: $(wildcard tests/foreign/grpc_js/*)
	@mkdir -p $(NODE_CLIENT); cp tests/foreign/grpc_js/* $(NODE_CLIENT)/
	@if ! command -v npm >/dev/null; then echo "npm is missing; on Debian and Ubuntu: apt-get install npm" >&2; \
		elif cd $(NODE_CLIENT) && npm ci --silent --no-audit --no-fund --ignore-scripts; then touch .npm; \
		else echo "npm could not install grpc-js; its tests are skipped" >&2; fi

# A device on Node.js, for the commands in docs/mqtt.md; the same holds for it.
$(NODE_DEVICE)/.npm: $(wildcard tests/foreign/mqtt_js/*)
	@mkdir -p $(NODE_DEVICE); cp tests/foreign/mqtt_js/* $(NODE_DEVICE)/
	@if ! command -v npm >/dev/null; then echo "npm is missing; on Debian and Ubuntu: apt-get install npm" >&2; \
		elif cd $(NODE_DEVICE) && npm ci --silent --no-audit --no-fund --ignore-scripts; then touch .npm; \
		else echo "npm could not install mqtt; its test is skipped" >&2; fi

# The example of a client in TypeScript, compiled; the same holds for it.
$(MOBILE)/.npm: $(wildcard examples/mobile-ts/* examples/mobile-ts/src/*)
	@mkdir -p $(MOBILE); cp -r examples/mobile-ts/. $(MOBILE)/
	@if ! command -v npm >/dev/null; then echo "npm is missing; on Debian and Ubuntu: apt-get install npm" >&2; \
		elif cd $(MOBILE) && npm ci --silent --no-audit --no-fund --ignore-scripts && npm run --silent build; then touch .npm; \
		else echo "npm could not build the example in TypeScript; its test is skipped" >&2; fi

.PHONY: mobile-ts
mobile-ts: $(MOBILE)/.npm ## build examples/mobile-ts, which the tests run

.PHONY: node-client
node-client: $(NODE_CLIENT)/.npm $(NODE_DEVICE)/.npm ## install grpc-js and mqtt, which the tests call nodes with

.PHONY: install
install: $(VENV)/.demo ## make .venv with everything that `make demo` needs

.PHONY: install-dev
install-dev: $(VENV)/.dev ## make .venv with the development tools too

.PHONY: demo
demo: install ## run the whole mesh here; ONCE=1: check it and exit
	@$(BIN)/nearcast demo $(if $(ONCE),--once)

.PHONY: stubs
stubs: $(STUBS_VENV)/.stubs ## regenerate nearcast/wire/v1 from proto/
	@mkdir -p $(STUBS_OUT)
	@$(STUBS_VENV)/bin/python -m grpc_tools.protoc -I proto --python_out=$(STUBS_OUT) --pyi_out=$(STUBS_OUT) $(PROTOS)

.PHONY: stubs-check
stubs-check: $(STUBS_VENV)/.stubs ## fail if the committed stubs are not those of proto/
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; $(MAKE) stubs STUBS_OUT="$$out"; \
	for file in "$$out"/$(STUBS)/* $(STUBS)/*_pb2*; do \
		name=$${file##*/}; \
		diff -u "$(STUBS)/$$name" "$$out/$(STUBS)/$$name" || { echo "stubs are stale: run 'make stubs' and commit" >&2; exit 1; }; \
	done

.PHONY: format
format: install-dev ## format the sources
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

.PHONY: check
check: install-dev ## format, lint, types, layers, stubs
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) stubs-check
	@echo "check: all fine"

# Groups of tests, those that take longest first. Each is a process of pytest; three at a time: most of them mostly wait.
AGENTS := $(wildcard tests/integration/test_agent_*.py tests/integration/test_attacks_*.py)
SYNC := $(patsubst %,tests/integration/test_%.py,certificate_renewal controller enrolment github_action key_drills sync_process trial)
ABUSE := $(wildcard tests/integration/test_abuse_*.py)
OWN_MESH := $(patsubst %,tests/e2e/test_%.py,demo edge_app membership mesh_processes sealed_at_rest)
ELSE := tests/integration $(foreach path,$(AGENTS) $(SYNC) $(ABUSE),--ignore=$(path))
RUN := log=$$(mktemp -p $$0); $(BIN)/pytest -p no:cacheprovider $$1 >$$log 2>&1; code=$$?; cat $$log; exit $$code
.PHONY: test
test: install-dev $(S3_VENV)/.s3 $(GMQTT)/.gmqtt $(NODE_CLIENT)/.npm $(NODE_DEVICE)/.npm $(MOBILE)/.npm ## run the tests; ARGS="-k name" narrows them
	@if [ -n "$(ARGS)" ]; then exec $(BIN)/pytest $(ARGS); fi; \
	logs=$$(mktemp -d); trap 'rm -rf "$$logs"' EXIT; \
	printf '%s\n' "$(ELSE)" "$(AGENTS)" "tests/e2e $(OWN_MESH:%=--ignore=%)" "$(OWN_MESH)" tests/unit "$(SYNC)" \
		"tests/crash tests/compat" "tests/property tests/architecture" "$(ABUSE)" \
		| xargs -d '\n' -P 3 -n 1 sh -c '$(RUN)' "$$logs"

# The suite is not ours and not in this repository: https://github.com/theupdateframework/tuf-conformance
.PHONY: conformance
conformance: install-dev ## run the upstream suite of TUF clients on the agent; SUITE=its checkout
	@if [ ! -d "$(SUITE)/tuf_conformance" ]; then echo "SUITE=/path/to/a/checkout/of/tuf-conformance is missing" >&2; exit 64; fi
	@command -v faketime >/dev/null || { echo "faketime is missing; on Debian and Ubuntu: apt-get install faketime" >&2; exit 69; }
	@here=$$PWD; cd "$(SUITE)"; PATH="$$here/$(BIN):$$PATH" PYTHONPATH="$$here" "$$here/$(BIN)/pytest" -q -p no:asyncio \
		-p no:cacheprovider tuf_conformance --entrypoint "$$here/$(BIN)/python $$here/tests/conformance/client.py" $(ARGS)

.PHONY: bench
bench: install-dev ## measure everything and compare with the targets (minutes)
	@$(BIN)/python -m benchmarks $(ARGS)

.PHONY: bench-quick
bench-quick: install-dev ## the same in seconds, noisier
	@$(BIN)/python -m benchmarks --quick $(ARGS)

.PHONY: bench-peers
bench-peers: $(PEERS)/envoy/.peer $(PEERS)/mlserver/.peer $(PEERS)/triton/.peer ## install Envoy, MLServer and Triton's core, to be measured beside us

.PHONY: compat
compat: install-dev bench-peers ## run the protocol's conformance suite on three servers; writes docs/compat.md
	@$(BIN)/python -m tests.compat --all --write docs/compat.md $(ARGS)

.PHONY: crash
crash: install-dev ## cut the power at every step of a real agent (minutes; ARGS=--quick: one minute)
	@$(BIN)/python -m benchmarks crash $(ARGS)

.PHONY: chaos
chaos: install-dev ## kill nodes and brokers, cut links, judge every request over MQTT (minutes; ARGS=--quick: half a minute)
	@$(BIN)/python -m benchmarks chaos $(ARGS)

.PHONY: fuzz
fuzz: install-dev ## send a million mutated connections to both transports (minutes; ARGS=--quick: half a minute)
	@$(BIN)/python -m benchmarks fuzz $(ARGS)

.PHONY: models
models: install-dev ## fetch the example's detectors from their packages and check what they see
	$(BIN)/python examples/ar/check.py

.PHONY: clean
clean: ## remove environments and everything generated
	rm -rf $(VENV) $(STUBS_VENV) $(S3_VENV) $(GMQTT) $(NODE_CLIENT) $(NODE_DEVICE) $(MOBILE) $(PEERS) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
