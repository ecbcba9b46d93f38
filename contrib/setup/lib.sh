# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Shared by the set-up scripts: messages, the lock, stamps, and Debian packages unpacked into a folder
# of the project. Nothing here writes outside TOOLS_DIR; the host's package database is never touched.

set -euo pipefail
# A failure inside $(...) is a failure too.
shopt -s inherit_errexit

SETUP_DIR=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PROJECT_DIR=$(cd -- "$SETUP_DIR/../.." && pwd)
TOOLS_DIR=${COHORT_TOOLS:-$PROJECT_DIR/.tools}
STAMP_DIR=$TOOLS_DIR/stamp

# The longest that one download or build step may take, in seconds. A mirror that hangs must end in a
# message, not in a job that never does.
STEP_TIMEOUT=${COHORT_STEP_TIMEOUT:-900}

# shellcheck source=contrib/setup/versions.sh
. "$SETUP_DIR/versions.sh"

say() { printf '%s\n' "$*" >&2; }
die() {
	say "error: $1"
	[ $# -lt 2 ] || say "  cure: $2"
	exit 1
}

# The loader and PATH split their lists at blanks and colons, mount splits its options at commas, and none
# of them knows a way to quote one.
case $PROJECT_DIR$TOOLS_DIR in
*[[:space:]:,]*) die "the project's folder, $PROJECT_DIR, has a blank, a colon or a comma in its name" "move it to a folder without" ;;
esac

need_root() { [ "$(id -u)" = 0 ] || die "this must run as root" "run it with sudo"; }
have() { command -v "$1" >/dev/null 2>&1; }
need_command() { have "$1" || die "the command $1 is missing" "apt-get install $2"; }

# take_lock makes sure that only one set-up at a time writes to TOOLS_DIR. The lock belongs to file
# descriptor 9 and ends with the process, however that ends; children close it (see step).
take_lock() {
	mkdir -p "$TOOLS_DIR"
	exec 9>"$TOOLS_DIR/lock"
	if ! flock -n 9; then
		say "waiting for another set-up in $TOOLS_DIR"
		flock -w "$STEP_TIMEOUT" 9 || die "another set-up has held $TOOLS_DIR/lock for ${STEP_TIMEOUT}s" "see who holds it with: fuser $TOOLS_DIR/lock"
	fi
}

# step NAME KEY FUNCTION runs FUNCTION unless it already ended well for this KEY. The stamp is written
# last, so a step that was killed half way is done again; a step must therefore build aside and rename.
step() {
	local name=$1 key=$2 work=$3 begin=$SECONDS
	local stamp=$STAMP_DIR/$name have_key=
	if [ -f "$stamp" ] && read -r have_key <"$stamp" && [ "$have_key" = "$key" ]; then
		return 0
	fi
	mkdir -p "$STAMP_DIR" "$TOOLS_DIR/log" "$TOOLS_DIR/bin" "$TOOLS_DIR/tmp"
	rm -f "$stamp"
	say "set-up: $name ..."
	local log=$TOOLS_DIR/log/$name.log
	# Not `if ! work` or `work || ...`: bash ignores errexit in all that runs under those, and a step that
	# failed half way would be stamped as done. For the same reason a step is never called under them.
	set +e
	(
		set -e
		exec 9>&-
		"$work"
	) >"$log" 2>&1
	local status=$?
	set -e
	if [ $status -ne 0 ]; then
		say "error: set-up step '$name' failed; the end of $log:"
		tail -n 15 "$log" | sed 's/^/  | /' >&2
		say "  cure: correct what it names and run the same command again; finished steps are kept"
		exit 1
	fi
	printf '%s\n' "$key" >"$stamp.new"
	mv "$stamp.new" "$stamp"
	say "set-up: $name done in $((SECONDS - begin)) s"
}

# key_of prints one word for any number of words and files ("@path"), to be used as a step's KEY.
key_of() {
	local item
	for item in "$@"; do
		case $item in
		@*) cat -- "${item#@}" ;;
		*) printf '%s\0' "$item" ;;
		esac
	done | sha256sum | cut -c1-32
}

