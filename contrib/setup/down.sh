#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# down.sh [--run DIR]: ends the instance that up.sh started, with every container in it, and removes what it
# left: processes, mounts, loop devices, cgroups, sockets and the folder itself. It works whatever state the
# instance is in: running, half started, or with daemons that were killed. Doing it twice is no error.

# shellcheck source=contrib/setup/instance.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/instance.sh"

ctr() { timeout 15 "$TOOLS_DIR/bin/ctr" --address "$ADDRESS" "$@"; }

# is_below PATH tells whether PATH lies in the instance's folder, by either of its paths.
is_below() { [ "${1#"$RUN_DIR"/}" != "$1" ] || [ "${1#"$RUN"/}" != "$1" ]; }

# end_containers asks containerd, the way any client would.
end_containers() {
	local namespace container
	for namespace in $(ctr namespaces ls -q); do
		for container in $(ctr -n "$namespace" tasks ls -q); do
			ctr -n "$namespace" tasks kill --all -s SIGKILL "$container" || true
			ctr -n "$namespace" tasks delete --force "$container" || true
		done
		for container in $(ctr -n "$namespace" containers ls -q); do
			ctr -n "$namespace" containers delete "$container" || true
		done
	done
}

# shims prints the pids of shims that serve this containerd, by the address on their command line.
shims() {
	local file pid
	for file in /proc/[0-9]*/cmdline; do
		pid=${file#/proc/}
		pid=${pid%/cmdline}
		if { tr '\0' ' ' <"$file"; } 2>/dev/null | grep -qF -e "-address $ADDRESS " -e "-address $RUN_DIR/containerd.sock "; then
			case $(readlink "/proc/$pid/exe" 2>/dev/null) in
			*/containerd-shim-*) printf '%s\n' "$pid" ;;
			esac
		fi
	done
}

# descendants PID prints all processes below PID. A shim is the reaper of everything in its containers.
descendants() {
	local child
	for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
		printf '%s\n' "$child"
		descendants "$child"
	done
}

# container_inits prints the recorded first process of every bundle, for containers whose shim is gone.
container_inits() {
	local file pid
	for file in "$RUN_DIR"/containerd/state/io.containerd.runtime.v2.task/*/*/init.pid; do
		{ read -r pid <"$file"; } 2>/dev/null || [ -n "${pid:-}" ] || continue
		# The pid may belong to someone else by now; only a process in this bundle's cgroup is ours.
		if grep -qF "/$(basename "$(dirname "$file")")" "/proc/$pid/cgroup" 2>/dev/null; then
			printf '%s\n' "$pid"
			descendants "$pid"
		fi
		pid=
	done
}

# thaw PID lets a frozen process run: a frozen one does not even die.
thaw() {
	local line path
	while IFS= read -r line; do
		path=${line#*:*:}
		[ "$path" != / ] || continue
		case $line in
		*:freezer:*) echo THAWED >"/sys/fs/cgroup/freezer$path/freezer.state" ;;
		0::*) for root in /sys/fs/cgroup /sys/fs/cgroup/unified; do
			if [ -f "$root$path/cgroup.freeze" ]; then
				echo 0 >"$root$path/cgroup.freeze"
			fi
		done ;;
		esac
	done <"/proc/$1/cgroup" 2>/dev/null || true
}

# end_shims kills what end_containers could not: shims, and the containers below them.
end_shims() {
	local pid all
	all=$( (for pid in $(shims); do
		descendants "$pid"
		printf '%s\n' "$pid"
	done
	container_inits) | sort -un)
	[ -n "$all" ] || return 0
	for pid in $all; do
		thaw "$pid" 2>/dev/null || true
	done
	for pid in $all; do
		end_process "$pid" "$(start_time "$pid" || true)" KILL 10 || say "warning: process $pid does not die"
	done
}

# end_daemon NAME ends one daemon, gently at first.
end_daemon() {
	local pid began
	pid=$(alive "$1") || return 0
	began=$(start_time "$pid") || return 0
	end_process "$pid" "$began" TERM 10 || end_process "$pid" "$began" KILL 10 || die "$1 (process $pid) does not die" "it hangs in the kernel: see /proc/$pid/stack"
}

