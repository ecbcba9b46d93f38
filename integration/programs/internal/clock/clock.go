// SPDX-License-Identifier: Apache-2.0

// Package clock measures how long a process was stopped, as it feels it.
package clock

import (
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Ticker ticks every millisecond on a thread of its own and remembers the
// longest time between two ticks. It may be used concurrently.
//
// It sleeps and reads the clock by system calls rather than by Go's timers,
// whose wake-ups depend on what other goroutines do. CLOCK_MONOTONIC goes on
// from its old value after a restore, for CRIU restores into a time namespace,
// so a gap never contains the time between a checkpoint and its restore.
type Ticker struct {
	mu    sync.Mutex
	last  int64
	gap   int64
	ticks uint64
}

// Start returns a running ticker. It ticks until the process ends.
func Start() *Ticker {
	t := &Ticker{last: now()}
	go t.run()
	return t
}

func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // no kernel lacks this clock
	}
	return ts.Nano()
}

func (t *Ticker) run() {
	runtime.LockOSThread()
	for {
		ts := unix.NsecToTimespec(int64(time.Millisecond))
		// Interrupted or not, the time that has passed is measured below.
		_ = unix.Nanosleep(&ts, nil)
		t.tick()
	}
}

func (t *Ticker) tick() {
	t.mu.Lock()
	defer t.mu.Unlock()
	at := now()
	t.gap = max(t.gap, at-t.last)
	t.last = at
	t.ticks++
}

// Take returns the longest gap in milliseconds and the number of ticks since
// the last Take, and begins anew.
func (t *Ticker) Take() (maxGapMS float64, ticks uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// A gap that is still open counts.
	gap := max(t.gap, now()-t.last)
	maxGapMS, ticks = float64(gap)/1e6, t.ticks
	t.gap, t.ticks = 0, 0
	return maxGapMS, ticks
}
