// SPDX-License-Identifier: Apache-2.0

/*
 * Files in the writable layer, and in /dev/shm. Each process has a folder of its own in both, and one
 * thread works on them. A file's content follows from its id and versions as memory's does; the last block
 * may be cut short.
 */

#include "torture.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILES 10
#define BLOCKS 64
#define DIRS 3
#define SHM_FILES 3U /* of FILES: those are in /dev/shm */

struct file {
	int used;
	uint64_t id;
	int dir;	    /* the folder's index */
	unsigned int name;  /* the file's */
	int dir2;
	unsigned int name2; /* of a hard link, or 0 */
	int fd;		    /* kept open, or -1 */
	mode_t mode;
	uint32_t size, counter;
	uint32_t version[BLOCKS];
};

static struct file files[FILES];
static unsigned int dirs[DIRS]; /* number in the folder's name; 0 is /dev/shm's */
static unsigned int last_name;
static int root_pid;
static uint64_t root_id;

static const char *dir_path(char *to, int dir)
{
	if (dir == 0)
		sprintf(to, "/dev/shm/p%d-%lu", root_pid, root_id);
	else
		sprintf(to, "/data/p%d-%lu/d%u", root_pid, root_id, dirs[dir]);
	return to;
}

static const char *file_path(char *to, int dir, unsigned int name)
{
	sprintf(to + strlen(dir_path(to, dir)), "/f%u", name);
	return to;
}

static void make_dir(const char *path)
{
	if (mkdir(path, 0755) < 0)
		fail("mkdir %s: %s", path, strerror(errno));
}

/* files_init begins with empty folders. A child's copy of its parent's files is forgotten. */
void files_init(void)
{
	char path[128];

	for (int i = 0; i < FILES; i++)
		if (files[i].used && files[i].fd >= 0)
			close(files[i].fd);
	memset(files, 0, sizeof(files));
	root_pid = my_pid;
	root_id = new_id();
	last_name = 0;
	sprintf(path, "/data/p%d-%lu", root_pid, root_id);
	make_dir(path);
	for (int d = 0; d < DIRS; d++) {
		dirs[d] = ++last_name;
		make_dir(dir_path(path, d));
	}
}

/* put writes the bytes from off on, of new versions, as far as size. */
static void put(struct file *f, int fd, uint32_t off, uint32_t end, int append)
{
	char buffer[BLOCK];

	while (off < end) {
		uint32_t b = off / BLOCK, in = off % BLOCK, n = BLOCK - in;
		ssize_t done;

		n = n > end - off ? end - off : n;
		/* What is in the block already keeps its version: only a whole block gets another. */
		if (in == 0)
			f->version[b] = ++f->counter;
		fill(buffer, f->id, b, f->version[b]);
		done = append ? write(fd, buffer + in, n) : pwrite(fd, buffer + in, n, off);
		if (done != (ssize_t)n)
			fail("writing %u bytes to file %u: %s", n, f->name, strerror(errno));
		off += n;
		f->size = off > f->size ? off : f->size;
	}
}

static void check(struct file *f, int fd, const char *path)
{
	char buffer[BLOCK], want[BLOCK];
	struct stat st;

	if (fstat(fd, &st) < 0)
		fail("%s: %s", path, strerror(errno));
	if (st.st_size != f->size || (st.st_mode & 0777) != f->mode)
		fail("%s: %ld bytes, mode %o; it should be %u, %o", path, st.st_size, st.st_mode & 0777, f->size, f->mode);
	for (uint32_t off = 0; off < f->size; off += BLOCK) {
		uint32_t b = off / BLOCK, n = f->size - off > BLOCK ? BLOCK : f->size - off;

		if (pread(fd, buffer, n, off) != (ssize_t)n)
			fail("%s: reading %u bytes at %u: %s", path, n, off, strerror(errno));
		fill(want, f->id, b, f->version[b]);
		if (memcmp(buffer, want, n) != 0)
			fail("%s: block %u of %u bytes is not version %u", path, b, f->size, f->version[b]);
	}
}

