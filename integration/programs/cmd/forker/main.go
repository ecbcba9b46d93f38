// SPDX-License-Identifier: Apache-2.0

// Forker is a tree of processes, each with threads of its own, in a ring of
// pipes: a number goes through every process and comes back, each adding one.
//
//	forker --children 8 --threads 4 --report /report
//
// SIGUSR1 to the first process asks for a report (programs.Forker). Exit code
// 3: a number came back wrong; 5: a pipe ended, so a process was lost.
package main

import (
	"encoding/binary"
	"flag"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/programs/internal/report"
)

func main() {
	children := flag.Int("children", 4, "processes below the first one; every second is the child of the one before it")
	threads := flag.Int("threads", 2, "threads in each process")
	path := flag.String("report", "", "`file` for reports")
	child := flag.Int("child", 0, "used by itself: processes still to be started below")
	flag.Parse()
	if flag.NArg() > 0 || *children < 1 {
		flag.Usage()
		os.Exit(2)
	}
	for range *threads {
		go spin()
	}
	if *child > 0 {
		follow(*child, *threads)
		return
	}
	lead(*children, *threads, *path)
}

// spin holds one thread in a system call, most of the time.
func spin() {
	runtime.LockOSThread()
	for {
		ts := unix.NsecToTimespec(int64(10 * time.Millisecond))
		_ = unix.Nanosleep(&ts, nil)
	}
}

// start starts a process that reads from in and writes to the pipe whose other
// end is returned. It ends with its parent.
func start(in *os.File, below, threads int) (*os.File, int) {
	r, w, err := os.Pipe()
	if err != nil {
		report.Exit(1, "%v", err)
	}
	c := exec.Command("/proc/self/exe", "--child", strconv.Itoa(below), "--threads", strconv.Itoa(threads))
	c.Stdin, c.Stdout, c.Stderr = in, w, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// Pdeathsig is about the parent's thread, so that thread must not end.
	runtime.LockOSThread()
	if err := c.Start(); err != nil {
		report.Exit(1, "starting a child: %v", err)
	}
	_, _ = in.Close(), w.Close() // the child has them
	return r, c.Process.Pid
}

// follow passes numbers from standard input to standard output. If another
// process is to be below this one, it stands between this one and its output.
func follow(below, threads int) {
	out := os.Stdout
	var back *os.File
	if below > 1 {
		r, w, err := os.Pipe()
		if err != nil {
			report.Exit(1, "%v", err)
		}
		back, _ = start(r, 1, threads)
		out = w
		go func() { pass(back, os.Stdout, 0) }()
	}
	pass(os.Stdin, out, 1)
}

func pass(in io.Reader, out io.Writer, add uint64) {
	for {
		n, err := get(in)
		if err == nil {
			err = put(out, n+add)
		}
		if err != nil {
			report.Exit(programs.ExitBroken, "a pipe ended: %v", err)
		}
	}
}

func get(in io.Reader) (uint64, error) {
	var b [8]byte
	_, err := io.ReadFull(in, b[:])
	return binary.LittleEndian.Uint64(b[:]), err
}

func put(out io.Writer, n uint64) error {
	_, err := out.Write(binary.LittleEndian.AppendUint64(nil, n))
	return err
}

// lead builds the ring and sends numbers round it.
func lead(children, threads int, path string) {
	in, w, err := os.Pipe()
	if err != nil {
		report.Exit(1, "%v", err)
	}
	pids := []int{os.Getpid()}
	for left := children; left > 0; {
		below := min(left, 2)
		var pid int
		in, pid = start(in, below, threads)
		pids = append(pids, pid)
		left -= below
	}
	var rounds atomic.Uint64
	round := func(n uint64) {
		if err := put(w, n); err != nil {
			report.Exit(programs.ExitBroken, "the ring ended: %v", err)
		}
		got, err := get(in)
		if err != nil {
			report.Exit(programs.ExitBroken, "the ring ended: %v", err)
		}
		if want := n + uint64(children); got != want {
			report.Exit(programs.ExitCorrupt, "%d went round and came back as %d, not %d", n, got, want)
		}
		rounds.Add(1)
	}
	round(0) // the tree stands before the first report
	report.Serve(path, func(n int) any {
		return programs.Forker{Report: programs.Report{N: n}, Pids: pids, Rounds: rounds.Load(), Threads: threads}
	})
	for n := uint64(0); ; {
		n = n*6364136223846793005 + 1442695040888963407
		round(n)
		time.Sleep(time.Millisecond)
	}
}
