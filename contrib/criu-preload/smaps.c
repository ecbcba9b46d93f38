// SPDX-License-Identifier: Apache-2.0

/*
 * COHORT_CRIU_SMAPS=DIR, a cgroup's directory: what CRIU needs of /proc/PID/smaps is read before the processes of this
 * cgroup are frozen. CRIU takes two things from there (criu/proc_parse.c, parse_smaps): the lines that /proc/PID/maps has as
 * well, and VmFlags. The kernel counts all pages of a mapping before it prints one: 5 ms for 256 MiB.
 *
 * So while CRIU waits (see gate.c) the flags are noted, anew when the mappings change, and when it opens the file for
 * the dump it is given them if /proc/PID/maps is still the same, and as much memory locked; otherwise it is given the file
 * itself. What this cannot see is advice given by madvise(2) for exactly the range of a mapping, between the last time
 * of reading and the freeze. A very small process, for which nothing is gained, has its file read in any case.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>

#include "internal.h"

/* A process with less memory than this, in KiB, is not worth it. PostgreSQL's have some 5 MiB and 240 mappings. */
#define WORTH 1024
#define PROCESSES 512
/* How much text there may be: of one process, and of what is kept of all. */
#define TEXT_SIZE (16UL << 20)
#define KEPT_SIZE (64UL << 20)
/* How many mappings there may be of all processes. */
#define MODES_SIZE (1UL << 20)
/* How often to look whether mappings have changed, and how small a part of the time that may take. */
#define LOOK_NS 50000000L
#define LOOK_PART 20

struct noted {
	long pid;
	char *text; /* lines of maps, each with its VmFlags */
	size_t size;
	uint64_t locked;
	unsigned char *modes; /* of the files of its mappings, see line_mode */
	int shown; /* CRIU has been given it: these are the mappings of the frozen process */
};

/* The pagemap that CRIU opened last, whose it is, and its mappings where they are known. */
static struct {
	int fd;
	uint64_t ino;
	long pid;
	struct lines lines;
} pagemap = { .fd = -1 };

static struct noted noted[PROCESSES];
static int noted_count;
static char *text, *kept;
static size_t kept_size;
static unsigned char *modes;
static size_t modes_count;

static void *map(size_t size)
{
	long p = raw(SYS_mmap, 0, (long)size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p < 0 && p >= -4095)
		return NULL;
	raw(SYS_madvise, p, (long)size, MADV_DONTFORK, 0, 0, 0); /* CRIU forks in the dump */
	return (void *)p;
}

/* read_text reads a file whole; -1 where it cannot be, or does not fit. */
static long read_text(int dir, const char *path, char *to, size_t room)
{
	size_t size = 0;
	long fd = raw(SYS_openat, dir, (long)path, O_RDONLY | O_CLOEXEC, 0, 0, 0);

	if (fd < 0)
		return -1;
	while (size < room) {
		long count = raw(SYS_read, fd, (long)(to + size), (long)(room - size), 0, 0, 0);

		if (count == -EINTR)
			continue;
		if (count <= 0) {
			raw(SYS_close, fd, 0, 0, 0, 0, 0);
			return count < 0 ? -1 : (long)size;
		}
		size += (size_t)count;
	}
	raw(SYS_close, fd, 0, 0, 0, 0, 0);
	return -1;
}

int starts(const char *p, const char *end, const char *with)
{
	while (*with) {
		if (p >= end || *p != *with)
			return 0;
		p++;
		with++;
	}
	return 1;
}

static const char *line_end(const char *p, const char *end)
{
	while (p < end && *p != '\n')
		p++;
	return p < end ? p + 1 : end;
}

/* A line of maps begins with an address, one of smaps' own with a capital letter. */
static int is_range(const char *p)
{
	return (*p >= '0' && *p <= '9') || (*p >= 'a' && *p <= 'f');
}

static uint64_t number(const char *p, const char *end)
{
	uint64_t n = 0;

	while (p < end && (*p < '0' || *p > '9'))
		p++;
	for (; p < end && *p >= '0' && *p <= '9'; p++)
		n = n * 10 + (uint64_t)(*p - '0');
	return n;
}

