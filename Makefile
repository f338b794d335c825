# Every target sets up its own .venv first; nothing is installed elsewhere.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fast lint soak chaos bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# From the docstrings of the installed packages to a small chat model: no network, no GPU.
demo: .venv/installed
	$(BIN)/python -m jobs.data build --corpus docstrings
	$(BIN)/python -m jobs.tokenizer train --config jobs/demo_tokenizer.yaml
	$(BIN)/python -m jobs.pretrain --config jobs/demo_pretrain.yaml
	$(BIN)/python -m jobs.sft --config jobs/demo_sft.yaml
	$(BIN)/python -m jobs.eval chat --config jobs/demo_eval.yaml
	$(BIN)/python -m jobs.rl --config jobs/demo_rl.yaml

test: lint
	$(BIN)/python -m pytest

fast: .venv/installed
	$(BIN)/python -m pytest -m 'not slow and not soak'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: .venv/installed
	$(BIN)/python -m pytest -m soak --timeout 3600

# Twenty runs of the whole pipeline on a local cluster, in each stage of which something is killed.
chaos: .venv/installed
	$(BIN)/python cluster/chaos.py --runs 20 --seed 0

# NANOCHAT=DIR, a checkout of the peer, adds the comparisons with it; BUNDLE=DIR, the folder of the
# CORE eval bundle, the one on CORE. (bench/sft.py --data DIR measures on real conversations, too;
# bench/gpu.py, by itself, what a GPU makes of training steps and the engine.)
bench: .venv/installed
	for name in loss_memory startup ray_overhead demo sft rollouts rl_learning serve step_time; do $(BIN)/python bench/$$name.py || exit 1; done
ifdef NANOCHAT
	for name in packing train_step engine; do $(BIN)/python bench/$$name.py --nanochat $(NANOCHAT) || exit 1; done
# CORE is compared with the peer's, too.
ifdef BUNDLE
	$(BIN)/python bench/core.py --nanochat $(NANOCHAT) --bundle $(BUNDLE)
endif
endif

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
