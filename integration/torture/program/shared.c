// SPDX-License-Identifier: Apache-2.0

/* What is done to memory that several processes have, each at addresses of its own. */

#include "torture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RW (PROT_READ | PROT_WRITE)
#define SHARED_PAGES 256U

struct region views[MAX_SHARED];

static const enum kind made[] = {SHANON, MEMFD, SHFILE, SHMFILE};

static char *map_view(struct region *r, char *at)
{
	char *p = mmap(at, r->o->pages * PAGE, RW, MAP_SHARED | (at ? MAP_FIXED : 0), r->fd, 0);

	if (p == MAP_FAILED)
		fail("mmap (%s): %s", kind_name(r->kind), strerror(errno));
	memset(r->prot, RW, sizeof(r->prot));
	return p;
}

/* shared_create makes the objects, in the first process. */
void shared_create(void)
{
	ctl->shared = sizeof(made) / sizeof(*made);
	for (int i = 0; i < ctl->shared; i++) {
		int fd = -1;

		ctl->kind[i] = made[i];
		object_init(&ctl->object[i], SHARED_PAGES, 1);
		if (made[i] == MEMFD)
			fd = memfd_create("torture", 0);
		else if (made[i] == SHFILE)
			fd = open("/data/shared", O_RDWR | O_CREAT | O_EXCL, 0644);
		else if (made[i] == SHMFILE)
			fd = open("/dev/shm/shared", O_RDWR | O_CREAT | O_EXCL, 0644);
		if (made[i] == SHANON)
			continue;
		if (fd < 0 || ftruncate(fd, SHARED_PAGES * PAGE) < 0 || dup2(fd, SHARED_FD + i) < 0)
			fail("making a %s: %s", kind_name(made[i]), strerror(errno));
		close(fd);
	}
}

/* shared_attach maps all objects. After execve what is anonymous is out of reach. */
void shared_attach(int exec)
{
	for (int i = 0; i < ctl->shared; i++) {
		struct region *r = &views[i];

		r->kind = ctl->kind[i];
		r->o = &ctl->object[i];
		r->fd = r->kind == SHANON ? -1 : SHARED_FD + i;
		if (r->kind == SHANON && exec)
			continue;
		if (r->kind == SHANON) {
			r->addr = mmap(NULL, SHARED_PAGES * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
			memset(r->prot, RW, sizeof(r->prot));
		} else {
			r->addr = map_view(r, NULL);
		}
		r->used = 1;
	}
}

/* write_file writes a block by its descriptor; the mapping must show it. */
static void write_file(struct region *r, uint32_t block)
{
	struct object *o = r->o;
	char buffer[BLOCK];

	fill(buffer, o->id, block, ++o->counter);
	if (pwrite(r->fd, buffer, BLOCK, (off_t)(block * BLOCK)) != (ssize_t)BLOCK)
		fail("pwrite (%s): %s", kind_name(r->kind), strerror(errno));
	set_version(o, block, o->counter);
}

static void read_file(struct region *r, uint32_t block)
{
	char buffer[BLOCK];
	uint32_t v = r->o->version[block];

	if (pread(r->fd, buffer, BLOCK, (off_t)(block * BLOCK)) != (ssize_t)BLOCK)
		fail("pread (%s): %s", kind_name(r->kind), strerror(errno));
	if (differs(buffer, r->o->id, block, v) >= 0)
		fail("%s: block %u read by its descriptor is not version %u, and %s", kind_name(r->kind), block, v,
		     differs(buffer, 0, 0, 0) < 0 ? "zeros" : "not zeros");
}

static void change_view(struct region *r)
{
	struct object *o = r->o;
	uint32_t first = upto(o->pages), n = 1 + upto(16);
	size_t size = o->pages * PAGE;
	char *to;

	n = n > o->pages - first ? o->pages - first : n;
	switch (upto(8)) {
	case 0:
		to = reserve(size);
		move_pages_to(r->addr, size, to);
		r->addr = to;
		count(OP_SHARED_REMAP);
		break;
	case 1:
		if (r->fd < 0)
			break;
		if (upto(2)) {
			map_view(r, r->addr);
		} else {
			munmap(r->addr, size);
			r->addr = map_view(r, NULL);
		}
		count(OP_SHARED_REMAP);
		break;
	case 2:
		/* For all who have it. Not a file of the writable layer: not every file system can. */
		if (r->kind == SHANON) {
			protect(r, first, n, RW);
			if (madvise(r->addr + first * PAGE, n * PAGE, MADV_REMOVE) < 0)
				fail("madvise MADV_REMOVE: %s", strerror(errno));
		} else if (r->kind == SHFILE ||
			   fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(first * PAGE), (off_t)(n * PAGE)) < 0) {
			break;
		}
		forget(o, first, n);
		count(OP_PUNCH);
		break;
	case 3:
		/* Only this process's view of them: the content stays. */
		if (madvise(r->addr + first * PAGE, n * PAGE, MADV_DONTNEED) < 0)
			fail("madvise (%s): %s", kind_name(r->kind), strerror(errno));
		break;
	case 4:
		if (r->kind == SHFILE && msync(r->addr + first * PAGE, n * PAGE, MS_SYNC) < 0)
			fail("msync: %s", strerror(errno));
		break;
	case 5:
		protect(r, first, n, upto(2) ? PROT_READ : PROT_NONE);
		break;
	default:
		protect(r, 0, o->pages, RW);
	}
}

/* shared_step does one thing to one object. The caller holds the world for reading. */
void shared_step(void)
{
	struct region *r = &views[upto((uint32_t)ctl->shared)];
	struct object *o = r->o;

	if (!r->used)
		return;
	pthread_mutex_lock(&o->lock);
	switch (upto(8)) {
	case 0:
		change_view(r);
		break;
	case 1:
	case 2:
		if (r->fd >= 0) {
			write_file(r, upto(o->pages * PER_PAGE));
			count(OP_SHARED_PWRITE);
		}
		break;
	case 3:
		if (r->fd >= 0)
			read_file(r, upto(o->pages * PER_PAGE));
		break;
	default:
		for (uint32_t n = 1 + upto(4); n > 0; n--)
			write_block(r, upto(o->pages * PER_PAGE));
		count(OP_SHARED_WRITE);
	}
	pthread_mutex_unlock(&o->lock);
}
