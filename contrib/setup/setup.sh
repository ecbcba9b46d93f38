#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# setup.sh [run|test|lint|proto]: brings what the named use of the project needs into .tools/ (or COHORT_TOOLS):
#   run    programs and container images for `make up` and `make demo`; this is the default
#   test   the same, and a registry
#   lint   the linters
#   proto  the protobuf compiler and its plugins
# Needs root, Go, gcc and git on Debian; writes
# nowhere else. Finished steps are remembered, so a second run returns at once.

# shellcheck source=contrib/setup/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=contrib/setup/tools.sh
. "$SETUP_DIR/tools.sh"
# shellcheck source=contrib/setup/images.sh
. "$SETUP_DIR/images.sh"

# setup_run compiles containerd beside the steps that mostly wait for the network and the disk. Whichever
# fails, the script ends when both have: nothing goes on writing behind its back.
setup_run() {
	setup_containerd &
	CONTAINERD_BUILD=$!
	trap 'wait $CONTAINERD_BUILD' EXIT
	setup_tools
	setup_images
	trap - EXIT
	wait $CONTAINERD_BUILD
	image_tools
}

main() {
	local what=${1:-run}
	need_root
	need_command go golang
	need_command gcc gcc
	need_command dpkg-deb dpkg
	need_command flock util-linux
	take_lock
	case $what in
	run) setup_run ;;
	test)
		setup_run
		setup_registry
		;;
	lint) setup_lint ;;
	proto) setup_proto ;;
	*) die "unknown use '$what'" "one of: run test lint proto" ;;
	esac
}

main "$@"