debian_arch() { dpkg --print-architecture; }

# debian_multiarch is the folder name that Debian gives the machine's libraries.
debian_multiarch() {
	case $(debian_arch) in
	amd64) echo x86_64-linux-gnu ;;
	arm64) echo aarch64-linux-gnu ;;
	*) die "no packages are known for the architecture $(debian_arch)" "use an amd64 or arm64 machine" ;;
	esac
}

# debian_loader is the dynamic loader inside a prefix made by debian_extract.
debian_loader() {
	case $(debian_arch) in
	amd64) echo lib64/ld-linux-x86-64.so.2 ;;
	arm64) echo lib/ld-linux-aarch64.so.1 ;;
	esac
}

# debian_repository prints the repository that the host itself is set up to use. No mirror is named in
# this project: whoever runs it has chosen one already. --print-uris reads the configuration only; it
# answers without package lists and without the network.
debian_repository() {
	need_command apt-get apt >&2
	local uri
	uri=$(apt-get --print-uris update 2>/dev/null |
		sed -n "s|^'\([^']*\)/dists/[a-z]*/InRelease' .*|\1|p" | head -n 1)
	[ -n "$uri" ] || die "the host's apt has no Debian repository configured" "add one to /etc/apt/sources.list.d; it is only read, never written"
	printf '%s\n' "$uri"
}

# apt_state SUITE makes a private apt state for SUITE below TOOLS_DIR/apt and prints its configuration
# file. The host's proxies and credentials stay in force (its apt.conf is still read first), but not its
# hooks: those of container images delete the host's package cache.
apt_state() {
	local suite=$1 dir=$TOOLS_DIR/apt/$1 keyring=/usr/share/keyrings/debian-archive-keyring.gpg signed='' repository
	repository=$(debian_repository)
	mkdir -p "$dir/lists/partial" "$dir/archives/partial" "$dir/empty"
	: >"$dir/status"
	[ ! -f "$keyring" ] || signed="[signed-by=$keyring] "
	printf 'deb %s%s %s main\n' "$signed" "$repository" "$suite" >"$dir/sources.list"
	cat >"$dir/apt.conf" <<-CONF
		#clear APT::Update::Pre-Invoke;
		#clear APT::Update::Post-Invoke;
		#clear APT::Update::Post-Invoke-Success;
		#clear DPkg::Pre-Invoke;
		#clear DPkg::Post-Invoke;
		#clear DPkg::Pre-Install-Pkgs;
		#clear APT::Architectures;
		#clear Acquire::GzipIndexes;
		#clear Acquire::IndexTargets;
		APT::Architecture "$(debian_arch)";
		APT::Architectures { "$(debian_arch)"; };
		APT::Install-Recommends "false";
		APT::Install-Suggests "false";
		APT::Get::Assume-Yes "true";
		APT::Sandbox::User "root";
		Acquire::IndexTargets::deb::Packages {
		  MetaKey "\$(COMPONENT)/binary-\$(ARCHITECTURE)/Packages";
		  flatMetaKey "Packages";
		  ShortDescription "Packages";
		  Description "\$(RELEASE)/\$(COMPONENT) \$(ARCHITECTURE) Packages";
		};
		Acquire::Languages "none";
		Acquire::Check-Valid-Until "false";
		Acquire::Retries "3";
		Acquire::http::Timeout "30";
		Acquire::https::Timeout "30";
		Dir::Etc::sourcelist "$dir/sources.list";
		Dir::Etc::sourceparts "$dir/empty";
		Dir::Etc::preferences "$dir/empty/none";
		Dir::Etc::preferencesparts "$dir/empty";
		Dir::State "$dir";
		Dir::State::lists "$dir/lists";
		Dir::State::status "$dir/status";
		Dir::State::extended_states "$dir/extended_states";
		Dir::Cache "$dir";
		Dir::Cache::archives "$dir/archives";
		Dir::Cache::pkgcache "";
		Dir::Cache::srcpkgcache "";
		Dir::Log "$dir";
	CONF
	printf '%s\n' "$dir/apt.conf"
}

