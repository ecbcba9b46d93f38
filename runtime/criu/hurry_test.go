// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// start starts a process that does nothing until the test ends.
func start(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

func policy(t *testing.T, pid int) uint32 {
	t.Helper()
	a, err := unix.SchedGetAttr(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	return a.Policy
}

func TestCRIUHurriesUntilItIsDone(t *testing.T) {
	pid := start(t)
	hurry(pid)
	if policy(t, pid) != unix.SCHED_RR {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("missing: the right to real-time priority (CAP_SYS_NICE)")
		}
		t.Skip("missing: the right to real-time priority (CAP_SYS_NICE)")
	}
	calm(pid)
	if p := policy(t, pid); p != unix.SCHED_NORMAL {
		t.Errorf("policy %d", p)
	}
}

func TestCRIUYieldsOneProcessorOfSeveral(t *testing.T) {
	pid := start(t)
	var all, rest unix.CPUSet
	if err := unix.SchedGetaffinity(pid, &all); err != nil {
		t.Fatal(err)
	}
	if all.Count() < 2 {
		t.Skip("missing: a second processor")
	}
	yieldCPU(pid)
	if err := unix.SchedGetaffinity(pid, &rest); err != nil {
		t.Fatal(err)
	}
	if rest.Count() != all.Count()-1 {
		t.Errorf("it has %d of %d processors", rest.Count(), all.Count())
	}
	for range all.Count() + 1 {
		yieldCPU(pid)
	}
	if err := unix.SchedGetaffinity(pid, &rest); err != nil || rest.Count() != 1 {
		t.Errorf("it has %d processors in the end: %v", rest.Count(), err)
	}
}

func TestWarmPassesOverWhatHasEnded(t *testing.T) {
	pid := start(t)
	Warm([]int{1 << 30, pid, -1})
	if names := list(filepath.Join("/proc", strconv.Itoa(pid), "map_files")); len(names) == 0 {
		t.Error("it looked at no mapping")
	}
}
