// SPDX-License-Identifier: Apache-2.0

package urgent

import (
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// policies counts this process's threads by their scheduling policy.
func policies(t *testing.T) map[uint32]int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	out := map[uint32]int{}
	for _, e := range entries {
		tid, _ := strconv.Atoi(e.Name())
		if a, err := unix.SchedGetAttr(tid, 0); err == nil {
			out[a.Policy]++
		}
	}
	return out
}

func TestTheLastToEndItLeavesNoThreadUrgent(t *testing.T) {
	first := Raise()
	defer first()
	if p := policies(t); p[unix.SCHED_RR] == 0 {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatalf("missing: the right to real-time priority (CAP_SYS_NICE): %v", p)
		}
		t.Skipf("missing: the right to real-time priority (CAP_SYS_NICE): %v", p)
	}
	second := Raise()
	first()
	first()
	if p := policies(t); p[unix.SCHED_RR] == 0 {
		t.Errorf("not urgent any more while one is not done: %v", p)
	}
	second()
	if p := policies(t); p[unix.SCHED_RR] != 0 {
		t.Errorf("urgent still: %v", p)
	}
}
