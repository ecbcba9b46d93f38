// SPDX-License-Identifier: Apache-2.0

/*
 * COHORT_CRIU_GATE=FD, a socket: CRIU waits in two places more than its notifications allow, so that more of it is done
 * before the container is frozen, and something else beside it while it is.
 *
 *	'h'	to the other end, once, when CRIU begins to read its request: the library is there. The answer to
 *		"pre-dump" may then come at once.
 *	'A'	CRIU is about to look for the container's tasks. It has read what it needs to know of the host, itself and
 *		its libraries by then, a millisecond. It goes on when it reads 'a': when the tasks are frozen.
 *	'B'	CRIU has seized all tasks and read the first one's mappings, and is about to change a register or a byte of it
 *		for the first time. It goes on when it reads 'b', and what clean.c is to know.
 *
 * Whoever asks for this must see each of them. CRIU ends when the other end does.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

static int gate = -1;
static char next;

static void say(char what)
{
	if (raw(SYS_sendto, gate, (long)&what, 1, MSG_NOSIGNAL, 0, 0) != 1)
		raw(SYS_exit_group, 1, 0, 0, 0, 0, 0);
}

static void wait_for(char what)
{
	char c;
	long count;

	do
		count = raw(SYS_read, gate, (long)&c, 1, 0, 0, 0);
	while (count == -EINTR);
	if (count != 1 || c != what)
		raw(SYS_exit_group, 1, 0, 0, 0, 0, 0);
}

static void open_gate(void)
{
	const char *p = getenv("COHORT_CRIU_GATE");
	int fd = 0;

	if (!p || !*p)
		return;
	for (; *p >= '0' && *p <= '9' && fd < 1000; p++)
		fd = fd * 10 + (*p - '0');
	if (*p || raw(SYS_fcntl, fd, F_SETFD, FD_CLOEXEC, 0, 0, 0) < 0)
		return;
	gate = fd;
	next = 'A';
	say('h');
}

/*
 * CRIU looks how long a message is before it reads it (criu/cr-service.c, recv_criu_msg). The first that it waits for is
 * the request, the second the answer to "pre-dump".
 */
__attribute__((visibility("default"))) ssize_t recv(int fd, void *buf, size_t len, int flags)
{
	static int messages;

	if (!buf && flags == (MSG_TRUNC | MSG_PEEK) && messages < 2) {
		if (++messages == 1) {
			open_gate();
		} else if (gate < 0) {
			note_mappings(fd);
			keep_noted(fd);
		}
	}
	return answer(raw(SYS_recvfrom, fd, (long)buf, (long)len, flags, 0, 0));
}

/* The first thing that CRIU does in order to seize tasks is to limit the time for it (criu/seize.c, collect_pstree). */
__attribute__((visibility("default"))) unsigned int alarm(unsigned int seconds)
{
	struct {
		struct {
			long seconds, microseconds;
		} interval, value;
	} t = { { 0, 0 }, { seconds, 0 } }, old;

	if (gate >= 0 && next == 'A' && seconds) {
		note_mappings(gate);
		say('A');
		keep_noted(gate);
		wait_for('a');
		next = 'B';
	}
	if (raw(SYS_setitimer, 0 /* ITIMER_REAL */, (long)&t, (long)&old, 0, 0, 0) < 0)
		return 0;
	return (unsigned int)(old.value.seconds + (old.value.microseconds > 0));
}

static int only_looks(int request)
{
	switch (request) {
	case PTRACE_SEIZE:
	case PTRACE_INTERRUPT:
	case PTRACE_DETACH:
	case PTRACE_SETOPTIONS:
	case PTRACE_GETSIGINFO:
	case PTRACE_PEEKSIGINFO:
	case PTRACE_GETSIGMASK:
	case PTRACE_GETREGSET:
	case PTRACE_PEEKDATA:
	case PTRACE_PEEKTEXT:
	case PTRACE_SECCOMP_GET_FILTER:
	case 0x420f: /* PTRACE_GET_RSEQ_CONFIGURATION */
		return 1;
	}
	return 0;
}

/* The C library's returns what was read where the kernel stores it. */
#define PEEKS(request) ((request) == PTRACE_PEEKTEXT || (request) == PTRACE_PEEKDATA || (request) == PTRACE_PEEKUSER)

__attribute__((visibility("default"))) long ptrace(enum __ptrace_request request, ...)
{
	long pid, addr, data, result, word = 0;
	va_list args;

	va_start(args, request);
	pid = va_arg(args, long);
	addr = va_arg(args, long);
	data = va_arg(args, long);
	va_end(args);
	if (gate >= 0 && next == 'B' && !only_looks((int)request)) {
		say('B');
		wait_for('b');
		if (hear_told(gate))
			raw(SYS_exit_group, 1, 0, 0, 0, 0, 0);
		next = 0;
	}
	result = answer(raw(SYS_ptrace, (long)request, (int)pid, addr, PEEKS(request) ? (long)&word : data, 0, 0));
	if (result >= 0 && PEEKS(request)) {
		errno = 0;
		return word;
	}
	return result;
}