# containers prints "namespace id" for every bundle that exists, also of a containerd that was killed.
containers() {
	local bundle
	for bundle in "$RUN_DIR"/containerd/state/io.containerd.runtime.v2.task/*/*; do
		[ -d "$bundle" ] || continue
		printf '%s %s\n' "$(basename "$(dirname "$bundle")")" "$(basename "$bundle")"
	done
}

# remove_container NAMESPACE ID removes runc's record and the cgroups of a container whose processes are gone.
remove_container() {
	local namespace=$1 id=$2 state cgroup
	for state in "/run/containerd/runc/$namespace" "$RUN/state/runc/$namespace"; do
		if [ -d "$state/$id" ]; then
			timeout 15 "$TOOLS_DIR/bin/runc" --root "$state" delete --force "$id" 2>/dev/null || rm -rf "${state:?}/$id"
		fi
	done
	for cgroup in /sys/fs/cgroup/"$namespace/$id" /sys/fs/cgroup/*/"$namespace/$id"; do
		if [ -d "$cgroup" ]; then
			find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
		fi
	done
}

# remove_fifos removes the named pipes that a client made for a container's standard streams, in containerd's
# default place, and could not remove because its container ended with the daemon. One in use is left alone.
remove_fifos() {
	local id=$1 folder
	for folder in /run/containerd/fifo/*/; do
		folder=${folder%/}
		if [ -p "$folder/$id-stdout" ] || [ -p "$folder/$id-stdin" ]; then
			[ -n "$(find /proc/[0-9]*/fd -lname "$folder/*" -print -quit 2>/dev/null)" ] || rm -rf "$folder"
		fi
	done
}

# remove_mounts unmounts everything below the instance's folder, the newest first. Lines of mountinfo write
# a blank as \040; printf %b turns it back (the digits are octal either way).
remove_mounts() {
	local round point left
	for round in 1 2 3; do
		left=
		while read -r point; do
			point=$(printf '%b' "${point//\\/\\0}")
			is_below "$point" || continue
			left=yes
			umount "$point" 2>/dev/null || [ "$round" -lt 2 ] || umount --lazy "$point" || true
		done < <(awk '{print $5}' /proc/self/mountinfo | tac)
		[ -n "$left" ] || return 0
	done
}

# remove_loops frees loop devices whose file is below the instance's folder.
remove_loops() {
	local file backing device
	for file in /sys/block/loop*/loop/backing_file; do
		{ read -r backing <"$file"; } 2>/dev/null || continue
		is_below "${backing% (deleted)}" || continue
		device=${file#/sys/block/}
		losetup --detach "/dev/${device%%/*}" || true
	done
}

# remove_short_path undoes what up.sh did for an instance in a deep folder.
remove_short_path() {
	[ "$RUN" != "$RUN_DIR" ] || return 0
	while mountpoint -q "$RUN"; do
		umount "$RUN" 2>/dev/null || umount --lazy "$RUN" || die "$RUN cannot be unmounted" "see who uses it: fuser -m $RUN"
	done
	[ ! -d "$RUN" ] || rmdir "$RUN"
}

main() {
	local namespace id bundles
	parse_instance "$@"
	need_root
	lock_instance
	if [ ! -e "$RUN_DIR" ] && [ -z "$(shims)" ]; then
		remove_short_path
		return 0
	fi
	bundles=$(containers)
	if alive containerd >/dev/null && [ -S "$ADDRESS" ]; then
		end_containers >>"$RUN_DIR/down.log" 2>&1 || say "containerd does not answer; ending its containers without it"
	fi
	end_daemon containerd
	end_shims
	while read -r namespace id; do
		[ -n "$id" ] || continue
		remove_container "$namespace" "$id"
		remove_fifos "$id"
	done <<<"$bundles"
	end_daemon cohortd
	remove_mounts
	remove_loops
	remove_short_path

	# One file system only: whatever is still mounted below here is not the instance's to delete.
	rm -rf --one-file-system "$RUN_DIR" || die "$RUN_DIR could not be removed" "see what is still in it; mount | grep $RUN_DIR"

	# Folders that containers leave behind outside, as far as they are empty.
	while read -r namespace _; do
		[ -z "$namespace" ] || rmdir "/run/containerd/runc/$namespace" /sys/fs/cgroup/"$namespace" /sys/fs/cgroup/*/"$namespace" 2>/dev/null || true
	done <<<"$(printf 'default x\n%s\n' "$bundles" | sort -u)"
	rmdir /run/containerd/runc /run/containerd/fifo /run/containerd/s /run/containerd 2>/dev/null || true
	say "ended; $RUN_DIR is removed"
}

main "$@"
