// SPDX-License-Identifier: Apache-2.0

/* enter ROOT PROGRAM ARGS...: runs PROGRAM in a mount namespace of its own in which ROOT is everything, as a container has it. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return perror("unshare"), 3;
	if (mount(argv[1], argv[1], NULL, MS_BIND, NULL) || chdir(argv[1]) || mount("proc", "proc", "proc", 0, NULL))
		return perror("mount"), 3;
	if (syscall(SYS_pivot_root, ".", "old") || umount2("/old", MNT_DETACH) || chdir("/"))
		return perror("pivot_root"), 3;
	/* CRIU dumps no file of a mount that this namespace has not. */
	close(0);
	syscall(SYS_close_range, 3u, ~0u, 0);
	if (open("/dev/null", O_RDWR) != 0 || dup2(0, 2) != 2)
		return 3;
	execv(argv[2], argv + 2);
	return perror(argv[2]), 3;
}
