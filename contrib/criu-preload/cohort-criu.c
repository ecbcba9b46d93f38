// SPDX-License-Identifier: Apache-2.0

/*
 * libcohort-criu.so: loaded into CRIU by the loader's --preload (see contrib/setup/tools.sh).
 *
 * CRIU reads the resource limits of every task that it dumps with
 *
 *	syscall(__NR_prlimit64, pid, resource, NULL, &limit)	(criu/cr-dump.c, dump_task_rlimits)
 *
 * and the kernel refuses that for a task of another user unless the caller has CAP_SYS_RESOURCE
 * (kernel/sys.c, check_prlimit_permission). Root lacks this capability on many hosts: in containers,
 * in most CI machines, under hardened service units. The same numbers are in /proc/PID/limits, which
 * root may always read. This library answers from there, and only when the kernel has said EPERM.
 *
 * The second thing it does, where the environment has COHORT_CRIU_NO_CONNTRACK=1: it answers CRIU's
 * request for the connection tracking table of the container's network namespace (criu/net.c, dump_nf_ct)
 * with an empty one. The namespace is external for cohort, a restore never looks at the table; but the kernel
 * walks its whole hash to dump it, twice: 12 ms each time with the 262,144 buckets of a machine with 24 GiB,
 * while the container is frozen.
 *
 * The third, where the environment has COHORT_CRIU_SKIP_CLEAN: it leaves out pages of private mappings that somebody else has,
 * see clean.c.
 *
 * The fourth, where the environment has COHORT_CRIU_SKIP_SHMEM=DEV:INO,DEV:INO... : of these shared memory objects
 * CRIU finds no data, see is_skipped.
 *
 * What else it does makes the time shorter that the container stands still: see stop.c.
 *
 * It wraps syscall(2) itself, since CRIU calls the limit that way. It may need nothing that some C
 * library lacks: it is built with the host's compiler and runs beside the libraries of CRIU's own
 * prefix. The symbols it takes from there are __errno_location and getenv, which glibc and musl both have.
 * Everything else is a bare system call.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netlink.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

/* Limits of a task as in /proc/PID/limits: 16 lines of under 80 characters (fs/proc/base.c). */
#define LIMITS_SIZE 4096
#define LIMITS_COUNT 16

/* The kernel's struct rlimit64 (include/uapi/linux/resource.h), named apart from the C library's. */
struct limit {
	uint64_t soft;
	uint64_t hard;
};

long raw(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc 0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	return x0;
#else
#error "libcohort-criu knows the system call convention of x86-64 and arm64 only"
#endif
}

long answer(long result)
{
	if (result < 0 && result >= -4095) {
		errno = (int)-result;
		return -1;
	}
	return result;
}

/*
 * The lines of /proc/PID/limits in the order of the resource numbers (include/uapi/asm-generic/resource.h);
 * the file has its own order, which is not promised to be the same, so lines are found by name.
 */
static const char *const limit_names[LIMITS_COUNT] = {
	"Max cpu time",	      "Max file size",	   "Max data size",	  "Max stack size",
	"Max core file size", "Max resident set",  "Max processes",	  "Max open files",
	"Max locked memory",  "Max address space", "Max file locks",	  "Max pending signals",
	"Max msgqueue size",  "Max nice priority", "Max realtime priority", "Max realtime timeout",
};

/* append_number writes the digits of n at p and returns the place behind them. */
char *append_number(char *p, unsigned long n)
{
	char digits[20];
	int count = 0;

	do {
		digits[count++] = (char)('0' + n % 10);
		n /= 10;
	} while (n);
	while (count)
		*p++ = digits[--count];
	return p;
}

char *append_text(char *p, const char *text)
{
	while (*text)
		*p++ = *text++;
	return p;
}

/* parse_value reads "unlimited" or a decimal number behind blanks; NULL when there is neither. */
static const char *parse_value(const char *p, const char *end, uint64_t *value)
{
	static const char unlimited[] = "unlimited";
	const char *begin;
	size_t i;

	while (p < end && *p == ' ')
		p++;
	for (i = 0; i < sizeof(unlimited) - 1; i++)
		if (p + i >= end || p[i] != unlimited[i])
			break;
	if (i == sizeof(unlimited) - 1) {
		*value = UINT64_MAX;
		return p + i;
	}
	begin = p;
	for (*value = 0; p < end && *p >= '0' && *p <= '9'; p++) {
		uint64_t digit = (uint64_t)(*p - '0');

		if (*value > (UINT64_MAX - digit) / 10)
			return NULL;
		*value = *value * 10 + digit;
	}
	return p > begin ? p : NULL;
}