/*
 * part_names lets go of a file's second name where it names another file: overlayfs copies a file that is in a
 * lower layer, as all are after a restore, when it is opened for writing, by the one name (kernel,
 * Documentation/filesystems/overlayfs.rst, "Non-standard behavior"). It may have parted in the middle of a change that
 * a checkpoint cut in two, too.
 */
static void part_names(struct file *f)
{
	char path[128];
	struct stat one, two;

	if (!f->name2)
		return;
	if (stat(file_path(path, f->dir, f->name), &one) < 0 || stat(file_path(path, f->dir2, f->name2), &two) < 0)
		fail("%s: %s", path, strerror(errno));
	if (one.st_ino == two.st_ino)
		return;
	if (unlink(path) < 0)
		fail("unlink %s: %s", path, strerror(errno));
	f->name2 = 0;
}

static void verify_file(struct file *f)
{
	char path[128];
	int fd;

	part_names(f);
	if (f->fd >= 0)
		check(f, f->fd, "a file that is kept open");
	for (int second = 0; second < 2; second++) {
		unsigned int name = second ? f->name2 : f->name;

		if (!name)
			continue;
		fd = open(file_path(path, second ? f->dir2 : f->dir, name), O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			fail("%s: %s", path, strerror(errno));
		check(f, fd, path);
		close(fd);
	}
}

/* files_verify checks all files, and that there are no others. The caller has stopped the world. */
void files_verify(void)
{
	for (int i = 0; i < FILES; i++)
		if (files[i].used)
			verify_file(&files[i]);
	for (int d = 0; d < DIRS; d++) {
		char path[128];
		int have = 0, want = 0;
		struct dirent *e;
		DIR *dir = opendir(dir_path(path, d));

		if (!dir)
			fail("%s: %s", path, strerror(errno));
		while ((e = readdir(dir)))
			have += e->d_name[0] != '.';
		closedir(dir);
		for (int i = 0; i < FILES; i++)
			if (files[i].used)
				want += (files[i].name && files[i].dir == d) + (files[i].name2 && files[i].dir2 == d);
		if (have != want)
			fail("%s has %d files, it should be %d", path, have, want);
	}
}

static void create(struct file *f, int shm)
{
	char path[128];

	memset(f, 0, sizeof(*f));
	f->id = new_id();
	f->dir = shm ? 0 : 1 + (int)upto(DIRS - 1);
	f->name = ++last_name;
	f->mode = 0600 + upto(8) * 010;
	f->fd = open(file_path(path, f->dir, f->name), O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0600);
	if (f->fd < 0 || fchmod(f->fd, f->mode) < 0)
		fail("%s: %s", path, strerror(errno));
	f->used = 1;
	put(f, f->fd, 0, 1 + upto(6 * BLOCK), 1);
	if (upto(2)) {
		close(f->fd);
		f->fd = -1;
	}
}

static int opened(struct file *f, int flags)
{
	char path[128];
	int fd = open(file_path(path, f->dir, f->name), flags | O_CLOEXEC);

	if (fd < 0)
		fail("%s: %s", path, strerror(errno));
	return fd;
}

static void remove_file(struct file *f)
{
	char path[128];

	if (f->name && unlink(file_path(path, f->dir, f->name)) < 0)
		fail("unlink %s: %s", path, strerror(errno));
	if (f->name2 && unlink(file_path(path, f->dir2, f->name2)) < 0)
		fail("unlink %s: %s", path, strerror(errno));
	if (f->fd >= 0)
		close(f->fd);
	f->used = 0;
}

static void move_file(struct file *f, int over)
{
	char from[128], to[128];
	int dir = f->dir ? 1 + (int)upto(DIRS - 1) : 0;
	unsigned int name = ++last_name;

	file_path(from, f->dir, f->name);
	if (over) {
		/* A new version of the whole file takes the name of the old one. */
		struct file was = *f;

		if (f->name2)
			return;
		file_path(to, was.dir, was.name);
		create(f, was.dir == 0);
		file_path(from, f->dir, f->name);
		if (upto(2)) {
			int fd = opened(f, O_RDONLY);

			fsync(fd);
			close(fd);
		}
		if (rename(from, to) < 0)
			fail("rename %s to %s: %s", from, to, strerror(errno));
		f->dir = was.dir;
		f->name = was.name;
		if (was.fd >= 0)
			close(was.fd);
		count(OP_FILE_REPLACE);
		return;
	}
	if (rename(from, file_path(to, dir, name)) < 0)
		fail("rename %s to %s: %s", from, to, strerror(errno));
	f->dir = dir;
	f->name = name;
	count(OP_FILE_RENAME);
}

static void move_dir(void)
{
	char from[128], to[128];
	int d = 1 + (int)upto(DIRS - 1);
	unsigned int old = dirs[d];

	dir_path(from, d);
	dirs[d] = ++last_name;
	if (rename(from, dir_path(to, d)) < 0 && errno == EXDEV)
		dirs[d] = old; /* in a lower layer, which overlayfs does not rename */
	else if (access(to, F_OK) < 0)
		fail("rename %s to %s: %s", from, to, strerror(errno));
	count(OP_FILE_DIR);
}

static void change(struct file *f)
{
	uint32_t blocks = (uint32_t)(f->size / BLOCK);
	char from[128], to[128];
	int fd;

	switch (upto(12)) {
	default:
		if (f->size > (BLOCKS - 4) * BLOCK)
			break;
		fd = f->fd >= 0 ? f->fd : opened(f, O_WRONLY | O_APPEND);
		part_names(f);
		put(f, fd, f->size, f->size + 1 + upto(3 * BLOCK), 1);
		if (fd != f->fd)
			close(fd);
		count(OP_FILE_APPEND);
		break;
	case 4:
	case 5:
		if (!blocks)
			break;
		fd = opened(f, O_WRONLY);
		part_names(f);
		blocks = upto(blocks) * BLOCK;
		put(f, fd, blocks, blocks + BLOCK, 0);
		close(fd);
		count(OP_FILE_REWRITE);
		break;
	case 6:
		fd = opened(f, O_WRONLY);
		part_names(f);
		f->size = upto(f->size + 1);
		if (ftruncate(fd, f->size) < 0)
			fail("ftruncate: %s", strerror(errno));
		close(fd);
		count(OP_FILE_TRUNCATE);
		break;
	case 7:
		move_file(f, 0);
		break;
	case 8:
		move_file(f, 1);
		break;
	case 9:
		remove_file(f);
		count(OP_FILE_UNLINK);
		break;
	case 10:
		if (f->name2) {
			unlink(file_path(to, f->dir2, f->name2));
			f->name2 = 0;
			break;
		}
		f->dir2 = f->dir ? 1 + (int)upto(DIRS - 1) : 0;
		f->name2 = ++last_name;
		if (link(file_path(from, f->dir, f->name), file_path(to, f->dir2, f->name2)) < 0)
			fail("link %s to %s: %s", from, to, strerror(errno));
		count(OP_FILE_LINK);
		break;
	case 11:
		move_dir();
	}
}

/* files_step does one thing to one file. The caller holds the world for reading. */
void files_step(void)
{
	uint32_t i = upto(FILES);

	if (!files[i].used)
		create(&files[i], i < SHM_FILES);
	else if (upto(4) == 0)
		verify_file(&files[i]);
	else
		change(&files[i]);
	if (i < SHM_FILES)
		count(OP_SHM_FILE);
}

/* files_remove leaves nothing behind of a process that is about to end. */
void files_remove(void)
{
	char path[128];

	for (int i = 0; i < FILES; i++)
		if (files[i].used)
			remove_file(&files[i]);
	for (int d = 0; d < DIRS; d++)
		if (rmdir(dir_path(path, d)) < 0)
			fail("rmdir %s: %s", path, strerror(errno));
	sprintf(path, "/data/p%d-%lu", root_pid, root_id);
	if (rmdir(path) < 0)
		fail("rmdir %s: %s", path, strerror(errno));
}
