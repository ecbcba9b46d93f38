// SPDX-License-Identifier: Apache-2.0

/*
 * Loaded into CRIU by a test, on kernels without soft-dirty bits, before libcohort-criu.so: it has CRIU believe that
 * there are some. In their place are the marks of userfaultfd's asynchronous write protection, which the test
 * has put on the process that is dumped:
 *
 *	CRIU (criu/kerndat.c, mem.c, pagemap-cache.c)	here
 *	reads its own entry in /proc/self/pagemap	has bit 55 set
 *	writes "4" to /proc/PID/clear_refs		write-protects what was written, by ioctl(PAGEMAP_SCAN)
 *	asks ioctl(PAGEMAP_SCAN) for soft-dirty pages	is told which were written since
 *
 * What nobody tracks counts as written. A page that is not there, and protected all the same, looks as if it were
 * swapped out: such pages are left out, so there must be no swap. CRIU's file of what the kernel can do is hidden, so that it neither
 * says otherwise nor lasts. Built as libcohort-criu.so is, so it has nothing of a C library but errno.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>

/* include/uapi/linux/fs.h, Linux 6.7 */
struct scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
};
struct region {
	uint64_t start, end, categories;
};
#define SCAN 0xc0606610UL
#define WRITTEN (1UL << 1)
#define SWAPPED (1UL << 4)
#define SOFT_DIRTY (1UL << 7)
#define WP_MATCHING 1
#define TASK_END 0x7ffffffff000UL
#define PAGEMAP_SOFT_DIRTY (1UL << 55)

static long raw(long number, long a, long b, long c, long d)
{
#if defined(__x86_64__)
	long result;
	register long r10 __asm__("r10") = d;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
#endif
}

static long answer(long result)
{
	if (result < 0 && result >= -4095) {
		errno = (int)-result;
		return -1;
	}
	return result;
}

static size_t length(const char *s)
{
	size_t n = 0;

	while (s[n])
		n++;
	return n;
}

static int ends(const char *s, const char *tail)
{
	size_t n = length(s), m = length(tail), i;

	if (n < m)
		return 0;
	for (i = 0; i < m; i++)
		if (s[n - m + i] != tail[i])
			return 0;
	return 1;
}

/* name puts the path of an open file into buf. */
static int name(int fd, char *buf, size_t size)
{
	char link[40] = "/proc/self/fd/", digits[12], *p = link + 14;
	int count = 0;
	long n;

	if (fd < 0)
		return 0;
	do
		digits[count++] = (char)('0' + fd % 10);
	while (fd /= 10);
	while (count)
		*p++ = digits[--count];
	*p = 0;
	n = raw(SYS_readlinkat, AT_FDCWD, (long)link, (long)buf, (long)size - 1);
	if (n <= 0)
		return 0;
	buf[n] = 0;
	return 1;
}

ssize_t read(int fd, void *buf, size_t size)
{
	long n = raw(SYS_read, fd, (long)buf, (long)size, 0);
	char path[128];

	if (n == sizeof(uint64_t) && size == sizeof(uint64_t) && name(fd, path, sizeof(path)) && ends(path, "/pagemap"))
		*(uint64_t *)buf |= PAGEMAP_SOFT_DIRTY;
	return answer(n);
}

ssize_t write(int fd, const void *buf, size_t size)
{
	static const char tail[] = "clear_refs", pagemap[] = "pagemap";
	struct scan s = { .size = sizeof(s), .flags = WP_MATCHING, .end = TASK_END, .mask = WRITTEN };
	char path[128];
	size_t i, n;
	long other, result;

	if (!size || *(const char *)buf != '4' || size > 2 || !name(fd, path, sizeof(path)) || !ends(path, tail))
		return answer(raw(SYS_write, fd, (long)buf, (long)size, 0));
	n = length(path) - (sizeof(tail) - 1);
	for (i = 0; i < sizeof(pagemap); i++)
		path[n + i] = pagemap[i];
	other = raw(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0);
	if (other < 0)
		return answer(other);
	result = raw(SYS_ioctl, other, SCAN, (long)&s, 0);
	raw(SYS_close, other, 0, 0, 0);
	return answer(result < 0 ? result : (long)size);
}

int ioctl(int fd, unsigned long request, ...)
{
	struct region *r;
	struct scan *s;
	va_list list;
	long n, i, arg;
	uint64_t anyof;

	va_start(list, request);
	arg = va_arg(list, long);
	va_end(list);
	s = (struct scan *)arg;
	if ((request & 0xffffffff) != SCAN || !(s->returned & SOFT_DIRTY))
		return (int)answer(raw(SYS_ioctl, fd, (long)request, arg, 0));
	anyof = s->anyof;
	s->anyof &= ~SWAPPED;
	s->returned = (s->returned & ~SOFT_DIRTY) | WRITTEN;
	n = raw(SYS_ioctl, fd, (long)request, arg, 0);
	s->returned = (s->returned & ~WRITTEN) | SOFT_DIRTY;
	s->anyof = anyof;
	r = (struct region *)s->vec;
	for (i = 0; i < n; i++)
		if (r[i].categories & WRITTEN)
			r[i].categories = (r[i].categories & ~WRITTEN) | SOFT_DIRTY;
	return (int)answer(n);
}

static int hidden(const char *path)
{
	return path && (ends(path, "/criu.kdat") || ends(path, "/criu.kdat.tmp"));
}

int open64(const char *path, int flags, ...)
{
	va_list list;
	long mode;

	va_start(list, flags);
	mode = va_arg(list, int);
	va_end(list);
	if (hidden(path))
		return (int)answer(-ENOENT);
	return (int)answer(raw(SYS_openat, AT_FDCWD, (long)path, flags, mode));
}

int open(const char *path, int flags, ...) __attribute__((alias("open64")));
