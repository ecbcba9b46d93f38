// SPDX-License-Identifier: Apache-2.0

package preloadtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// told is the beginning of a program that does as CRIU does when it is asked for a dump: it reads the
// request, and waits until it is told to go on, which it is after a while.
const told = `
#define _GNU_SOURCE
#include <sys/socket.h>
#include <unistd.h>

static int receive(int from)
{
	char byte;

	return recv(from, NULL, 0, MSG_TRUNC | MSG_PEEK) != 1 || recv(from, &byte, 1, MSG_TRUNC) != 1;
}

static int wait_to_be_told(void)
{
	int messages[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, messages) || send(messages[1], "a", 1, 0) != 1 || receive(messages[0]))
		return -1;
	if (fork() == 0) {
		usleep(300000);
		_exit(send(messages[1], "b", 1, 0) != 1);
	}
	return receive(messages[0]);
}
`

// build makes the library and a program.
func build(t *testing.T, source string) (library, program string) {
	t.Helper()
	for _, tool := range []string{"gcc", "bash"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing(t, tool)
		}
	}
	dir := t.TempDir()
	library, program = filepath.Join(dir, "preload.so"), filepath.Join(dir, "program")
	output(t, "bash", "-c", `. ../../setup/lib.sh; . ../../setup/tools.sh; build_preload "$0"`, library)
	if err := os.WriteFile(program+".c", []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	output(t, "gcc", "-o", program, program+".c")
	return library, program
}

func runProgram(t *testing.T, program string, env []string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v %v: %v\n%s", env, args, err, out)
	}
	return string(out)
}

const runner = `
#define _GNU_SOURCE
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	(void)argc;
	execvp(argv[1], argv + 1);
	return perror(argv[1]), 1;
}
`

