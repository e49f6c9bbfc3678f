# The one entry point. `make` lists the targets.

SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-nested chaos sweep soak fuzz check bench bench-memory bench-deephaven bench-pool bench-hog install clean

PREFIX ?= /usr/local
DESTDIR ?=
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
DH := bin/dh
POWER_CUT := artifacts/power-cut/PowerCut

# qemu, mmdebstrap and what follows are used by `dh`; procps by its tests; gcc and the libraries by its build.
PACKAGES := qemu-system-x86 mmdebstrap e2fsprogs xz-utils zstd uidmap debian-archive-keyring procps gcc libc6-dev zlib1g-dev
# What publishing reads; bin/dh is made again when one of them is newer.
SOURCES := $(shell find src native guest templates \( -name obj -o -name bin \) -prune -o -type f -print 2>/dev/null) \
	Directory.Build.props Directory.Packages.props global.json

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

setup: ## Install the Debian packages that are missing; check the SDK
	@command -v dotnet >/dev/null && dotnet --version >/dev/null || \
		{ echo "make setup: the .NET SDK that global.json asks for is missing: https://dotnet.microsoft.com/download" >&2; exit 1; }
	@missing=$$(for package in $(PACKAGES); do \
		dpkg-query --show --showformat='$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || echo $$package; done); \
	if [ -n "$$missing" ]; then \
		echo "installing" $$missing; \
		$(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; \
	fi

build: $(DH) ## Make bin/dh, with native/, guest/ and templates/ beside it

$(DH): $(SOURCES)
	dotnet publish src/Dh.Cli -c Release -o bin --nologo -v quiet
	@touch $@

# What test/Dh.IntegrationTests/PowerCuts runs in its machine.
$(POWER_CUT): $(SOURCES) $(wildcard test/power-cut/*.* test/Dh.TestSupport/*.cs*) | $(DH)
	dotnet publish test/power-cut -c Release -o $(@D) --nologo -v quiet
	@touch $@

demo: setup build ## Prepare a Python snapshot and run code in it
	$(DH) vm prepare
	$(DH) exec --verbose -c "print('Hello from UFFD!')"
	$(DH) exec -c "1+1"
	$(DH) exec --json -c "1+1"
	$(DH) exec -c "import sys; sys.exit(7)"; test $$? -eq 7
	DH_VM_NO_UFFD=1 $(DH) exec -c "print('same')"
	seq 5 | $(DH) exec -c "import sys; print(sum(map(int, sys.stdin)))"

test: setup build $(POWER_CUT) ## Run all tests; the last lines name those that failed, and count
	@log=$$(mktemp); \
	dotnet test --solution Dh.slnx 2>&1 | tee $$log; code=$$?; \
	grep '^failed ' $$log; \
	awk '/^  succeeded:/{p=$$2}/^  failed:/{f=$$2}/^  skipped:/{s=$$2}END{printf "%d passed, %d failed, %d skipped\n",p,f,s}' $$log; \
	rm -f $$log; exit $$code

test-nested: setup build ## Run dh under KVM, in an emulated machine that has it (minutes; DH_FIRECRACKER=PATH: Firecracker too)
	$(DH) vm prepare
	test/nested/run

chaos: setup build $(POWER_CUT) ## Kill or stop dh, launcher, VMM, daemon; fail the page server; cut the power (CHAOS_RUNS, FAULTS, POWER_CUTS)
	$(DH) vm prepare
	test/chaos/run
	POWER_CUTS=$${POWER_CUTS:-20} dotnet test --project test/Dh.IntegrationTests --output Detailed --filter-class '*.PowerCutTests'
	test/chaos/page-server
	REMOVE_COUNT=1000000 dotnet test --project test/Dh.IntegrationTests --filter-method '*.Pages_that_are_given_back_without_end_cost_no_memory'

sweep: setup build ## Fail each system call of dh, launcher and VMM with each plausible errno (SWEEP_SECONDS: 1800, SWEEP_SEED)
	$(DH) vm prepare
	test/sweep/run

fuzz: setup ## Parse a million hostile inputs of each kind, and ten million frames of a guest (FUZZ_COUNT, FUZZ_SEED)
	@seed=$${FUZZ_SEED:-$$((RANDOM * 32768 + RANDOM))} count=$${FUZZ_COUNT:-1000000}; echo "FUZZ_SEED=$$seed FUZZ_COUNT=$$count"; \
	FUZZ_SEED=$$seed FUZZ_COUNT=$$count dotnet test --project test/Dh.Tests -c Release --output Detailed \
		--filter-class Dh.Tests.Paging.FuzzTests Dh.Tests.Guest.GuestFuzzTests

check: setup ## Formatting, analyzers as errors, AOT without a warning
	dotnet format Dh.slnx --verify-no-changes
	dotnet build Dh.slnx --nologo -v quiet -warnaserror
	dotnet publish src/Dh.Cli -c Release -o bin --nologo -v quiet -warnaserror
	$(DH) --version

bench: setup build ## Measure what SPECIFICATION.md promises; results go to bench/results/
	$(DH) vm prepare
	dotnet build bench/Dh.Benchmarks -c Release --nologo -v quiet
	@failed=0; for benchmark in population exec cage firecracker; do \
		dotnet run --project bench/Dh.Benchmarks -c Release --no-build -- $$benchmark || failed=1; \
	done; exit $$failed

bench-memory: setup build ## Measure how a Python guest's memory comes back
	$(DH) vm prepare
	dotnet build bench/Dh.Benchmarks -c Release --nologo -v quiet
	dotnet run --project bench/Dh.Benchmarks -c Release --no-build -- memory

bench-deephaven: setup build ## Measure a restored Deephaven engine (WHEELHOUSE: a directory of wheels instead of the index)
	$(DH) vm prepare --version $(or $(VERSION),41.1) $(if $(WHEELHOUSE),--wheelhouse $(WHEELHOUSE))
	dotnet build bench/Dh.Benchmarks -c Release --nologo -v quiet
	dotnet run --project bench/Dh.Benchmarks -c Release --no-build -- deephaven

bench-pool: setup build ## Measure runs in sandboxes that a pool has ready
	$(DH) vm prepare
	dotnet build bench/Dh.Benchmarks -c Release --nologo -v quiet
	dotnet run --project bench/Dh.Benchmarks -c Release --no-build -- pool

soak: setup build ## Run thousands of times out of a pool, and see that nothing grows (SOAK_COUNT: 10000)
	$(DH) vm prepare
	dotnet build bench/Dh.Benchmarks -c Release --nologo -v quiet
	dotnet run --project bench/Dh.Benchmarks -c Release --no-build -- soak

bench-hog: setup build ## Measure pooled runs beside one that takes all that it can get (HOG_COUNT: 200)
	$(DH) vm prepare
	dotnet build bench/Dh.Benchmarks -c Release --nologo -v quiet
	dotnet run --project bench/Dh.Benchmarks -c Release --no-build -- hog

install: build ## Install to PREFIX (default /usr/local)
	install -d $(DESTDIR)$(PREFIX)/lib/dh $(DESTDIR)$(PREFIX)/bin
	cp -R bin/. $(DESTDIR)$(PREFIX)/lib/dh/
	ln -sfn ../lib/dh/dh $(DESTDIR)$(PREFIX)/bin/dh

clean: ## Remove what was built; snapshots stay (dh vm clean)
	rm -rf bin artifacts TestResults
	find src test bench samples \( -name obj -o -name bin \) -type d -prune -exec rm -rf {} +
