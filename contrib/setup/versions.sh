# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2034
#
# Every version that the set-up brings in, in one place. A change here changes the stamp of the step
# that reads it, so the next `make setup` rebuilds that step and nothing else.

# Go modules, built from source with the host's Go.
CONTAINERD_VERSION=v2.4.2
# Without the Kubernetes plugin, which nothing here uses yet: a fifth less to compile.
CONTAINERD_TAGS=no_cri
RUNC_VERSION=v1.5.2
REGISTRY_VERSION=v3.1.2
PROTOC_GEN_GO_VERSION=v1.36.11
PROTOC_GEN_GO_TTRPC_VERSION=v1.2.10
GOLANGCI_LINT_VERSION=v2.15.0
GOFUMPT_VERSION=v0.12.0

# Debian packages. A mirror keeps only the newest revision of a package, so what can be pinned is the
# release, and, where cohort depends on it, the oldest version that will do.
#
# TOOLS_SUITE is a stable release on purpose: the file systems that its mkfs makes are mounted by any
# kernel that cohort supports, while a newer mkfs turns on features that older kernels refuse.
TOOLS_SUITE=bookworm
TOOLS_PACKAGES="btrfs-progs xfsprogs e2fsprogs nftables iptables iproute2 libseccomp-dev protobuf-compiler"
IMAGES_SUITE=bookworm
BUSYBOX_PACKAGES="busybox-static"
DATA_PACKAGES="postgresql-15 postgresql-client-15 redis-server redis-tools dash coreutils util-linux sed libc-bin tzdata"

# CRIU before 4.2 fails on the vDSO of current kernels (3.x) or on every TCP socket of kernels from
# 6.16 on (4.1). Suites are tried in this order; their release files may be past their date.
CRIU_SUITES="forky sid"
CRIU_PACKAGES="criu"
CRIU_MIN_VERSION=4.2
