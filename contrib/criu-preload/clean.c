// SPDX-License-Identifier: Apache-2.0

/*
 * COHORT_CRIU_SKIP_CLEAN: the pages that CRIU dumps of a private mapping are only those written since they were last
 * write-protected by userfaultfd. The others were copied while the container ran, and are added to the images
 * afterwards (runtime/memory/pages). CRIU asks for pages with ioctl(PAGEMAP_SCAN) (criu/pagemap-cache.c, pmc_fill); one
 * category more is required of them here. Shared memory is not concerned: CRIU finds its pages by mincore(2)
 * (criu/shmem.c), unless told otherwise by CRIU_TRACK_SHMEM, and then nothing is changed here. The vDSO and asynchronous
 * I/O rings are dumped whole in any case.
 *
 * With the value "told" this is done for the processes alone that are named at the gate (see gate.c): those that somebody has looked
 * through after the freeze, and of which he has everything that the kernel does not say to be written. Nobody else's
 * page tables are believed: marks of write protection stay in them where a mapping has lost its registration
 * (runtime/memory/track, Clean). With "1" it is done for all processes.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>

#include "internal.h"

#define MOST_TOLD 16384

static long told[MOST_TOLD];
static int told_count, told_all;

static int asks_to_be_told(void)
{
	const char *value = getenv("COHORT_CRIU_SKIP_CLEAN");

	return value && is_same_text(value, "told");
}

/*
 * hear_told reads "PID,PID,...\n", or "*\n" for all. Of what does not fit, everything is dumped. A shim that is older than this
 * library says nothing, and has not asked for it.
 */
int hear_told(int socket)
{
	char text[512];
	long pid = 0, count, i;

	if (!asks_to_be_told())
		return 0;
	for (;;) {
		count = raw(SYS_read, socket, (long)text, sizeof(text), 0, 0, 0);
		if (count == -EINTR)
			continue;
		if (count <= 0)
			return -1;
		for (i = 0; i < count; i++) {
			if (text[i] >= '0' && text[i] <= '9') {
				pid = pid * 10 + (text[i] - '0');
				continue;
			}
			if (text[i] == '*')
				told_all = 1;
			else if (pid && told_count < MOST_TOLD)
				told[told_count++] = pid;
			pid = 0;
			if (text[i] == '\n')
				return 0;
		}
	}
}

static int is_told(long pid)
{
	static long last;
	int i;

	if (told_all || (pid && pid == last))
		return 1;
	for (i = 0; i < told_count; i++)
		if (told[i] == pid) {
			last = pid;
			return 1;
		}
	return 0;
}

/* skips_clean says whether the clean pages of the process whose pagemap fd is are left out. */
static int skips_clean(int fd)
{
	return is_set("COHORT_CRIU_SKIP_CLEAN") || (asks_to_be_told() && is_told(pagemap_pid(fd)));
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

static long scan_written(int fd, struct scan *scan)
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
		/* When the walk reaches the end, the kernel leaves an earlier place here (6.7 to 6.18, do_pagemap_scan). */
		at = count < CANDIDATES ? scan->end : found[count - 1].end;
	}
	scan->walk_end = at;
	return total;
}

/*
 * is_dump_scan knows CRIU's request for the pages to dump by its masks. The same masks without room for
 * an answer are its test of the kernel (criu/kerndat.c, check_pagemap), and guard pages are asked for otherwise.
 */
static int is_dump_scan(const struct scan *scan)
{
	return scan && scan->size == sizeof(*scan) && !scan->flags && scan->vec_len &&
	       scan->category_mask == (SCAN_PFNZERO | SCAN_FILE) && scan->category_inverted == (SCAN_PFNZERO | SCAN_FILE) &&
	       scan->category_anyof_mask == (SCAN_PRESENT | SCAN_SWAPPED);
}

/* The request is a long in glibc and an int in musl; its upper half says nothing. */
__attribute__((visibility("default"))) int ioctl(int fd, unsigned long request, ...)
{
	struct scan *scan;
	va_list args;
	long arg, result;

	va_start(args, request);
	arg = va_arg(args, long);
	va_end(args);
	scan = (struct scan *)arg;
	request = (uint32_t)request;
	if (request != SCAN || !is_dump_scan(scan) || !skips_clean(fd) || getenv("CRIU_TRACK_SHMEM"))
		return (int)answer(raw(SYS_ioctl, fd, (long)request, arg, 0, 0, 0));
	/*
	 * CRIU wants no page of a file, and all pages of shared memory are a file's (fs/proc/task_mmu.c,
	 * pagemap_page_category). The kernel would look at each of them, in every process that maps it.
	 */
	if (is_shared(fd, scan->start, scan->end)) {
		scan->walk_end = scan->end;
		return 0;
	}
	scan->category_mask |= SCAN_WRITTEN;
	result = scan_written(fd, scan);
	scan->category_mask &= ~(uint64_t)SCAN_WRITTEN;
	return (int)answer(result);
}