/* find_limit takes one resource's pair from the text of a limits file; 0 when it was found. */
static int find_limit(const char *text, size_t size, unsigned int resource, struct limit *limit)
{
	const char *end = text + size;
	const char *line = text;

	while (line < end) {
		const char *next = line;
		const char *p = line;
		const char *name = limit_names[resource];

		while (next < end && *next != '\n')
			next++;
		while (*name && p < next && *p == *name) {
			p++;
			name++;
		}
		if (!*name && p < next && *p == ' ') {
			p = parse_value(p, next, &limit->soft);
			p = p ? parse_value(p, next, &limit->hard) : NULL;
			return p ? 0 : -1;
		}
		line = next + 1;
	}
	return -1;
}

/*
 * read_limit reads the file once for all limits of a process: CRIU asks for them one after the other, while the process is
 * frozen and cannot change them.
 */
static int read_limit(long pid, unsigned int resource, struct limit *limit)
{
	static char text[LIMITS_SIZE];
	static size_t size;
	static long of;
	char path[48];
	char *p;
	long fd;

	if (of == pid && resource != 0)
		return find_limit(text, size, resource, limit);
	p = append_text(path, "/proc/");
	p = append_number(p, (unsigned long)pid);
	p = append_text(p, "/limits");
	*p = '\0';

	of = 0;
	size = 0;
	fd = raw(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0, 0);
	if (fd < 0)
		return -1;
	while (size < sizeof(text)) {
		long count = raw(SYS_read, fd, (long)(text + size), (long)(sizeof(text) - size), 0, 0, 0);

		if (count == -EINTR)
			continue;
		if (count <= 0)
			break;
		size += (size_t)count;
	}
	raw(SYS_close, fd, 0, 0, 0, 0, 0);
	of = pid;
	return find_limit(text, size, resource, limit);
}

/*
 * syscall is the C library's, with one answer changed. Six arguments are always taken, as every C
 * library does: what the caller did not pass is whatever its registers held, and the kernel does not look.
 */
__attribute__((visibility("default"))) long syscall(long number, ...)
{
	va_list args;
	long a, b, c, d, e, f, result;

	va_start(args, number);
	a = va_arg(args, long);
	b = va_arg(args, long);
	c = va_arg(args, long);
	d = va_arg(args, long);
	e = va_arg(args, long);
	f = va_arg(args, long);
	va_end(args);

	/* pid_t and int arrive in 64-bit registers whose upper half is not defined. */
	result = raw(number, a, b, c, d, e, f);
	if (result == -EPERM && number == SYS_prlimit64 && c == 0 && d != 0 && (int)a > 0 &&
	    (unsigned int)b < LIMITS_COUNT && read_limit((int)a, (unsigned int)b, (struct limit *)d) == 0)
		return 0;
	return answer(result);
}

/* is_set says whether a variable of the environment is "1". */
int is_set(const char *name)
{
	const char *value = getenv(name);

	return value && value[0] == '1' && value[1] == '\0';
}

/* The socket and sequence number of a request that waits for its empty answer. CRIU dumps in one thread. */
static int conntrack_socket = -1;
static uint32_t conntrack_seq;

/* is_conntrack_dump knows the two requests by their type: the table, and the expectations. */
static int is_conntrack_dump(const struct msghdr *msg)
{
	const struct nlmsghdr *h;

	if (!msg || msg->msg_iovlen != 1 || msg->msg_iov[0].iov_len < sizeof(*h) || msg->msg_namelen != sizeof(struct sockaddr_nl))
		return 0;
	h = msg->msg_iov[0].iov_base;
	if (!(h->nlmsg_flags & NLM_F_DUMP) ||
	    (h->nlmsg_type != ((NFNL_SUBSYS_CTNETLINK << 8) | IPCTNL_MSG_CT_GET) &&
	     h->nlmsg_type != ((NFNL_SUBSYS_CTNETLINK << 8) | IPCTNL_MSG_EXP_GET)))
		return 0;
	return is_set("COHORT_CRIU_NO_CONNTRACK");
}

