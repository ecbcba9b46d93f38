// SPDX-License-Identifier: Apache-2.0

/*
 * CRIU looks up each mapping of each process in /proc/PID/map_files (criu/proc_parse.c, vma_get_mapfile): by
 * fstatat(2) whether it is of a file, and how that was opened, and then it opens the file, again for each process that maps
 * it. PostgreSQL's 14 processes have 3,400 mappings of the same 60 files: 20 ms. For a process whose mappings are noted, and were found
 * unchanged in the dump (smaps.c):
 *
 *   - a mapping without a device and an inode number is of no file: there is no such name;
 *   - how the file of another was opened has been noted with its line;
 *   - a file that was opened once, by the line's device, inode number and name, in the same mount namespace, is not opened again: a
 *     duplicate of that descriptor is given, of which CRIU wants fstat(2), the mount, and what it is when it sees it for the first time.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "internal.h"

#define FILES 512
/* Where descriptors are kept: above those that CRIU works with, below its own at the limit's end (criu/servicefd.c). */
#define FIRST_KEPT 256

/* The directory map_files that CRIU opened last, the lines of its process, and the line last found. */
static struct {
	int fd;
	uint64_t ino, ns;
	struct lines lines;
} dir = { .fd = -1 };

/* Files that were opened, by the mount namespace and what their lines have in common. */
static struct {
	const char *key;
	size_t size;
	uint64_t ns;
	int flags, fd;
} files[FILES];
static int file_count;

void map_files_opened(long pid, int process, int fd)
{
	struct stat st;

	dir.fd = shown_lines(pid, &dir.lines) ? fd : -1;
	dir.ino = dir.fd >= 0 ? inode(fd) : 0;
	dir.ns = 0;
	if (dir.fd >= 0 && raw(SYS_newfstatat, process, (long)"ns/mnt", (long)&st, 0, 0, 0) == 0)
		dir.ns = (uint64_t)st.st_ino;
}

/* find_name takes a name of map_files, "START-END"; 0 where it is not known. */
static int find_name(int fd, const char *name)
{
	const char *end = name;
	uint64_t from, to;

	if (fd < 0 || fd != dir.fd || inode(fd) != dir.ino)
		return 0;
	while (*end)
		end++;
	from = hex(&name, end);
	if (name >= end || *name++ != '-')
		return 0;
	to = hex(&name, end);
	return name == end && find_line(&dir.lines, from, to);
}

/* file_of is what a line says of the file: its device, inode number and name; 0 where there is none. */
static size_t file_of(const char **key)
{
	const char *p = dir.lines.at, *end = dir.lines.last, *last;
	int field;

	for (field = 0; field < 3; field++) { /* addresses, protection, offset */
		while (p < end && *p != ' ')
			p++;
		while (p < end && *p == ' ')
			p++;
	}
	for (last = p; last < end && *last != '\n'; last++)
		;
	*key = p;
	return starts(p, last, "00:00 0 ") || (starts(p, last, "00:00 0") && last - p == 7) ? 0 : (size_t)(last - p);
}

static int is_same_key(const char *a, const char *b, size_t size)
{
	while (size-- > 0)
		if (*a++ != *b++)
			return 0;
	return 1;
}

/* map_file_open answers openat(2) for a name in map_files; 0 where it does not know. */
int map_file_open(int fd, const char *name, int flags, int *result)
{
	const char *key;
	size_t size;
	int i;

	if (!find_name(fd, name))
		return 0;
	size = file_of(&key);
	if (!size) {
		*result = -ENOENT;
		return 1;
	}
	for (i = 0; i < file_count; i++)
		if (files[i].ns == dir.ns && files[i].size == size && files[i].flags == flags && is_same_key(files[i].key, key, size))
			break;
	if (i == file_count) {
		*result = (int)raw(SYS_openat, fd, (long)name, flags, 0, 0, 0);
		if (*result >= 0 && i < FILES && dir.ns) {
			files[i].fd = (int)raw(SYS_fcntl, *result, F_DUPFD_CLOEXEC, FIRST_KEPT, 0, 0, 0);
			files[i].key = key;
			files[i].ns = dir.ns;
			files[i].size = size;
			files[i].flags = flags;
			file_count += files[i].fd >= 0;
		}
		return 1;
	}
	*result = (int)raw(SYS_fcntl, files[i].fd, F_DUPFD, 0, 0, 0, 0);
	return *result >= 0;
}

static int stat_at(int fd, const char *name, struct stat *st, int flags)
{
	const char *key;

	if (flags == AT_SYMLINK_NOFOLLOW && find_name(fd, name)) {
		int mode = line_mode(&dir.lines);

		if (!file_of(&key))
			return (int)answer(-ENOENT);
		if (mode) {
			*st = (struct stat){ .st_mode = S_IFLNK | (mode_t)mode };
			return 0;
		}
	}
	return (int)answer(raw(SYS_newfstatat, fd, (long)name, (long)st, flags, 0, 0));
}

__attribute__((visibility("default"))) int fstatat(int fd, const char *name, struct stat *st, int flags)
{
	return stat_at(fd, name, st, flags);
}

/*
 * The same under its other name, of which not every C library knows a declaration. Before glibc 2.33 it has a third, and nothing
 * changes.
 */
int fstatat_64(int fd, const char *name, struct stat *st, int flags) __asm__("fstatat64");

__attribute__((visibility("default"))) int fstatat_64(int fd, const char *name, struct stat *st, int flags)
{
	return stat_at(fd, name, st, flags);
}
