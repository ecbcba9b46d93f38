// SPDX-License-Identifier: Apache-2.0

/* What the files of libcohort-criu.so share. Nothing of it is visible outside of the library. */

#ifndef COHORT_CRIU_INTERNAL_H
#define COHORT_CRIU_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

/*
 * From include/uapi/linux/fs.h of Linux 6.7, which the headers of the host may not have yet.
 */
struct scan {
	uint64_t size;
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end;
	uint64_t vec;
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

#define SCAN 0xc0606610UL /* _IOWR('f', 16, struct pm_scan_arg) */
#define SCAN_WRITTEN (1 << 1)
#define SCAN_FILE (1 << 2)
#define SCAN_PRESENT (1 << 3)
#define SCAN_SWAPPED (1 << 4)
#define SCAN_PFNZERO (1 << 5)

/* raw makes a system call and returns what the kernel does: an error as its negative number. */
long raw(long number, long a, long b, long c, long d, long e, long f);

/* answer turns the kernel's result into the C library's, with errno. */
long answer(long result);

/* append_number and append_text write at p and return the place behind. */
char *append_number(char *p, unsigned long n);
char *append_text(char *p, const char *text);

/* is_set says whether a variable of the environment is "1". */
int is_set(const char *name);

/* is_same_text compares two texts. */
int is_same_text(const char *a, const char *b);

/* hear_told reads from a socket of which processes clean pages are left out; not 0 if it ends before. */
int hear_told(int socket);

/*
 * note_mappings reads the mappings of the processes to be dumped, and keep_noted reads them again when they change, until
 * there is something to read from the socket.
 */
void note_mappings(int socket);
void keep_noted(int socket);

/* inode is a descriptor's inode number, 0 where there is none. */
uint64_t inode(int fd);

/* starts says whether a text begins with another one. */
int starts(const char *p, const char *end, const char *with);

/* hex reads a hexadecimal number at *p, and leaves there what is behind it. */
uint64_t hex(const char **p, const char *end);

/*
 * struct lines are the mappings of a process as CRIU was given them, the line found last, and how many there are before it. They are
 * looked for in ascending order, mostly.
 */
struct lines {
	const char *text, *last, *at;
	const unsigned char *modes;
	size_t index;
};

/* shown_lines are those of a process that CRIU has been given; 0 where that is not so. */
int shown_lines(long pid, struct lines *lines);

/* find_line looks for the line of a mapping; 0 where there is none. */
int find_line(struct lines *lines, uint64_t start, uint64_t end);

/* line_mode is how the file of the line found last was opened, as permissions of its link in map_files; 0 if unknown. */
int line_mode(const struct lines *lines);

/* map_files_opened says that CRIU has opened the directory map_files of a process, whose own directory is open too. */
void map_files_opened(long pid, int process, int fd);

/* map_file_open opens a name in that directory; 0 where that has to be left to the kernel. *result is what the kernel would answer. */
int map_file_open(int fd, const char *name, int flags, int *result);

/* pagemap_pid is whose pagemap fd is; 0 where that is not known. */
long pagemap_pid(int fd);

/* is_shared says whether a range of the process whose pagemap fd is lies in one shared mapping, as far as that is noted. */
int is_shared(int fd, uint64_t start, uint64_t end);

#endif
