// SPDX-License-Identifier: Apache-2.0

package preloadtest

import (
	"os"
	"path/filepath"
	"testing"
)

// sharer does what CRIU does with a process that has 32 MiB of private and of shared memory side by
// side: it reads its smaps, opens its pagemap, and asks for the pages to dump in several ranges. Between the two the
// process may unmap something, which CRIU's process cannot.
const sharer = `
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

struct scan { uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, result; };
struct region { uint64_t start, end, categories; };

static void ask(int fd, const char *what, char *start, char *end)
{
	static struct region found[64];
	struct scan s = { sizeof(s), 0, (uint64_t)start, (uint64_t)end, 0, (uint64_t)found, 64, 0, 1 << 5 | 1 << 2, 1 << 5 | 1 << 2, 1 << 3 | 1 << 4, 1 << 3 | 1 << 4 };
	long n = ioctl(fd, 0xc0606610UL, &s);

	printf("%s %ld%s\n", what, n < 0 ? -errno : n, n >= 0 && s.walk_end != (uint64_t)end ? " not to the end" : "");
}

int main(int argc, char **argv)
{
	size_t size = 32 << 20, step = 2 << 20;
	char *all = mmap(NULL, 3 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *shared = all + size, *last = shared + size;
	char path[64], byte;
	int done[2], fd, dir;
	pid_t pid;
	FILE *procs;

	if (argc < 2 || pipe(done))
		return 1;
	mmap(all, size, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	mmap(shared, size, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	mmap(last, size, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pid = fork();
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		memset(all, 1, 3 * size);
		if (write(done[1], "", 1) == 1)
			pause();
		return 0;
	}
	sprintf(path, "/proc/%d", pid);
	dir = open(path, O_PATH);
	if (read(done[0], &byte, 1) != 1 || !(procs = fopen(argv[1], "w")) || fprintf(procs, "%d\n", pid) < 0 || fclose(procs))
		return 2;
	if (wait_to_be_told())
		return 3;
	if (argc > 2) {
		char text[4096];

		fd = openat(dir, "smaps", O_RDONLY);
		while (read(fd, text, sizeof(text)) > 0)
			;
		close(fd);
	}
	fd = openat(dir, "pagemap", O_RDONLY);
	ask(fd, "private", all, all + step);
	ask(fd, "shared", shared, shared + step);
	ask(fd, "to its end", last - step, last);
	ask(fd, "both", shared - step, shared + step);
	ask(fd, "both", last - step, last + step);
	ask(fd, "backwards", shared, shared + step);
	ask(fd, "private behind", last, last + step);
	/* The kernel refuses a range that is not one of pages: this tells who has answered. */
	ask(fd, "asked", shared + 1, shared + step);
	close(fd);
	fd = open("/proc/self/pagemap", O_RDONLY);
	ask(fd, "another's", shared + 1, shared + step);
	kill(pid, SIGKILL);
	while (wait(NULL) > 0)
		;
	return 0;
}
`

// The answers are the kernel's own, and it is not asked for what lies in shared memory of a process whose mappings
// CRIU has been told.
func TestPagesOfSharedMemoryAreNotLookedFor(t *testing.T) {
	library, program := build(t, told+sharer)
	cgroup := t.TempDir()
	procs := filepath.Join(cgroup, "cgroup.procs")
	lib := []string{"LD_PRELOAD=" + library, "COHORT_CRIU_SMAPS=" + cgroup}
	const answers = "private 1\nshared 0\nto its end 0\nboth 1\nboth 1\nbackwards 0\nprivate behind 1\n"
	const kernel, library0 = answers + "asked -22\nanother's -22\n", answers + "asked 0\nanother's -22\n"
	for _, c := range []struct {
		name string
		env  []string
		args []string
		want string
	}{
		{"without the library", nil, []string{procs, "smaps"}, kernel},
		{"not asked to leave out clean pages", lib, []string{procs, "smaps"}, kernel},
		{"mappings not read", append(lib, "COHORT_CRIU_SKIP_CLEAN=1"), []string{procs}, kernel},
		{"mappings read", append(lib, "COHORT_CRIU_SKIP_CLEAN=1"), []string{procs, "smaps"}, library0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.RemoveAll(procs); err != nil {
				t.Fatal(err)
			}
			if got := runProgram(t, program, c.env, c.args...); got != c.want {
				t.Errorf("got\n%swant\n%s", got, c.want)
			}
		})
	}
}
