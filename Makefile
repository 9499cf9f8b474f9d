# kvmd: `make help` names the targets.
.DEFAULT_GOAL = help

PREFIX  = /usr
SBINDIR = $(PREFIX)/sbin
DATADIR = $(PREFIX)/share/ganeti-kvmd
MANDIR  = $(PREFIX)/share/man
UNITDIR = $(PREFIX)/lib/systemd/system
DESTDIR =

PYTHON = python3
VENV   = .venv
# Seconds that one long test of `make soak` runs.
SOAK_SECONDS = 60

# One download that fails is no failure.
APT = apt-get -o Acquire::Retries=3

# $(call install-packages,COMMAND that needs them,PACKAGES)
install-packages = command -v $(1) >/dev/null || \
	{ $(APT) update -qq && $(APT) install -qq -y --no-install-recommends $(2); }

need-debootstrap:
	@$(call install-packages,debootstrap,debootstrap)
.PHONY: need-debootstrap

ifdef SUITE
# With SUITE=trixie, say, a target is made in a Debian of that release, with the
# other variables as they are given; `in-suite` makes TARGET there.
TARGET = $@
MAKECMDGOALS ?= $(.DEFAULT_GOAL)
.PHONY: $(MAKECMDGOALS)
$(MAKECMDGOALS): need-debootstrap
	test/world/enter $(SUITE) \
		make $(filter-out SUITE=% TARGET=%,$(MAKEOVERRIDES)) $(TARGET)
else

help: ## name the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo 'with SUITE=NAME, a target is made in a Debian of that release'

demo: need-python need-qemu ## shut down real guests in every way, show each verdict
	$(PYTHON) test/demo.py

check: need-qemu need-tests ## run all tests, on the oldest and newest Python too
	test/check-pythons $(VENV)

soak: need-qemu need-tests ## run the long tests (SOAK_SECONDS each, default 60)
	KVMD_SOAK_SECONDS=$(SOAK_SECONDS) test/check-pythons $(VENV) -m soak --timeout=0

lint: need-venv ## let ruff and mypy read the code
	.ci/lint $(VENV)-lint

MODULES = kvmd.py kvmd_*.py

install: ## install below DESTDIR, with PREFIX (default /usr)
	install -d $(DESTDIR)$(SBINDIR) $(DESTDIR)$(DATADIR) $(DESTDIR)$(MANDIR)/man8 \
		$(DESTDIR)$(UNITDIR)/ganeti-kvmd.service.d
	install -m 644 $(MODULES) $(DESTDIR)$(DATADIR)
	install -m 644 man/ganeti-kvmd.8 $(DESTDIR)$(MANDIR)/man8
	install -m 644 ganeti-kvmd.service.d/50-kvmd.conf \
		$(DESTDIR)$(UNITDIR)/ganeti-kvmd.service.d
	rm -f $(DESTDIR)$(SBINDIR)/ganeti-kvmd # Ganeti's, a symlink, is not to be followed
	sed 's|@DATADIR@|$(DATADIR)|' ganeti-kvmd.in >$(DESTDIR)$(SBINDIR)/ganeti-kvmd
	chmod 755 $(DESTDIR)$(SBINDIR)/ganeti-kvmd

# Of these files the package is made, in a copy: nothing else gets into it.
PACKAGE_FILES = .ci LICENSE Makefile README.md debian ganeti-kvmd.in \
	ganeti-kvmd.service.d man test $(MODULES)
deb: need-packaging ## build the Debian package into dist/
	rm -rf dist && mkdir -p dist/build/kvmd
	tar -c --exclude=__pycache__ --exclude=result.json $(PACKAGE_FILES) | \
		tar -x -C dist/build/kvmd
	cd dist/build/kvmd && dpkg-buildpackage --unsigned-source --unsigned-changes
	mv dist/build/*.* dist && rm -r dist/build

lint-deb: deb ## let lintian look at the package, and systemd at the unit with it
	@$(call install-packages,lintian,lintian)
	@$(call install-packages,systemd-analyze,systemd)
	test/package/lint
	test/package/ganeti-with-units
	test/package/rate-unit

check-package: lint-deb ## install the package beside Ganeti's, in namespaces (as root)
	test/package/reproducible
	test/ganeti/throwaway $(PYTHON) /checkout/test/package/check.py

# The releases on which the build has to be the same as here, byte for byte.
RELEASES = bookworm trixie sid
check-releases: deb need-debootstrap ## build the package on other releases too, and compare
	set -e; for suite in $(RELEASES); do \
		test/world/enter $$suite test/package/reproducible; \
	done

need-packaging:
	@$(call install-packages,dpkg-buildpackage,dpkg-dev)
	@dpkg-checkbuilddeps 2>/dev/null || { $(APT) update -qq && \
	$(APT) build-dep -qq -y --no-install-recommends ./; }
.PHONY: install deb lint-deb check-package check-releases need-packaging

check-ganeti: deb ## try the package on a real Ganeti node, in namespaces (as root)
	test/ganeti/throwaway $(PYTHON) /checkout/test/ganeti/check.py
check-upgrade: deb need-debootstrap ## upgrade a node of Debian 12 to 13 (as root)
	test/world/enter bookworm test/ganeti/upgrade trixie
.PHONY: check-ganeti check-upgrade

# The release whose systemd is booted.
SYSTEMD = trixie
check-systemd: deb need-debootstrap ## try the package under a real systemd, in namespaces (as root)
	test/package/ganeti-with-units
	test/boot/boot $(SYSTEMD) python3 test/boot/check.py
.PHONY: check-systemd

# Options of the benchmark: make bench BENCH="--only verdict --repetitions 5"
BENCH =
bench: need-bench ## measure beside Ganeti's own daemon and a floor in C (as root)
	$(PYTHON) test/bench/bench.py $(BENCH)

# Ganeti's own daemon is not installed, but what its package depends on is.
need-bench:
	@$(APT) update -qq
	@$(APT) install -qq -y --no-install-recommends gcc libc6-dev python3 \
	$$(apt-cache depends $$(test/bench/ganeti-package) | \
	sed -n 's/^  Depends: \([^<]*\)$$/\1/p')
.PHONY: bench need-bench

need-python:
	@$(call install-packages,$(PYTHON),python3)

need-qemu:
	@$(call install-packages,qemu-system-x86_64,qemu-system-x86)

need-venv:
	@python3 -c "import ensurepip" 2>/dev/null || { $(APT) update -qq && \
	$(APT) install -qq -y --no-install-recommends python3 python3-venv; }

# Debian's pytest for Debian's Python, unless it can have a virtual environment.
need-tests:
	@python3 -c "import ensurepip" 2>/dev/null || \
	python3 -c "import pytest, pytest_timeout" 2>/dev/null || \
	{ $(APT) update -qq && $(APT) install -qq -y --no-install-recommends \
	python3 python3-pytest python3-pytest-timeout; }
	@$(call install-packages,mandoc,mandoc)
	@$(call install-packages,man,man-db)
	@$(call install-packages,strace,strace)

clean: ## remove what the other targets made
	rm -rf $(VENV)* .worlds dist .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help demo check soak lint need-python need-qemu need-tests need-venv clean
endif
