// SPDX-License-Identifier: Apache-2.0

// Memload is a process of a given size that dirties a given part of its memory
// each second, in small steps, and measures how long it was stopped.
//
//	memload --mem 1024 --dirty 1 --step 1 --report /report
//
// A thread of its own ticks each millisecond and remembers the longest time
// between two ticks; it dirties no page but that of its own numbers. SIGUSR1
// asks for a report (programs.MemLoad), SIGUSR2 for one after all memory has been
// verified, SIGHUP for one after --step percent of the memory have been dirtied at
// once. Exit code 3: memory is not as it was left.
package main

import (
	"flag"
	"os"
	"os/signal"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/programs/internal/clock"
	"github.com/cohort-project/cohort/integration/programs/internal/report"
)

func main() {
	mem := flag.Int("mem", 256, "memory to hold, in `MiB`")
	dirty := flag.Float64("dirty", 1, "`percent` of the memory to dirty each second")
	step := flag.Float64("step", 1, "`percent` of the memory to dirty at once upon SIGHUP")
	path := flag.String("report", "", "`file` for reports")
	flag.Parse()
	if flag.NArg() > 0 || *mem < 1 || *dirty < 0 || *step < 0 {
		flag.Usage()
		os.Exit(2)
	}
	// No collector: its pauses are not the stop that is being measured. The
	// memory is not Go's, and nothing below allocates in its loop.
	debug.SetGCPercent(-1)

	f, err := newField(*mem << 20)
	if err != nil {
		report.Exit(1, "taking %d MiB: %v", *mem, err)
	}
	share := func(percent float64) float64 { return float64(f.pages()) * percent / 100 }
	w := &writer{field: f, rate: rate{perSecond: share(*dirty)}, ask: make(chan func())}
	orders := make(chan os.Signal, 1)
	signal.Notify(orders, syscall.SIGUSR2, syscall.SIGHUP)
	ticks := clock.Start()
	go w.run()
	reports := report.Serve(*path, func(n int) any {
		r := programs.MemLoad{Report: programs.Report{N: n}, SumOK: true, Touched: w.touched.Load(), Verified: w.verified.Load()}
		r.MaxGapMS, r.Ticks = ticks.Take()
		return r
	})
	for sig := range orders {
		w.do(func() {
			if sig == syscall.SIGHUP {
				f.touch(uint64(share(*step)))
				return
			}
			if err := f.verify(); err != nil {
				report.Exit(programs.ExitCorrupt, "%v", err)
			}
			w.verified.Add(f.pages() * pageBytes)
		})
		reports.Write()
	}
}

// writer is the one goroutine that touches the field.
type writer struct {
	field *field
	rate  rate
	ask   chan func()

	touched, verified atomic.Uint64
}

// do runs f between two steps and returns when it has.
func (w *writer) do(f func()) {
	done := make(chan struct{})
	w.ask <- func() {
		f()
		w.touched.Store(w.field.touched)
		close(done)
	}
	<-done
}

func (w *writer) run() {
	// Nothing to do but orders: no step dirties a page then.
	if w.rate.perSecond == 0 {
		for f := range w.ask {
			f()
		}
	}
	ms := unix.NsecToTimespec(int64(time.Millisecond))
	for last := time.Now(); ; {
		select {
		case f := <-w.ask:
			f()
		default:
		}
		now := time.Now()
		if n := w.rate.due(now.Sub(last)); n > 0 {
			w.field.touch(n)
			w.touched.Store(w.field.touched)
		}
		last = now
		// By system call, and not by Go's timers, which share a thread with others.
		_ = unix.Nanosleep(&ms, nil)
	}
}

// longestStep bounds what is made up for when the process has not run for a
// while: a burst after each stop would dirty what no program at that rate does.
const longestStep = 5 * time.Millisecond

// rate turns time into whole touches and keeps the rest.
type rate struct {
	perSecond float64
	rest      float64
}

// due is how many touches are due after the time d.
func (r *rate) due(d time.Duration) uint64 {
	r.rest += min(d, longestStep).Seconds() * r.perSecond
	n := uint64(r.rest)
	r.rest -= float64(n)
	return n
}
