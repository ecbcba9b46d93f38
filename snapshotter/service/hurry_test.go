// SPDX-License-Identifier: Apache-2.0

package service

import (
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hurries tells whether this process is urgent.
func hurries(t *testing.T) bool {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	a, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		t.Fatal(err)
	}
	return a.Policy == unix.SCHED_RR
}

func TestHurryEndsWithTheLastTakeOrByItself(t *testing.T) {
	var h hurry
	h.approach("a")()
	if !hurries(t) {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("missing: the right to real-time priority (CAP_SYS_NICE)")
		}
		t.Skip("missing: the right to real-time priority (CAP_SYS_NICE)")
	}
	late := h.approach("a") // told twice
	h.approach("b")()
	h.end("a")
	late() // after the Take
	if !hurries(t) {
		t.Error("b is not ended")
	}
	h.end("a")
	h.end("b")
	if hurries(t) {
		t.Error("no capture is ready, and it hurries still")
	}
	h.approach("c")()
	for deadline := time.Now().Add(5 * hurryLimit); hurries(t); <-time.After(hurryLimit / 10) {
		if time.Now().After(deadline) {
			t.Fatal("its Take did not come, and it hurries still")
		}
	}
}
