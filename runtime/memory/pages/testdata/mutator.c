// SPDX-License-Identifier: Apache-2.0

/*
 * mutator PAGES STEPS RESULT: keeps changing PAGES pages of private memory and some of shared, and knows at any time what each must
 * hold. It tracks its memory itself with userfaultfd, and stops once for somebody to take the descriptor over:
 * CRIU dumps no process that has one. After that it changes STEPS pages between pauses of a millisecond
 * until SIGUSR1 comes; then it compares all of its memory, writes the verdict to RESULT, and ends.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

static volatile sig_atomic_t ending;
static uint64_t seed = 88172645463325252ull;

static void end(int signal)
{
	(void)signal;
	ending = 1;
}

static uint64_t next(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static void fill(uint64_t *page, uint64_t value, size_t words)
{
	size_t i;

	for (i = 0; i < words; i++)
		page[i] = value ? value + i : 0;
}

static int differs(const uint64_t *page, uint64_t value, size_t words)
{
	size_t i;

	for (i = 0; i < words; i++)
		if (page[i] != (value ? value + i : 0))
			return 1;
	return 0;
}

int main(int argc, char **argv)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };
	struct timespec pause = { 0, 1000000 };
	size_t page = (size_t)getpagesize(), words = page / sizeof(uint64_t), pages, steps, i;
	uint64_t *expected;
	char *memory, *shared, *late = NULL;
	uint64_t changes = 0;
	size_t bad = 0;
	FILE *result;
	int uffd;

	if (argc != 4)
		return 2;
	pages = strtoul(argv[1], NULL, 10);
	steps = strtoul(argv[2], NULL, 10);
	signal(SIGUSR1, end);
	memory = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	shared = mmap(NULL, pages / 8 * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	expected = calloc(3 * pages, sizeof(*expected));
	if (memory == MAP_FAILED || shared == MAP_FAILED || !expected)
		return 3;
	for (i = 0; i < pages / 10; i++)
		fill((uint64_t *)(shared + i * page), expected[2 * pages + i] = next() | 1, words);
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		return perror("userfaultfd"), 4;
	reg.range.start = (uintptr_t)memory;
	reg.range.len = pages * page;
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		return perror("register"), 5;
	/* Three quarters from the start; the last quarter grows while it is watched. */
	for (i = 0; i < pages * 3 / 4; i++)
		fill((uint64_t *)(memory + i * page), expected[i] = next() | 1, words);
	printf("%d %zu %zu\n", uffd, (size_t)memory, pages * page);
	fflush(stdout);
	raise(SIGSTOP);
	close(uffd);
	close(1);
	open("/dev/null", O_WRONLY);

	while (!ending) {
		for (i = 0; i < steps; i++) {
			uint64_t what = next();
			/* Most changes are in a tenth of the memory. */
			size_t n = next() % (what % 4 ? pages / 10 : pages);

			if (what % 64 == 1) {
				if (madvise(memory + n * page, page, MADV_DONTNEED))
					return perror("madvise"), 6;
				expected[n] = 0;
			} else {
				expected[n] = what % 64 == 2 ? 0 : next() | 1;
				fill((uint64_t *)(memory + n * page), expected[n], words);
			}
			changes++;
		}
		/* CRIU takes shared memory whole, in each checkpoint. */
		i = next() % (pages / 8);
		fill((uint64_t *)(shared + i * page), expected[2 * pages + i] = next() | 1, words);
		/* A mapping that nobody tracks. */
		if (!late && changes > 20 * steps) {
			late = mmap(NULL, pages / 16 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			if (late == MAP_FAILED)
				return perror("mmap"), 7;
			for (i = 0; i < pages / 16; i++)
				fill((uint64_t *)(late + i * page), expected[pages + i] = next() | 1, words);
		}
		nanosleep(&pause, NULL);
	}
	for (i = 0; i < pages; i++)
		bad += differs((uint64_t *)(memory + i * page), expected[i], words);
	for (i = 0; late && i < pages / 16; i++)
		bad += differs((uint64_t *)(late + i * page), expected[pages + i], words);
	for (i = 0; i < pages / 8; i++)
		bad += differs((uint64_t *)(shared + i * page), expected[2 * pages + i], words);
	result = fopen(argv[3], "w");
	if (!result)
		return perror("result"), 8;
	fprintf(result, "%zu of %zu pages differ after %llu changes\n", bad, pages, (unsigned long long)changes);
	return fclose(result) || bad ? 9 : 0;
}
