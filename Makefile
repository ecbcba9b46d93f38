# SPDX-License-Identifier: Apache-2.0
#
# Everything that is done with this project by hand or by CI. `make` alone lists the targets. Tools come
# into .tools/ (see contrib/setup/versions.sh), binaries into bin/, a private containerd into .run/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO ?= go
PREFIX ?= /usr/local
DESTDIR ?=
BENCH_OUT ?= $(CURDIR)/bench.out

BIN := $(CURDIR)/bin
TOOLS := $(or $(COHORT_TOOLS),$(CURDIR)/.tools)
PROGRAMS := containerd-shim-cohort-v2 cohortd cohort

MODULE := github.com/cohort-project/cohort
VERSION := $(or $(shell git describe --tags --match 'v*' --dirty 2>/dev/null),0.0.0-dev)
REVISION := $(shell git rev-parse HEAD 2>/dev/null)$(shell git diff --quiet HEAD 2>/dev/null || echo .m)
LDFLAGS := -s -w -X $(MODULE)/api/version.Version=$(VERSION) -X $(MODULE)/api/version.Revision=$(REVISION)
# Static, and the same setting everywhere: packages that tests and tools share are compiled once.
GO_BUILD := CGO_ENABLED=0 $(GO) build -buildvcs=false -ldflags '$(LDFLAGS)'

# Tests of these run under the race detector, which costs a second compilation of all they import.
RACE_PACKAGES ?= ./runtime/...
# How long one package's tests may take. Integration tests run one package at a time: they measure time.
UNIT_TIMEOUT ?= 10m
INTEGRATION_TIMEOUT ?= 25m
# No result of an earlier run: programs that tests compile and start are not in the key of Go's test cache.
TEST_FLAGS ?= -count=1

# What tests and demo run finds this project's programs and tools before the host's.
RUN_ENV := PATH='$(BIN):$(TOOLS)/bin':"$$PATH" COHORT_TOOLS='$(TOOLS)'

PROTO_OUT := --go_opt=paths=source_relative --go-ttrpc_opt=paths=source_relative
PROTO_FILES := $(sort $(wildcard api/*/v1/*.proto))

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | sed 's/\$$\$$/$$/g' | sort | \
		while IFS=$$'\t' read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

.PHONY: build
build: ## build the shim, cohortd and cohort into bin/
	@mkdir -p '$(BIN)'
	$(GO_BUILD) -o '$(BIN)/' $(addprefix ./cmd/,$(PROGRAMS)) >&2

.PHONY: build-arm64
build-arm64: ## check that everything compiles for arm64
	GOARCH=arm64 CGO_ENABLED=0 $(GO) build -buildvcs=false ./...

.PHONY: setup
setup: ## bring containerd, runc, CRIU and the container images into .tools/
	@contrib/setup/setup.sh run >&2

.PHONY: up
up: build setup ## start a private containerd and cohortd; use as: eval "$$(make -s up)"
	@contrib/setup/up.sh

.PHONY: down
down: ## end what `make up` started, with all its containers
	@contrib/setup/down.sh

.PHONY: test
test: build ## all tests, as root; a test that cannot run fails
	@contrib/setup/setup.sh test >&2
	$(GO) vet ./...
	$(MAKE) --no-print-directory unit COHORT_REQUIRE=1
	@# Most packages start an instance of their own; some use the one of the environment.
	run='$(CURDIR)/.run-make'; trap 'contrib/setup/down.sh --run "$$run"' EXIT; \
	export COHORT_TOOLS='$(TOOLS)' COHORT_REQUIRE=1 CGO_ENABLED=0; \
	environment="$$(contrib/setup/up.sh --run "$$run")"; eval "$$environment"; \
	$(GO) test -p 1 -timeout $(INTEGRATION_TIMEOUT) $(TEST_FLAGS) ./integration/...

.PHONY: unit
unit: ## the tests beside the code, those of runtime/ with the race detector
	COHORT_REQUIRE='$(COHORT_REQUIRE)' $(RUN_ENV) CGO_ENABLED=1 $(GO) test -race -timeout $(UNIT_TIMEOUT) $(TEST_FLAGS) $(RACE_PACKAGES)
	packages="$$($(GO) list ./... | grep -vxF "$$($(GO) list $(RACE_PACKAGES))" | grep -v '^$(MODULE)/integration')"; \
	COHORT_REQUIRE='$(COHORT_REQUIRE)' $(RUN_ENV) CGO_ENABLED=0 $(GO) test -timeout $(UNIT_TIMEOUT) $(TEST_FLAGS) $$packages

.PHONY: demo
demo: build setup ## PostgreSQL, Redis and a web shop, checkpointed under load and brought back
	@$(GO_BUILD) -o '$(BIN)/demo' ./integration/demo
	@$(RUN_ENV) '$(BIN)/demo'

.PHONY: bench
bench: build setup ## measure cohort beside containerd and CRIU; BENCH_OUT=FILE takes the rows, see docs/bench.md
	@$(GO_BUILD) -o '$(BIN)/bench' ./integration/bench
	@$(RUN_ENV) BENCH_OUT='$(BENCH_OUT)' '$(BIN)/bench'

.PHONY: bench-pictures
bench-pictures: ## draw docs/bench-*.svg and the tables of docs/bench.md from BENCH_OUT
	@$(GO) run -buildvcs=false ./integration/bench -draw '$(BENCH_OUT)'

.PHONY: lint
lint: proto-check build-arm64 ## linters, formatting, generated code, arm64
	@contrib/setup/setup.sh lint >&2
	for script in .ci/run contrib/*.sh contrib/setup/*.sh contrib/setup/images/run-*; do bash -n "$$script"; done
	'$(TOOLS)/bin/golangci-lint' run ./...

.PHONY: fmt
fmt: ## format the Go code
	@contrib/setup/setup.sh lint >&2
	'$(TOOLS)/bin/golangci-lint' fmt ./...

.PHONY: proto
proto: ## regenerate the code of api/*/v1/*.proto
	@contrib/setup/setup.sh proto >&2
	PATH='$(TOOLS)/bin':"$$PATH" protoc -I api --go_out=api --go-ttrpc_out=api $(PROTO_OUT) $(PROTO_FILES)

.PHONY: proto-check
proto-check: ## fail if the generated code is not what `make proto` makes
	@contrib/setup/setup.sh proto >&2
	@out="$$(mktemp -d)"; trap 'rm -rf "$$out"' EXIT; \
	PATH='$(TOOLS)/bin':"$$PATH" protoc -I api --go_out="$$out" --go-ttrpc_out="$$out" $(PROTO_OUT) $(PROTO_FILES); \
	for file in $$(cd "$$out" && find . -name '*.pb.go'); do \
		diff -u "api/$$file" "$$out/$$file" || { echo "error: api/$$file is out of date; cure: make proto" >&2; exit 1; }; \
	done

.PHONY: install
install: build ## install into PREFIX (/usr/local), below DESTDIR if set; CRIU=no leaves CRIU out
	@[ '$(CRIU)' = no ] || contrib/setup/setup.sh run >&2
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' CRIU='$(CRIU)' contrib/install.sh install

.PHONY: uninstall
uninstall: ## remove what `make install` with the same PREFIX and DESTDIR installed
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' contrib/install.sh uninstall

.PHONY: clean
clean: ## remove what was built; tools and images stay (they go with `make distclean`)
	rm -rf '$(BIN)' bench.out

.PHONY: distclean
distclean: down clean ## end everything and remove the tools as well
	rm -rf .tools .run .cache
