// SPDX-License-Identifier: Apache-2.0

/*
 * What makes the dump of a frozen container shorter. Each part is asked for by a variable of the environment,
 * and where it cannot be had CRIU does what it always does, which takes longer.
 *
 * COHORT_CRIU_NO_TAR=1: the content of a tmpfs is not archived. CRIU runs "tar --gzip" for each (criu/filesystems.c,
 * tmpfs_dump), 5 to 10 ms each; /dev is one in every container. The image is left empty, which no archive is, and
 * whoever set the variable fills it (runtime/criu).
 */

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

int is_same_text(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

/* CRIU has forked: this is the child that would become tar. */
__attribute__((visibility("default"))) int execvp(const char *file, char *const argv[])
{
	if (argv[0] && argv[1] && is_same_text(file, "tar") && is_same_text(argv[1], "--create") && is_set("COHORT_CRIU_NO_TAR"))
		raw(SYS_exit_group, 0, 0, 0, 0, 0, 0);
	return execvpe(file, argv, environ);
}