/* field takes a number of KiB out of a text that has it on a line of its own; 0 where there is none. */
static uint64_t field(const char *p, const char *end, const char *name)
{
	for (; p < end; p = line_end(p, end))
		if (starts(p, end, name))
			return number(p, line_end(p, end));
	return 0;
}

static int proc_path(char *path, long pid, const char *name)
{
	char *p = append_text(path, "/proc/");

	p = append_number(p, (unsigned long)pid);
	p = append_text(p, name);
	*p = '\0';
	return 0;
}

static long locked_of(int dir, const char *path, uint64_t *locked)
{
	char status[4096];
	long size = read_text(dir, path, status, sizeof(status));

	if (size < 0)
		return -1;
	*locked = field(status, status + size, "VmLck:");
	return 0;
}

/* is_same compares the lines of maps with those noted. */
static int is_same(const struct noted *n, const char *p, size_t size)
{
	const char *end = p + size, *q = n->text, *qend = n->text + n->size;

	while (p < end && q < qend) {
		const char *next = line_end(p, end), *qnext = line_end(q, qend);

		if (next - p != qnext - q)
			return 0;
		while (p < next)
			if (*p++ != *q++)
				return 0;
		q = line_end(q, qend); /* VmFlags */
	}
	return p == end && q == qend;
}

uint64_t hex(const char **p, const char *end)
{
	uint64_t n = 0;

	for (; *p < end; (*p)++) {
		char c = **p;

		if (c >= '0' && c <= '9')
			n = n * 16 + (uint64_t)(c - '0');
		else if (c >= 'a' && c <= 'f')
			n = n * 16 + (uint64_t)(c - 'a' + 10);
		else
			break;
	}
	return n;
}

/* in_line reads the addresses of a line, and leaves what is behind them; 0 where it has none. */
static int in_line(const char **p, const char *last, uint64_t *from, uint64_t *to)
{
	if (*p >= last || !is_range(*p))
		return 0;
	*from = hex(p, last);
	if (*p >= last || *(*p)++ != '-')
		return 0;
	*to = hex(p, last);
	return 1;
}

