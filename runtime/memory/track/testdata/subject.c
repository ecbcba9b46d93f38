// SPDX-License-Identifier: Apache-2.0
//
// A process that does with its memory what it is told, one command a line on
// standard input, one answer a line on standard output ("ok ...", or "err ...").
// Slots 0..15 are mappings; amounts are pages. The leader may be ended, then
// another thread goes on reading commands.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define HUGE (2UL << 20)

static struct slot {
	volatile unsigned char *at;
	size_t len;
} slots[16];
static char **args;

// orphans end with the process that made them, also if it ended before this.
static void dieWithParent(pid_t parent)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
}

static pid_t self;

static void answer(const char *fmt, unsigned long a, unsigned long b)
{
	printf(fmt, a, b);
	putchar('\n');
	fflush(stdout);
}

static void fail(void)
{
	printf("err %s\n", strerror(errno));
	fflush(stdout);
}

static void fill(struct slot *s, size_t from, size_t n, int byte)
{
	for (size_t i = from * PAGE; i < (from + n) * PAGE; i += PAGE)
		memset((void *)(s->at + i), byte, 64);
}

static unsigned long sum(struct slot *s)
{
	unsigned long v = 0;
	for (size_t i = 0; i < s->len; i += 64)
		v = v * 31 + s->at[i];
	return v;
}

