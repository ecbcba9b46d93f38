// SPDX-License-Identifier: Apache-2.0

/*
 * subject MIB WRITERS [quiet|punch]: many processes that write to shared memory without a pause, in every way there is;
 * quiet: only WRITERS that have been there from the start, to anonymous memory; punch: and one more that makes holes. All are in one process group. Prints "ready" when
 * all objects are there, then closes its output.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB (1UL << 20)
#define PAGE 4096UL

static uint64_t state;
static int rest = 200; /* microseconds after each write */

static uint64_t any(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static char *map(int fd, unsigned long size, unsigned long offset, int prot)
{
	char *p = mmap(NULL, size, prot, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, offset);

	if (p == MAP_FAILED)
		fail("mmap");
	return p;
}

/* scribble writes, and sometimes lets the page table forget it, which changes nothing of the memory. */
static void scribble(char *p, unsigned long size)
{
	uint64_t at = any() % (size / PAGE) * PAGE + any() % (PAGE / 8) * 8;

	*(uint64_t *)(p + at) = any();
	if (any() % 4 == 0)
		madvise(p + at / PAGE * PAGE, PAGE, MADV_DONTNEED);
	usleep(rest);
}

static int null;

static void close_output(void)
{
	int n;

	for (n = 0; n < 3; n++)
		dup2(null, n);
	close(null);
}

static int started(int seed)
{
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (pid)
		return 0;
	close_output();
	state = 88172645463325252UL * (seed + 1);
	return 1;
}

int main(int argc, char **argv)
{
	unsigned long big = (argc > 1 ? strtoul(argv[1], NULL, 10) : 8) * MIB, i;
	int writers = argc > 2 ? atoi(argv[2]) : 3, written, holes, beyond, open_only;
	char *anonymous, *window, *punched, *head, *readable, *small;
	int n;

	null = open("/dev/null", O_RDWR);
	if (argc > 3)
		rest = 10000;
	anonymous = map(-1, 2 * big, 0, PROT_READ | PROT_WRITE);
	for (i = 0; i < big; i += PAGE)
		*(uint64_t *)(anonymous + i) = i + 1;
	small = map(-1, 2 * PAGE, 0, PROT_READ | PROT_WRITE);
	*small = 1;
	written = memfd_create("written", 0);
	holes = memfd_create("holes", 0);
	beyond = memfd_create("beyond", 0);
	open_only = memfd_create("open only", 0);
	if (ftruncate(written, 4 * MIB) || ftruncate(holes, 4 * MIB) || ftruncate(beyond, 8 * MIB) || ftruncate(open_only, MIB + 100))
		fail("ftruncate");
	window = map(written, MIB, MIB, PROT_READ | PROT_WRITE);
	memset(window, 1, MIB);
	punched = map(holes, 4 * MIB, 0, PROT_READ | PROT_WRITE);
	memset(punched, 2, 4 * MIB);
	head = map(beyond, MIB, 0, PROT_READ | PROT_WRITE);
	memset(head, 3, MIB);
	for (i = 0; i < 300; i++)
		if (pwrite(beyond, &i, sizeof(i), 4 * MIB + i * PAGE) < 0 || pwrite(open_only, &i, sizeof(i), i % 256 * PAGE) < 0)
			fail("pwrite");

	for (n = 0; n < writers; n++)
		if (started(n))
			for (;;)
				scribble(anonymous, big + big / 2);
	if (argc > 3) {
		if (!strcmp(argv[3], "punch") && started(60))
			for (;;) {
				unsigned long at = any() % (big / PAGE) * PAGE;

				madvise(anonymous + at, PAGE, MADV_REMOVE);
				if (at & PAGE)
					state += (unsigned char)anonymous[at];
				usleep(rest);
			}
		puts("ready");
		fflush(stdout);
		close_output();
		for (;;)
			pause();
	}
	if (started(50)) { /* writers that are born, write and die */
		for (n = 0;; n++) {
			pid_t child = fork();

			if (!child) {
				state += n;
				scribble(anonymous, big);
				scribble(window, MIB);
				_exit(0);
			}
			waitpid(child, NULL, 0);
		}
	}
	if (started(51)) { /* mappings that come and go */
		for (;;) {
			char *p = map(written, 4 * MIB, 0, PROT_READ | PROT_WRITE);

			scribble(p, 4 * MIB);
			munmap(p, 4 * MIB);
		}
	}
	if (started(52)) { /* by descriptor, behind all mappings too */
		for (;;) {
			uint64_t v = any();

			if (pwrite(written, &v, sizeof(v), v % (4 * MIB - 8)) < 0 || pwrite(beyond, &v, sizeof(v), v % (8 * MIB - 8)) < 0 ||
			    pwrite(open_only, &v, sizeof(v), v % (MIB + 92)) < 0)
				_exit(1);
			usleep(200);
		}
	}
	if (started(53)) { /* holes */
		for (;;) {
			unsigned long at = any() % 1000 * PAGE;

			if (madvise(punched + at, 8 * PAGE, MADV_REMOVE) ||
			    fallocate(holes, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, any() % 1000 * PAGE + 100, 5 * PAGE) ||
			    fallocate(holes, FALLOC_FL_KEEP_SIZE, any() % 1000 * PAGE, 5 * PAGE))
				_exit(1);
			scribble(punched, 4 * MIB);
			madvise(anonymous + any() % (big / PAGE) * PAGE, PAGE, MADV_DONTNEED);
		}
	}
	if (started(54)) { /* reads only */
		munmap(anonymous, big);
		readable = map(beyond, 2 * MIB, MIB, PROT_READ);
		for (;;) {
			scribble(head, MIB);
			state += (unsigned char)readable[any() % (2 * MIB)];
		}
	}
	puts("ready");
	fflush(stdout);
	close_output();
	state = 1;
	for (;;)
		scribble(head, MIB);
}