/* append_hex writes a number as the names in map_files have it. */
static char *append_hex(char *p, uint64_t n)
{
	int shift = 60;

	while (shift > 0 && !(n >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		*p++ = "0123456789abcdef"[(n >> shift) & 15];
	return p;
}

/* note_modes asks how the files of a process' mappings were opened. */
static void note_modes(struct noted *n)
{
	const char *p, *last = n->text + n->size, *next;
	char path[64];
	size_t i = 0;
	long dir;

	n->modes = NULL;
	proc_path(path, n->pid, "/map_files");
	dir = raw(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
	if (dir < 0)
		return;
	for (p = n->text; p < last; p = next) {
		const char *line = p;
		uint64_t from, to;
		struct stat st;

		next = line_end(p, last);
		if (!in_line(&line, last, &from, &to))
			continue;
		if (modes_count + i >= MODES_SIZE) {
			raw(SYS_close, dir, 0, 0, 0, 0, 0);
			return;
		}
		*append_hex(append_text(append_hex(path, from), "-"), to) = '\0';
		modes[modes_count + i] = 0;
		if (raw(SYS_newfstatat, dir, (long)path, (long)&st, AT_SYMLINK_NOFOLLOW, 0, 0) == 0)
			modes[modes_count + i] = (unsigned char)(st.st_mode >> 6 & 7);
		i++;
	}
	raw(SYS_close, dir, 0, 0, 0, 0, 0);
	n->modes = modes + modes_count;
	modes_count += i;
}

/* note reads the smaps of a process. Every line of maps must have its flags. */
static int note(struct noted *n, long pid)
{
	char path[48], *to = kept + kept_size, *begin = to;
	const char *p, *end, *next;
	uint64_t rss = 0;
	int flags = 1;
	long size;

	n->pid = 0;
	n->shown = 0;
	proc_path(path, pid, "/status");
	if (locked_of(AT_FDCWD, path, &n->locked))
		return -1;
	proc_path(path, pid, "/smaps");
	size = read_text(AT_FDCWD, path, text, TEXT_SIZE);
	if (size <= 0)
		return -1;
	for (p = text, end = text + size; p < end; p = next) {
		int range = is_range(p);

		next = line_end(p, end);
		if (starts(p, end, "Rss:"))
			rss += number(p, next);
		if (!range && !starts(p, end, "VmFlags:"))
			continue;
		if (range != flags || kept_size + (size_t)(to - begin) + (size_t)(next - p) > KEPT_SIZE)
			return -1;
		flags = !range;
		while (p < next)
			*to++ = *p++;
	}
	if (!flags || rss < WORTH)
		return -1;
	n->pid = pid;
	n->text = begin;
	n->size = (size_t)(to - begin);
	kept_size += n->size;
	note_modes(n);
	return 0;
}

/* asked says that CRIU is told to go on. */
static int asked(int socket, long ns)
{
	struct pollfd p = { .fd = socket, .events = POLLIN };
	struct timespec t = { .tv_nsec = ns };

	return raw(SYS_ppoll, (long)&p, 1, (long)&t, 0, 0, 0) != 0;
}

static void note_all(const char *cgroup, int socket)
{
	char path[4096], pids[65536];
	const char *p, *end;
	size_t i;
	long size;

	for (i = 0; cgroup[i] && i < sizeof(path) - sizeof("/cgroup.procs"); i++)
		path[i] = cgroup[i];
	*append_text(path + i, "/cgroup.procs") = '\0';
	size = read_text(AT_FDCWD, path, pids, sizeof(pids));
	if (size < 0)
		return;
	for (p = pids, end = pids + size; p < end && noted_count < PROCESSES; p = line_end(p, end))
		if (!asked(socket, 0) && note(&noted[noted_count], (long)number(p, end)) == 0)
			noted_count++;
}

static void refresh(int socket)
{
	char path[48];
	int i;

	for (i = 0; i < noted_count && !asked(socket, 0); i++) {
		long pid = noted[i].pid, size;

		if (!pid)
			continue;
		proc_path(path, pid, "/maps");
		size = read_text(AT_FDCWD, path, text, TEXT_SIZE);
		if (size < 0 || !is_same(&noted[i], text, (size_t)size))
			note(&noted[i], pid);
	}
}

static long now(void)
{
	struct timespec t;

	raw(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&t, 0, 0, 0, 0);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* note_mappings notes what may be asked for later, unless CRIU is told to go on before. */
void note_mappings(int socket)
{
	const char *cgroup = getenv("COHORT_CRIU_SMAPS");

	if (!cgroup || !*cgroup || text)
		return;
	text = map(TEXT_SIZE);
	kept = map(KEPT_SIZE);
	modes = map(MODES_SIZE);
	if (text && kept && modes)
		note_all(cgroup, socket);
}

/* keep_noted looks after what is noted until CRIU is told to go on. */
void keep_noted(int socket)
{
	long wait = LOOK_NS;

	while (noted_count && !asked(socket, wait)) {
		long begin = now();

		refresh(socket);
		wait = (now() - begin) * LOOK_PART;
		wait = wait < LOOK_NS ? LOOK_NS : wait > 900000000L ? 900000000L : wait;
	}
}

/* pid_of reads which process's directory a descriptor is of: "/proc/PID". */
static long pid_of(int dir)
{
	char path[48], link[64];
	char *p = append_text(path, "/proc/self/fd/");
	long size;

	*append_number(p, (unsigned long)dir) = '\0';
	size = raw(SYS_readlinkat, AT_FDCWD, (long)path, (long)link, sizeof(link), 0, 0);
	if (size <= 0 || !starts(link, link + size, "/proc/"))
		return 0;
	return (long)number(link, link + size);
}

static struct noted *find_noted(long pid)
{
	int i;

	for (i = 0; pid && i < noted_count; i++)
		if (noted[i].pid == pid)
			return &noted[i];
	return NULL;
}

/* struct procmap_query of include/uapi/linux/fs.h, Linux 6.11. */
struct query {
	uint64_t size, flags, address;
	uint64_t start, end, protection, page_size, offset, ino;
	uint32_t major, minor, name_size, build_id_size;
	uint64_t name, build_id;
};

#define QUERY 0xc0686611UL /* _IOWR('f', 17, struct procmap_query) */
#define QUERY_OR_NEXT 0x10

/* is_line says whether a line of maps is what the kernel has answered; its name is not looked at. */
static int is_line(const struct query *q, const char *p, const char *end)
{
	static const char letters[] = "rwx";
	uint64_t from, to, bit;

	if (!in_line(&p, end, &from, &to) || from != q->start || to != q->end || end - p < 7)
		return 0;
	for (bit = 0, p++; bit < 3; bit++, p++)
		if ((*p == letters[bit]) != !!(q->protection & (1U << bit)))
			return 0;
	if ((*p == 's') != !!(q->protection & 8))
		return 0;
	p += 2;
	if (hex(&p, end) != q->offset || p++ >= end || hex(&p, end) != q->major || p++ >= end || hex(&p, end) != q->minor)
		return 0;
	return number(p, end) == q->ino;
}

/*
 * is_unchanged compares mappings with those noted. The kernel is asked for one after the other, if it can be: to print a line takes
 * five times as long, most of it for the name. The name is the file's, or what the kernel calls the mapping: it says
 * nothing of memory.
 */
static int is_unchanged(const struct noted *n, int dir)
{
	const char *p, *last = n->text + n->size, *next;
	struct query q = { .size = sizeof(q), .flags = QUERY_OR_NEXT };
	long fd, size, result;

	fd = raw(SYS_openat, dir, (long)"maps", O_RDONLY | O_CLOEXEC, 0, 0, 0);
	if (fd < 0)
		return 0;
	for (p = n->text; p < last; p = next) {
		next = line_end(p, last);
		if (!is_range(p))
			continue;
		q.name_size = q.build_id_size = 0;
		result = raw(SYS_ioctl, fd, QUERY, (long)&q, 0, 0, 0);
		if (result == -ENOTTY)
			break;
		if (result == -ENOENT && starts(p, next, "ffffffffff600000-")) {
			p = last; /* the page of vsyscalls, which has no mapping */
			break;
		}
		if (result || !is_line(&q, p, next))
			break;
		q.address = q.end;
	}
	if (p >= last)
		result = raw(SYS_ioctl, fd, QUERY, (long)&q, 0, 0, 0) == -ENOENT;
	else if (result == -ENOTTY)
		result = (size = read_text(dir, "maps", text, TEXT_SIZE)) >= 0 && is_same(n, text, (size_t)size);
	else
		result = 0;
	raw(SYS_close, fd, 0, 0, 0, 0, 0);
	return (int)result;
}

/* open_noted returns a file with what was noted of a process, if it is still so; -1 if not. */
static int open_noted(int dir)
{
	struct noted *n = find_noted(pid_of(dir));
	uint64_t locked;
	size_t done = 0;
	long fd;

	if (!n || !is_unchanged(n, dir) || locked_of(dir, "status", &locked) || locked != n->locked)
		return -1;
	fd = raw(SYS_memfd_create, (long)"smaps", MFD_CLOEXEC, 0, 0, 0, 0);
	if (fd < 0)
		return -1;
	while (done < n->size) {
		long count = raw(SYS_pwrite64, fd, (long)(n->text + done), (long)(n->size - done), (long)done, 0, 0);

		if (count <= 0) {
			raw(SYS_close, fd, 0, 0, 0, 0, 0);
			return -1;
		}
		done += (size_t)count;
	}
	n->shown = 1;
	return (int)fd;
}

uint64_t inode(int fd)
{
	struct stat st;

	return raw(SYS_fstat, fd, (long)&st, 0, 0, 0, 0) == 0 ? (uint64_t)st.st_ino : 0;
}

long pagemap_pid(int fd)
{
	return fd >= 0 && fd == pagemap.fd && inode(fd) == pagemap.ino ? pagemap.pid : 0;
}

int shown_lines(long pid, struct lines *lines)
{
	const struct noted *n = find_noted(pid);

	if (!n || !n->shown)
		return 0;
	*lines = (struct lines){ .text = n->text, .last = n->text + n->size, .at = n->text, .modes = n->modes };
	return 1;
}

/* covers goes on from the line found last to the one that has a range; -1 where it is passed. */
static int covers(struct lines *l, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to)
{
	for (; l->at < l->last; l->at = line_end(l->at, l->last)) {
		const char *p = l->at;

		if (!in_line(&p, l->last, from, to))
			continue;
		if (*from > start)
			return -1;
		if (start < *to)
			return end <= *to;
		l->index++;
	}
	l->at = l->text; /* nothing is behind the last one */
	l->index = 0;
	return -1;
}

static int find_range(struct lines *l, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to)
{
	int result = covers(l, start, end, from, to);

	if (result < 0) {
		l->at = l->text;
		l->index = 0;
		result = covers(l, start, end, from, to);
	}
	return result > 0;
}

int find_line(struct lines *lines, uint64_t start, uint64_t end)
{
	uint64_t from, to;

	return find_range(lines, start, end, &from, &to) && from == start && to == end;
}

int line_mode(const struct lines *lines) { return lines->modes ? lines->modes[lines->index] << 6 : 0; }

int is_shared(int fd, uint64_t start, uint64_t end)
{
	uint64_t from, to;
	const char *p;

	if (!pagemap.lines.text || !pagemap_pid(fd) || !find_range(&pagemap.lines, start, end, &from, &to))
		return 0;
	p = pagemap.lines.at;
	in_line(&p, pagemap.lines.last, &from, &to); /* "START-END rwxs ..." */
	return pagemap.lines.last - p > 4 && p[4] == 's';
}

/* look_up notes of which process a pagemap is. */
static void look_up(int dir, int fd)
{
	pagemap.pid = pid_of(dir);
	pagemap.fd = fd;
	pagemap.ino = inode(fd);
	if (!shown_lines(pagemap.pid, &pagemap.lines))
		pagemap.lines.text = NULL;
}

static int open_at(int dir, const char *path, int flags, mode_t mode)
{
	int result;

	if (noted_count && dir >= 0 && map_file_open(dir, path, flags, &result))
		return (int)answer(result);
	if (noted_count && dir >= 0 && is_same_text(path, "map_files")) {
		result = (int)raw(SYS_openat, dir, (long)path, flags, mode, 0, 0);
		map_files_opened(pid_of(dir), dir, result);
		return (int)answer(result);
	}
	if (noted_count && dir >= 0 && is_same_text(path, "smaps")) {
		int fd = open_noted(dir);

		if (fd >= 0)
			return fd;
	}
	if (dir >= 0 && is_same_text(path, "pagemap")) {
		result = (int)raw(SYS_openat, dir, (long)path, flags, mode, 0, 0);
		look_up(dir, result);
		return (int)answer(result);
	}
	return (int)answer(raw(SYS_openat, dir, (long)path, flags, mode, 0, 0));
}

/* The mode is there only with O_CREAT or O_TMPFILE; without, the kernel does not look. */
#define OPEN_AT                                                                                                                \
	va_list args;                                                                                                          \
	mode_t mode = 0;                                                                                                       \
                                                                                                                               \
	va_start(args, flags);                                                                                                 \
	if (flags & (O_CREAT | O_TMPFILE))                                                                                     \
		mode = va_arg(args, mode_t);                                                                                   \
	va_end(args);                                                                                                          \
	return open_at(dir, path, flags, mode)

/* Musl has this name alone. */
__attribute__((visibility("default"))) int openat(int dir, const char *path, int flags, ...)
{
	OPEN_AT;
}

__attribute__((visibility("default"))) int openat64(int dir, const char *path, int flags, ...)
{
	OPEN_AT;
}
