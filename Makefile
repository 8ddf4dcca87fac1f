# Each target makes .venv if it is missing; only gpu uses PYTHON as it is.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart preference reinforcement shy test test-fast proofs faults durations \
  image image-test gpu bench lint schema clean
.DELETE_ON_ERROR:

# Install what a run needs; `make test` and `make lint` add their own tools.
install: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) \
	  and "Install Python 3.11 or newer; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	# torch first: the others then accept the installed build (on a CPU-only machine add
	# --index-url of your CPU wheels)
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	# The command finetune, which runs this checkout from any folder
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv/tools: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

quickstart: install
	$(BIN)/python data_scripts/pig_latin.py --output data/pig_latin
	$(BIN)/python train.py --config configs/quickstart_pretrain.yaml
	$(BIN)/python train.py --config configs/quickstart.yaml
	@echo
	$(BIN)/python -m finetune evaluate runs/quickstart --data data/pig_latin/test.jsonl \
	  --max-new-tokens 80 --scores exact-match word-accuracy
	@echo
	@echo "The tuned model is in runs/quickstart/model. Chat with it:"
	@echo "  $(BIN)/python -m finetune chat runs/quickstart --one-turn"

# A minute each after the quickstart: its model made shy of one rule, which DPO brings back from
# pairs of answers, or GRPO from rewards alone.
preference: shy
	$(BIN)/python train.py --config configs/quickstart_preference.yaml
	@echo
	$(BIN)/python -m finetune evaluate runs/quickstart_preference \
	  --data data/pig_latin_shy/test.jsonl --max-new-tokens 48 --scores exact-match word-accuracy

reinforcement: shy
	$(BIN)/python train.py --config configs/quickstart_reinforcement.yaml
	@echo
	$(BIN)/python -m finetune evaluate runs/quickstart_reinforcement \
	  --data data/pig_latin_shy/test.jsonl --max-new-tokens 48 --scores exact-match word-accuracy

shy: install runs/quickstart/model
	$(BIN)/python data_scripts/pig_latin.py --output data/pig_latin_shy --shy --train 1200 \
	  --held-out 80
	$(BIN)/python train.py --config configs/quickstart_shy.yaml

runs/quickstart/model:
	$(MAKE) quickstart

# Four to six minutes on two idle cores; it ends with a count of what it leaves to the targets below.
test: .venv/tools
	$(BIN)/python -m pytest tests -n auto --dist worksteal

test-fast: .venv/tools
	$(BIN)/python -m pytest tests -n auto --dist worksteal -m "not slow"

# Every recipe, method, optimizer and topology, with a real compiler; forecasts against runs.
proofs: .venv/tools
	$(BIN)/python -m pytest tests -n auto --dist worksteal -m proof

# Hundreds of kills, every signal, cloud, damage and move to another topology.
faults: .venv/tools
	FINETUNE_KILLS=201 $(BIN)/python -m pytest tests/faults tests/distributed -n 2 -s -m ""

# Measure each file of tests, and write tests/durations.json.
durations: .venv/tools
	$(BIN)/python -m pytest tests -n 2 --dist worksteal --record-durations

# For NVIDIA GPUs; docs/containers.md has SUFFIX and ARGS for a CPU and for FlashAttention.
# BUILDER="buildah build" and "podman build" work too.
BUILDER ?= docker build
image:
	version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) && \
	$(BUILDER) --file docker/Dockerfile --tag finetune:$$version$(SUFFIX) \
	  --build-arg VERSION=$$version \
	  --build-arg REVISION=$$(git describe --always --dirty --abbrev=40 --exclude='*') \
	  --build-arg SOURCE=$$(git config --get remote.origin.url || true) $(ARGS) .

# Build the image for a CPU and run it; as root, with Debian's buildah, runc and mmdebstrap.
image-test: .venv/tools
	$(BIN)/python -m pytest tests/test_image.py tests/test_container.py -s -m ""

# Test a GPU with the packages of PYTHON, each part in under five minutes, without a network:
# PART=correctness, objectives, memory or speed (default: all). ONLY=regex, MINUTES=9, OUT=folder.
# CPU=1 runs on tiny models without a GPU.
gpu:
	$(PYTHON) benchmarks/gpu.py $(PART) $(if $(ONLY),--only '$(ONLY)') \
	  $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(OUT),--out '$(OUT)') $(if $(CPU),--cpu)

# Compare with TRL, in about half an hour, and draw it. ROWS=my.jsonl uses your rows,
# LITGPT=its/bin/python adds LitGPT.
bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python benchmarks/peers.py --plot peers.png $(if $(ROWS),--rows $(ROWS)) \
	  $(if $(LITGPT),--litgpt $(LITGPT))

lint: .venv/tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

schema: install
	$(BIN)/python -m finetune schema > configs/schema.json
	$(BIN)/python -m finetune.preparation.request > configs/request.json
	$(BIN)/python -m finetune.evaluation.results_file > configs/results.json
	$(BIN)/python -m finetune.evaluation.suites > configs/suite.json

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
