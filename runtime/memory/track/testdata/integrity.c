// SPDX-License-Identifier: Apache-2.0
//
// A process whose main thread does one thing over and over and checks everything
// that a tracer could spoil: registers, signal mask, pending signals, results of
// system calls. It says "ready", goes on until standard input ends, then says "ok
// ROUNDS"; or says "bad ..." at once and ends.
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <linux/rseq.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int stop;
static long rounds;

static void bad(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	printf("bad ");
	vprintf(fmt, ap);
	printf(" (errno %d, round %ld)\n", errno, rounds);
	fflush(stdout);
	_exit(1);
}

static double now(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static void *untilEnd(void *unused)
{
	char c;
	while (read(0, &c, 1) == 1)
		;
	stop = 1;
	return NULL;
}

static void thread(void *(*fn)(void *), void *arg)
{
	pthread_t t;
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	if (pthread_create(&t, NULL, fn, arg))
		bad("pthread_create");
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

// Every general register and every byte of the vector registers is known, for the
// time of some hundred thousand turns of a loop.
static void registers(void)
{
	static uint8_t vectors[32][64] __attribute__((aligned(64))), after[32][64] __attribute__((aligned(64)));
	static uint64_t got[15];
	int wide = __builtin_cpu_supports("avx512f"), half = __builtin_cpu_supports("avx");
	for (int i = 0; i < 32; i++)
		for (int j = 0; j < 64; j++)
			vectors[i][j] = rounds + i * 67 + j * 3;
	memset(after, 0, sizeof(after));
#define EACH16(OP, R) \
	OP(0, R) OP(1, R) OP(2, R) OP(3, R) OP(4, R) OP(5, R) OP(6, R) OP(7, R) \
	OP(8, R) OP(9, R) OP(10, R) OP(11, R) OP(12, R) OP(13, R) OP(14, R) OP(15, R)
#define EACH32(OP, R) EACH16(OP, R) \
	OP(16, R) OP(17, R) OP(18, R) OP(19, R) OP(20, R) OP(21, R) OP(22, R) OP(23, R) \
	OP(24, R) OP(25, R) OP(26, R) OP(27, R) OP(28, R) OP(29, R) OP(30, R) OP(31, R)
#define LOADZ(N, R) "vmovdqu64 64*" #N "(%0), %%zmm" #N "\n"
#define SAVEZ(N, R) "vmovdqu64 %%zmm" #N ", 64*" #N "(%0)\n"
#define LOADY(N, R) "vmovdqu 64*" #N "(%0), %%ymm" #N "\n"
#define SAVEY(N, R) "vmovdqu %%ymm" #N ", 64*" #N "(%0)\n"
#define LOADX(N, R) "movdqu 64*" #N "(%0), %%xmm" #N "\n"
#define SAVEX(N, R) "movdqu %%xmm" #N ", 64*" #N "(%0)\n"
	if (wide)
		asm volatile(EACH32(LOADZ, 0) : : "r"(vectors) : "memory");
	else if (half)
		asm volatile(EACH16(LOADY, 0) : : "r"(vectors) : "memory");
	else
		asm volatile(EACH16(LOADX, 0) : : "r"(vectors) : "memory");
	asm volatile(
		"push %%rbp\n push %%rbx\n sub $128, %%rsp\n"
		"mov %0, -8(%%rsp)\n" // in the red zone on purpose
		"mov $0x1111111111111111, %%rbx\n mov $0x2222222222222222, %%rcx\n"
		"mov $0x3333333333333333, %%rdx\n mov $0x4444444444444444, %%rsi\n"
		"mov $0x5555555555555555, %%rdi\n mov $0x6666666666666666, %%rbp\n"
		"mov $0x7777777777777777, %%r8\n mov $0x0888888888888888, %%r9\n"
		"mov $0x0999999999999999, %%r10\n mov $0x0aaaaaaaaaaaaaaa, %%r11\n"
		"mov $0x0bbbbbbbbbbbbbbb, %%r12\n mov $0x0ccccccccccccccc, %%r13\n"
		"mov $0x0ddddddddddddddd, %%r14\n mov $0x0eeeeeeeeeeeeeee, %%r15\n"
		"mov $400000, %%rax\n"
		"1: dec %%rax\n jnz 1b\n"
		"xchg %%rax, -8(%%rsp)\n"
		"mov %%rbx, (%%rax)\n mov %%rcx, 8(%%rax)\n mov %%rdx, 16(%%rax)\n mov %%rsi, 24(%%rax)\n"
		"mov %%rdi, 32(%%rax)\n mov %%rbp, 40(%%rax)\n mov %%r8, 48(%%rax)\n mov %%r9, 56(%%rax)\n"
		"mov %%r10, 64(%%rax)\n mov %%r11, 72(%%rax)\n mov %%r12, 80(%%rax)\n mov %%r13, 88(%%rax)\n"
		"mov %%r14, 96(%%rax)\n mov %%r15, 104(%%rax)\n"
		"mov -8(%%rsp), %%rbx\n mov %%rbx, 112(%%rax)\n"
		"add $128, %%rsp\n pop %%rbx\n pop %%rbp\n"
		: : "a"(got)
		: "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
	if (wide)
		asm volatile(EACH32(SAVEZ, 0) : : "r"(after) : "memory");
	else if (half)
		asm volatile(EACH16(SAVEY, 0) : : "r"(after) : "memory");
	else
		asm volatile(EACH16(SAVEX, 0) : : "r"(after) : "memory");
	static const uint64_t want[15] = {
		0x1111111111111111, 0x2222222222222222, 0x3333333333333333, 0x4444444444444444,
		0x5555555555555555, 0x6666666666666666, 0x7777777777777777, 0x0888888888888888,
		0x0999999999999999, 0x0aaaaaaaaaaaaaaa, 0x0bbbbbbbbbbbbbbb, 0x0ccccccccccccccc,
		0x0ddddddddddddddd, 0x0eeeeeeeeeeeeeee, 0};
	for (int i = 0; i < 15; i++)
		if (got[i] != want[i])
			bad("register %d: %lx", i, got[i]);
	for (int i = 0; i < (wide ? 32 : 16); i++)
		if (memcmp(vectors[i], after[i], wide ? 64 : half ? 32 : 16))
			bad("vector register %d", i);
}

static void sleeping(void)
{
	double t = now();
	struct timespec ts = {0, 5000000}, abs;
	if (nanosleep(&ts, NULL))
		bad("nanosleep");
	if (now() - t < 0.005 || now() - t > 1)
		bad("nanosleep took %f", now() - t);
	clock_gettime(CLOCK_MONOTONIC, &abs);
	abs.tv_nsec += 5000000;
	if (abs.tv_nsec >= 1000000000)
		abs.tv_nsec -= 1000000000, abs.tv_sec++;
	if (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &abs, NULL))
		bad("clock_nanosleep");
}

static void futexes(void)
{
	static int word;
	double t = now();
	struct timespec ts = {0, 10000000};
	if (syscall(SYS_futex, &word, FUTEX_WAIT, 0, &ts, NULL, 0) != -1 || errno != ETIMEDOUT)
		bad("futex");
	if (now() - t < 0.010 || now() - t > 1)
		bad("futex took %f", now() - t);
}

static void polls(void)
{
	double t = now();
	int fds[2];
	if (pipe(fds))
		bad("pipe");
	struct pollfd p = {fds[0], POLLIN, 0};
	if (poll(&p, 1, 8) != 0)
		bad("poll");
	struct timeval tv = {0, 8000};
	fd_set set;
	FD_ZERO(&set);
	FD_SET(fds[0], &set);
	if (select(fds[0] + 1, &set, NULL, NULL, &tv) != 0)
		bad("select");
	if (now() - t < 0.016 || now() - t > 1)
		bad("poll and select took %f", now() - t);
	close(fds[0]), close(fds[1]);
}

static void *feed(void *arg)
{
	struct timespec ts = {0, 3000000};
	for (unsigned char c = 0; !stop; c++) {
		nanosleep(&ts, NULL);
		if (write(*(int *)arg, &c, 1) != 1)
			bad("write");
	}
	unsigned char c = 0;
	for (;;) { // the reader may need one more to see stop
		nanosleep(&ts, NULL);
		if (write(*(int *)arg, &c, 1) != 1)
			return NULL;
	}
}

static void reading(void)
{
	static int fds[2];
	static unsigned char next;
	if (!fds[1]) {
		if (pipe(fds))
			bad("pipe");
		thread(feed, &fds[1]);
	}
	unsigned char c;
	ssize_t n = read(fds[0], &c, 1);
	if (n != 1)
		bad("read gave %ld", n);
	if (c != next && !stop)
		bad("read %d, not %d", c, next);
	next++;
}

static void *feedEvents(void *arg)
{
	struct timespec ts = {0, 3000000};
	for (;;) {
		nanosleep(&ts, NULL);
		eventfd_write(*(int *)arg, 1);
	}
	return NULL;
}

static void epolls(void)
{
	static int fed = -1, silent, ep, epSilent;
	struct epoll_event e = {.events = EPOLLIN};
	if (fed < 0) {
		fed = eventfd(0, 0), silent = eventfd(0, 0);
		ep = epoll_create1(0), epSilent = epoll_create1(0);
		if (epoll_ctl(ep, EPOLL_CTL_ADD, fed, &e) || epoll_ctl(epSilent, EPOLL_CTL_ADD, silent, &e))
			bad("epoll_ctl");
		thread(feedEvents, &fed);
	}
	if (epoll_wait(ep, &e, 1, -1) != 1)
		bad("epoll_wait");
	eventfd_t v;
	eventfd_read(fed, &v);
	double t = now();
	if (epoll_wait(epSilent, &e, 1, 5) != 0)
		bad("epoll_wait with a timeout");
	if (now() - t < 0.005 || now() - t > 2)
		bad("epoll_wait took %f", now() - t);
}

static volatile long handled;
static void onSignal(int sig) { handled++; }

static pthread_t mainThread;
static void *knock(void *unused)
{
	struct timespec ts = {0, 2000000};
	for (;;) {
		nanosleep(&ts, NULL);
		pthread_kill(mainThread, SIGUSR1);
	}
	return NULL;
}

static void suspended(void)
{
	sigset_t set, mask;
	static int started;
	sigemptyset(&set), sigaddset(&set, SIGUSR1);
	if (!started++) {
		sigprocmask(SIG_BLOCK, &set, NULL);
		thread(knock, NULL);
	}
	sigemptyset(&mask);
	long before = handled;
	if (sigsuspend(&mask) != -1 || errno != EINTR)
		bad("sigsuspend");
	if (handled != before + 1)
		bad("sigsuspend returned after %ld handlers", handled - before);
	sigprocmask(SIG_BLOCK, NULL, &mask);
	if (!sigismember(&mask, SIGUSR1) || sigismember(&mask, SIGUSR2) || sigismember(&mask, SIGTERM))
		bad("the mask after sigsuspend");
}

// Signals wait with their values in their order; a mask that is neither empty nor full.
static void pending(void)
{
	sigset_t set, got;
	union sigval v;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1), sigaddset(&set, SIGTRAP), sigaddset(&set, SIGRTMIN + 3);
	sigprocmask(SIG_SETMASK, &set, NULL);
	for (int i = 1; i <= 3; i++) {
		v.sival_int = rounds * 10 + i;
		if (sigqueue(getpid(), SIGRTMIN + 3, v))
			bad("sigqueue");
	}
	raise(SIGUSR1), raise(SIGTRAP);
	double t = now();
	while (now() - t < 0.004)
		;
	sleeping();
	sigpending(&got);
	if (!sigismember(&got, SIGUSR1) || !sigismember(&got, SIGTRAP) || !sigismember(&got, SIGRTMIN + 3))
		bad("pending signals");
	sigprocmask(SIG_BLOCK, NULL, &got);
	for (int s = 1; s < 65; s++)
		if (s != 32 && s != 33 && sigismember(&got, s) != sigismember(&set, s))
			bad("signal %d in the mask", s);
	siginfo_t info;
	struct timespec zero = {0, 0};
	sigset_t one;
	sigemptyset(&one), sigaddset(&one, SIGRTMIN + 3);
	for (int i = 1; i <= 3; i++)
		if (sigtimedwait(&one, &info, &zero) < 0 || info.si_value.sival_int != rounds * 10 + i)
			bad("queued signal %d", i);
	sigaddset(&set, SIGUSR1);
	if (sigtimedwait(&set, &info, &zero) < 0 || sigtimedwait(&set, &info, &zero) < 0)
		bad("plain signals");
	if (sigtimedwait(&set, &info, &zero) >= 0)
		bad("signal %d from nowhere", info.si_signo);
}

// A read without SA_RESTART ends with EINTR exactly when a handler ran.
static void handlers(void)
{
	static int fds[2];
	if (!fds[1]) {
		struct itimerval it = {{0, 1500}, {0, 1500}};
		if (pipe(fds))
			bad("pipe");
		setitimer(ITIMER_REAL, &it, NULL);
	}
	long before = handled;
	char c;
	if (read(fds[0], &c, 1) != -1 || errno != EINTR)
		bad("read");
	if (handled == before)
		bad("EINTR without a handler");
}

static void waiting(void)
{
	static int started;
	sigset_t set;
	siginfo_t info;
	sigemptyset(&set), sigaddset(&set, SIGUSR1);
	if (!started++) {
		sigprocmask(SIG_BLOCK, &set, NULL);
		thread(knock, NULL);
	}
	if (sigwaitinfo(&set, &info) != SIGUSR1)
		bad("sigwaitinfo");
}

// Increments of per-CPU counters in restartable sequences, each long enough for a
// tracer to fall into; none may be lost. The area is the C library's.
extern const ptrdiff_t __rseq_offset __attribute__((weak));
#define CPUS 256
static struct { volatile unsigned long n; char pad[56]; } counters[CPUS];

static int addPerCPU(void)
{
	struct rseq *rs = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	long cpu;
	int done = 0;
	asm volatile(
		".pushsection __rseq_cs, \"aw\"\n .balign 32\n"
		"3: .long 0, 0\n .quad 1f, 2f-1f, 4f\n .popsection\n"
		"lea 3b(%%rip), %%rax\n mov %%rax, %[cs]\n"
		"1: mov %[cpuid], %k[cpu]\n"
		"shl $6, %[cpu]\n add %[base], %[cpu]\n"
		"mov (%[cpu]), %%rax\n mov $3000, %%rcx\n"
		"6: dec %%rcx\n jnz 6b\n"
		"inc %%rax\n"
		"mov %%rax, (%[cpu])\n"
		"2: movl $1, %[done]\n jmp 5f\n"
		".pushsection __rseq_failure, \"ax\"\n .byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n"
		"4: jmp 5f\n .popsection\n"
		"5:\n"
		: [cpu] "=&r"(cpu), [done] "+r"(done), [cs] "=m"(rs->rseq_cs)
		: [cpuid] "m"(rs->cpu_id), [base] "r"(counters)
		: "rax", "rcx", "memory", "cc");
	return done;
}

static unsigned long others[2];
static volatile int othersEnded;
static void *compete(void *arg)
{
	while (!stop)
		*(unsigned long *)arg += addPerCPU();
	__atomic_add_fetch(&othersEnded, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

static void rseqs(void)
{
	static unsigned long mine;
	static int started;
	if (!started++) {
		if (!&__rseq_offset)
			bad("no rseq");
		cpu_set_t one;
		CPU_ZERO(&one);
		CPU_SET(0, &one);
		sched_setaffinity(0, sizeof(one), &one);
		thread(compete, &others[0]);
		thread(compete, &others[1]);
	}
	for (int i = 0; i < 1000; i++)
		mine += addPerCPU();
	if (!stop)
		return;
	while (othersEnded < 2)
		sched_yield();
	unsigned long sum = 0;
	for (int i = 0; i < CPUS; i++)
		sum += counters[i].n;
	if (sum != mine + others[0] + others[1])
		bad("%lu increments of %lu", sum, mine + others[0] + others[1]);
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*fn)(void); } modes[] = {
		{"registers", registers}, {"sleep", sleeping}, {"futex", futexes}, {"poll", polls},
		{"read", reading}, {"epoll", epolls}, {"sigsuspend", suspended}, {"pending", pending},
		{"handler", handlers}, {"sigwait", waiting}, {"rseq", rseqs},
	};
	struct sigaction sa = {.sa_handler = onSignal};
	sigaction(SIGUSR1, &sa, NULL), sigaction(SIGALRM, &sa, NULL), sigaction(SIGTRAP, &sa, NULL);
	mainThread = pthread_self();
	thread(untilEnd, NULL);
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
		if (strcmp(argv[1], modes[i].name))
			continue;
		for (modes[i].fn(); !stop; modes[i].fn(), rounds++)
			if (rounds == 0) {
				puts("ready");
				fflush(stdout);
			}
		modes[i].fn(); // with stop set for the whole of it
		struct sigaction old;
		sigaction(SIGTRAP, NULL, &old);
		if (old.sa_handler != onSignal)
			bad("the handler of SIGTRAP");
		printf("ok %ld\n", rounds);
		return 0;
	}
	bad("no mode %s", argv[1]);
}
