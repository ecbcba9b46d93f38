#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# install.sh install|uninstall, called by the Makefile with PREFIX, DESTDIR and CRIU. It puts files below
# DESTDIR/PREFIX only: nothing in /etc is changed and nothing is started. What remains to be done on the
# host is printed at the end.

set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

PREFIX=${PREFIX:-/usr/local}
ROOT=${DESTDIR:-}$PREFIX
TOOLS=${COHORT_TOOLS:-.tools}
PROGRAMS="containerd-shim-cohort-v2 cohortd cohort"

case $PREFIX in
/*) ;;
*)
	echo "error: PREFIX must be an absolute path, not '$PREFIX'" >&2
	exit 1
	;;
esac

# fill SOURCE TARGET installs a text file with @PREFIX@ replaced.
fill() {
	install -D -m 644 /dev/null "$2"
	sed "s|@PREFIX@|$PREFIX|g" "$1" >"$2"
}

# copy_program WRAPPER PREFIX-NAME PROGRAM installs one program of a tool prefix with the libraries that it
# loads, and its wrapper, so that a host without that package has it.
copy_program() {
	local wrapper=$1 name=$2 program=$3 loader library libraries target=$ROOT/lib/cohort/$2
	loader=$(sed -n 's|^exec "$p/\(lib[^"]*\)".*|\1|p' "$wrapper")
	install -D -m 755 "$TOOLS/$name/$program" "$target/$program"
	install -D -m 755 "$TOOLS/$name/$loader" "$target/$loader"
	libraries=$(echo "$TOOLS/$name"/usr/lib/*-linux-gnu)
	for library in $("$TOOLS/$name/$loader" --library-path "$libraries" --list "$TOOLS/$name/$program" |
		sed -n 's|.*=> \([^ ]*\) (.*|\1|p' | grep -F "$libraries/"); do
		install -D -m 644 "$library" "$target/usr/lib/${libraries##*/}/${library##*/}"
	done
	install -D -m 755 "$wrapper" "$ROOT/lib/cohort/bin/${program##*/}"
}

install_all() {
	local program
	for program in $PROGRAMS; do
		install -D -m 755 "bin/$program" "$ROOT/bin/$program"
	done
	if [ "${CRIU:-}" != no ]; then
		rm -rf "$ROOT/lib/cohort"
		mkdir -p "$ROOT/lib/cohort"
		cp -a "$TOOLS/criu" "$ROOT/lib/cohort/criu"
		install -D -m 755 "$TOOLS/bin/criu" "$ROOT/lib/cohort/bin/criu"
		copy_program "$TOOLS/bin/mkfs.btrfs" debian usr/sbin/mkfs.btrfs
		copy_program "$TOOLS/bin/btrfs" debian usr/bin/btrfs
	fi
	fill contrib/systemd/cohortd.service "$ROOT/lib/systemd/system/cohortd.service"
	fill contrib/systemd/containerd-cohort.conf "$ROOT/lib/systemd/system/containerd.service.d/cohort.conf"
	fill contrib/containerd/config.toml "$ROOT/share/cohort/containerd/config.toml"
	fill contrib/docker/daemon.json "$ROOT/share/cohort/docker/daemon.json"
	fill contrib/nerdctl/nerdctl.toml "$ROOT/share/cohort/nerdctl/nerdctl.toml"
	fill contrib/kubernetes/runtimeclass.yaml "$ROOT/share/cohort/kubernetes/runtimeclass.yaml"
	install -D -m 644 LICENSE "$ROOT/share/doc/cohort/LICENSE"

	install -d "$ROOT/share/bash-completion/completions" "$ROOT/share/zsh/site-functions" "$ROOT/share/fish/vendor_completions.d"
	bin/cohort completion bash >"$ROOT/share/bash-completion/completions/cohort"
	bin/cohort completion zsh >"$ROOT/share/zsh/site-functions/_cohort"
	bin/cohort completion fish >"$ROOT/share/fish/vendor_completions.d/cohort.fish"

	cat >&2 <<-DONE
		installed below $ROOT. What is left to do on the host:
		  1. merge $PREFIX/share/cohort/containerd/config.toml into /etc/containerd/config.toml
		  2. systemctl daemon-reload && systemctl enable --now cohortd && systemctl restart containerd
		  3. ctr run --runtime io.containerd.cohort.v2 --snapshotter cohort ...
	DONE
}

uninstall_all() {
	local program folder
	for program in $PROGRAMS; do
		rm -f "$ROOT/bin/$program"
	done
	rm -rf "$ROOT/lib/cohort" "$ROOT/share/cohort" "$ROOT/share/doc/cohort"
	rm -f "$ROOT/lib/systemd/system/cohortd.service" "$ROOT/lib/systemd/system/containerd.service.d/cohort.conf" \
		"$ROOT/share/bash-completion/completions/cohort" "$ROOT/share/zsh/site-functions/_cohort" \
		"$ROOT/share/fish/vendor_completions.d/cohort.fish"
	# Folders that the installation may have made go with it, unless something else has moved in.
	for folder in lib/systemd/system/containerd.service.d lib/systemd/system lib/systemd share/bash-completion/completions \
		share/bash-completion share/zsh/site-functions share/zsh share/fish/vendor_completions.d share/fish share/doc; do
		rmdir "$ROOT/$folder" 2>/dev/null || true
	done
}

case ${1:-} in
install) install_all ;;
uninstall) uninstall_all ;;
*)
	echo "usage: PREFIX=... DESTDIR=... $0 install|uninstall" >&2
	exit 2
	;;
esac
