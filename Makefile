# Kemari for libvirt. `make help` says what there is.
SHELL := /bin/bash
PREFIX ?= /usr
DESTDIR ?=
GO ?= go
LAB := virsh-examples/lab/lab

# The cgo binding loads libvirt when it runs, so building needs no libvirt.
TAGS := libvirt_dlopen
GOFLAGS_COMMON := -trimpath -tags $(TAGS) -ldflags '-s -w'
PURE := bin/virtkemarid bin/kemari-replicator bin/kemari-hook bin/vif-kemari
CGO := bin/kemari bin/kemari-xcsave

bin/virtkemarid_PKG := ./driver/cmd/virtkemarid
bin/kemari_PKG := ./driver/cmd/kemari
bin/kemari-replicator_PKG := ./migrate/cmd/kemari-replicator
bin/kemari-xcsave_PKG := ./migrate/xen/cmd/kemari-xcsave
bin/kemari-hook_PKG := ./hooks/cmd/kemari-hook
bin/vif-kemari_PKG := ./hooks/cmd/vif-kemari

.PHONY: help
help:
	@echo 'make demo     protect a guest between two emulated hosts and cut the first one'"'"'s power'
	@echo 'make test     every test, those in the two-host laboratory included'
	@echo 'make unit     the tests that need no laboratory'
	@echo 'make bench    what migrate/bench/SPEC.md promises, a line each (20 minutes)'
	@echo 'make build    the programs, in bin/'
	@echo 'make install  into $$(DESTDIR)$$(PREFIX)'
	@echo 'make deb      a package for Debian, in bin/'
	@echo 'make lint     go vet, staticcheck, shellcheck'
	@echo 'make clean    remove bin/'

# Says what is missing before anything is tried, and installs what can be.
.PHONY: prepare
prepare:
	@.ci/prepare

.PHONY: demo
demo: prepare
	@$(LAB) up && $(LAB) reset && $(LAB) deploy && $(MAKE) -s bin/count
	@virsh-examples/failover; status=$$?; $(LAB) down; exit $$status

.PHONY: test
test: lint unit lab-test

.PHONY: unit
unit: prepare
	$(GO) test -tags $(TAGS) $$($(GO) list -tags $(TAGS) ./... | grep -v /virsh-examples/lab$$)
	@# What must not need cgo is built without it.
	CGO_ENABLED=0 $(GO) build ./xml/... ./hooks/... ./driver ./driver/rpc/... ./driver/cmd/virtkemarid ./migrate ./migrate/wire ./migrate/page ./migrate/bench/... ./migrate/control ./migrate/output ./migrate/shadow ./migrate/xen ./migrate/cmd/...

.PHONY: lab-test
lab-test: prepare
	@# Says again at the end what has failed, and why.
	$(GO) run gotest.tools/gotestsum@v1.13.0 --format standard-verbose -- -tags $(TAGS) -count=1 -timeout 85m ./virsh-examples/lab

# What needs the laboratory is measured even if something before has missed. For
# 20,000 epochs in a row: KEMARI_BENCH_EPOCHS=20000 make bench
.PHONY: bench
bench: prepare bin/bench-lab
	$(GO) run ./migrate/bench/cmd/bench; status=$$?; bin/bench-lab && exit $$status

.PHONY: lint
lint: prepare
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo 'these files need gofmt' >&2; exit 1; }
	$(GO) vet -tags $(TAGS) ./...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.1 -tags $(TAGS) ./... || exit 1
	shellcheck -x -S error virsh-examples/common.sh virsh-examples/{protect,status,autostart,events,refuse,python,failover,switchover} virsh-examples/lab/lab virsh-examples/lab/image.sh virsh-examples/lab/stock-migrate virsh-examples/lab/power-cuts .ci/run .ci/prepare systemd/deb/{preinst,postinst,prerm,postrm}

.PHONY: bin/count
bin/count:
	@CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./virsh-examples/lab/count

.PHONY: bin/bench-lab
bin/bench-lab:
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ ./migrate/bench/cmd/lab

.PHONY: build
build: $(PURE) $(CGO)

.PHONY: $(PURE) $(CGO)
$(PURE):
	@CGO_ENABLED=0 $(GO) build $(GOFLAGS_COMMON) -o $@ $($@_PKG)
$(CGO):
	@CGO_ENABLED=1 $(GO) build $(GOFLAGS_COMMON) -o $@ $($@_PKG)

# Where our virsh goes: before the real one in PATH, unless that is put aside, as by
# the package.
VIRSH ?= $(PREFIX)/local/bin
LIBEXEC := $(DESTDIR)$(PREFIX)/libexec/kemari
UNITS := $(DESTDIR)$(PREFIX)/lib/systemd/system
# Who runs a take-over: libvirt in either form, and Xen's daemons, which Debian
# starts by one script.
TAKEOVER_UNITS := libvirtd virtxend xen xenstored xenconsoled

.PHONY: install
install: build
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin bin/kemari
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/sbin bin/virtkemarid
	install -D -m 755 -t $(LIBEXEC) bin/kemari-replicator bin/vif-kemari systemd/units/post-install
	for a in openvswitch route; do ln -sf vif-kemari $(LIBEXEC)/vif-kemari-$$a || exit; done
	install -D -m 755 bin/kemari-hook $(DESTDIR)/etc/libvirt/hooks/libxl.d/kemari
	install -d $(DESTDIR)$(VIRSH)
	ln -sf $(PREFIX)/bin/kemari $(DESTDIR)$(VIRSH)/virsh
	install -D -m 644 -t $(UNITS) systemd/units/*.service systemd/units/*.socket
	for u in $(TAKEOVER_UNITS); do install -D -m 644 systemd/units/takeover.conf $(UNITS)/$$u.service.d/50-kemari.conf || exit; done
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/tmpfiles.d systemd/units/kemari.conf
	install -D -m 644 systemd/units/kemari-modules.conf $(DESTDIR)$(PREFIX)/lib/modules-load.d/kemari.conf
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man1 driver/cmd/kemari/*.1
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man7 driver/cmd/kemari/*.7
	install -D -m 644 driver/cmd/kemari/kemari.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/kemari
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man8 driver/cmd/virtkemarid/virtkemarid.8
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/kemari xml/*.rng

# The hook is a file in /etc that is ours, and no setting.
.PHONY: deb
deb: build
	rm -rf bin/deb && mkdir -p bin/deb/DEBIAN
	$(MAKE) -s install DESTDIR=$(CURDIR)/bin/deb VIRSH=/usr/bin
	install -m 644 -t bin/deb/DEBIAN systemd/deb/control
	install -m 755 -t bin/deb/DEBIAN systemd/deb/preinst systemd/deb/postinst systemd/deb/prerm systemd/deb/postrm
	dpkg-deb --root-owner-group --build bin/deb bin

.PHONY: clean
clean:
	rm -rf bin