func TestTmpfsArchivesAreLeftOutOnlyWhereAskedFor(t *testing.T) {
	library, program := build(t, runner)
	tar, dir := filepath.Join(t.TempDir(), "tar"), t.TempDir()
	if err := os.WriteFile(tar, []byte("#!/bin/sh\necho \"archives: $*\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	path := "PATH=" + filepath.Dir(tar) + ":" + os.Getenv("PATH")
	create, extract := []string{"tar", "--create", "--gzip", dir}, []string{"tar", "--extract", "--gzip"}
	for _, c := range []struct {
		env  []string
		args []string
		runs bool
	}{
		{[]string{path}, create, true},
		{[]string{path, "LD_PRELOAD=" + library}, create, true},
		{[]string{path, "LD_PRELOAD=" + library, "COHORT_CRIU_NO_TAR=1"}, extract, true},
		{[]string{path, "LD_PRELOAD=" + library, "COHORT_CRIU_NO_TAR=1"}, create, false},
	} {
		if out := runProgram(t, program, c.env, c.args...); strings.HasPrefix(out, "archives: ") != c.runs {
			t.Errorf("%q with %q: %q", c.args, c.env[1:], out)
		}
	}
}

// reader does what CRIU does: it is told something, says that it waits, and opens the smaps of a
// process when it is told to go on. The process then maps and unmaps, locks and unlocks.
const reader = `
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static int dir;

static void print(const char *what, const char *name)
{
	char text[4096];
	ssize_t count;
	int fd = openat(dir, name, O_RDONLY);

	if (fd < 0)
		exit(10);
	printf("== %s\n", what);
	fflush(stdout);
	while ((count = read(fd, text, sizeof(text))) > 0)
		if (write(1, text, count) != count)
			exit(11);
	close(fd);
}

int main(int argc, char **argv)
{
	size_t size = 64 << 20;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char path[64], byte, *apart;
	int go[2], done[2], messages[2], file = memfd_create("one", 0), other = memfd_create("other", 0);
	pid_t pid;

	if (argc < 2 || memory == MAP_FAILED || pipe(go) || pipe(done) || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, messages))
		return 1;
	pid = fork();
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		memset(memory, 1, size);
		madvise(memory, size / 2, MADV_DONTFORK);
		/* A page of a file, and one of none, apart from others. */
		ftruncate(file, 8192);
		ftruncate(other, 8192);
		apart = mmap(NULL, 5 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		mmap(apart + 4096, 4096, PROT_READ, MAP_FIXED | MAP_PRIVATE, file, 0);
		mmap(apart + 3 * 4096, 4096, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (write(done[1], "", 1) != 1 || read(go[0], &byte, 1) != 1)
			return 1;
		if (!strcmp(argv[1], "lock"))
			mlock(memory, size / 2);
		if (!strcmp(argv[1], "unmap"))
			munmap(memory, 4096);
		if (!strcmp(argv[1], "protect"))
			mprotect(memory + size - 4096, 4096, PROT_NONE);
		if (!strcmp(argv[1], "whole"))
			mprotect(apart + 3 * 4096, 4096, PROT_READ);
		if (!strcmp(argv[1], "file"))
			mmap(apart + 4096, 4096, PROT_READ, MAP_FIXED | MAP_PRIVATE, other, 0);
		if (!strcmp(argv[1], "offset"))
			mmap(apart + 4096, 4096, PROT_READ, MAP_FIXED | MAP_PRIVATE, file, 4096);
		if (!strcmp(argv[1], "share"))
			mmap(apart + 4096, 4096, PROT_READ, MAP_FIXED | MAP_SHARED, file, 0);
		if (!strcmp(argv[1], "none"))
			mmap(apart + 4096, 4096, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (!strcmp(argv[1], "more"))
			mmap((void *)(1UL << 44), 4096, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (write(done[1], "", 1) != 1 || read(go[0], &byte, 1) != 1)
			return 1;
		return 0;
	}
	sprintf(path, "/proc/%d", pid);
	dir = open(path, O_PATH);
	if (read(done[0], &byte, 1) != 1)
		return 2;
	/* The parent's own memory is not that of the child: the cgroup has only the child. */
	if (argc > 2) {
		FILE *procs = fopen(argv[2], "w");

		if (!procs || fprintf(procs, "%d\n", pid) < 0 || fclose(procs))
			return 3;
	}
	if (send(messages[1], "a", 1, 0) != 1 || recv(messages[0], NULL, 0, MSG_TRUNC | MSG_PEEK) != 1 || recv(messages[0], &byte, 1, MSG_TRUNC) != 1)
		return 4;
	if (fork() == 0) {
		usleep(400000);
		if (write(go[1], "", 1) != 1 || read(done[0], &byte, 1) != 1)
			return 1;
		return send(messages[1], "b", 1, 0) != 1;
	}
	if (recv(messages[0], NULL, 0, MSG_TRUNC | MSG_PEEK) != 1 || recv(messages[0], &byte, 1, MSG_TRUNC) != 1)
		return 5;
	print("maps", "maps");
	print("first", "smaps");
	if (write(go[1], "", 1) != 1)
		return 6;
	kill(pid, SIGKILL);
	while (wait(NULL) > 0)
		;
	return 0;
}
`

var ownLine = regexp.MustCompile("(?m)^[A-Z].*\n")

// TestFlagsOfMappingsAreNotedBeforeTheFreeze tells the file that the library makes up from the kernel's by
// what only the kernel counts.
func TestFlagsOfMappingsAreNotedBeforeTheFreeze(t *testing.T) {
	library, program := build(t, reader)
	cgroup := t.TempDir()
	procs := filepath.Join(cgroup, "cgroup.procs")
	asked := []string{"LD_PRELOAD=" + library, "COHORT_CRIU_SMAPS=" + cgroup}
	for _, c := range []struct {
		name  string
		env   []string
		act   string
		noted bool
	}{
		{"without the library", nil, "nothing", false},
		{"not asked for", asked[:1], "nothing", false},
		{"nothing changed", asked, "nothing", true},
		{"locked", asked, "lock", false},
		{"unmapped", asked, "unmap", false},
		{"protected", asked, "protect", false},
		{"protected as a whole", asked, "whole", false},
		{"another file in its place", asked, "file", false},
		{"another part of the file", asked, "offset", false},
		{"shared instead of private", asked, "share", false},
		{"no file any more", asked, "none", false},
		{"one more", asked, "more", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			out := runProgram(t, program, c.env, c.act, procs)
			maps, smaps, ok := strings.Cut(strings.TrimPrefix(out, "== maps\n"), "== first\n")
			if !ok {
				t.Fatalf("it printed %q", out)
			}
			if noted := !strings.Contains(smaps, "\nRss:"); noted != c.noted {
				t.Errorf("the flags are noted ones: %v, want %v", noted, c.noted)
			}
			if got := ownLine.ReplaceAllString(smaps, ""); got != maps {
				t.Errorf("the mappings are\n%s\nand not\n%s", got, maps)
			}
			if got, want := strings.Count(smaps, "\nVmFlags: "), strings.Count(maps, "\n"); got != want {
				t.Errorf("%d of %d mappings have flags", got, want)
			}
			if !strings.Contains(smaps, " dc ") {
				t.Error("MADV_DONTFORK is not among the flags")
			}
			if locked := regexp.MustCompile("(?m)^VmFlags:.* lo ").MatchString(smaps); locked != (c.act == "lock") {
				t.Errorf("a mapping is locked: %v", locked)
			}
		})
	}
}
