# Every target needs nothing done before it: it makes .venv if it has to; only gpu takes PYTHON as it is.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test test-fast proofs faults durations image image-test gpu bench lint schema clean
.DELETE_ON_ERROR:

# What a run needs; `make test` and `make lint` add their own tools.
install: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	# torch first: the others then accept the build that is there (on a CPU-only machine add --index-url of your CPU wheels)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/tools: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

quickstart: install
	$(BIN)/python data_scripts/pig_latin.py --output data/pig_latin
	$(BIN)/python train.py --config configs/quickstart_pretrain.yaml
	$(BIN)/python train.py --config configs/quickstart.yaml
	@echo
	$(BIN)/python -m finetune evaluate --base runs/quickstart_base/model --tuned runs/quickstart/model \
	  --data data/pig_latin/test.jsonl --max-new-tokens 80
	@echo
	@echo "The tuned model is in runs/quickstart/model. Chat with it:"
	@echo "  $(BIN)/python -m finetune chat --model runs/quickstart/model --one-turn"

# Under 6 minutes on two idle cores; what it leaves to the long forms below is named at its end.
test: .venv/tools
	$(BIN)/python -m pytest tests -n auto --dist worksteal

test-fast: .venv/tools
	$(BIN)/python -m pytest tests -n auto --dist worksteal -m "not slow"

# Wide sweeps: every recipe, method, optimizer, topology with a real compiler, forecasts against runs.
proofs: .venv/tools
	$(BIN)/python -m pytest tests -n auto --dist worksteal -m proof

# 201 kills, every signal, cloud, damage and move to another topology.
faults: .venv/tools
	FINETUNE_KILLS=201 $(BIN)/python -m pytest tests/faults tests/distributed -n 2 -s -m ""

# Records what each file of tests costs, in tests/durations.json.
durations: .venv/tools
	$(BIN)/python -m pytest tests -n 2 --dist worksteal --record-durations

# For NVIDIA GPUs; docs/containers.md has SUFFIX and ARGS for a CPU and for FlashAttention. BUILDER="buildah build" or "podman build" will do, too.
BUILDER ?= docker build
image:
	version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) && \
	$(BUILDER) --file docker/Dockerfile --tag finetune:$$version$(SUFFIX) --build-arg VERSION=$$version \
	  --build-arg REVISION=$$(git describe --always --dirty --abbrev=40 --exclude='*') \
	  --build-arg SOURCE=$$(git config --get remote.origin.url || true) $(ARGS) .

# Builds one for a CPU and runs it; as root, with Debian's buildah, runc and mmdebstrap.
image-test: .venv/tools
	$(BIN)/python -m pytest tests/test_image.py tests/test_container.py -s -m ""

# What only a GPU shows, each part in under five minutes, without a network: PART=correctness, memory or speed (all, if none is
# given), with what PYTHON has installed. ONLY=regex, MINUTES=9, OUT=folder; CPU=1 rehearses on tiny models without a GPU.
gpu:
	$(PYTHON) benchmarks/gpu.py $(PART) $(if $(ONLY),--only '$(ONLY)') $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(OUT),--out '$(OUT)') $(if $(CPU),--cpu)

# Side by side with TRL, about half an hour, and a picture; ROWS=my.jsonl for your own. LITGPT=its/bin/python: with LitGPT, too.
bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python benchmarks/peers.py --plot peers.png $(if $(ROWS),--rows $(ROWS)) $(if $(LITGPT),--litgpt $(LITGPT))

lint: .venv/tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

schema: install
	$(BIN)/python -m finetune schema > configs/schema.json

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
