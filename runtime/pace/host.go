// SPDX-License-Identifier: Apache-2.0

package pace

import (
	"bytes"
	"context"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// host is what a pacer knows the world by; tests have another.
type host interface {
	// now is a clock that is not set.
	now() time.Duration
	// used is the processor time of this process.
	used() time.Duration
	// times are those of all processors since the host started: spent idle, and all.
	times() (idle, all time.Duration, ok bool)
	processors() int
	// sleep tells whether it was not ended by ctx.
	sleep(ctx context.Context, d time.Duration) bool
}

type linux struct{}

var started = time.Now()

func (linux) now() time.Duration { return time.Since(started) }

func (linux) used() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func (linux) processors() int { return runtime.NumCPU() }

func (linux) sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// userHZ is the unit of /proc/stat: 100 on every architecture Linux has today
// (USER_HZ, include/asm-generic/param.h).
const userHZ = 100

func (linux) times() (idle, all time.Duration, ok bool) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, false
	}
	return parseStat(text)
}

// parseStat reads the first line of /proc/stat: cpu user nice system idle iowait irq
// softirq steal, and more that is counted there already (proc_stat(5)). Waiting for the disk is idle:
// another may have the processor. What the hypervisor took is not.
func parseStat(text []byte) (idle, all time.Duration, ok bool) {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	f := bytes.Fields(line)
	if len(f) < 5 || string(f[0]) != "cpu" {
		return 0, 0, false
	}
	for i, w := range f[1:min(len(f), 9)] {
		n, err := strconv.ParseInt(string(w), 10, 64)
		if err != nil {
			return 0, 0, false
		}
		d := time.Duration(n) * (time.Second / userHZ)
		all += d
		if i == 3 || i == 4 {
			idle += d
		}
	}
	return idle, all, true
}
