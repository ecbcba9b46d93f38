// SPDX-License-Identifier: Apache-2.0

/* What a block of memory must hold, and whether it does. */

#include "torture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

/* A stale page is usually a few versions old: how far back fail's message looks. */
#define LOOK_BACK 100000

struct ctl *ctl;
int my_pid;
__thread uint64_t rng;
__thread int reporter;

static const char *const kinds[KINDS] = {
	"anonymous", "transparent huge", "hugetlb", "brk heap", "locked", "private file",
	"shared anonymous", "memfd", "shared file", "/dev/shm file",
};

static const char *const ops[OPS] = {
	"write", "write_run", "dontneed", "free", "pageout", "move", "grow", "join", "shrink", "dontunmap",
	"remap", "readonly", "guard", "readwrite", "lock", "new", "drop", "collapse", "brk", "hugetlb",
	"private_file", "shared_write", "shared_pwrite", "shared_remap", "punch", "file_append", "file_rewrite",
	"file_truncate", "file_rename", "file_replace", "file_unlink", "file_link", "file_dir", "shm_file",
	"fork_short", "fork_long", "fork_orphan", "exec", "exit", "pid_reuse", "stack", "vdso",
};

const char *kind_name(enum kind kind) { return kinds[kind]; }
const char *op_name(enum op op) { return ops[op]; }

/* The finalizer of splitmix64. */
uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

uint64_t rnd(void)
{
	rng += 0x9e3779b97f4a7c15ULL;
	return mix(rng);
}

uint64_t new_id(void) { return atomic_fetch_add(&ctl->next_id, 1) + 1; }

void count(enum op op)
{
	atomic_fetch_add(&ctl->ops[op], 1);
	atomic_fetch_add(&ctl->steps, 1);
}

/* check_failed stops the calling thread for good when something was found wrong: what is there is evidence. */
void check_failed(void)
{
	while (atomic_load(&ctl->failed))
		pause();
}

