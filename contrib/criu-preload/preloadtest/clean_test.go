// SPDX-License-Identifier: Apache-2.0

package preloadtest

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// scanner has 30 pages: 10 tracked and written since, 10 tracked and not, 10 that nobody tracks. It asks for them
// as CRIU does for a dump (criu/pagemap-cache.c, pmc_fill), without room for an answer (criu/kerndat.c,
// check_pagemap), and for all that are present; it prints how many pages each answer has.
const scanner = `
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

struct scan { uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned; };
struct region { uint64_t start, end, categories; } regions[64];
enum { WRITTEN = 2, FILE_BACKED = 4, PRESENT = 8, SWAPPED = 16, ZERO = 32 };
static char *memory;
static int pagemap, page;

static int ask(const char *what, uint64_t flags, uint64_t mask, uint64_t inverted, uint64_t anyof, int room, int from, int to)
{
	struct scan s = { sizeof(s), flags, (uintptr_t)memory + from * page, (uintptr_t)memory + to * page, 0, room ? (uintptr_t)regions : 0,
			  room, 0, inverted, mask, anyof, PRESENT | SWAPPED };
	int i, n = ioctl(pagemap, _IOWR('f', 16, struct scan), &s), pages = 0;

	for (i = 0; i < n; i++)
		pages += (regions[i].end - regions[i].start) / page;
	if (n < 0)
		return perror(what), -1;
	if (s.mask != mask || (room && s.walk_end != s.end))
		return fprintf(stderr, "%s: the request was changed\n", what), -1;
	return what ? printf("%s %d\n", what, pages) : 0;
}

/* told does what CRIU does until it is told at its gate of which processes clean pages are left out: of this one, "%". */
static int told(const char *list)
{
	int gate[2], messages[2], self = getpid();
	char byte, number[16];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, gate) || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, messages))
		return -1;
	if (fork() == 0) {
		close(gate[0]);
		while (read(gate[1], &byte, 1) == 1) {
			if (byte == 'A')
				dprintf(gate[1], "a");
			if (byte != 'B')
				continue;
			dprintf(gate[1], "b");
			for (; *list; list++)
				*list == '%' ? dprintf(gate[1], "%d", self) : dprintf(gate[1], "%c", *list);
			dprintf(gate[1], "\n");
		}
		_exit(0);
	}
	close(gate[1]);
	sprintf(number, "%d", gate[0]);
	setenv("COHORT_CRIU_GATE", number, 1);
	if (send(messages[1], "a", 1, 0) != 1 || recv(messages[0], NULL, 0, MSG_TRUNC | MSG_PEEK) != 1)
		return -1;
	alarm(10);
	ptrace(PTRACE_POKEDATA, 1, NULL, NULL);
	alarm(0);
	close(gate[0]);
	return 0;
}

int main(int argc, char **argv)
{
	char proc[32];
	struct uffdio_api api = { .api = UFFD_API, .features = 1 << 15 | 1 << 13 };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	page = getpagesize();
	memory = mmap(NULL, 30 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(memory, 30 * page, MADV_NOHUGEPAGE);
	reg.range.start = (uintptr_t)memory;
	reg.range.len = 20 * page;
	if (argc > 1 && told(argv[1]))
		return 1;
	sprintf(proc, "/proc/%d", getpid());
	pagemap = openat(open(proc, O_PATH), "pagemap", O_RDONLY);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))
		return 77;
	memset(memory, 1, 30 * page);
	if (ask(NULL, 3, WRITTEN, 0, 0, 64, 0, 20) < 0)
		return 77;
	memset(memory, 2, 10 * page);
	return ask("dumped", 0, ZERO | FILE_BACKED, ZERO | FILE_BACKED, PRESENT | SWAPPED, 64, 0, 30) < 0 ||
	       ask("probe", 0, ZERO | FILE_BACKED, ZERO | FILE_BACKED, PRESENT | SWAPPED, 0, 0, 0) < 0 ||
	       ask("present", 0, PRESENT, 0, 0, 64, 0, 30) < 0 || ioctl(-1, 1, NULL) != -1;
}
`

// TestPagesNotWrittenAreLeftOutOfADumpOnlyWhereAskedFor shows what CRIU will see, and that no other request is changed.
func TestPagesNotWrittenAreLeftOutOfADumpOnlyWhereAskedFor(t *testing.T) {
	if os.Getuid() != 0 {
		missing(t, "root")
	}
	library, program := build(t, scanner)
	const all, written = "dumped 30\nprobe 0\npresent 30\n", "dumped 20\nprobe 0\npresent 30\n"
	preload, skip, told := "LD_PRELOAD="+library, "COHORT_CRIU_SKIP_CLEAN=1", "COHORT_CRIU_SKIP_CLEAN=told"
	for _, test := range []struct {
		env  []string
		args []string
		want string
	}{
		{nil, nil, all},
		{[]string{skip}, nil, all},
		{[]string{preload}, nil, all},
		{[]string{preload, "COHORT_CRIU_SKIP_CLEAN=0"}, nil, all},
		{[]string{preload, skip, "CRIU_TRACK_SHMEM=1"}, nil, all},
		{[]string{preload, skip}, nil, written},
		{[]string{preload, told}, nil, all},
		{[]string{preload, told}, []string{""}, all},
		{[]string{preload, told}, []string{"1,22,333"}, all},
		{[]string{preload, told}, []string{"%0"}, all},
		{[]string{preload, told}, []string{"%"}, written},
		{[]string{preload, told}, []string{strings.Repeat("1234567,", 5000) + "%,1"}, written},
		{[]string{preload, told}, []string{"*"}, written},
	} {
		cmd := exec.Command(program, test.args...)
		cmd.Env = append(os.Environ(), test.env...)
		out, err := cmd.CombinedOutput()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 77 {
			missing(t, "userfaultfd with asynchronous write protection and ioctl PAGEMAP_SCAN")
		}
		if err != nil {
			t.Fatalf("%v %.20q: %v\n%s", test.env, test.args, err, out)
		}
		if string(out) != test.want {
			t.Errorf("%v %.20q: %q, want %q", test.env, test.args, out, test.want)
		}
	}
}
