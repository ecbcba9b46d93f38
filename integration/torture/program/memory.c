// SPDX-License-Identifier: Apache-2.0

/* What is done to private memory. Each step holds the lock of the region that it changes. */

#include "torture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define RW (PROT_READ | PROT_WRITE)
#define BASE_FILE "/data/base"
#define JOIN_PAGES 8U
#define LOCKED_PAGES 12U /* an unprivileged process may lock 16 */

struct region regions[MAX_REGIONS];
static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER;
static uint64_t base_id;

/* reserve finds a hole of the address space and keeps it. */
char *reserve(size_t size)
{
	char *p = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		fail("mmap of %zu bytes: %s", size, strerror(errno));
	return p;
}

/* map_at maps pages of a region's kind over what is at addr. */
static void map_at(struct region *r, char *addr, uint32_t first, uint32_t n)
{
	int flags = MAP_PRIVATE | MAP_FIXED, fd = -1;
	off_t off = 0;
	void *p;

	if (r->kind == FILEPRIV) {
		fd = open(BASE_FILE, O_RDONLY | O_CLOEXEC);
		off = (off_t)(first * PAGE);
	} else {
		flags |= MAP_ANONYMOUS;
	}
	if (r->kind == HUGETLB)
		flags |= MAP_HUGETLB;
	p = mmap(addr, n * PAGE, RW, flags, fd, off);
	if (p != addr)
		fail("mmap of %u pages (%s) at %p: %s", n, kind_name(r->kind), (void *)addr, strerror(errno));
	if (fd >= 0)
		close(fd);
	if (r->kind == THP)
		madvise(addr, n * PAGE, MADV_HUGEPAGE);
	if (r->kind == HUGETLB)
		/* A child that copies a huge page and gets none dies of it. */
		madvise(addr, n * PAGE, MADV_DONTFORK);
}

static uint32_t total_pages(void)
{
	uint32_t n = 0;

	for (int i = 0; i < MAX_REGIONS; i++)
		if (regions[i].used)
			n += regions[i].o->pages;
	return n;
}

/* add_region makes a region; the world is stopped, or the table locked. */
static struct region *add_region(enum kind kind, uint32_t pages, char *addr)
{
	struct region *r = NULL;
	struct object *o;

