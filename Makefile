# TensorRT-LLM serving. `make` lists the targets.
MAKEFLAGS     += --no-builtin-rules --warn-undefined-variables
SHELL         := bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

# What a user may give, on the command line or in the environment. Each is taken by its raw value,
# so that make expands nothing in it, and reaches the recipes through the environment, so that the
# shell does not either: MODEL='it'\''s a "test"; $(x)' arrives as it is. A variable that is not
# given is not passed on: its default is the script's, below .env.
GIVEN := IMAGE MODEL TP PORT WORKSPACE CONTAINER_MOUNT RUNTIME READY_TIMEOUT GPUS PRIVILEGED
GIVEN += MPI NODELIST TRTLLM_VERSION FILE COMPRESS BENCH_TYPE BENCH_IMAGE RESULTS BEFORE AFTER
GIVEN += CONFIGS GOODPUT
GIVEN += REPLICA PREFILL DECODE PREFILL_CONFIG DECODE_CONFIG
GIVEN += HOST RESTART REPLICAS LOAD_AT_ONCE PROBE_SECONDS PROBE_TIMEOUT ENGINE FOLDER CLUSTER HOURS LOG JOB
# Shells that export HOST mean their own machine: only HOST=... on make's command line counts.
ifneq ($(origin HOST),command line)
HOST :=
endif
# An exported PORT is the launcher's default, too: only `make test PORT=...` names a server by it.
SERVER_PORT := $(if $(filter command,$(origin PORT)),$(if $(value PORT),--port "$$PORT"))
# An exported JOB is anybody's. An empty one is a slip, which has to stop nothing.
STOP_JOB := $(if $(filter command,$(origin JOB)),="$$JOB")
# An exported IMAGE is the server's; `make bench IMAGE=...` asks for NVIDIA's client in it.
ifeq ($(origin IMAGE),command line)
BENCH_IMAGE := $(value IMAGE)
endif
define take
ifneq ($$(value $(1)),)
override $(1) := $$(value $(1))
export $(1)
endif
endef
$(foreach name,$(GIVEN),$(eval $(call take,$(name))))

# make adds `*** Error 130` below a server that was stopped by ^C, and `*** Error 1` below an answer
# that has said all, unless the recipe ends well. Programs call the scripts, whose exit codes tell.
OR_STOPPED := || [ $$? = 130 ]
OR_SAID    := || [ $$? = 1 ]
OR_EITHER  := || [[ $$? = 1 || $$? = 130 ]]

# $(call flag,NAME,--flag): the flag with the shell's "$NAME", where NAME was given.
flag = $(if $(value $(1)),$(2) "$$$(1)")
POOLS = $(call flag,PREFILL,--prefill) $(call flag,DECODE,--decode) $(call flag,PREFILL_CONFIG,--prefill-config) $(call flag,DECODE_CONFIG,--decode-config)
# The values that the shell splits into words: more arguments for the engine and for bench.py; and
# CONFIGS and GOODPUT of `make tune`.
EXTRA_ARGS ?=
BENCH_ARGS ?=

SAVED := tensorrt-llm-serve-latest.tar

##@ Image
.PHONY: docker
docker: ## Build the image from the Dockerfile (IMAGE= TRTLLM_VERSION=)
	DOCKER_BUILDKIT=1 docker build --tag "$${IMAGE:-tensorrt-llm-serve:latest}" $(if $(value TRTLLM_VERSION),--build-arg TRTLLM_VERSION) .

.PHONY: save
save: $(READY) ## Save the image as a tarball for the nodes (IMAGE= FILE= COMPRESS=gz|zst|none)
	$(PY) save_image.py $(call flag,FILE,--output) $(call flag,COMPRESS,--compress)

.PHONY: load
load: $(READY) ## Load a tarball into this machine's Docker (FILE=; default: the newest one from `make save`)
	newest=$$(ls -t $(SAVED){.gz,.zst,} 2>/dev/null | head -n 1 || :); $(PY) save_image.py --load "$${FILE:-$${newest:-$(SAVED).gz}}"

