// SPDX-License-Identifier: Apache-2.0

/*
 * Torture is a tree of processes that uses memory in every way there is, and knows at any time what each
 * byte of it has to be. This page is its story; each file has one part of it.
 *
 *	model.c    what a block of memory must hold, and whether it does
 *	memory.c   what is done to private memory: mremap, madvise, mprotect, brk, huge pages, ...
 *	shared.c   what is done to memory and files that several processes map and write
 *	files.c    files in the writable layer and in /dev/shm
 *	process.c  fork, execve, exit, pids that come again
 *	main.c     threads, stacks, the vDSO, and the report
 *
 * Memory is made of blocks of 1 KiB. A block's content follows from the id of its object, its place in
 * it, and its version; version 0 is what the kernel gives: zeros, or the content of the file that is
 * mapped. An object's versions are kept apart from its memory and have a checksum of their own, so a page that
 * is of another time, or another place, or another process, is found out whichever of the two it is.
 * What is shared has its object in shared memory too, under a lock that works between processes.
 *
 * The first process answers SIGUSR1 with a report (integration/programs), for which every process of the
 * tree first verifies all it has. What is found wrong is written to /failed, once; then everything
 * stops and each later report says it.
 */

#ifndef TORTURE_H
#define TORTURE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096UL
#define BLOCK 1024UL
#define PER_PAGE (PAGE / BLOCK)
#define HUGE (2UL << 20)
#define MAX_PAGES 1024U /* of one object */
#define MAX_REGIONS 24
#define MAX_SHARED 6
#define MAX_SLOTS 12
#define CTL_FD 100 /* descriptors that outlive execve */
#define SHARED_FD 101

enum kind { ANON, THP, HUGETLB, HEAP, LOCKED, FILEPRIV, SHANON, MEMFD, SHFILE, SHMFILE, KINDS };

/* What can be done; the report counts each. */
enum op {
	OP_WRITE, OP_WRITE_RUN, OP_DONTNEED, OP_FREE, OP_PAGEOUT, OP_MOVE, OP_GROW, OP_JOIN, OP_SHRINK, OP_DONTUNMAP,
	OP_REMAP, OP_READONLY, OP_GUARD, OP_READWRITE, OP_LOCK, OP_NEW, OP_DROP, OP_COLLAPSE, OP_BRK, OP_HUGETLB,
	OP_PRIVATE_FILE, OP_SHARED_WRITE, OP_SHARED_PWRITE, OP_SHARED_REMAP, OP_PUNCH, OP_FILE_APPEND, OP_FILE_REWRITE,
	OP_FILE_TRUNCATE, OP_FILE_RENAME, OP_FILE_REPLACE, OP_FILE_UNLINK, OP_FILE_LINK, OP_FILE_DIR, OP_SHM_FILE,
	OP_FORK_SHORT, OP_FORK_LONG, OP_FORK_ORPHAN, OP_EXEC, OP_EXIT, OP_PID_REUSE, OP_STACK, OP_VDSO, OPS
};

/* The expected content of one stretch of memory. */
struct object {
	pthread_mutex_t lock;
	uint64_t id;
	uint64_t under; /* object id of the file whose content version 0 is, or 0 */
	uint32_t pages;
	uint32_t counter; /* the newest version */
	uint64_t sum;	  /* of all versions */
	uint32_t version[MAX_PAGES * PER_PAGE];
	uint8_t freed[MAX_PAGES]; /* MADV_FREE: version 0 is right as well */
};

/* A process's mapping of an object. */
struct region {
	int used;
	enum kind kind;
	int fd; /* -1: none */
	struct object *o;
	char *addr;
	uint8_t prot[MAX_PAGES];
};

struct slot {
	_Atomic int pid; /* in the container; 0: free */
	_Atomic uint64_t acked;
};

/* What all processes share: a memfd, so that it is found again after execve. */
struct ctl {
	uint64_t seed;
	unsigned int memory; /* pages of private memory that a process may have */
	unsigned int speed;  /* percent of the usual rate */
	int hugetlb;
	_Atomic uint64_t next_id;
	_Atomic uint64_t steps;
	_Atomic uint64_t verified;
	_Atomic uint64_t asked, generation;
	_Atomic int failed;
	_Atomic int last_pid; /* of a process that has ended */
	char message[1024];
	_Atomic uint64_t ops[OPS];
	struct slot slots[MAX_SLOTS];
	int shared;
	enum kind kind[MAX_SHARED];
	void *addr[MAX_SHARED];
	struct object object[MAX_SHARED];
};

extern struct ctl *ctl;
extern struct region regions[MAX_REGIONS];
extern struct region views[MAX_SHARED];
extern pthread_rwlock_t world;
extern int my_pid;
extern __thread uint64_t rng;
extern __thread int reporter; /* this thread reports */

/* model.c */
uint64_t mix(uint64_t x);
uint64_t rnd(void);
static inline uint32_t upto(uint32_t n) { return n ? (uint32_t)(rnd() % n) : 0; }
uint64_t new_id(void);
void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void check_failed(void);
void count(enum op op);
void fill(void *to, uint64_t id, uint32_t block, uint32_t version);
long differs(const void *at, uint64_t id, uint32_t block, uint32_t version);
void object_init(struct object *o, uint32_t pages, int shared);
void object_reset(struct object *o, uint32_t pages);
void set_version(struct object *o, uint32_t block, uint32_t version);
void forget(struct object *o, uint32_t first, uint32_t n);
void verify_object(const struct object *o, const char *what);
void verify_pages(struct region *r, uint32_t first, uint32_t n, int all);
void verify_protection(struct region *r);
const char *kind_name(enum kind kind);
const char *op_name(enum op op);

/* memory.c */
void memory_init(void);
void memory_step(void);
void write_block(struct region *r, uint32_t block);
char *reserve(size_t size);
void move_pages_to(char *from, size_t size, char *to);
void protect(struct region *r, uint32_t first, uint32_t n, int prot);

/* shared.c */
void shared_create(void);
void shared_attach(int exec);
void shared_step(void);

/* files.c */
void files_init(void);
void files_step(void);
void files_verify(void);
void files_remove(void);

/* process.c */
void tree_step(int depth);
void tree_end(int depth, struct slot *slot) __attribute__((noreturn));

/* main.c */
void verify_memory(void);
void unlock_world(void);
void become(int depth, uint64_t life) __attribute__((noreturn));
void nap(unsigned int microseconds);

#endif
