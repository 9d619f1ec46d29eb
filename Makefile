# `make run` and `make test` do their own set-up; see README.md.
VENV ?= .venv
BIN = "$(VENV)/bin"
PY = $(BIN)/python
export FLUX_VENV = $(VENV)
# Exported, because the shell then takes any name as it is, also one with spaces.
export STATE ?= .state
# program=Debian package, for the tests; what is missing is installed when root.
TEST_PACKAGES = redis-server=redis-server cc=build-essential sshd=openssh-server ip=iproute2 openssl=openssl curl=curl zip=zip
# Tests wait for programs of their own as often as they compute: three at a time keep two cores busy. Each
# worker begins with tests that stand together (and share a module's agents) and then takes over others'.
PARALLEL = -n 3 --dist worksteal
GEN = fluxlib/rpc/gen
# Modules mypy sees nothing of elsewhere.
ONLY_ON_WINDOWS = fluxlib/windows $(wildcard fluxlib/agent/executor/win*.py) fluxlib/agent/executor/jobobject.py

.PHONY: run uninstall test check format proto docs lock bench test-vm test-packages test-windows test-faults test-soak fuzz deb clean

run:
	@scripts/setup run
	@exec $(PY) flux.py run --state "$$STATE"

# What `make run` made, also where that is not in this directory.
uninstall:
	@$${PYTHON:-python3} scripts/uninstall "$$STATE" "$$FLUX_VENV"

test:
	@scripts/setup dev $(TEST_PACKAGES)
	@$(PY) -m pytest $(PARALLEL) -m "not vm and not windows and not faults and not soak and not fuzz and not slow" $(ARGS)

check:
	@scripts/setup dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --follow-imports=silent $(ONLY_ON_WINDOWS)
	$(BIN)/lint-imports

format:
	@scripts/setup dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto:
	@scripts/setup dev
	$(PY) -m grpc_tools.protoc -I $(GEN)=protos --python_out=. --pyi_out=. --grpc_python_out=. $(GEN)/flux.proto

# The newest versions that fit pyproject.toml, written with their hashes.
LOCK = uv pip compile -q pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command 'make lock' --upgrade
lock:
	$(LOCK) --extra dev -o requirements/dev.txt
	$(LOCK) -c requirements/dev.txt -o requirements/run.txt
	$(LOCK) --extra cloud -c requirements/dev.txt -o requirements/cloud.txt
	$(LOCK) --extra build -c requirements/dev.txt -o requirements/build.txt

docs:
	@scripts/setup run
	scripts/settings-doc

bench:
	@scripts/setup dev $(TEST_PACKAGES)
	$(PY) -m benchmarks $(ARGS)

test-faults:
	@scripts/setup dev $(TEST_PACKAGES)
	@$(PY) -m pytest $(PARALLEL) -m faults tests $(ARGS)

test-soak:
	@scripts/setup dev $(TEST_PACKAGES)
	@$(PY) -m pytest $(PARALLEL) -m "soak or slow" tests --ignore=tests/packaging $(ARGS)

fuzz:
	@scripts/setup dev $(TEST_PACKAGES)
	@$(PY) -m pytest -n 3 -m fuzz tests $(ARGS)

DEB_PACKAGES = dpkg-buildpackage=dpkg-dev dh=debhelper objdump=binutils python3-config=python3-dev lintian=lintian
VM_PACKAGES = $(DEB_PACKAGES) qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils debootstrap=debootstrap mke2fs=e2fsprogs ssh=openssh-client
test-vm:
	@scripts/setup dev $(TEST_PACKAGES) $(VM_PACKAGES)
	@$(PY) -m pytest -m vm tests/vm $(ARGS)

# What the packages hold: builds them, and takes a few minutes for it.
test-packages:
	@scripts/setup dev $(TEST_PACKAGES) $(DEB_PACKAGES)
	@$(PY) -m pytest -m slow tests/packaging $(ARGS)

# flux and flux-agent for Debian and Ubuntu, into dist/.
deb:
	@scripts/deb

# Windows programs under Wine; flux.exe is built there too (windows/build-wine.sh).
WINDOWS_PACKAGES = wine=wine wineserver=wine64 x86_64-w64-mingw32-gcc=gcc-mingw-w64-x86-64
test-windows:
	@scripts/setup dev $(TEST_PACKAGES) $(WINDOWS_PACKAGES)
	@$(PY) -m pytest -m windows tests/windows $(ARGS)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
