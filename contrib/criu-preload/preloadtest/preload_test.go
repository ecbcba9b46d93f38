// SPDX-License-Identifier: Apache-2.0

package preloadtest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// asker asks for all limits of a process as CRIU does, without CAP_SYS_RESOURCE whatever the host
// grants, and prints "soft hard" lines; then it checks that other calls and errors are untouched.
const asker = `
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];
	struct { uint64_t soft, hard; } limit, raise = { 1, 1 };
	long pid = argc > 1 ? atol(argv[1]) : 0;
	int resource;

	if (syscall(SYS_capget, &header, data))
		return perror("capget"), 1;
	data[0].effective &= ~(1u << CAP_SYS_RESOURCE);
	if (syscall(SYS_capset, &header, data))
		return perror("capset"), 1;
	for (resource = 0; resource < 16; resource++) {
		if (syscall(SYS_prlimit64, pid, resource, NULL, &limit))
			return perror("prlimit64"), 2;
		printf("%llu %llu\n", (unsigned long long)limit.soft, (unsigned long long)limit.hard);
	}
	if (syscall(SYS_prlimit64, pid, 7, &raise, NULL) != -1 || errno != EPERM)
		return fprintf(stderr, "a change of another's limits was not refused\n"), 3;
	if (syscall(SYS_prlimit64, pid, 16, NULL, &limit) != -1)
		return fprintf(stderr, "a resource that does not exist was answered\n"), 3;
	if (syscall(SYS_close, -1) != -1 || errno != EBADF)
		return fprintf(stderr, "errno is not set by other calls\n"), 3;
	return syscall(SYS_getpid) == getpid() ? 0 : 4;
}
`

// TestLimitsOfAnotherUserAreReadWithoutSysResource keeps the promise of the library, and shows
// that it is the library that keeps it: the same program without it is refused.
func TestLimitsOfAnotherUserAreReadWithoutSysResource(t *testing.T) {
	if os.Getuid() != 0 {
		missing(t, "root")
	}
	library, program := build(t, asker)

	// Its limits differ from ours, so that an answer about the wrong process shows.
	want := map[int]unix.Rlimit{
		unix.RLIMIT_CPU:    {Cur: 1000, Max: 2000},
		unix.RLIMIT_NOFILE: {Cur: 123, Max: 456},
		unix.RLIMIT_CORE:   {Cur: 0, Max: 4096},
		unix.RLIMIT_STACK:  {Cur: 1 << 20, Max: 1 << 21},
	}
	const ulimits = "ulimit -St 1000 && ulimit -Ht 2000 && ulimit -Sn 123 && ulimit -Hn 456 && ulimit -Sc 0 && ulimit -Hc 4 && ulimit -Ss 1024 && ulimit -Hs 2048 && echo ready; read -r _"
	target := exec.Command("bash", "-c", ulimits)
	target.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 999, Gid: 999}, Pdeathsig: syscall.SIGKILL}
	stdin, err := target.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := target.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		_ = target.Wait()
	}()
	var ready string
	if _, err := fmt.Fscan(stdout, &ready); err != nil {
		t.Fatalf("wait for the process with its own limits: %v", err)
	}
	pid := fmt.Sprint(target.Process.Pid)

	if out, err := exec.Command(program, pid).CombinedOutput(); err == nil {
		t.Errorf("the kernel answers without the library; it would not be needed:\n%s", out)
	}
	command := exec.Command(program, pid)
	command.Env = append(os.Environ(), "LD_PRELOAD="+library)
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("with the library: %v\n%s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 16 {
		t.Fatalf("%d limits instead of 16:\n%s", len(lines), out)
	}
	for resource, limit := range want {
		if have := fmt.Sprintf("%d %d", limit.Cur, limit.Max); lines[resource] != have {
			t.Errorf("limit %d: %q, want %q", resource, lines[resource], have)
		}
	}
	// One that nobody set here must equal what the kernel says of this process, its parent.
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &own); err != nil {
		t.Fatal(err)
	}
	if have := fmt.Sprintf("%d %d", own.Cur, own.Max); lines[unix.RLIMIT_NPROC] != have {
		t.Errorf("limit of processes: %q, want %q", lines[unix.RLIMIT_NPROC], have)
	}
}

func output(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}
