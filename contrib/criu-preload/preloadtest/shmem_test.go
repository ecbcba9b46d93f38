// SPDX-License-Identifier: Apache-2.0

package preloadtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// seeker has two memfds with data, a file with data, and System V shared memory (by its mapping). It runs itself with the
// first memfd, and then with the segment, in the list; EXTRA is put before them. It prints for each whether SEEK_DATA finds
// something, and whether other uses of lseek are as ever.
const seeker = `
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <unistd.h>

static char list[256];

static void add(int fd)
{
	struct stat st;

	fstat(fd, &st);
	sprintf(list + strlen(list), "%s%lu:%lu", *list ? "," : "", (unsigned long)st.st_dev, (unsigned long)st.st_ino);
}

static void show(const char *name, int fd)
{
	int data = lseek64(fd, 0, SEEK_DATA) == 0 && lseek(fd, 0, SEEK_DATA) == 0;
	int none = lseek64(fd, 0, SEEK_DATA) == -1 && errno == ENXIO && lseek(fd, 0, SEEK_DATA) == -1 && errno == ENXIO;
	int rest = lseek64(fd, 0, SEEK_HOLE) == 4096 && lseek64(fd, 0, SEEK_END) == 4096 && lseek(fd, 7, SEEK_SET) == 7 &&
		   lseek(-1, 0, SEEK_DATA) == -1 && errno == EBADF;

	printf("%s %s%s\n", name, data ? "data" : none ? "none" : "?", rest ? "" : " and the rest is wrong");
}

int main(void)
{
	int listed = memfd_create("listed", 0), other = memfd_create("other", 0), file = open(".", O_TMPFILE | O_RDWR, 0600);
	int id = shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600), sysv;
	char page[4096], path[64], *p = shmat(id, NULL, 0);

	shmctl(id, IPC_RMID, NULL);
	memset(page, 1, sizeof(page));
	memset(p, 1, sizeof(page));
	if (write(listed, page, 4096) != 4096 || write(other, page, 4096) != 4096 || write(file, page, 4096) != 4096)
		return 1;
	snprintf(path, sizeof(path), "/proc/self/map_files/%lx-%lx", (unsigned long)p, (unsigned long)p + 4096);
	sysv = open(path, O_RDONLY);
	strcpy(list, getenv("EXTRA") ? getenv("EXTRA") : "");
	add(listed);
	add(sysv);
	if (!getenv("WITHOUT"))
		setenv("COHORT_CRIU_SKIP_SHMEM", list, 1);
	show("listed", listed);
	show("other", other);
	show("file", file);
	show("sysv", sysv);
	return 0;
}
`

// TestListedSharedMemoryIsFoundEmpty shows what CRIU will see of shared memory, and that nothing else is changed.
func TestListedSharedMemoryIsFoundEmpty(t *testing.T) {
	if os.Getuid() != 0 {
		missing(t, "root")
	}
	library, program := build(t, seeker)
	const all, skipped = "listed data\nother data\nfile data\nsysv data\n", "listed none\nother data\nfile data\nsysv data\n"
	preload := "LD_PRELOAD=" + library
	for _, test := range []struct {
		env  string
		want string
	}{
		{"", all},
		{preload + " WITHOUT=1", all},
		{preload, skipped},
		{preload + " EXTRA=1:2,33:44", skipped},
		{preload + " EXTRA=1:x", all}, // nothing is believed behind what cannot be read
		{preload + " CRIU_TRACK_SHMEM=1", all},
	} {
		cmd := exec.Command(program)
		cmd.Dir = filepath.Dir(program)
		cmd.Env = append(os.Environ(), strings.Fields(test.env)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", test.env, err, out)
		}
		if string(out) != test.want {
			t.Errorf("%s: %q, want %q", test.env, out, test.want)
		}
	}
}
