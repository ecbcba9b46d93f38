// SPDX-License-Identifier: Apache-2.0

// Ticker is a process of a given size that writes into its memory all the
// time, measures how long it was stopped, and verifies itself.
//
//	ticker --mem 256 --dirty 100 --checksum --file /log --report /report
//
// SIGUSR1 asks for a report (programs.Ticker), SIGUSR2 for one after all
// memory has been verified. Exit code 3: memory or file is not as it was left.
package main

import (
	"flag"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/programs/internal/clock"
	"github.com/cohort-project/cohort/integration/programs/internal/report"
)

func main() {
	mem := flag.Int("mem", 256, "memory to hold, in `MiB`")
	dirty := flag.Int("dirty", 100, "random bytes to write each millisecond")
	checksum := flag.Bool("checksum", false, "verify the memory all the time")
	file := flag.String("file", "", "`file` to append a counter to every 10 ms")
	fsync := flag.Bool("fsync", false, "fsync --file after each number")
	path := flag.String("report", "", "`file` for reports")
	flag.Parse()
	if flag.NArg() > 0 || *mem < 1 {
		flag.Usage()
		os.Exit(2)
	}
	// No collector: its pauses are not the stop that is being measured. The
	// memory is not Go's, and nothing below allocates in its loop.
	debug.SetGCPercent(-1)

	h, err := newHeap(*mem << 20)
	if err != nil {
		report.Exit(1, "taking %d MiB: %v", *mem, err)
	}
	var log *counterLog
	if *file != "" {
		if log, err = openLog(*file, *fsync); err != nil {
			report.Exit(1, "%v", err)
		}
	}
	ticks := clock.Start()
	w := &writer{heap: h, log: log, dirty: *dirty, checksum: *checksum, ask: make(chan chan struct{})}
	full := make(chan os.Signal, 1)
	signal.Notify(full, syscall.SIGUSR2)
	go w.run()
	reports := report.Serve(*path, func(n int) any {
		r := w.report(n)
		r.MaxGapMS, r.Ticks = ticks.Take()
		return r
	})
	for range full {
		done := make(chan struct{})
		w.ask <- done
		<-done
		reports.Write()
	}
}

// writer is the one goroutine that touches heap and log.
type writer struct {
	heap     *heap
	log      *counterLog
	dirty    int
	checksum bool
	ask      chan chan struct{}
}

func (w *writer) run() {
	ms := unix.NsecToTimespec(1e6)
	for round := uint64(1); ; round++ {
		select {
		case done := <-w.ask:
			w.verify(w.heap.chunks())
			close(done)
		default:
		}
		w.heap.scribble(w.dirty)
		if w.checksum {
			w.verify(1)
		}
		if w.log != nil && round%10 == 0 {
			if err := w.log.next(); err != nil {
				report.Exit(programs.ExitCorrupt, "%v", err)
			}
		}
		_ = unix.Nanosleep(&ms, nil)
	}
}

func (w *writer) verify(chunks int) {
	if err := w.heap.verify(chunks); err != nil {
		report.Exit(programs.ExitCorrupt, "%v", err)
	}
}

func (w *writer) report(n int) programs.Ticker {
	r := programs.Ticker{
		Report: programs.Report{N: n}, SumOK: true,
		Verified: w.heap.verified.Load(), Writes: w.heap.writes.Load(),
	}
	if w.log != nil {
		r.Counter = w.log.counter.Load()
	}
	return r
}
