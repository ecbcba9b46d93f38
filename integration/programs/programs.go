// SPDX-License-Identifier: Apache-2.0

package programs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Exit codes of the programs. 1 is any other failure, 2 wrong usage.
const (
	// ExitCorrupt: memory, or a file, is not what the program left there.
	ExitCorrupt = 3
	// ExitStream: a byte of a stream was lost, doubled, or out of order.
	ExitStream = 4
	// ExitBroken: a connection ended or failed.
	ExitBroken = 5
	// ExitUnsupported: the kernel or a policy refuses what the program is for.
	ExitUnsupported = 6
)

// Report is what every report has. N counts the reports of one process from
// 1: it tells a new report from an old one.
type Report struct {
	N int `json:"n"`
}

// Ticker is the report of the program ticker. The counts of ticks and gaps
// begin anew with each report.
type Ticker struct {
	Report
	// MaxGapMS is the longest time between two ticks, by CLOCK_MONOTONIC.
	MaxGapMS float64 `json:"max_gap_ms"`
	Ticks    uint64  `json:"ticks"`
	// SumOK is false once memory was found changed; the program then ends.
	SumOK bool `json:"sum_ok"`
	// Verified is how many bytes have been verified since the start.
	Verified uint64 `json:"verified"`
	// Writes is how many bytes have been written since the memory was filled.
	Writes uint64 `json:"writes"`
	// Counter is the last number appended to --file.
	Counter uint64 `json:"counter"`
}

// MemLoad is the report of the program memload. The counts of ticks and gaps
// begin anew with each report.
type MemLoad struct {
	Report
	// MaxGapMS is the longest time between two ticks, by CLOCK_MONOTONIC.
	MaxGapMS float64 `json:"max_gap_ms"`
	Ticks    uint64  `json:"ticks"`
	// SumOK is always true: the program ends when memory was found changed.
	SumOK bool `json:"sum_ok"`
	// Touched is how often a page has been dirtied since the memory was filled.
	Touched uint64 `json:"touched"`
	// Verified is how many bytes have been verified since the start.
	Verified uint64 `json:"verified"`
}

// Echo is the report of either end of the program echo.
type Echo struct {
	Report
	// Sent and Received count bytes of the stream; every received byte has
	// been verified.
	Sent     uint64 `json:"sent"`
	Received uint64 `json:"received"`
	// Bursts is how many bursts came back whole; only the sender counts them.
	Bursts uint64 `json:"bursts"`
	// Connections is how many there have been, Broken how many ended badly.
	Connections uint64 `json:"connections"`
	Broken      uint64 `json:"broken"`
	LastError   string `json:"last_error,omitempty"`
}

// Forker is the report of the program forker.
type Forker struct {
	Report
	// Pids are the first process and its own children, as they see themselves.
	Pids []int `json:"pids"`
	// Rounds is how often a number went through every process and came back.
	Rounds uint64 `json:"rounds"`
	// Threads is how many each process holds beside the language runtime's.
	Threads int `json:"threads"`
}

// FileAgree is the report of the program fileagree.
type FileAgree struct {
	Report
	Records uint64 `json:"records"`
	Bytes   uint64 `json:"bytes"`
}

// Unixpair is the report of either end of the program unixpair.
type Unixpair struct {
	Report
	Messages uint64 `json:"messages"`
}

// Uring is the report of the program uring.
type Uring struct {
	Report
	FD int `json:"fd"`
}

// Ask sends the process SIGUSR1 and reads the report that it writes for that
// to path, a path of its own root file system, into the report type it has.
// It needs the right to look into the process's root, and fails when the
// process ends or ctx does.
func Ask(ctx context.Context, pid int, path string, into any) error {
	return ask(ctx, pid, syscall.SIGUSR1, path, into)
}

// AskVerified is Ask for ticker and memload, which first verify all their memory.
func AskVerified(ctx context.Context, pid int, path string, into any) error {
	return ask(ctx, pid, syscall.SIGUSR2, path, into)
}

// AskStep is Ask for memload, which first dirties --step percent of its memory.
func AskStep(ctx context.Context, pid int, path string, into any) error {
	return ask(ctx, pid, syscall.SIGHUP, path, into)
}

// WaitReady waits for the report that every program writes by itself when it
// is up; it has N 0.
func WaitReady(ctx context.Context, pid int, path string) error {
	return poll(ctx, pid, path, func(Report) bool { return true }, new(json.RawMessage))
}

func ask(ctx context.Context, pid int, sig syscall.Signal, path string, into any) error {
	var old Report
	if err := WaitReady(ctx, pid, path); err != nil {
		return err
	}
	if err := read(pid, path, &old); err != nil {
		return err
	}
	if err := syscall.Kill(pid, sig); err != nil {
		return fmt.Errorf("asking process %d for a report: %w", pid, err)
	}
	return poll(ctx, pid, path, func(r Report) bool { return r.N > old.N }, into)
}

// poll waits for a report. A file of another mount namespace's overlay gives
// no reliable inotify event to the host, so this looks every few milliseconds.
func poll(ctx context.Context, pid int, path string, good func(Report) bool, into any) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		var raw json.RawMessage
		err := read(pid, path, &raw)
		if err == nil {
			var r Report
			if err := json.Unmarshal(raw, &r); err != nil {
				return fmt.Errorf("report of process %d: %w", pid, err)
			}
			if good(r) {
				return json.Unmarshal(raw, into)
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if syscall.Kill(pid, 0) != nil {
			return fmt.Errorf("process %d ended without writing its report %s", pid, path)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for report %s of process %d: %w", path, pid, ctx.Err())
		case <-tick.C:
		}
	}
}

func read(pid int, path string, into any) error {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "root", path))
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}
