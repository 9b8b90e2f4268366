# All targets need Python 3.11 to 3.13 and make, nothing else.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
EXTRA ?= $(if $(filter Linux,$(shell uname -s)),cpu)
PROJECT := .$(if $(EXTRA),[$(EXTRA)])
DEMO_PROMPT ?= What is 27 + 35?

.PHONY: demo test test-all lint rewritten dist clean

# The main job with the packaged model: the chat at a terminal, else one streamed answer.
demo: .venv/ready
	@if [ -t 0 ] && [ -t 1 ]; then set -x; .venv/bin/ring-mlx chat; \
	else set -x; .venv/bin/ring-mlx generate --prompt "$(DEMO_PROMPT)"; fi

# Tests start hundreds of processes, which must not compile each module again.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv-test/ready
	@$(MAKE) --no-print-directory -j 2 lint rewritten
	.venv-test/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(if $(SLOW),-m "")

# Those too that are marked as slow: see docs/tests.md.
test-all:
	$(MAKE) test SLOW=1

# Else each worker rewrites the asserts of each file for itself; mypy leaves a core free meanwhile.
rewritten: .venv-test/ready
	@.venv-test/bin/python -m pytest --collect-only -qq >/dev/null || :  # make test says what is wrong

lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

# Wheel and sdist, and each tried in an environment of its own, as .github/workflows/release.yml does.
dist: .venv-test/ready
	rm -rf dist
	.venv-test/bin/python -m build
	.venv-test/bin/python tests/check_dist.py dist $(WAYS)

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 found; install one or set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e "$(PROJECT)"
	@touch $@

.venv-test/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 found; install one or set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	.venv-test/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e "$(PROJECT)" --group dev
	@.venv-test/bin/python -m compileall -qq -j 0 .venv-test/lib || :  # as pip does, but on every core
	@touch $@

clean:
	rm -rf .venv .venv-test dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
