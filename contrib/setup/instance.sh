# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# One private instance of containerd and cohortd, everything of it below one folder. Shared by env.sh,
# up.sh and down.sh. Several instances may run side by side; each has its own folder.

# shellcheck source=contrib/setup/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

# A unix socket's path has room for 107 bytes (linux/un.h), and containerd gives the folder of the shims'
# sockets 42. An instance that lies deeper than that is reached through a bind mount with a short path. (A
# symbolic link would not do: daemons rightly work with the real path of their folder.)
MAX_RUN_LENGTH=38

# The longest wait for a daemon to come up or to end, in seconds.
WAIT_LIMIT=${COHORT_WAIT_LIMIT:-120}

# parse_instance ARGUMENT... sets RUN_DIR, the real folder of the instance, from --run DIR or RUNDIR, RUN and
# ADDRESS, by which it is reached, and IMAGES, the images that it wants.
parse_instance() {
	RUN_DIR=${RUNDIR:-$PROJECT_DIR/.run}
	IMAGES=all
	while [ $# -gt 0 ]; do
		case $1 in
		--run)
			[ $# -ge 2 ] || die "--run needs a folder"
			RUN_DIR=$2
			shift
			;;
		--run=*) RUN_DIR=${1#--run=} ;;
		--images)
			[ $# -ge 2 ] || die "--images needs names, or none"
			IMAGES=${2//,/ }
			shift
			;;
		*) die "unknown argument '$1'" "usage: ${0##*/} [--run DIR] [--images NAME,...|none]" ;;
		esac
		shift
	done
	RUN_DIR=$(realpath -m -- "$RUN_DIR")
	case $RUN_DIR in
	/ | /run | /tmp | /var | /home | /root | "$PROJECT_DIR") die "$RUN_DIR cannot be an instance's folder: make down deletes it" "name a folder of its own" ;;
	esac
	case $RUN_DIR in
	*[[:space:]:,]*) die "the folder $RUN_DIR has a blank, a colon or a comma in its name" "name one without" ;;
	esac
	RUN=$RUN_DIR
	if [ ${#RUN_DIR} -gt $MAX_RUN_LENGTH ]; then
		RUN=/run/cohort-$(printf %s "$RUN_DIR" | sha256sum | cut -c1-12)
	fi
	ADDRESS=$RUN/containerd.sock
}

# lock_instance lets one up or down at a time work on an instance. The lock is on the parent folder, since
# the instance's own is deleted by down.
lock_instance() {
	mkdir -p "${RUN_DIR%/*}"
	exec 8<"${RUN_DIR%/*}"
	flock -w 120 8 || die "another up or down has been at work beside $RUN_DIR for two minutes" "see who holds it with: fuser ${RUN_DIR%/*}"
}

# print_environment prints what a shell needs in order to use the instance, and nothing else.
print_environment() {
	printf 'export CONTAINERD_ADDRESS=%q\n' "$ADDRESS"
	printf 'export CONTAINERD_NAMESPACE=default\n'
	printf 'export CONTAINERD_SNAPSHOTTER=cohort\n'
	printf 'export COHORT_STATE=%q\n' "$RUN/state"
	printf 'export COHORT_ROOT=%q\n' "$RUN/cohort"
	# A second eval in the same shell must not make PATH longer.
	case :$PATH: in
	:"$PROJECT_DIR/bin:$TOOLS_DIR/bin":*) printf 'export PATH=%q\n' "$PATH" ;;
	*) printf 'export PATH=%q\n' "$PROJECT_DIR/bin:$TOOLS_DIR/bin:$PATH" ;;
	esac
}

# start_time PID prints when a process began, in clock ticks since boot (field 22 of /proc/PID/stat). With
# the pid it names one process for good; pids alone are used again.
start_time() {
	local stat
	{ read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
	# The command's name, in parentheses, may hold blanks: count from behind it.
	stat=${stat##*) }
	# shellcheck disable=SC2086
	set -- $stat
	[ "$1" != Z ] || return 1
	printf '%s\n' "${20}"
}

# alive NAME prints the pid of the instance's daemon NAME if that very process still runs.
alive() {
	local pid began
	{ read -r pid began <"$RUN_DIR/$1.pid"; } 2>/dev/null || return 1
	[ "$(start_time "$pid")" = "$began" ] || return 1
	printf '%s\n' "$pid"
}

# end_process PID BEGAN SIGNAL SECONDS signals one process and waits until it has gone. Status 1 if it has not.
end_process() {
	local pid=$1 began=$2 signal=$3 deadline=$((SECONDS + $4))
	[ "$(start_time "$pid")" = "$began" ] || return 0
	kill -s "$signal" "$pid" 2>/dev/null || return 0
	while [ "$(start_time "$pid")" = "$began" ]; do
		[ $SECONDS -lt $deadline ] || return 1
		sleep 0.02
	done
}
