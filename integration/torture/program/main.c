// SPDX-License-Identifier: Apache-2.0

/*
 * Threads, stacks, the vDSO, and the report.
 *
 *	torture [--seed N] [--memory PAGES] [--speed PERCENT] [--hugetlb]
 *
 * --memory is what one process may have, --speed how often something is done: at 100 the tree takes about a
 * third of a core. With --hugetlb the first process has one huge page of 2 MiB.
 */

#include "torture.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define FRAME 512
#define THREADS 3
#define ANSWER 120 /* seconds in which all processes verify themselves */

pthread_rwlock_t world;
static struct slot *slot;
static __thread uint64_t own[64];

void unlock_world(void)
{
	pthread_rwlockattr_t attr;

	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&world, &attr);
}

void nap(unsigned int microseconds)
{
	uint64_t ns = (uint64_t)microseconds * 1000 * 100 / ctl->speed;
	struct timespec ts = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};

	nanosleep(&ts, NULL);
}

static void check_vdso(void)
{
	struct timespec t[3];

	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t[0]);
	clock_gettime(CLOCK_MONOTONIC, &t[1]);
	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t[2]);
	for (int i = 0; i < 2; i++)
		if (t[i].tv_sec > t[i + 1].tv_sec || (t[i].tv_sec == t[i + 1].tv_sec && t[i].tv_nsec > t[i + 1].tv_nsec))
			fail("the clocks of the kernel and of the vDSO differ");
	count(OP_VDSO);
}

/* dive goes down the stack, waits there, and verifies each frame on its way up. */
static __attribute__((noinline)) void dive(uint32_t depth, uint64_t seed)
{
	volatile uint64_t frame[FRAME];

	for (uint64_t i = 0; i < FRAME; i++)
		frame[i] = seed + i;
	if (depth > 0)
		dive(depth - 1, mix(seed));
	if (depth == 0 || upto(200) == 0)
		nap(20000 + upto(30000));
	for (uint64_t i = 0; i < FRAME; i++)
		if (frame[i] != seed + i)
			fail("stack frame %u above the deepest: word %lu is %lx, not %lx", depth, i, frame[i], seed + i);
}

static void check_own(uint64_t seed)
{
	for (uint64_t i = 0; i < 64; i++)
		if (own[i] != seed + i)
			fail("thread-local word %lu is %lx, not %lx", i, own[i], seed + i);
}

/* work is the life of a thread: number 0 works on files, the others on memory. */
static void *work(void *number)
{
	uint64_t seed;

	rng = mix(ctl->seed + new_id());
	seed = rnd();
	for (uint64_t i = 0; i < 64; i++)
		own[i] = seed + i;
	for (;;) {
		check_failed();
		pthread_rwlock_rdlock(&world);
		if (!number)
			files_step();
		else if (upto(4))
			memory_step();
		else
			shared_step();
		pthread_rwlock_unlock(&world);
		check_own(seed);
		if (upto(64) == 0)
			check_vdso();
		if (number && upto(128) == 0) {
			dive(upto(200), rnd());
			count(OP_STACK);
		}
		nap(upto(number ? 8000 : 30000));
	}
	return NULL;
}

static void verify_region(struct region *r)
{
	if (!r->used)
		return;
	pthread_mutex_lock(&r->o->lock);
	if (r->used) {
		verify_object(r->o, kind_name(r->kind));
		verify_pages(r, 0, r->o->pages, 1);
		verify_protection(r);
	}
	pthread_mutex_unlock(&r->o->lock);
}

/* verify_memory checks all memory of the process. */
void verify_memory(void)
{
	for (int i = 0; i < MAX_REGIONS; i++)
		verify_region(&regions[i]);
	for (int i = 0; i < MAX_SHARED; i++)
		verify_region(&views[i]);
}

/* look verifies some pages while others change. */
static void look(void)
{
	int i = (int)upto(MAX_REGIONS + MAX_SHARED);
	struct region *r = i < MAX_REGIONS ? &regions[i] : &views[i - MAX_REGIONS];
	uint32_t first, n = 64;

	if (!r->used)
		return;
	pthread_mutex_lock(&r->o->lock);
	if (r->used) {
		first = upto(r->o->pages);
		n = n > r->o->pages - first ? r->o->pages - first : n;
		verify_pages(r, first, n, 0);
	}
	pthread_mutex_unlock(&r->o->lock);
}

/* watch is the thread that verifies: something all the time, and everything when asked. */
static void *watch(void *unused)
{
	rng = mix(ctl->seed + new_id());
	for (;;) {
		uint64_t asked = atomic_load(&ctl->generation);

		check_failed();
		if (atomic_load(&slot->acked) < asked) {
			pthread_rwlock_wrlock(&world);
			verify_memory();
			files_verify();
			pthread_rwlock_unlock(&world);
			atomic_store(&slot->acked, asked);
		}
		pthread_rwlock_rdlock(&world);
		look();
		pthread_rwlock_unlock(&world);
		nap(upto(10000));
	}
	return unused;
}

static void start(void *(*f)(void *), void *arg)
{
	pthread_t thread;
	int err = pthread_create(&thread, NULL, f, arg);

	if (err)
		fail("pthread_create: %s", strerror(err));
}

/* take_slot makes the process one that is asked to verify; there may be no room for it. */
static int take_slot(void)
{
	for (int i = 0; i < MAX_SLOTS; i++)
		if (atomic_load(&ctl->slots[i].pid) == my_pid) {
			slot = &ctl->slots[i]; /* from before execve */
			return 1;
		}
	for (int i = 0; i < MAX_SLOTS; i++) {
		int zero = 0;

		if (atomic_compare_exchange_strong(&ctl->slots[i].pid, &zero, my_pid)) {
			slot = &ctl->slots[i];
			atomic_store(&slot->acked, 0);
			return 1;
		}
	}
	return 0;
}