/* fail is what ends everything; the thread that reports goes on. */
void fail(const char *format, ...)
{
	char text[1000], line[1100];
	va_list args;
	int zero = 0, fd, n;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	n = snprintf(line, sizeof(line), "process %d: %s\n", my_pid, text);
	if (atomic_compare_exchange_strong(&ctl->failed, &zero, 1)) {
		memcpy(ctl->message, line, (size_t)n);
		ctl->message[n - 1] = '\0';
	}
	fd = open("/failed", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (write(2, line, (size_t)n) < 0 || write(fd, line, (size_t)n) < 0)
		_exit(4);
	close(fd);
	if (!reporter)
		check_failed();
}

static uint64_t base(uint64_t id, uint32_t block, uint32_t version)
{
	return mix(mix(id * 0x9e3779b97f4a7c15ULL + block) + version);
}

void fill(void *to, uint64_t id, uint32_t block, uint32_t version)
{
	uint64_t b = base(id, block, version), *w = to;

	for (size_t i = 0; i < BLOCK / sizeof(*w); i++)
		w[i] = version ? b + i * 0x9e3779b97f4a7c15ULL : 0;
}

/* differs returns the offset of the first wrong word, or -1. */
long differs(const void *at, uint64_t id, uint32_t block, uint32_t version)
{
	uint64_t b = base(id, block, version), wrong = 0;
	const uint64_t *w = at;

	for (size_t i = 0; i < BLOCK / sizeof(*w); i++)
		wrong |= w[i] ^ (version ? b + i * 0x9e3779b97f4a7c15ULL : 0);
	if (!wrong)
		return -1;
	for (size_t i = 0; i < BLOCK / sizeof(*w); i++)
		if (w[i] != (version ? b + i * 0x9e3779b97f4a7c15ULL : 0))
			return (long)(i * sizeof(*w));
	return 0; /* it has changed while it was looked at */
}

void object_init(struct object *o, uint32_t pages, int shared)
{
	pthread_mutexattr_t attr;

	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setpshared(&attr, shared ? PTHREAD_PROCESS_SHARED : PTHREAD_PROCESS_PRIVATE);
	pthread_mutex_init(&o->lock, &attr);
	object_reset(o, pages);
}

/* object_reset makes another object of it, under the same lock. */
void object_reset(struct object *o, uint32_t pages)
{
	memset((char *)o + sizeof(o->lock), 0, sizeof(*o) - sizeof(o->lock));
	o->id = new_id();
	o->pages = pages;
}

static uint64_t version_sum(uint32_t block, uint32_t version)
{
	return version ? mix(((uint64_t)block << 32) + version) : 0;
}

void set_version(struct object *o, uint32_t block, uint32_t version)
{
	o->sum -= version_sum(block, o->version[block]);
	o->version[block] = version;
	o->sum += version_sum(block, version);
}

/* forget: the kernel was told to drop n pages. */
void forget(struct object *o, uint32_t first, uint32_t n)
{
	for (uint32_t b = first * PER_PAGE; b < (first + n) * PER_PAGE; b++)
		set_version(o, b, 0);
	memset(o->freed + first, 0, n);
}

void verify_object(const struct object *o, const char *what)
{
	uint64_t sum = 0;

	if (o->pages > MAX_PAGES)
		fail("object %lu (%s): %u pages", o->id, what, o->pages);
	for (uint32_t b = 0; b < MAX_PAGES * PER_PAGE; b++) {
		sum += version_sum(b, o->version[b]);
		if (o->version[b] > o->counter || (o->version[b] && b >= o->pages * PER_PAGE))
			fail("object %lu (%s): block %u of %u pages has version %u, the newest is %u", o->id, what, b,
			     o->pages, o->version[b], o->counter);
	}
	if (sum != o->sum)
		fail("object %lu (%s): the sum of its versions is %lx, not %lx", o->id, what, sum, o->sum);
}

/* complain tells what a block has instead of what it should have. */
static void complain(struct region *r, uint32_t block, uint32_t version, long off)
{
	struct object *o = r->o;
	const char *at = r->addr + block * BLOCK;
	const uint64_t *w = (const uint64_t *)at;
	char has[96];

	snprintf(has, sizeof(has), "words %lx %lx at its beginning", w[0], w[1]);
	if (differs(at, 0, 0, 0) < 0)
		snprintf(has, sizeof(has), "zeros");
	for (uint32_t v = o->counter; v > 0 && o->counter - v < LOOK_BACK; v--)
		if (differs(at, o->id, block, v) < 0)
			snprintf(has, sizeof(has), "version %u", v);
	if (r->fd >= 0) {
		char buffer[BLOCK];

		if (pread(r->fd, buffer, BLOCK, (off_t)(block * BLOCK)) == (ssize_t)BLOCK)
			fprintf(stderr, "the file is %s\n", differs(buffer, o->id, block, version) < 0 ? "right" : "wrong");
	}
	fail("object %lu (%s) at %p: block %u (page %u of %u) should have version %u of %u and differs at byte %ld: it has %s",
	     o->id, kinds[r->kind], (void *)r->addr, block, (uint32_t)(block / PER_PAGE), o->pages, version, o->counter, off, has);
}

/*
 * verify_pages compares n pages with what they should be; the object is locked. Pages that were never
 * written, or are dropped, are only looked at where all is set: looking makes them present.
 */
void verify_pages(struct region *r, uint32_t first, uint32_t n, int all)
{
	struct object *o = r->o;

	for (uint32_t p = first; p < first + n; p++) {
		if (r->prot[p] == PROT_NONE) {
			if (!all)
				continue;
			if (mprotect(r->addr + p * PAGE, PAGE, PROT_READ) < 0)
				fail("mprotect of a guard page: %s", strerror(errno));
		}
		for (uint32_t b = p * PER_PAGE; b < (p + 1) * PER_PAGE; b++) {
			uint32_t v = o->version[b];
			const char *at = r->addr + b * BLOCK;
			long off;

			if (!v && !all)
				continue;
			off = v || !o->under ? differs(at, o->id, b, v) : differs(at, o->under, b, 1);
			if (off >= 0 && o->freed[p])
				off = differs(at, 0, 0, 0);
			if (off >= 0)
				complain(r, b, v, off);
		}
		if (r->prot[p] == PROT_NONE && mprotect(r->addr + p * PAGE, PAGE, PROT_NONE) < 0)
			fail("mprotect of a guard page: %s", strerror(errno));
	}
	atomic_fetch_add(&ctl->verified, n);
}

/* verify_protection asks the kernel to read and write where it must not. */
void verify_protection(struct region *r)
{
	for (uint32_t p = 0; p < r->o->pages; p++) {
		uint64_t word = 0;
		struct iovec mine = {&word, sizeof(word)}, there = {r->addr + p * PAGE, sizeof(word)};
		ssize_t n;

		if (r->prot[p] == (PROT_READ | PROT_WRITE))
			continue;
		n = process_vm_readv(getpid(), &mine, 1, &there, 1, 0);
		if ((n < 0) != (r->prot[p] == PROT_NONE))
			fail("object %lu (%s): page %u has protection %d and is %s", r->o->id, kinds[r->kind], p, r->prot[p],
			     n < 0 ? "unreadable" : "readable");
		if (n == (ssize_t)sizeof(word) && process_vm_writev(getpid(), &mine, 1, &there, 1, 0) >= 0)
			fail("object %lu (%s): page %u has protection %d and can be written to", r->o->id, kinds[r->kind], p, r->prot[p]);
	}
}
