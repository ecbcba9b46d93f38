#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# up.sh [--run DIR] [--images NAME,...|none]: starts a private containerd and cohortd in the background,
# everything of theirs below DIR (default: RUNDIR, or .run of the project), imports the project's images (all,
# unless some are named), and prints the export lines for a shell that wants to use them:
#
#	eval "$(contrib/setup/up.sh)"
#
# If they run already it prints the same lines. Messages go to standard error. End them with down.sh.

# shellcheck source=contrib/setup/instance.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/instance.sh"

# write_config keeps everything of this containerd below RUN. Plugins that would write elsewhere on the
# host (CRI, NRI, opt), or load what is installed there, are off.
write_config() {
	cat >"$RUN/containerd.toml" <<-CONFIG
		version = 3
		root = "$RUN/containerd/root"
		state = "$RUN/containerd/state"
		imports = []
		disabled_plugins = [
		  "io.containerd.grpc.v1.cri",
		  "io.containerd.cri.v1.images",
		  "io.containerd.cri.v1.runtime",
		  "io.containerd.podsandbox.controller.v1.podsandbox",
		  "io.containerd.nri.v1.nri",
		  "io.containerd.internal.v1.opt",
		  "io.containerd.internal.v1.tracing",
		  "io.containerd.tracing.processor.v1.otlp",
		  "io.containerd.snapshotter.v1.blockfile",
		  "io.containerd.snapshotter.v1.btrfs",
		  "io.containerd.snapshotter.v1.devmapper",
		  "io.containerd.snapshotter.v1.erofs",
		  "io.containerd.snapshotter.v1.zfs",
		]

		[grpc]
		  address = "$ADDRESS"

		[ttrpc]
		  address = "$ADDRESS.ttrpc"

		[proxy_plugins.cohort]
		  type = "snapshot"
		  address = "$RUN/cohort/snapshotter.sock"
		  [proxy_plugins.cohort.exports]
		    root = "$RUN/cohort"

		[plugins."io.containerd.shim.v1.manager"]
		  socket_dir = "$RUN/s"

		# Without a line of its own, pulling or importing straight into the snapshotter is refused.
		[[plugins."io.containerd.transfer.v1.local".unpack_config]]
		  platform = "linux"
		  snapshotter = "overlayfs"
		[[plugins."io.containerd.transfer.v1.local".unpack_config]]
		  platform = "linux"
		  snapshotter = "cohort"
	CONFIG
}

# start NAME COMMAND... starts a daemon of the instance and records which process it is. It gets a session
# of its own, so that a Ctrl-C at the terminal is not for it, and none of our file descriptors.
start() {
	local name=$1 pid
	shift
	env PATH="$PROJECT_DIR/bin:$TOOLS_DIR/bin:$PATH" COHORT_STATE="$RUN/state" COHORT_ROOT="$RUN/cohort" \
		CONTAINERD_ADDRESS="$ADDRESS" setsid "$@" </dev/null >>"$RUN/$name.log" 2>&1 8<&- 9<&- &
	pid=$!
	printf '%s %s\n' "$pid" "$(start_time "$pid")" >"$RUN_DIR/$name.pid"
}

# wait_ready NAME COMMAND... returns when COMMAND succeeds, and fails when the daemon has ended or is late.
wait_ready() {
	local name=$1 deadline=$((SECONDS + WAIT_LIMIT))
	shift
	until "$@" >/dev/null 2>&1; do
		if ! alive "$name" >/dev/null; then
			tail -n 15 "$RUN/$name.log" | sed 's/^/  | /' >&2
			die "$name ended instead of starting" "see $RUN_DIR/$name.log, then run: make down"
		fi
		if [ $SECONDS -ge $deadline ]; then
			tail -n 15 "$RUN/$name.log" | sed 's/^/  | /' >&2
			die "$name was not ready after $WAIT_LIMIT s" "see $RUN_DIR/$name.log, then run: make down"
		fi
		sleep 0.05
	done
}