.PHONY: image-check
image-check: ## Show what the image contains: engine, MPI, NCCL, EFA, GDRCopy (IMAGE=)
	docker run --rm --pull=never --volume "$$PWD/launch/engines/trtllm_image_check.py:/image_check.py:ro" \
	    "$${IMAGE:-tensorrt-llm-serve:latest}" python3 /image_check.py

.PHONY: sqsh
sqsh: $(READY) ## Save the image for pyxis and enroot (IMAGE= FILE=)
	$(PY) save_image.py --compress sqsh $(call flag,FILE,--output)

##@ Serve
.PHONY: serve
serve: $(READY) ## Serve a model here, or in this Slurm allocation (MODEL= TP= ENGINE= HOST= PORT= IMAGE= REPLICAS= PREFILL= DECODE= EXTRA_ARGS=)
	$(PY) run_sbatch.py $(call flag,MODEL,) $(call flag,HOST,--host) $(POOLS) $(EXTRA_ARGS) $(OR_STOPPED)

.PHONY: stop
stop: $(READY) ## Stop what was started from this workspace, or only one job (JOB=)
	$(PY) run_sbatch.py --stop$(STOP_JOB)

.PHONY: status
status: $(READY) ## Show what runs from this workspace
	@$(PY) run_sbatch.py --status $(OR_SAID)

.PHONY: logs
logs: $(READY) ## Follow the newest server log, or a replica's (REPLICA=r2)
	@$(PY) run_sbatch.py --logs $(call flag,REPLICA,) $(OR_STOPPED)

.PHONY: why
why: $(READY) ## Say why the newest server ended, or the one that wrote LOG (LOG=)
	@$(PY) run_sbatch.py --why $(call flag,LOG,)

.PHONY: test
test: $(READY) ## Check a server's API (HOST= PORT= MODEL=)
	@$(PY) test.py $(call flag,HOST,--host) $(SERVER_PORT) $(call flag,MODEL,--model) $(OR_SAID)

.PHONY: demo
demo: $(READY) ## See it work: serve, check, measure with a simulated engine; no GPU, no Docker, no cluster
	$(PY) simulator/demo.py

##@ Measure
.PHONY: bench
bench: $(READY) ## Benchmark a server (HOST= PORT= BENCH_TYPE=throughput,prefill IMAGE= BENCH_ARGS=)
	$(PY) bench.py $(call flag,HOST,--host) $(SERVER_PORT) $(call flag,MODEL,--model) $(call flag,BENCH_TYPE,--type) $(call flag,BENCH_IMAGE,--image) $(BENCH_ARGS)

.PHONY: report
report: $(READY) ## Write the report of a result folder again (RESULTS=)
	$(PY) -m report "$${RESULTS:?RESULTS= names the folder}"

.PHONY: compare
compare: $(READY) ## Compare result folders, each with the first (BEFORE= AFTER=folder,folder...)
	IFS=, read -ra after <<<"$${AFTER:?BEFORE= and AFTER= name the folders}"; $(PY) -m report compare "$${BEFORE:?BEFORE= names the first folder}" "$${after[@]}"

.PHONY: tune
tune: $(READY) ## Find the best configuration for a model (MODEL= TP=1,2,4,8 REPLICAS=1,auto CONFIGS='a.yaml b.yaml' GOODPUT='ttft:500 tpot:30' EXTRA_ARGS=)
	$(PY) tune.py $(call flag,MODEL,) $(call flag,TP,--tp) $(call flag,REPLICAS,--replicas) $(if $(value CONFIGS),--config $$CONFIGS) $(if $(value GOODPUT),--goodput $$GOODPUT) $(EXTRA_ARGS) $(OR_EITHER)

