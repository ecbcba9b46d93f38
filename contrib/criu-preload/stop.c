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

static int same(const char *a, const char *b)
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
	if (argv[0] && argv[1] && same(file, "tar") && same(argv[1], "--create") && is_set("COHORT_CRIU_NO_TAR"))
		raw(SYS_exit_group, 0, 0, 0, 0, 0, 0);
	return execvpe(file, argv, environ);
}

struct region {
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};

/*
 * The kernel looks at the struct page of every page in range when it is asked for SCAN_FILE (fs/proc/task_mmu.c,
 * pagemap_page_category), a cache miss each, though few pages have been written. So it is asked without that first,
 * which reads page tables only, and with it where there was an answer.
 */
#define CANDIDATES 1024
/* Candidates with less than this between them, in bytes, are looked at together: a call costs about as much as 16 pages. */
#define NEAR (16 * 4096)

long scan_written(int fd, struct scan *scan)
{
	static struct region found[CANDIDATES]; /* CRIU dumps in one thread */
	struct region *out = (struct region *)scan->vec;
	uint64_t at = scan->start, room = scan->vec_len;
	long total = 0, count, i;

	while (at < scan->end && room > 0) {
		struct scan first = {
			.size = sizeof(first),
			.start = at,
			.end = scan->end,
			.vec = (uint64_t)found,
			.vec_len = CANDIDATES,
			.category_mask = SCAN_WRITTEN,
			.category_anyof_mask = SCAN_PRESENT | SCAN_SWAPPED,
			.return_mask = SCAN_WRITTEN,
		};

		count = raw(SYS_ioctl, fd, SCAN, (long)&first, 0, 0, 0);
		if (count < 0)
			return raw(SYS_ioctl, fd, SCAN, (long)scan, 0, 0, 0);
		for (i = 0; i < count;) {
			struct scan rest = *scan;
			long got;

			rest.start = found[i].start;
			rest.end = found[i].end;
			for (i++; i < count && found[i].start - rest.end < NEAR; i++)
				rest.end = found[i].end;
			rest.vec = (uint64_t)out;
			rest.vec_len = room;
			got = raw(SYS_ioctl, fd, SCAN, (long)&rest, 0, 0, 0);
			if (got < 0)
				return got;
			total += got;
			out += got;
			room -= (uint64_t)got;
			if (room == 0) {
				scan->walk_end = rest.walk_end;
				return total;
			}
		}
		at = first.walk_end;
	}
	scan->walk_end = at;
	return total;
}
