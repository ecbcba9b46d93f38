// SPDX-License-Identifier: Apache-2.0

// Package urgent has the calling process run before others while containers that
// it has frozen stand still: on a busy host the others would run in that time. The
// real-time priority asked for is one above CRIU's (see runtime/criu), which waits for what
// this process does; a nice value would count within a session or a cgroup only
// (sched(7), autogroup). The kernel leaves others a twentieth of the time whatever
// happens (sched_rt_runtime_us).
//
// Go's garbage collector is off meanwhile. Its sweeper waits for a sweeping thread that has lost its processor by
// turning round and round (runtime/mgcsweep.go, bgsweep). Two urgent processes that did so kept both processors for
// a round robin's whole turn, 100 ms (sched_rr_timeslice_ms), with the containers frozen.
package urgent

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// priority is of SCHED_RR, 1 to 99.
const priority = 2

// Poised is how long before the time to freeze a process is to be urgent: it does nothing
// but wait for that time, so that all freeze together on a busy host as well.
const Poised = 2 * time.Millisecond

// again is when threads are looked for once more.
const again = 50 * time.Millisecond

var (
	mu         sync.Mutex
	near, held int
	gcPercent  int   // as it was before
	limit      int64 // as well, of memory
)

// Hurry is one need to be urgent. Its methods may be called concurrently.
type Hurry struct {
	raised, ended bool // guarded by mu
}

// room is how much the heap may grow while no garbage is collected, in bytes; it is
// collected again beyond that.
const room = 256 << 20

// Approach begins a Hurry, ahead of time: garbage is collected now and not any more until
// End. It takes as long as a collection does, which is tens of milliseconds on a busy host.
func Approach() *Hurry {
	mu.Lock()
	near++
	first := near == 1
	if first {
		gcPercent = debug.SetGCPercent(-1)
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		limit = debug.SetMemoryLimit(int64(m.Sys-m.HeapReleased) + room) //nolint:gosec // far below
	}
	mu.Unlock()
	if first {
		runtime.GC() // sweeps too
	}
	return &Hurry{}
}

// Raise makes all threads of the process urgent until End. Threads that are
// made meanwhile have it from those that make them. Where it is not allowed nothing
// changes. It takes some ten microseconds.
func (h *Hurry) Raise() {
	mu.Lock()
	defer mu.Unlock()
	if h.raised || h.ended {
		return
	}
	h.raised = true
	if held++; held == 1 {
		set(unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: priority})
	}
}

// End ends it; it may be called again, and on nil.
func (h *Hurry) End() {
	if h == nil {
		return
	}
	mu.Lock()
	defer mu.Unlock()
	if h.ended {
		return
	}
	h.ended = true
	if h.raised {
		held--
	}
	if h.raised && held == 0 {
		calm()
		// A thread that was being made just now may have been in no list yet.
		time.AfterFunc(again, func() {
			mu.Lock()
			defer mu.Unlock()
			if held == 0 {
				calm()
			}
		})
	}
	if near--; near == 0 {
		debug.SetGCPercent(gcPercent)
		debug.SetMemoryLimit(limit)
	}
}

func calm() { set(unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}) }

func set(a unix.SchedAttr) {
	EachThread(func(tid int) { _ = unix.SchedSetAttr(tid, &a, 0) })
}

// EachThread calls f for each thread of the process; for those made meanwhile too, since
// they stand behind the others in the directory.
func EachThread(f func(tid int)) {
	d, err := os.Open("/proc/self/task")
	if err != nil {
		return
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(256)
		for _, n := range names {
			if tid, err := strconv.Atoi(n); err == nil {
				f(tid)
			}
		}
		if err != nil || len(names) == 0 {
			return
		}
	}
}
