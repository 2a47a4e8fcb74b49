# Two commands matter: `make demo` and `make test`. Each sets everything up first, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-oldest soak load setup lab explorers docs export outputs bench bench-all study

demo: $(READY)
	@$(BIN)/bgrpo demo

# One thread a process: two workers with two threads each would wait for one another most of the time. Values in pages and
# tests are those of a CPU, so only the tests marked `cuda` see a device. Tests wait for processes that they start: three
# workers keep two cores busy
test: export OMP_NUM_THREADS := 1
test: $(READY)
	@$(BIN)/python nbs/_build/lint.py
	@$(BIN)/python nbs/_build/sync.py --check
	@temp=$$(mktemp -d) && trap 'rm -rf "$$temp"' EXIT && CUDA_VISIBLE_DEVICES= TMPDIR=$$temp $(BIN)/nbdev-test --n-workers 2 --timing
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
	@! command -v nvidia-smi > /dev/null || $(BIN)/python -m pytest -m cuda

# The fast tests of algebra, search, policy, learn and solve under the lowest versions that settings.ini declares, in an
# environment of their own; `make test-oldest LOWEST=constraints.txt PYTHON=python3.13` runs them under another Python
LOWEST ?= $(OLDEST)/lowest.txt
OLDEST := .venv-oldest
CORE := polynomial data generation model trl_batching trainer resume rewards_and_filter evaluation
test-oldest: export OMP_NUM_THREADS := 1
test-oldest:
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(PYTHON) tests/lowest_versions.py > $(OLDEST)/lowest.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST) -e ".[study,plots,widgets,wandb,lora]"
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check pytest pytest-timeout pytest-xdist hypothesis
	@$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(CORE:%=tests/test_%.py)

# An hour of hostile texts, kills, full disks and foreign folders; the report is runs/soak/report.json
soak: export OMP_NUM_THREADS := 1
soak: $(READY)
	@$(BIN)/python tests/soak.py

# A million problems, 27,000 evaluated and 200 trials under kills: time and memory; the report is runs/load/report.json
load: export OMP_NUM_THREADS := 1
load: $(READY)
	@$(BIN)/python tests/load.py

setup: $(READY)

# The kernel `python3` is the one of .venv, whatever other kernels there are
lab: $(READY)
	@JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab nbs

# The explorers, each a page of its own in the browser
explorers: $(READY)
	@JUPYTER_PREFER_ENV_PATH=1 $(BIN)/voila nbs/_explorers

# The site, in _docs; `.venv/bin/python -m http.server -d _docs` shows it. Where Quarto is installed, `nbdev-docs` builds the same pages
docs: $(READY)
	@$(BIN)/python nbs/_build/build_site.py

# Notebooks -> library, cleaned notebooks, README
export: $(READY)
	@$(BIN)/python nbs/_build/sync.py

# Every notebook runs and keeps its new outputs: after a change of defaults, of a message, of a bundled policy
outputs: export OMP_NUM_THREADS := 1
outputs: $(READY)
	@CUDA_VISIBLE_DEVICES= $(BIN)/python nbs/_build/outputs.py
	@$(BIN)/python nbs/_build/sync.py

# Searches, gradients and steps against their rivals, on the GPU if there is one; `make bench ARGS=--quick` in 90 seconds
bench: $(READY)
	@$(BIN)/python benchmarks/bench_device.py $(ARGS)

# Every benchmark, one after the other, on a machine that does nothing else
bench-all: $(READY)
	@set -e; for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench; done

# BGRPO against GRPO at the size of `tiny`: problems, eight sweeps, one analysis, and what the tutorial loads
study: export OMP_NUM_THREADS := 1
study: $(READY)
	@mkdir -p runs/study
	@test -f runs/study/held_out.txt || $(BIN)/bgrpo generate runs/study/held_out.txt --n 150 --degrees 3_2 --canonical --seed 30000
	@test -f runs/study/pool.txt || $(BIN)/bgrpo generate runs/study/pool.txt --n 1200 --degrees 3_2 --canonical --seed 40000
	@test -f runs/study/hard.txt || $(BIN)/bgrpo filter --model tiny --problems runs/study/pool.txt --out runs/study/hard.txt
	@for part in rollout rank lists credit forms original longer rates; do $(BIN)/bgrpo sweep configs/sweeps/study_$$part.yaml --workers 2 --output_dir runs/study/$$part $$(test -d runs/study/$$part && echo --resume); done
	@$(BIN)/bgrpo analyze $(patsubst %,runs/study/%,rollout rank lists credit forms original longer rates) --out runs/study/analysis
	@$(BIN)/python nbs/experiments/study/record.py

$(READY): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (once, a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@