# apt_update SUITE brings the suite's package list, once a day at most.
apt_update() {
	local suite=$1 conf stamp
	conf=$(apt_state "$suite")
	stamp=$TOOLS_DIR/apt/$suite/updated
	if [ -n "$(find "$stamp" -mmin -1440 2>/dev/null)" ]; then
		return 0
	fi
	timeout --foreground "$STEP_TIMEOUT" apt-get -c "$conf" -o APT::Update::Error-Mode=any update ||
		die "the package list of Debian $suite could not be read from $(debian_repository)" "check the network and the host's apt configuration"
	touch "$stamp"
}

# debian_extract SUITE PREFIX PACKAGE... unpacks the packages and all they depend on into PREFIX, which
# must not exist. Nothing is configured: no maintainer script runs, nothing is mounted or chrooted into.
# What a Debian archive signature covers is checked by apt as always.
debian_extract() {
	local suite=$1 prefix=$2 conf deb
	shift 2
	conf=$(apt_state "$suite")
	apt_update "$suite"
	local archives=$TOOLS_DIR/apt/$suite/archives-$$
	rm -rf "$archives"
	mkdir -p "$archives/partial"
	if ! timeout --foreground "$STEP_TIMEOUT" apt-get -c "$conf" -o Dir::Cache::archives="$archives" --download-only install "$@"; then
		# A list that is a day old may name files that the mirror has replaced since.
		rm -f "$TOOLS_DIR/apt/$suite/updated"
		apt_update "$suite"
		timeout --foreground "$STEP_TIMEOUT" apt-get -c "$conf" -o Dir::Cache::archives="$archives" --download-only install "$@" ||
			die "the Debian $suite packages $* could not be downloaded" "check the network and the host's apt configuration"
	fi
	# Every Debian release from 12 on is merged-/usr, but before 13 the links are made by an installer.
	mkdir -p "$prefix/usr/bin" "$prefix/usr/sbin" "$prefix/usr/lib" "$prefix/usr/lib64"
	for deb in bin sbin lib lib64; do
		ln -s "usr/$deb" "$prefix/$deb"
	done
	for deb in "$archives"/*.deb; do
		dpkg-deb --fsys-tarfile "$deb" | tar -C "$prefix" -xp --keep-directory-symlink -f - ||
			die "the package ${deb##*/} could not be unpacked into $prefix" "is the disk full? (df -h $prefix)"
	done
	mkdir -p "$prefix/usr/share/cohort"
	for deb in "$archives"/*.deb; do
		dpkg-deb --show "$deb"
	done >"$prefix/usr/share/cohort/packages"
	rm -rf "$archives"
}

# wrap PREFIX PROGRAM [ARGUMENT...] writes TOOLS_DIR/bin/<name of PROGRAM>, which runs PROGRAM of the
# prefix through the prefix's own loader and libraries: the host's distribution does not matter. The
# wrapper finds its prefix from its own place, so the folder of the project may be moved.
wrap() {
	local prefix=$1 program=$2 libs name
	shift 2
	name=${program##*/}
	libs=$(debian_multiarch)
	[ -e "$TOOLS_DIR/$prefix/$program" ] || die "the prefix $prefix has no $program" "rm -rf $TOOLS_DIR and run the set-up again"
	mkdir -p "$TOOLS_DIR/bin"
	cat >"$TOOLS_DIR/tmp/$name" <<-SCRIPT
		#!/bin/sh
		# SPDX-License-Identifier: Apache-2.0
		# Made by contrib/setup: runs $name from its own prefix, with that prefix's loader and libraries.
		self=\$0
		[ ! -L "\$self" ] || self=\$(readlink -f "\$self")
		p=\${self%/*}/../$prefix
		exec "\$p/$(debian_loader)" --library-path "\$p/usr/lib/$libs" --argv0 "\$0" $* "\$p/$program" "\$@"
	SCRIPT
	chmod 755 "$TOOLS_DIR/tmp/$name"
	mv "$TOOLS_DIR/tmp/$name" "$TOOLS_DIR/bin/$name"
}