	for (int i = 0; i < MAX_REGIONS && !r; i++)
		if (!regions[i].used)
			r = &regions[i];
	if (!r)
		return NULL;
	if (!r->o) {
		o = mmap(NULL, sizeof(*o), RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (o == MAP_FAILED)
			fail("mmap: %s", strerror(errno));
		object_init(o, 0, 0);
		r->o = o;
	}
	o = r->o;
	pthread_mutex_lock(&o->lock);
	object_reset(o, pages);
	if (kind == FILEPRIV)
		o->under = base_id;
	r->kind = kind;
	r->fd = -1;
	r->addr = addr;
	memset(r->prot, RW, sizeof(r->prot));
	if (kind == HEAP) {
		sbrk((intptr_t)(-(uintptr_t)sbrk(0) & (PAGE - 1)));
		r->addr = sbrk((intptr_t)(pages * PAGE));
		if (r->addr == (char *)-1)
			fail("sbrk: %s", strerror(errno));
	} else if (!addr) {
		size_t align = kind == THP || kind == HUGETLB ? HUGE : PAGE;
		char *hole = reserve(pages * PAGE + align);

		r->addr = (char *)(((uintptr_t)hole + align - 1) & ~(align - 1));
		munmap(hole, (size_t)(r->addr - hole));
		munmap(r->addr + pages * PAGE, align - (size_t)(r->addr - hole));
		map_at(r, r->addr, 0, pages);
	}
	if (kind == LOCKED && mlock(r->addr, pages * PAGE) < 0)
		fail("mlock of %u pages: %s", pages, strerror(errno));
	r->used = 1;
	pthread_mutex_unlock(&o->lock);
	return r;
}

void memory_init(void)
{
	base_id = 1; /* its file is the same for all processes */
	if (access(BASE_FILE, F_OK) < 0) {
		char block[BLOCK];
		int fd = open(BASE_FILE, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);

		for (uint32_t b = 0; b < MAX_PAGES * PER_PAGE; b++) {
			fill(block, base_id, b, 1);
			if (write(fd, block, BLOCK) != (ssize_t)BLOCK)
				fail("%s: %s", BASE_FILE, strerror(errno));
		}
		close(fd);
	}
	add_region(ANON, 256, NULL);
	add_region(ANON, 64 + upto(256), NULL);
	add_region(THP, 1024, NULL);
	add_region(HEAP, 64, NULL);
	add_region(LOCKED, LOCKED_PAGES, NULL);
	add_region(FILEPRIV, 128, NULL);
	if (ctl->hugetlb && my_pid == 1) {
		add_region(HUGETLB, 512, NULL);
		count(OP_HUGETLB);
	}
}

void write_block(struct region *r, uint32_t block)
{
	struct object *o = r->o;
	uint32_t p = block / PER_PAGE, first = block, n = 1;

	if (!(r->prot[p] & PROT_WRITE))
		return;
	if (o->freed[p]) {
		/* From the first write on the kernel leaves the page alone, with the old content or without it. */
		first = p * PER_PAGE;
		n = PER_PAGE;
	}
	for (uint32_t b = first; b < first + n; b++) {
		fill(r->addr + b * BLOCK, o->id, b, ++o->counter);
		set_version(o, b, o->counter);
	}
	o->freed[p] = 0;
}

/* some picks a stretch of pages, mostly short. */
static uint32_t some(struct object *o, uint32_t *first)
{
	uint32_t n = 1 + upto(upto(8) ? 8 : 64);

	*first = upto(o->pages);
	return n > o->pages - *first ? o->pages - *first : n;
}

void protect(struct region *r, uint32_t first, uint32_t n, int prot)
{
	if (mprotect(r->addr + first * PAGE, n * PAGE, prot) < 0)
		fail("mprotect of %u pages (%s): %s", n, kind_name(r->kind), strerror(errno));
	memset(r->prot + first, prot, n);
}

static int mapped(char *addr)
{
	unsigned char there;

	return mincore(addr, PAGE, &there) == 0;
}

/*
 * move_pages_to moves mappings one by one: mremap refuses several at once if they are registered with
 * userfaultfd, and where only the second is, it fails with the first one moved (mm/mremap.c, remap_move).
 */
void move_pages_to(char *from, size_t size, char *to)
{
	size_t off = 0, n = size;

	while (off < size) {
		n = n > size - off ? size - off : n;
		if (!mapped(from + off)) {
			off += PAGE; /* moved by a call that failed */
		} else if (mremap(from + off, n, n, MREMAP_MAYMOVE | MREMAP_FIXED, to + off) != MAP_FAILED) {
			off += n;
			n = size;
		} else if (errno != EFAULT || n == PAGE) {
			fail("mremap of %zu bytes: %s", n, strerror(errno));
		} else {
			n = n / 2 > PAGE ? (n / 2) & ~(PAGE - 1) : PAGE;
		}
	}
}

static int movable(const struct region *r)
{
	return r->kind == ANON || r->kind == FILEPRIV || r->kind == THP;
}

static void move(struct region *r)
{
	size_t size = r->o->pages * PAGE;
	char *to = reserve(size);

	move_pages_to(r->addr, size, to);
	r->addr = to;
	count(OP_MOVE);
}

/* grow adds pages at the end, where they are or by moving. */
static void grow(struct region *r)
{
	struct object *o = r->o;
	uint32_t n = 1 + upto(64);
	char *end = r->addr + o->pages * PAGE, *p;

	if (o->pages + n > MAX_PAGES || total_pages() + n > ctl->memory)
		return;
	p = mremap(r->addr, o->pages * PAGE, (o->pages + n) * PAGE, MREMAP_MAYMOVE);
	if (p != MAP_FAILED) {
		r->addr = p;
	} else if (r->kind == FILEPRIV) {
		return;
	} else {
		/* Several mappings cannot grow as one. */
		p = mmap(end, n * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		if (p == MAP_FAILED)
			return;
	}
	/* What grew has the protection of what it grew from. */
	memset(r->prot + o->pages, RW, n);
	o->pages += n;
	protect(r, o->pages - n, n, RW);
	count(OP_GROW);
}

/*
 * join moves an empty mapping, which has been there for a while, to the end of a region. Where both are registered
 * with userfaultfd the kernel makes them one that is not, and leaves the marks of what was write-protected in the
 * region's page tables (mm/mremap.c, copy_vma and mremap_userfaultfd_prep).
 */
static void join(struct region *r)
{
	static __thread char *empty;
	static __thread int of;
	struct object *o = r->o;
	size_t size = JOIN_PAGES * PAGE;
	char *end = r->addr + o->pages * PAGE;

	if (empty && of == my_pid && o->pages + JOIN_PAGES <= MAX_PAGES && total_pages() + JOIN_PAGES <= ctl->memory &&
	    mmap(end, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == (void *)end) {
		if (mremap(empty, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, end) != (void *)end)
			fail("mremap of an empty mapping to the end of a region: %s", strerror(errno));
		empty = NULL;
		memset(r->prot + o->pages, RW, JOIN_PAGES);
		o->pages += JOIN_PAGES;
		count(OP_JOIN);
	}
	if (!empty || of != my_pid) {
		of = my_pid;
		/* Between two pages that are not alike, so that it is a mapping of its own. */
		empty = mmap(reserve(size + 2 * PAGE) + PAGE, size, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		if (empty == MAP_FAILED)
			fail("mmap: %s", strerror(errno));
	}
}

static void shrink(struct region *r)
{
	struct object *o = r->o;
	uint32_t n = 1 + upto(64);

	if (o->pages < n + 16)
		return;
	forget(o, o->pages - n, n);
	o->pages -= n;
	if (mremap(r->addr, (o->pages + n) * PAGE, o->pages * PAGE, 0) == MAP_FAILED &&
	    munmap(r->addr + o->pages * PAGE, n * PAGE) < 0)
		fail("munmap: %s", strerror(errno));
	count(OP_SHRINK);
}

static int readable(char *addr)
{
	uint64_t word;
	struct iovec mine = {&word, sizeof(word)}, there = {addr, sizeof(word)};

	return process_vm_readv(getpid(), &mine, 1, &there, 1, 0) > 0;
}

/* dontunmap moves the pages and leaves an empty mapping, which becomes a region or goes. */
static void dontunmap(struct region *r)
{
	struct object *o = r->o;
	size_t size = o->pages * PAGE, done = 0;
	char *to = reserve(size), *from = r->addr;
	struct region *left;

	protect(r, 0, o->pages, RW);
	if (mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == MAP_FAILED) {
		if (errno != EFAULT)
			fail("mremap with MREMAP_DONTUNMAP: %s", strerror(errno));
		/* There are several mappings, and the first may have been moved. */
		while (done < size && readable(to + done))
			done += PAGE;
		move_pages_to(to, done, from);
		munmap(to + done, size - done);
		return;
	}
	r->addr = to;
	left = total_pages() + o->pages <= ctl->memory ? add_region(ANON, o->pages, from) : NULL;
	if (left)
		verify_pages(left, 0, left->o->pages, 1);
	else
		munmap(from, size);
	count(OP_DONTUNMAP);
}

/* vacate unmaps a region and keeps its place, or another if a thread was quicker. */
static void vacate(struct region *r)
{
	size_t size = r->o->pages * PAGE;

	munmap(r->addr, size);
	if (mmap(r->addr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != (void *)r->addr)
		r->addr = reserve(size);
}

/* remap maps something new where something was. */
static void remap(struct region *r)
{
	uint32_t first = 0, n = r->o->pages;

	if (upto(2))
		n = some(r->o, &first);
	if (n == r->o->pages && upto(2))
		vacate(r);
	map_at(r, r->addr + first * PAGE, first, n);
	forget(r->o, first, n);
	memset(r->prot + first, RW, n);
	count(OP_REMAP);
}

static void give_back(struct region *r, int advice)
{
	struct object *o = r->o;
	uint32_t first, n = some(o, &first);

	if (advice == MADV_FREE && r->kind == FILEPRIV)
		return;
	if (madvise(r->addr + first * PAGE, n * PAGE, advice) < 0)
		fail("madvise %d of %u pages (%s): %s", advice, n, kind_name(r->kind), strerror(errno));
	if (advice == MADV_DONTNEED) {
		forget(o, first, n);
		count(OP_DONTNEED);
		return;
	}
	memset(o->freed + first, 1, n);
	count(OP_FREE);
	/* Without memory pressure nothing is dropped for long. */
	if (upto(2)) {
		madvise(r->addr + first * PAGE, n * PAGE, MADV_PAGEOUT);
		count(OP_PAGEOUT);
	}
}

static void drop(struct region *r)
{
	r->used = 0;
	munmap(r->addr, r->o->pages * PAGE);
	count(OP_DROP);
}

static void heap(struct region *r)
{
	struct object *o = r->o;
	uint32_t n = 1 + upto(32);

	if (upto(2) && o->pages + n <= 512) {
		if (sbrk((intptr_t)(n * PAGE)) != (void *)(r->addr + o->pages * PAGE))
			fail("sbrk: the heap has moved");
		memset(r->prot + o->pages, RW, n);
		o->pages += n;
	} else if (o->pages > n + 16) {
		forget(o, o->pages - n, n);
		o->pages -= n;
		sbrk(-(intptr_t)(n * PAGE));
	}
	count(OP_BRK);
}

static void lock_pages(struct region *r)
{
	uint32_t first, n = some(r->o, &first);

	munlock(r->addr + first * PAGE, n * PAGE);
	if (mlock(r->addr + first * PAGE, n * PAGE) < 0)
		fail("mlock of %u pages: %s", n, strerror(errno));
	count(OP_LOCK);
}

static void write_some(struct region *r)
{
	struct object *o = r->o;
	uint32_t first, n;

	if (upto(6)) {
		for (n = 1 + upto(8); n > 0; n--)
			write_block(r, upto(o->pages * PER_PAGE));
		count(r->kind == HUGETLB ? OP_HUGETLB : OP_WRITE);
		return;
	}
	n = some(o, &first);
	for (uint32_t b = first * PER_PAGE; b < (first + n) * PER_PAGE; b++)
		write_block(r, b);
	count(r->kind == FILEPRIV ? OP_PRIVATE_FILE : OP_WRITE_RUN);
}

/* change does something rarer to a region. */
static void change(struct region *r)
{
	struct object *o = r->o;
	uint32_t first, n = some(o, &first);

	switch (upto(17)) {
	case 0:
	case 1:
		give_back(r, MADV_DONTNEED);
		break;
	case 2:
	case 3:
		give_back(r, MADV_FREE);
		break;
	case 4:
		if (movable(r))
			move(r);
		break;
	case 5:
		if (movable(r) && r->kind != THP)
			grow(r);
		break;
	case 6:
		if (movable(r) && r->kind != THP)
			shrink(r);
		break;
	case 7:
		if (r->kind == ANON)
			dontunmap(r);
		break;
	case 8:
		if (movable(r))
			remap(r);
		break;
	case 9:
		protect(r, first, n, PROT_READ);
		count(OP_READONLY);
		break;
	case 10:
		protect(r, first, n, PROT_NONE);
		count(OP_GUARD);
		break;
	case 11:
	case 12:
		protect(r, 0, o->pages, RW);
		count(OP_READWRITE);
		break;
	case 13:
		if (r->kind == THP) {
			/* It may be refused: EAGAIN, ENOMEM, EINVAL where pages are protected. */
			madvise(r->addr, o->pages * PAGE, MADV_COLLAPSE);
			count(OP_COLLAPSE);
		}
		break;
	case 14:
		if (r->kind == ANON && total_pages() > ctl->memory / 2)
			drop(r);
		break;
	default:
		if (r->kind == ANON)
			join(r);
	}
}

/* memory_step does one thing to one region. The caller holds the world for reading. */
void memory_step(void)
{
	struct region *r = &regions[upto(MAX_REGIONS)];
	struct object *o;
	int rare = upto(8) == 0;

	if (rare)
		pthread_mutex_lock(&table);
	if (rare && !r->used && upto(3) == 0 && total_pages() + 256 <= ctl->memory) {
		add_region(ANON, 16 + upto(240), NULL);
		count(OP_NEW);
	}
	if (r->used) {
		o = r->o;
		pthread_mutex_lock(&o->lock);
		if (r->used) {
			if (rare && r->kind == HEAP && upto(2))
				heap(r);
			else if (rare && r->kind == LOCKED)
				lock_pages(r);
			else if (rare && r->kind != HUGETLB)
				change(r);
			else
				write_some(r);
		}
		pthread_mutex_unlock(&o->lock);
	}
	if (rare)
		pthread_mutex_unlock(&table);
}