/* become is the life of a process with all its threads; this thread makes its children. */
void become(int depth, uint64_t life)
{
	if (!take_slot())
		_exit(0);
	files_init();
	start(watch, NULL);
	for (uintptr_t i = 0; i < THREADS; i++)
		start(work, (void *)i);
	for (uint64_t i = 0; i < life; i++) {
		check_failed();
		tree_step(depth);
		nap(20000 + upto(60000));
	}
	tree_end(depth, slot);
}

static void on_ask(int sig)
{
	(void)sig;
	atomic_fetch_add(&ctl->asked, 1);
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
	(void)context;
	fail("signal %d at address %p", sig, info->si_addr);
}

static void handle(void)
{
	struct sigaction ask = {.sa_handler = on_ask, .sa_flags = SA_RESTART};
	struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
	sigset_t set;

	sigaction(SIGUSR1, &ask, NULL);
	sigaction(SIGSEGV, &fault, NULL);
	sigaction(SIGBUS, &fault, NULL);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
}

/* tell writes the report n of package integration/programs. */
static void tell(uint64_t n)
{
	static char text[8192];
	int at, processes = 0, fd;

	for (int i = 0; i < MAX_SLOTS; i++)
		processes += atomic_load(&ctl->slots[i].pid) != 0;
	at = snprintf(text, sizeof(text), "{\"n\": %lu, \"failed\": %s, \"steps\": %lu, \"verified\": %lu, \"processes\": %d, \"ops\": {", n,
		      atomic_load(&ctl->failed) ? "true" : "false", atomic_load(&ctl->steps), atomic_load(&ctl->verified), processes);
	for (int i = 0; i < OPS; i++)
		at += snprintf(text + at, sizeof(text) - (size_t)at, "%s\"%s\": %lu", i ? ", " : "", op_name(i), atomic_load(&ctl->ops[i]));
	at += snprintf(text + at, sizeof(text) - (size_t)at, "}}\n");
	fd = open("/report.new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (write(fd, text, (size_t)at) != at || rename("/report.new", "/report") < 0)
		fail("/report: %s", strerror(errno));
	close(fd);
}

/* await waits until every process has verified itself since generation g. */
static void await(uint64_t g)
{
	time_t end = time(NULL) + ANSWER;

	for (int i = 0; i < MAX_SLOTS; i++)
		for (;;) {
			int pid = atomic_load(&ctl->slots[i].pid);

			if (!pid || atomic_load(&ctl->slots[i].acked) >= g || atomic_load(&ctl->failed))
				break;
			if (time(NULL) > end)
				fail("process %d has not verified itself in %d seconds", pid, ANSWER);
			nap(1000);
		}
}

/* answer is the thread of the first process that reports. It does not stop when something was found wrong. */
static void *answer(void *unused)
{
	uint64_t told = 0;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	reporter = 1;
	for (;;) {
		uint64_t asked = atomic_load(&ctl->asked);

		if (asked > told) {
			await(atomic_fetch_add(&ctl->generation, 1) + 1);
			tell(told = asked);
		}
		nap(2000);
	}
	return unused;
}

static struct {
	int depth;
	uint64_t life;
} role;

static void *tree(void *unused)
{
	rng = mix(ctl->seed + new_id());
	become(role.depth, role.life);
	return unused;
}

static void map_ctl(void)
{
	ctl = mmap(NULL, sizeof(*ctl), PROT_READ | PROT_WRITE, MAP_SHARED, CTL_FD, 0);
	if (ctl == MAP_FAILED) {
		perror("torture: mmap");
		_exit(1);
	}
}

static void first(int argc, char **argv)
{
	int fd = memfd_create("torture-control", 0);

	if (fd < 0 || ftruncate(fd, sizeof(*ctl)) < 0 || dup2(fd, CTL_FD) < 0) {
		perror("torture: memfd");
		_exit(1);
	}
	close(fd);
	map_ctl();
	ctl->seed = 1;
	ctl->memory = 4096;
	ctl->speed = 100;
	ctl->next_id = 100;
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--hugetlb")) {
			ctl->hugetlb = 1;
			continue;
		}
		if (i + 1 == argc) {
			fprintf(stderr, "usage: torture [--seed N] [--memory PAGES] [--speed PERCENT] [--hugetlb]\n");
			_exit(2);
		}
		if (!strcmp(argv[i], "--seed"))
			ctl->seed = strtoul(argv[++i], NULL, 0);
		else if (!strcmp(argv[i], "--memory"))
			ctl->memory = (unsigned int)atoi(argv[++i]);
		else if (!strcmp(argv[i], "--speed"))
			ctl->speed = (unsigned int)atoi(argv[++i]);
	}
	mkdir("/data", 0755);
	shared_create();
	role.life = UINT64_MAX;
}

int main(int argc, char **argv)
{
	int exec = argc == 4 && !strcmp(argv[1], "--child");

	/* The heap is a region: the C library must not move its end. */
	mallopt(M_MMAP_THRESHOLD, 0);
	mallopt(M_TRIM_THRESHOLD, -1);
	my_pid = getpid();
	if (exec) {
		map_ctl();
		role.depth = atoi(argv[2]);
		role.life = strtoul(argv[3], NULL, 0);
	} else {
		first(argc, argv);
	}
	rng = mix(ctl->seed + new_id());
	unlock_world();
	handle();
	memory_init();
	shared_attach(exec);
	start(tree, NULL);
	if (!exec) {
		tell(0);
		start(answer, NULL);
	}
	for (;;) {
		check_failed();
		dive(upto(1000), rnd());
		count(OP_STACK);
		nap(upto(100000));
	}
}
