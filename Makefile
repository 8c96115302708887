# Every target sets itself up: it needs Python 3.11 or newer, git and a compiler, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
LOCKS := $(patsubst %,locks/%.txt,base demo ray dev)
LOCKED := --no-compile --require-hashes --no-deps --no-build-isolation --use-pep517
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo federation bench results bench-rounds test test-endurance coverage mutants golden check docs sbom release install lock clean
help:
	@echo "make demo   install, then tune a BERT over eight sites under differential privacy (about 6 minutes after installation)"
	@echo "make federation  install, then a coordinator and three sites as processes of their own, over gRPC and TLS"
	@echo "make bench  step, epoch, simulation, wire and aggregation beside their peers, about 40 minutes; ARGS='step' runs one"
	@echo "make results  the README's accuracy tables, three seeds of every scenario, hours; ARGS='digits' measures one row"
	@echo "make bench-rounds  what a round costs beyond training, with a coordinator and three sites as processes"
	@echo "make test   install, then all checks and tests"
	@echo "make coverage  the same tests, and which lines of the product none of them reaches; ARGS='tests/client' runs some"
	@echo "make test-endurance  sites and coordinators killed, cut off and out of disk space, for half an hour and more"
	@echo "make mutants  plant faults in the privacy code one by one and list those that no test notices; ARGS='persons ledger' for some modules"
	@echo "make golden BASE=COMMIT  record what that commit and this working tree do, and list what differs; ARGS='--cases demo' for some"
	@echo "make check  formatter, linter, types, import rule, without tests"
	@echo "make docs   the documents as a web site in site/, with a reference of the code; loads nothing from elsewhere"
	@echo "make sbom   what the images install, as CycloneDX JSON in build/sbom/, from the locks; needs no installation"
	@echo "make release  a version's commit: VERSION=1.2.3; CONTRIBUTING.md says what comes before and after"
	@echo "make lock   after a change of dependencies: constraints.txt and locks/ anew; ARGS=--upgrade for the newest versions"
	@echo "make clean  remove the virtual environment"

# Everything comes with its hash and without asking an index what else there is, but for torch, whose build the machine chooses.
# Bytecode is made at the end, on all cores; pip would use one. What cannot be compiled is code for other Pythons.
# torch is pinned (a looser request pulls gigabytes of CUDA on machines without a GPU) and finds what it needs installed already.
$(BIN)/.installed: pyproject.toml constraints.txt locks/build.txt $(LOCKS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(LOCKED) -r locks/build.txt
	$(BIN)/python -m pip install --quiet $(LOCKED) $(addprefix -r ,$(LOCKS))
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

install: $(BIN)/.installed

demo: $(BIN)/.installed
	$(BIN)/silotune demo

federation: $(BIN)/.installed
	$(BIN)/silotune federation

bench: $(BIN)/.installed
	$(BIN)/python -m benchmarks $(ARGS)

results: $(BIN)/.installed
	$(BIN)/python -m benchmarks.results $(ARGS)

bench-rounds: $(BIN)/.installed
	$(BIN)/python -m benchmarks.round_overhead

check: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three processes, also on two cores: many of the tests wait for networks, clocks and other processes. The slowest are named at the end.
# Files come in the order of tests/conftest.py; by number of tests, as would be usual, those of a few long ones would come last.
PYTEST := $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "not endurance" --durations=25
# The checks run beside them, for they too have one core at a time.
test: $(BIN)/.installed
	@sh tools/tests_beside_checks.sh $(PYTEST)

# A figure to look at, not one to reach: `make mutants` says whether tests notice a fault. ARGS='tests/client' for some tests.
coverage: $(BIN)/.installed
	$(PYTEST) --cov --cov-report=term-missing:skip-covered $(ARGS)

test-endurance: $(BIN)/.installed
	$(BIN)/python -m pytest -v -m endurance tests

# Not part of `make test`. What was found before is kept in .mutation/ and repeated only where module or tests changed.
mutants: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(ARGS)

# Randomness and clocks are replaced, so two checkouts that behave the same leave the same bytes; see tests/golden.
golden: $(BIN)/.installed
	$(BIN)/python -m tests.golden against $(BASE) $(ARGS)

$(BIN)/.docs: $(BIN)/.installed locks/docs.txt
	$(BIN)/python -m pip install --quiet $(LOCKED) -r locks/docs.txt
	@touch $@

# The pages lie in one tree as they do here, so that their links hold in both places.
docs: $(BIN)/.docs
	rm -rf build/pages && mkdir -p build/pages
	tar -cf - README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CODE_OF_CONDUCT.md docker/README.md charts/README.md docs | tar -xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

# The tool has an environment of its own: it is no part of what it lists.
SBOM := build/sbom-tool
$(SBOM)/.installed: locks/sbom.txt
	$(PYTHON) -m venv $(SBOM)
	$(SBOM)/bin/python -m pip install --quiet $(LOCKED) -r locks/sbom.txt
	@touch $@

sbom: $(SBOM)/.installed
	$(SBOM)/bin/python tools/sbom.py build/sbom/silotune.cdx.json

release: $(BIN)/.installed
	$(BIN)/python tools/release.py $(VERSION)

# After a change of pyproject.toml; ARGS=--upgrade takes the newest versions. What is missing here is installed by the next target.
lock:
	@test -x $(BIN)/uv || $(MAKE) install
	$(BIN)/python tools/lock.py $(ARGS)

clean:
	rm -rf $(VENV)
