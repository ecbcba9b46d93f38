// SPDX-License-Identifier: Apache-2.0

/* Fork, execve, exit, and pids that come again. */

#include "torture.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_DEPTH 2

/* struct clone_args of include/uapi/linux/sched.h, as of Linux 5.5. */
struct clone_arguments {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

static int free_slots(void)
{
	int n = 0;

	for (int i = 0; i < MAX_SLOTS; i++)
		n += atomic_load(&ctl->slots[i].pid) == 0;
	return n;
}

/* newborn makes a copy of the parent a process of its own. Nobody holds a lock of the process: see forked. */
static void newborn(void)
{
	my_pid = (int)syscall(SYS_getpid);
	rng = mix(rng + (uint64_t)my_pid);
	unlock_world();
	/* Huge pages of its parent are not mapped in it. */
	for (int i = 0; i < MAX_REGIONS; i++)
		if (regions[i].kind == HUGETLB)
			regions[i].used = 0;
}

/* forked is fork, with the process's other threads at rest. With a pid it is a clone that gets this pid. */
static int forked(int pid)
{
	pthread_rwlock_wrlock(&world);
	if (pid) {
		uint32_t tid = (uint32_t)pid;
		struct clone_arguments args = {.exit_signal = SIGCHLD, .set_tid = (uint64_t)(uintptr_t)&tid, .set_tid_size = 1};

		pid = (int)syscall(SYS_clone3, &args, sizeof(args));
	} else {
		pid = fork();
	}
	if (pid == 0)
		newborn();
	else
		pthread_rwlock_unlock(&world);
	return pid;
}

/* brief is the life of a child that ends soon. */
static void brief(void)
{
	verify_memory();
	nap(upto(20000));
	for (uint32_t n = upto(20); n > 0; n--)
		memory_step();
	nap(upto(20000));
	verify_memory();
	_exit(0);
}

static void fork_short(void)
{
	int pid = forked(0);

	if (pid == 0)
		brief();
	if (pid < 0)
		fail("fork: %s", strerror(errno));
	count(OP_FORK_SHORT);
}

static void fork_long(int depth)
{
	uint64_t life = 60 + upto(900);
	int pid = forked(0);

	if (pid == 0)
		become(depth + 1, life);
	if (pid < 0)
		fail("fork: %s", strerror(errno));
	count(OP_FORK_LONG);
}

/* fork_orphan leaves a grandchild whose parent has ended. */
static void fork_orphan(int depth)
{
	int pid = forked(0);

	if (pid < 0)
		fail("fork: %s", strerror(errno));
	if (pid == 0) {
		pid = fork();
		if (pid == 0) {
			newborn();
			become(depth + 1, 20 + upto(200));
		}
		_exit(pid < 0);
	}
	count(OP_FORK_ORPHAN);
}

/* again is execve of this program, in a process that has nothing to lose. */
static void again(int depth, uint64_t life)
{
	char d[24], l[24];
	char *args[] = {"torture", "--child", d, l, NULL};

	snprintf(d, sizeof(d), "%d", depth);
	snprintf(l, sizeof(l), "%lu", life);
	execv("/proc/self/exe", args);
	fail("execve: %s", strerror(errno));
}

static void fork_exec(int depth)
{
	uint64_t life = 20 + upto(300);
	int pid = forked(0);

	if (pid == 0)
		again(depth + 1, life);
	if (pid < 0)
		fail("fork: %s", strerror(errno));
	count(OP_EXEC);
}

static void reuse_pid(void)
{
	int pid = atomic_exchange(&ctl->last_pid, 0);

	if (!pid)
		return;
	pid = forked(pid);
	if (pid == 0)
		brief();
	if (pid > 0)
		count(OP_PID_REUSE);
	else if (errno != EEXIST)
		fail("clone3 with a pid: %s", strerror(errno));
}

static void reap(void)
{
	int status, pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (status)
			fail("process %d ended with status %#x", pid, status);
		atomic_store(&ctl->last_pid, pid);
	}
}

/* tree_step lets the tree of processes grow, one way or another. */
void tree_step(int depth)
{
	int room = free_slots() > 4 && depth < MAX_DEPTH;

	/* Some children are left as zombies for a while. */
	if (upto(4) == 0)
		reap();
	switch (upto(24)) {
	case 0:
	case 1:
		fork_short();
		break;
	case 2:
		reuse_pid();
		break;
	case 3:
		if (room)
			fork_long(depth);
		break;
	case 4:
		if (room && upto(2))
			fork_orphan(depth);
		break;
	case 5:
		if (room && upto(2))
			fork_exec(depth);
	}
}

/* tree_end ends the process, or makes another program of it. Its children are the first process's then. */
void tree_end(int depth, struct slot *slot)
{
	/* A thread must not end with the lock of a shared object in its hands. */
	pthread_rwlock_wrlock(&world);
	verify_memory();
	files_verify();
	files_remove();
	count(OP_EXIT);
	if (upto(3) == 0) {
		count(OP_EXEC);
		again(depth, 20 + upto(300));
	}
	atomic_store(&slot->pid, 0);
	_exit(0);
}
