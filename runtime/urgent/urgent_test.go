// SPDX-License-Identifier: Apache-2.0

package urgent

import (
	"os"
	"runtime"
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
	first, second := Approach(), Approach()
	defer first.End()
	defer second.End()
	if p := policies(t); p[unix.SCHED_RR] != 0 {
		t.Errorf("urgent before it is raised: %v", p)
	}
	first.Raise()
	if p := policies(t); p[unix.SCHED_RR] == 0 {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatalf("missing: the right to real-time priority (CAP_SYS_NICE): %v", p)
		}
		t.Skipf("missing: the right to real-time priority (CAP_SYS_NICE): %v", p)
	}
	second.Raise()
	second.Raise()
	first.End()
	first.End()
	if p := policies(t); p[unix.SCHED_RR] == 0 {
		t.Errorf("not urgent any more while one is not done: %v", p)
	}
	second.End()
	if p := policies(t); p[unix.SCHED_RR] != 0 {
		t.Errorf("urgent still: %v", p)
	}
	first.Raise()
	if p := policies(t); p[unix.SCHED_RR] != 0 {
		t.Errorf("urgent by one that has ended: %v", p)
	}
}

var sink []byte

// allocate makes several times as much garbage as starts a collection.
func allocate() {
	for range 64 {
		sink = make([]byte, 1<<20)
	}
}

func collections() uint32 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.NumGC
}

func TestNoGarbageIsCollectedMeanwhile(t *testing.T) {
	before := collections()
	allocate()
	if collections() == before {
		t.Fatal("the control: nothing was collected without it either")
	}
	h, other := Approach(), Approach()
	before = collections()
	allocate()
	h.Raise()
	allocate()
	h.End()
	allocate() // the other one goes on
	if n := collections() - before; n != 0 {
		t.Errorf("%d collections", n)
	}
	other.End()
	allocate()
	if collections() == before {
		t.Error("nothing is collected any more")
	}
	var none *Hurry
	none.End()
}
