// SPDX-License-Identifier: Apache-2.0

package preloadtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// mapper does what CRIU does with two processes that map the same files in several ways: it reads the smaps of each, and
// looks each mapping up in map_files. It compares every answer with the kernel's own. Two descriptors with the same
// offset are of one open file.
const mapper = `
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define RW (PROT_READ | PROT_WRITE)
static int names, files, wrong, again;
static long page;

static int open_before(int fd)
{
	static off_t place = 1000;
	struct stat st;

	/* An offset that nobody else sets tells who has opened it. */
	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || fcntl(fd, F_GETFL) & O_PATH)
		return 0;
	if (lseek(fd, 0, SEEK_CUR) >= 1000)
		return 1;
	lseek(fd, place++, SEEK_SET);
	return 0;
}

static void look_up(int dir, const char *name, int flags)
{
	struct stat ours, theirs;
	int r, e, fd, kernel;

	names++;
	errno = 0;
	r = fstatat(dir, name, &ours, AT_SYMLINK_NOFOLLOW);
	e = errno;
	errno = 0;
	if (syscall(SYS_newfstatat, dir, name, &theirs, AT_SYMLINK_NOFOLLOW) != r || errno != e || (r == 0 && (ours.st_mode & (S_IFMT | 0600)) != (theirs.st_mode & (S_IFMT | 0600))))
		wrong++, printf("stat %s: %d %d %o %o\n", name, r, e, ours.st_mode, theirs.st_mode);
	errno = 0;
	fd = openat(dir, name, flags);
	e = errno;
	errno = 0;
	kernel = syscall(SYS_openat, dir, name, flags);
	if ((fd < 0) != (kernel < 0) || errno != e)
		wrong++, printf("open %s: %d %d, not %d %d\n", name, fd, e, kernel, errno);
	if (fd >= 0) {
		files++;
		if (fstat(fd, &ours) || fstat(kernel, &theirs) || ours.st_dev != theirs.st_dev || ours.st_ino != theirs.st_ino)
			wrong++, printf("%s is another file\n", name);
		again += open_before(fd);
		close(fd);
		close(kernel);
	}
}

static void dump(pid_t pid)
{
	static char text[1 << 20], line[4096], name[64];
	unsigned long start, end, major, minor, ino;
	char path[64];
	int dir, fd, maps;
	size_t size = 0;
	ssize_t n;
	FILE *f;

	sprintf(path, "/proc/%d", pid);
	dir = open(path, O_PATH);
	fd = openat(dir, "smaps", O_RDONLY);
	while ((n = read(fd, text + size, sizeof(text) - size)) > 0)
		size += n;
	close(fd);
	maps = openat(dir, "map_files", O_RDONLY | O_DIRECTORY);
	f = fmemopen(text, size, "r");
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx %*s %*x %lx:%lx %lu", &start, &end, &major, &minor, &ino) != 5)
			continue;
		sprintf(name, "%lx-%lx", start, end);
		look_up(maps, name, major ? O_PATH : O_RDONLY);
		look_up(maps, name, O_RDONLY);
	}
	fclose(f);
	look_up(maps, "1000-2000", O_RDONLY);
	look_up(maps, "nothing", O_RDONLY);
	look_up(AT_FDCWD, "nothing", O_RDONLY);
	close(maps);
	/* The number is another directory's now. */
	if (open("/proc/self", O_RDONLY | O_DIRECTORY) == maps)
		look_up(maps, "status", O_RDONLY);
	close(maps);
	close(dir);
}

static void child(const char *file, int done, int apart)
{
	if (apart && unshare(CLONE_NEWNS))
		_exit(1);
	char *all = mmap(NULL, 64 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int r = open(file, O_RDONLY), rw = open(file, O_RDWR), memfd = memfd_create("x", 0);

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	ftruncate(memfd, 4 * page);
	mmap(all + 2 * page, 2 * page, PROT_READ, MAP_FIXED | MAP_PRIVATE, r, 0);
	mmap(all + 6 * page, 2 * page, PROT_READ, MAP_FIXED | MAP_SHARED, rw, 0);
	mmap(all + 10 * page, 2 * page, RW, MAP_FIXED | MAP_PRIVATE, rw, 0);
	mmap(all + 14 * page, 4 * page, RW, MAP_FIXED | MAP_SHARED, memfd, 0);
	mmap(all + 20 * page, 2 * page, RW, MAP_FIXED | MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	mmap(all + 24 * page, 2 * page, RW, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	all = mmap(NULL, 4 << 20, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(all, 1, 4 << 20);
	if (write(done, "", 1) == 1)
		pause();
	_exit(0);
}

int main(int argc, char **argv)
{
	int done[2], i;
	char byte;
	pid_t pids[2];
	FILE *procs;

	page = getpagesize();
	if (argc < 3 || pipe(done) || !(procs = fopen(argv[1], "w")))
		return 1;
	for (i = 0; i < 2; i++) {
		if ((pids[i] = fork()) == 0)
			child(argv[2], done[1], i == 1 && argc > 3);
		if (read(done[0], &byte, 1) != 1 || fprintf(procs, "%d\n", pids[i]) < 0)
			return 2;
	}
	fclose(procs);
	if (wait_to_be_told())
		return 3;
	for (i = 0; i < 2; i++)
		dump(pids[i]);
	for (i = 0; i < 2; i++)
		kill(pids[i], SIGKILL);
	while (wait(NULL) > 0)
		;
	printf("%s names, %s files, %d wrong, %d opened before\n", names > 50 ? "many" : "few", files > 30 ? "many" : "few", wrong, again);
	return 0;
}
`

// CRIU gets the kernel's answers, whoever gives them.
func TestMappedFilesAreLookedUpOnce(t *testing.T) {
	library, program := build(t, told+mapper)
	dir := t.TempDir()
	procs, file := filepath.Join(dir, "cgroup.procs"), filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte(strings.Repeat("x", 1<<16)), 0o600); err != nil {
		t.Fatal(err)
	}
	noted := []string{"LD_PRELOAD=" + library, "COHORT_CRIU_SMAPS=" + dir}
	before := map[string]int{}
	for _, c := range []struct {
		name string
		env  []string
		args []string
	}{
		{"without the library", nil, nil},
		{"mappings not noted", noted[:1], nil},
		{"mappings noted", noted, nil},
		{"two mount namespaces", noted, []string{"apart"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.RemoveAll(procs); err != nil {
				t.Fatal(err)
			}
			got := runProgram(t, program, c.env, append([]string{procs, file}, c.args...)...)
			var n int
			if _, err := fmt.Sscanf(got, "many names, many files, 0 wrong, %d opened before\n", &n); err != nil {
				t.Fatalf("it prints %q", got)
			}
			before[c.name] = n
		})
	}
	// A file of another mount namespace is opened there.
	one, two := before["mappings noted"], before["two mount namespaces"]
	if before["without the library"] != 0 || before["mappings not noted"] != 0 || two == 0 || one <= two {
		t.Errorf("so many were opened before: %v", before)
	}
}