containerd_answers() { [ -S "$ADDRESS" ] && timeout 5 "$TOOLS_DIR/bin/ctr" --address "$ADDRESS" version; }
cohortd_answers() { [ -S "$RUN/cohort/snapshotter.sock" ] && [ -S "$RUN/cohort/host.sock" ]; }
# Only a change goes all the way from ctr through containerd to cohortd: what can be answered from containerd's
# own database, such as an empty list, is.
snapshotter_answers() {
	local key=up-$$-$SECONDS-$RANDOM
	timeout 5 "$TOOLS_DIR/bin/ctr" --address "$ADDRESS" --namespace default snapshots --snapshotter cohort prepare "$key" &&
		timeout 5 "$TOOLS_DIR/bin/ctr" --address "$ADDRESS" --namespace default snapshots --snapshotter cohort rm "$key"
}

# import_images imports what is new since the last time. An archive's size and time stand for its content.
import_images() {
	local image mark name
	case $IMAGES in
	none) return 0 ;;
	all) IMAGES="cohort-busybox cohort-tools cohort-data" ;;
	esac
	mkdir -p "$RUN/images"
	for name in $IMAGES; do
		image=$TOOLS_DIR/images/$name.tar
		[ -f "$image" ] || die "there is no image $image" "run: make setup"
		mark=$(stat -c '%s %Y %i' "$image")
		if [ -f "$RUN/images/$name" ] && [ "$(cat "$RUN/images/$name")" = "$mark" ]; then
			continue
		fi
		timeout 120 "$TOOLS_DIR/bin/ctr" --address "$ADDRESS" --namespace default image import --snapshotter cohort "$image" >>"$RUN/images.log" 2>&1 || {
			tail -n 5 "$RUN/images.log" | sed 's/^/  | /' >&2
			die "the image $name could not be imported" "see $RUN_DIR/images.log and $RUN_DIR/cohortd.log"
		}
		printf '%s\n' "$mark" >"$RUN/images/$name"
	done
}

main() {
	local program started=
	parse_instance "$@"
	need_root
	for program in "$TOOLS_DIR/bin/containerd" "$TOOLS_DIR/bin/ctr" "$TOOLS_DIR/bin/runc" "$TOOLS_DIR/bin/criu"; do
		[ -x "$program" ] || die "$program is missing" "run: make setup"
	done
	for program in cohortd containerd-shim-cohort-v2; do
		[ -x "$PROJECT_DIR/bin/$program" ] || die "$PROJECT_DIR/bin/$program is missing" "run: make build"
	done
	lock_instance

	mkdir -p -m 711 "$RUN_DIR"
	if [ "$RUN" != "$RUN_DIR" ] && ! mountpoint -q "$RUN"; then
		mkdir -p "$RUN"
		# Private: what the daemons mount below the short path does not appear below the long one as well.
		mount --bind "$RUN_DIR" "$RUN" && mount --make-private "$RUN" || die "$RUN_DIR cannot be reached through $RUN" "clone the project into a folder with a shorter path"
	fi
	mkdir -p -m 700 "$RUN/state" "$RUN/s"
	mkdir -p "$RUN/containerd"
	# As /run is, where the records are kept otherwise: they are written while containers stand still.
	mountpoint -q "$RUN/state" || mount -t tmpfs -o mode=0700,size=64m cohort-state "$RUN/state" || die "$RUN/state cannot be made a tmpfs" "see dmesg"

	if ! alive cohortd >/dev/null; then
		rm -f "$RUN/cohort/snapshotter.sock" "$RUN/cohort/host.sock"
		start cohortd "$PROJECT_DIR/bin/cohortd" --root "$RUN/cohort"
		started=yes
	fi
	if ! alive containerd >/dev/null; then
		write_config
		rm -f "$ADDRESS" "$ADDRESS.ttrpc"
		start containerd "$TOOLS_DIR/bin/containerd" --config "$RUN/containerd.toml"
		started=yes
	fi
	if [ -n "$started" ]; then
		wait_ready cohortd cohortd_answers
		wait_ready containerd containerd_answers
		wait_ready cohortd snapshotter_answers
		say "containerd and cohortd run below $RUN_DIR"
	fi
	import_images
	print_environment
}

main "$@"