.PHONY: static-bench
static-bench: $(READY) ## Benchmark the engine alone, without a server, with trtllm-bench (MODEL= TP= IMAGE=)
	$(PY) -m load.static_bench $(call flag,MODEL,--model) $(call flag,TP,--tp) $(call flag,BENCH_IMAGE,--image) $(BENCH_ARGS)

##@ Develop
.PHONY: setup
setup: $(READY) ## Make .venv (targets that need it do this by themselves)

.PHONY: causes
causes: $(READY) ## Write the known causes of death into docs/troubleshooting.md
	$(PY) -m launch.cause_table docs/troubleshooting.md

.PHONY: check
check: $(READY) ## Run lint, types and all tests; as root also those on a real Slurm and Docker cluster
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@$(VENV)/bin/hadolint Dockerfile
	@# A node's Python is older. The types are checked beside the tests, which take far longer.
	@{ $(VENV)/bin/mypy --no-error-summary; $(VENV)/bin/mypy --no-error-summary --python-version 3.9 launch/node; } & \
	    $(PY) -m pytest --numprocesses=auto --dist=loadgroup || failed=$$?; wait $$! && exit $${failed:-0}

.PHONY: cluster
cluster: $(READY) ## Open a shell on the login node of a real two-node test cluster (as root)
	$(PY) -m tests.cluster.cluster

.PHONY: faults
faults: $(READY) ## Play every fault in every phase of a launch; print the tables of docs/faults.md (as root; FAULTS=scancel,dockerd RUNTIME=pyxis)
	@$(PY) -m tests.cluster.$(if $(filter pyxis,$(value RUNTIME)),pyxis_)faults

.PHONY: bench-launch
bench-launch: $(READY) ## Measure the launcher on the test cluster, for docs/figures.md (as root)
	$(PY) -m tests.cluster.bench_launch

.PHONY: bench-client
bench-client: $(READY) ## Measure how exact the benchmark client is, against a server that answers by the clock
	$(PY) tests/bench_client.py

.PHONY: bench-peers
bench-peers: $(READY) ## Measure the clients of vLLM or SGLang in the same way (ENGINE=vllm,vllm-rs,sglang FOLDER=)
	$(PY) -m tests.engines.peers $(call flag,ENGINE,--engine) $(call flag,FOLDER,--folder)

.PHONY: bench-nodes
bench-nodes: $(READY) ## Measure how a launch grows from 2 to 16 nodes (as root)
	$(PY) -m tests.cluster.bench_nodes

.PHONY: bench-fleet
bench-fleet: $(READY) ## Measure a fleet: what its front adds, what a death costs, how it grows (as root)
	$(PY) -m tests.cluster.bench_fleet

.PHONY: pictures
pictures: $(READY) ## Take the README's pictures again (as root)
	$(PY) -m tests.cluster.pictures

.PHONY: check-engines
check-engines: $(READY) ## Run test.py and bench.py against a real vLLM or SGLang on the CPU (ENGINE=vllm,sglang FOLDER= CLUSTER=1)
	$(PY) -m tests.engines.check $(call flag,ENGINE,--engine) $(call flag,FOLDER,--folder) $(if $(value CLUSTER),--cluster)

.PHONY: soak
soak: $(READY) ## Load the test cluster for hours: what grows, fails or stays behind? (as root; HOURS=)
	$(PY) -m tests.cluster.soak $(call flag,HOURS,--hours)

.PHONY: clean
clean: ## Remove .venv and caches; logs, results, data sets and images stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { echo "no venv: apt-get install python3-venv (or your system's package)" >&2; exit 1; }
	@$(PY) -m pip install -qq --disable-pip-version-check --no-compile '.[dev]' || { echo "packages are missing: pip needs its index (behind a proxy: HTTPS_PROXY; a mirror: PIP_INDEX_URL)" >&2; exit 1; }
	@$(PY) -m compileall -qq -j 0 $(VENV)/lib || true  # pip would do it on one core
	@touch $@  # last, so that an interrupted install is made again

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	    /^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