// place keeps a hole around every mapping, so that none merges with another.
static void *place(size_t len)
{
	char *p = mmap(NULL, len + 2 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return p;
	munmap(p, len + 2 * HUGE);
	return (void *)(((uintptr_t)p + HUGE) & ~(HUGE - 1));
}

static void *map(const char *kind, void *at, size_t len, const char *path)
{
	int rw = PROT_READ | PROT_WRITE, fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	if (!strcmp(kind, "shared"))
		flags = MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED;
	else if (!strcmp(kind, "huge"))
		flags |= MAP_HUGETLB;
	else if (!strcmp(kind, "lock"))
		flags |= MAP_LOCKED;
	else if (!strcmp(kind, "none"))
		rw = PROT_NONE;
	else if (!strcmp(kind, "memfd")) {
		fd = memfd_create("subject", 0);
		if (ftruncate(fd, len))
			return MAP_FAILED;
		flags = MAP_SHARED | MAP_FIXED;
	} else if (!strcmp(kind, "filep") || !strcmp(kind, "files")) {
		fd = open(path, O_RDWR);
		if (fd < 0)
			return MAP_FAILED;
		flags = (kind[4] == 's' ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED;
	} else if (!strcmp(kind, "zero")) {
		fd = open("/dev/zero", O_RDWR);
		flags = MAP_PRIVATE | MAP_FIXED;
	} else if (!strcmp(kind, "grow"))
		flags |= MAP_GROWSDOWN;
	void *p = mmap(at, len, rw, flags, fd, 0);
	if (fd >= 0)
		close(fd);
	if (p != MAP_FAILED && !strcmp(kind, "thp"))
		madvise(p, len, MADV_HUGEPAGE);
	return p;
}

static void deepen(int kib)
{
	volatile char here[1024];
	memset((void *)here, kib, sizeof(here));
	if (kib > 0)
		deepen(kib - 1);
	here[0] = here[1];
}

static int spinning;
static void *spin(void *arg)
{
	volatile unsigned long *n = arg;
	while (!__atomic_load_n(&spinning, __ATOMIC_RELAXED) || 1)
		++*n;
	return NULL;
}

static void *commands(void *unused);

static void one(char *line)
{
	char cmd[32] = "", w1[256] = "", w2[256] = "", w3[256] = "", w4[256] = "";
	sscanf(line, "%31s %255s %255s %255s %255s", cmd, w1, w2, w3, w4);
	struct slot *s = &slots[atoi(w1) & 15];
	size_t n2 = strtoul(w2, NULL, 0), n3 = strtoul(w3, NULL, 0), n4 = strtoul(w4, NULL, 0);

	if (!strcmp(cmd, "map")) { // map SLOT PAGES KIND [FILE]
		size_t len = n2 * PAGE;
		void *at = place(len), *p = at == MAP_FAILED ? at : map(w3, at, len, w4);
		if (p == MAP_FAILED)
			return fail();
		s->at = p, s->len = len;
		return answer("ok %lu %lu", (unsigned long)p, len);
	}
	if (!strcmp(cmd, "remap")) { // remap SLOT KIND: another mapping at the same place
		if (munmap((void *)s->at, s->len) || map(w2, (void *)s->at, s->len, w3) == MAP_FAILED)
			return fail();
		return answer("ok %lu %lu", (unsigned long)s->at, s->len);
	}
	if (!strcmp(cmd, "unmap")) { // unmap SLOT [FROM PAGES]
		if (munmap((void *)(s->at + n2 * PAGE), n3 ? n3 * PAGE : s->len))
			return fail();
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "move")) { // move SLOT [PAGES]: mremap to another place and size
		size_t len = n2 ? n2 * PAGE : s->len;
		void *p = mremap((void *)s->at, s->len, len, MREMAP_MAYMOVE | MREMAP_FIXED, place(len));
		if (p == MAP_FAILED)
			return fail();
		s->at = p, s->len = len;
		return answer("ok %lu %lu", (unsigned long)p, len);
	}
	if (!strcmp(cmd, "join")) { // join SLOT OTHER: move the other to the end of the first, which has it then
		struct slot *o = &slots[n2 & 15];
		void *end = (void *)(s->at + s->len);
		if (mremap((void *)o->at, o->len, o->len, MREMAP_MAYMOVE | MREMAP_FIXED, end) != end)
			return fail();
		s->len += o->len;
		return answer("ok %lu %lu", (unsigned long)s->at, s->len);
	}
	if (!strcmp(cmd, "resize")) { // resize SLOT PAGES: in place
		void *p = mremap((void *)s->at, s->len, n2 * PAGE, 0);
		if (p == MAP_FAILED)
			return fail();
		s->len = n2 * PAGE;
		return answer("ok %lu %lu", (unsigned long)p, s->len);
	}
	if (!strcmp(cmd, "fill")) { // fill SLOT BYTE [FROM PAGES]
		fill(s, n3, n4 ? n4 : s->len / PAGE - n3, n2);
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "work")) { // work SLOT STEP: write one byte in every STEPth page; nanoseconds
		struct timespec a, b;
		clock_gettime(CLOCK_MONOTONIC, &a);
		for (size_t i = 0; i < s->len; i += n2 * PAGE)
			s->at[i]++;
		clock_gettime(CLOCK_MONOTONIC, &b);
		return answer("ok %lu", (b.tv_sec - a.tv_sec) * 1000000000UL + b.tv_nsec - a.tv_nsec, 0);
	}
	if (!strcmp(cmd, "sum"))
		return answer("ok %lu", sum(s), 0);
	if (!strcmp(cmd, "advise")) { // advise SLOT ADVICE FROM PAGES
		if (madvise((void *)(s->at + n3 * PAGE), n4 * PAGE, n2))
			return fail();
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "protect")) { // protect SLOT PROT FROM PAGES
		if (mprotect((void *)(s->at + n3 * PAGE), n4 * PAGE, n2))
			return fail();
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "lock")) {
		if (mlock((void *)s->at, s->len))
			return fail();
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "read")) { // read SLOT FROM PAGES FILE: by read(2) into the pages
		int fd = open(w4, O_RDONLY);
		ssize_t n = fd < 0 ? -1 : read(fd, (void *)(s->at + n2 * PAGE), n3 * PAGE);
		if (n < 0)
			return fail();
		close(fd);
		return answer("ok %lu", n, 0);
	}
	if (!strcmp(cmd, "direct")) { // direct FILE: leave it open with O_DIRECT
		if (open(w1, O_RDONLY | O_DIRECT) < 0)
			return fail();
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "aio")) { // an asynchronous I/O context
		static unsigned long ctx;
		if (syscall(SYS_io_setup, 4, &ctx))
			return fail();
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "fork")) { // fork SLOT: the child writes every page of it, checks, and waits to be killed
		int done[2];
		if (pipe(done))
			return fail();
		unsigned long before = sum(s);
		pid_t pid = fork();
		if (pid == 0) {
			dieWithParent(self);
			char ok = sum(s) == before;
			fill(s, 0, s->len / PAGE, 0xee);
			for (size_t i = 0; i < s->len; i += PAGE)
				ok &= s->at[i] == 0xee;
			ok = write(done[1], &ok, 1) == 1;
			for (;;)
				pause();
		}
		char ok = 0;
		if (pid < 0 || read(done[0], &ok, 1) != 1)
			return fail();
		close(done[0]), close(done[1]);
		return answer("ok %lu %lu", pid, ok);
	}
	if (!strcmp(cmd, "reap")) { // reap PID
		kill(atoi(w1), SIGKILL);
		waitpid(atoi(w1), NULL, 0);
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "brk")) { // brk PAGES: grow the heap and fill what is new
		unsigned char *p = sbrk(atoi(w1) * PAGE);
		if (p == (void *)-1)
			return fail();
		memset(p, 1, atoi(w1) * PAGE);
		return answer("ok %lu %lu", (unsigned long)p, atoi(w1) * PAGE);
	}
	if (!strcmp(cmd, "stack")) { // stack KIB
		deepen(atoi(w1));
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "threads")) {
		static unsigned long counts[64 * 8];
		for (int i = 0; i < atoi(w1); i++) {
			pthread_t t;
			if ((errno = pthread_create(&t, NULL, spin, &counts[(i & 63) * 8])))
				return fail();
		}
		return answer("ok", 0, 0);
	}
	if (!strcmp(cmd, "endleader")) {
		pthread_t t;
		if ((errno = pthread_create(&t, NULL, commands, NULL)))
			return fail();
		answer("ok", 0, 0);
		pthread_exit(NULL);
	}
	if (!strcmp(cmd, "exec")) {
		answer("ok", 0, 0);
		execv("/proc/self/exe", args);
		return fail();
	}
	if (!strcmp(cmd, "vforkexec")) { // a child keeps the old address space, the parent leaves it
		// clone(CLONE_VM) without CLONE_VFORK, on a stack of its own.
		static char stack[64 << 10];
		extern int clone(int (*)(void *), void *, int, void *, ...);
		int sleeper(void *);
		if (clone(sleeper, stack + sizeof(stack), 0x100 | SIGCHLD, NULL) < 0)
			return fail();
		answer("ok", 0, 0);
		execv("/proc/self/exe", args);
		return fail();
	}
	if (!strcmp(cmd, "confine")) { // no new privileges, and no userfaultfd, ptrace or kcmp
		struct sock_filter f[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 2, 0),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ptrace, 1, 0),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		};
		struct sock_fprog prog = {sizeof(f) / sizeof(f[0]), f};
		if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog))
			return fail();
		return answer("ok", 0, 0);
	}
	printf("err unknown command %s\n", cmd);
	fflush(stdout);
}

int sleeper(void *unused)
{
	dieWithParent(self);
	for (;;)
		pause();
}

static void *commands(void *unused)
{
	char line[1024];
	while (fgets(line, sizeof(line), stdin))
		one(line);
	_exit(0);
}

int main(int argc, char **argv)
{
	args = argv;
	self = getpid();
	answer("ok %lu", getpid(), 0);
	commands(NULL);
}