__attribute__((visibility("default"))) ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
	if (is_conntrack_dump(msg)) {
		const struct nlmsghdr *h = msg->msg_iov[0].iov_base;

		conntrack_socket = fd;
		conntrack_seq = h->nlmsg_seq;
		return (ssize_t)msg->msg_iov[0].iov_len;
	}
	return answer(raw(SYS_sendmsg, fd, (long)msg, flags, 0, 0, 0));
}

__attribute__((visibility("default"))) ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
	/* NLMSG_DONE with the dump's result, 0 (net/netlink/af_netlink.c, netlink_dump_done). */
	struct done {
		struct nlmsghdr h;
		int result;
	} *d;

	if (fd != conntrack_socket || !msg || msg->msg_iovlen < 1 || msg->msg_iov[0].iov_len < sizeof(*d))
		return answer(raw(SYS_recvmsg, fd, (long)msg, flags, 0, 0, 0));
	conntrack_socket = -1;
	d = msg->msg_iov[0].iov_base;
	d->h.nlmsg_len = sizeof(*d);
	d->h.nlmsg_type = NLMSG_DONE;
	d->h.nlmsg_flags = NLM_F_MULTI;
	d->h.nlmsg_seq = conntrack_seq;
	d->h.nlmsg_pid = 0;
	d->result = 0;
	msg->msg_flags = 0;
	msg->msg_controllen = 0;
	return sizeof(*d);
}

/* next_number reads a decimal number at *p and the character behind it, which must be end or the last one of all. */
static int next_number(const char **p, char end, uint64_t *value)
{
	const char *begin = *p;

	for (*value = 0; **p >= '0' && **p <= '9'; (*p)++)
		*value = *value * 10 + (uint64_t)(**p - '0');
	if (*p == begin || (**p != end && **p != '\0'))
		return -1;
	if (**p)
		(*p)++;
	return 0;
}

/* is_sysv says whether a descriptor is of System V shared memory, whose inode number is its id: a number among others. */
static int is_sysv(int fd)
{
	static const char prefix[] = "/SYSV";
	char path[48], link[sizeof(prefix) - 1];
	char *p = append_text(path, "/proc/self/fd/");
	size_t i;

	*append_number(p, (unsigned long)fd) = '\0';
	if (raw(SYS_readlinkat, AT_FDCWD, (long)path, (long)link, sizeof(link), 0, 0) != sizeof(link))
		return 1;
	for (i = 0; i < sizeof(link); i++)
		if (link[i] != prefix[i])
			return 0;
	return 1;
}

/*
 * is_skipped says whether a descriptor is of an object that somebody else copies (runtime/memory/shm). CRIU walks the
 * data of anonymous shared memory and of memfds by lseek(2) (criu/shmem.c, next_data_segment), and writes
 * pagemap-shmem-INO.img with the pages found: with none, it is the same image without entries.
 */
static int is_skipped(int fd)
{
	const char *list = getenv("COHORT_CRIU_SKIP_SHMEM");
	uint64_t dev, ino;
	struct stat st;

	if (!list || !*list || fd < 0 || getenv("CRIU_TRACK_SHMEM") || raw(SYS_fstat, fd, (long)&st, 0, 0, 0, 0) != 0)
		return 0;
	while (*list) {
		if (next_number(&list, ':', &dev) || next_number(&list, ',', &ino))
			return 0;
		if (dev == (uint64_t)st.st_dev && ino == (uint64_t)st.st_ino)
			return !is_sysv(fd);
	}
	return 0;
}

/* off_t has 64 bits in both architectures: lseek and lseek64, which CRIU calls with glibc, are the same. */
static long seek(int fd, long offset, int whence)
{
	if (whence == SEEK_DATA && offset >= 0 && is_skipped(fd))
		return answer(-ENXIO);
	return answer(raw(SYS_lseek, fd, offset, whence, 0, 0, 0));
}

__attribute__((visibility("default"))) off_t lseek(int fd, off_t offset, int whence)
{
	return seek(fd, offset, whence);
}

#undef lseek64
__attribute__((visibility("default"))) long lseek64(int fd, long offset, int whence)
{
	return seek(fd, offset, whence);
}
