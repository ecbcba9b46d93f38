# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# The programs that cohort, its tests and its demo run: CRIU and file system tools from Debian
# packages, containerd and runc from their Go modules. Sourced by setup.sh.

# go_install ENVIRONMENT... -- ARGUMENT... runs `go install` into TOOLS_DIR/bin. It runs outside of the
# project, so that the tools' own go.mod decides their dependencies and a workspace file does not.
go_install() {
	local -a environment=()
	while [ "$1" != -- ]; do
		environment+=("$1")
		shift
	done
	shift
	cd "$TOOLS_DIR/tmp"
	timeout --foreground "$STEP_TIMEOUT" env GOWORK=off GOFLAGS= GOBIN="$TOOLS_DIR/bin" "${environment[@]}" \
		go install -buildvcs=false "$@" ||
		die "go install $* failed" "check the network and the Go module proxy (go env GOPROXY)"
}

tools_debian() {
	rm -rf "$TOOLS_DIR/debian.new" "$TOOLS_DIR/debian"
	# shellcheck disable=SC2086
	debian_extract "$TOOLS_SUITE" "$TOOLS_DIR/debian.new" $TOOLS_PACKAGES
	rm -rf "$TOOLS_DIR"/debian.new/usr/share/{doc,man,locale,info,lintian} "$TOOLS_DIR"/debian.new/usr/lib/python3*
	mv "$TOOLS_DIR/debian.new" "$TOOLS_DIR/debian"
	wrap debian usr/bin/btrfs
	wrap debian usr/sbin/mkfs.btrfs
	wrap debian usr/sbin/mkfs.xfs
	wrap debian usr/sbin/xfs_growfs
	wrap debian usr/sbin/mkfs.ext4
	wrap debian usr/sbin/nft
	wrap debian usr/bin/ip
	# protoc looks for its own .proto files beside /proc/self/exe, which is the loader here.
	wrap debian usr/bin/protoc
	sed -i 's|"\$@"$|-I "$p/usr/include" "$@"|' "$TOOLS_DIR/bin/protoc"
	wrap_iptables
	"$TOOLS_DIR/bin/btrfs" --version
	"$TOOLS_DIR/bin/mkfs.btrfs" --version
	"$TOOLS_DIR/bin/mkfs.xfs" -V
	"$TOOLS_DIR/bin/nft" --version
	"$TOOLS_DIR/bin/ip" -V
	"$TOOLS_DIR/bin/protoc" --version
}

# wrap_iptables is for CRIU alone: its default way to keep TCP connections silent, which a stock checkpoint
# takes, runs iptables-restore. One program serves all names, and loads its extensions by path.
wrap_iptables() {
	local name
	for name in iptables ip6tables iptables-restore ip6tables-restore iptables-save ip6tables-save; do
		wrap debian usr/sbin/xtables-nft-multi
		sed -i "s|^exec |export XTABLES_LIBDIR=\"\$p/usr/lib/$(debian_multiarch)/xtables\"\nexec |" "$TOOLS_DIR/bin/xtables-nft-multi"
		mv "$TOOLS_DIR/bin/xtables-nft-multi" "$TOOLS_DIR/bin/$name"
	done
}

# tools_criu makes a prefix that stands on its own (`make install` copies it as it is): CRIU, its
# libraries, their loader, and cohort's preload library.
tools_criu() {
	local suite version='' status
	for suite in $CRIU_SUITES; do
		rm -rf "$TOOLS_DIR/criu.new"
		set +e
		(
			set -e
			# shellcheck disable=SC2086
			debian_extract "$suite" "$TOOLS_DIR/criu.new" $CRIU_PACKAGES
		)
		status=$?
		set -e
		if [ $status -ne 0 ]; then
			say "Debian $suite has no installable CRIU now; trying the next suite"
			continue
		fi
		version=$(sed -n 's/^criu\t//p' "$TOOLS_DIR/criu.new/usr/share/cohort/packages")
		if dpkg --compare-versions "$version" ge "$CRIU_MIN_VERSION"; then
			break
		fi
		say "CRIU $version of Debian $suite is older than $CRIU_MIN_VERSION; trying the next suite"
		version=
	done
	[ -n "$version" ] || die "no CRIU of at least $CRIU_MIN_VERSION in Debian $CRIU_SUITES" "see the lines above; the suites are set in contrib/setup/versions.sh"
	rm -rf "$TOOLS_DIR"/criu.new/usr/share/{doc,man,locale,info,lintian} \
		"$TOOLS_DIR"/criu.new/usr/lib/*/gconv "$TOOLS_DIR"/criu.new/usr/lib/python3

	mkdir -p "$TOOLS_DIR/criu.new/usr/lib/cohort"
	build_preload "$TOOLS_DIR/criu.new/usr/lib/cohort/libcohort-criu.so"
	rm -rf "$TOOLS_DIR/criu"
	mv "$TOOLS_DIR/criu.new" "$TOOLS_DIR/criu"
	wrap criu usr/sbin/criu '--preload "$p/usr/lib/cohort/libcohort-criu.so"'
	"$TOOLS_DIR/bin/criu" --version
}

build_preload() {
	gcc -O2 -Wall -Wextra -Werror -fPIC -shared -nostdlib -fno-builtin -fno-stack-protector \
		-fno-tree-loop-distribute-patterns -fvisibility=hidden -Wl,-soname,libcohort-criu.so -Wl,-z,now \
		-o "$1" "$PROJECT_DIR"/contrib/criu-preload/*.c
}

tools_containerd() {
	go_install CGO_ENABLED=0 -- -ldflags "-s -w" -tags "$CONTAINERD_TAGS" \
		"github.com/containerd/containerd/v2/cmd/containerd@$CONTAINERD_VERSION" \
		"github.com/containerd/containerd/v2/cmd/ctr@$CONTAINERD_VERSION" \
		"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$CONTAINERD_VERSION"
	"$TOOLS_DIR/bin/containerd" --version
}

# tools_runc links libseccomp statically, so that runc needs nothing of TOOLS_DIR when it runs. The flags go
# through CGO_*FLAGS, which are part of Go's build cache key; what pkg-config answers is not, and a host
# that has a libseccomp of its own could get that one. The build only has to find some pkg-config.
tools_runc() {
	local answer=$TOOLS_DIR/tmp/pkg-config
	printf '#!/bin/sh\n' >"$answer"
	chmod 755 "$answer"
	go_install CGO_ENABLED=1 PKG_CONFIG="$answer" CGO_CFLAGS="-O2 -g -I$TOOLS_DIR/debian/usr/include" \
		CGO_LDFLAGS="-O2 -g $TOOLS_DIR/debian/usr/lib/$(debian_multiarch)/libseccomp.a" -- \
		-tags "seccomp urfave_cli_no_docs" "github.com/opencontainers/runc@$RUNC_VERSION"
	"$TOOLS_DIR/bin/runc" --version | tee "$TOOLS_DIR/tmp/runc-version"
	grep -q '^libseccomp:' "$TOOLS_DIR/tmp/runc-version" || die "runc was built without seccomp" "see $TOOLS_DIR/log/runc.log"
}

tools_registry() {
	go_install CGO_ENABLED=0 -- -ldflags "-s -w" "github.com/distribution/distribution/v3/cmd/registry@$REGISTRY_VERSION"
}

tools_protoc_plugins() {
	go_install CGO_ENABLED=0 -- "google.golang.org/protobuf/cmd/protoc-gen-go@$PROTOC_GEN_GO_VERSION"
	go_install CGO_ENABLED=0 -- "github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc@$PROTOC_GEN_GO_TTRPC_VERSION"
}

tools_lint() {
	go_install CGO_ENABLED=0 -- "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$GOLANGCI_LINT_VERSION"
	go_install CGO_ENABLED=0 -- "mvdan.cc/gofumpt@$GOFUMPT_VERSION"
}

# tool_step is `step`, with the parts that every tool's key has: the machine's architecture and the
# functions that do the work.
tool_step() {
	local name=$1 work=$2
	shift 2
	step "$name" "$(key_of "$(debian_arch)" "$(declare -f "$work")" "$@")" "$work"
}

setup_lint() {
	tool_step lint tools_lint "$GOLANGCI_LINT_VERSION" "$GOFUMPT_VERSION"
}

# setup_registry is apart from setup_tools: it takes longest to compile, and the tests alone want it.
setup_registry() {
	tool_step registry tools_registry "$REGISTRY_VERSION"
}

setup_proto() {
	tool_step debian tools_debian "$TOOLS_SUITE" "$TOOLS_PACKAGES" "$(declare -f wrap wrap_iptables debian_extract)"
	tool_step protoc-plugins tools_protoc_plugins "$PROTOC_GEN_GO_VERSION" "$PROTOC_GEN_GO_TTRPC_VERSION"
}

setup_containerd() {
	tool_step containerd tools_containerd "$CONTAINERD_VERSION" "$CONTAINERD_TAGS"
}

setup_tools() {
	tool_step debian tools_debian "$TOOLS_SUITE" "$TOOLS_PACKAGES" "$(declare -f wrap wrap_iptables debian_extract)"
	tool_step criu tools_criu "$CRIU_SUITES" "$CRIU_PACKAGES" "$CRIU_MIN_VERSION" "$(declare -f wrap debian_extract build_preload)" \
		"@$PROJECT_DIR/contrib/criu-preload/cohort-criu.c" "@$PROJECT_DIR/contrib/criu-preload/clean.c" "@$PROJECT_DIR/contrib/criu-preload/mapfiles.c" "@$PROJECT_DIR/contrib/criu-preload/stop.c" "@$PROJECT_DIR/contrib/criu-preload/smaps.c" "@$PROJECT_DIR/contrib/criu-preload/gate.c" "@$PROJECT_DIR/contrib/criu-preload/internal.h"
	tool_step runc tools_runc "$RUNC_VERSION" "$TOOLS_SUITE"
}
