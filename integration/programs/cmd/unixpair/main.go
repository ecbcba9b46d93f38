// SPDX-License-Identifier: Apache-2.0

// Unixpair is both ends of a unix socket in a folder that two containers
// share: what a preflight must find when it is a stream.
//
//	unixpair serve --path /shared/s.sock [--dgram] [--report FILE]
//	unixpair call --path /shared/s.sock [--dgram] [--report FILE]
//
// The caller sends a numbered message every 100 ms and keeps its socket open;
// on a stream, the server answers with the same number. Exit code 4: a number
// is not the next one; 5: the connection broke.
package main

import (
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"io/fs"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/programs/internal/report"
)

var messages atomic.Uint64

func main() {
	if len(os.Args) < 2 {
		report.Exit(2, "usage: unixpair serve|call [option]...")
	}
	f := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	path := f.String("path", "/shared/s.sock", "`path` of the socket")
	dgram := f.Bool("dgram", false, "datagrams instead of a stream")
	reports := f.String("report", "", "`file` for reports")
	_ = f.Parse(os.Args[2:]) // exits by itself
	// Reports are served only when the socket is connected: a test that sees
	// one knows that there is something for the preflight to find.
	ready := func() {
		report.Serve(*reports, func(n int) any {
			return programs.Unixpair{Report: programs.Report{N: n}, Messages: messages.Load()}
		})
	}
	var err error
	switch os.Args[1] + map[bool]string{true: " dgram"}[*dgram] {
	case "serve":
		err = serveStream(*path, ready)
	case "serve dgram":
		err = serveDgram(*path, ready)
	case "call", "call dgram":
		err = call(*path, *dgram, ready)
	default:
		report.Exit(2, "%q is neither serve nor call", os.Args[1])
	}
	report.Exit(programs.ExitBroken, "%v", err)
}

func serveStream(path string, ready func()) error {
	_ = os.Remove(path) // of an earlier run
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	for first := true; ; first = false {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if first {
			ready()
		}
		go func() {
			if err := expect(c, c); !errors.Is(err, io.EOF) {
				report.Exit(programs.ExitBroken, "%v", err)
			}
		}()
	}
}

func serveDgram(path string, ready func()) error {
	_ = os.Remove(path) // of an earlier run
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	ready()
	return expect(c, nil)
}

// expect reads the numbers 1, 2, 3 … and answers each, if there is anyone to.
func expect(in io.Reader, answer io.Writer) error {
	var b [8]byte
	for want := uint64(1); ; want++ {
		if _, err := io.ReadFull(in, b[:]); err != nil {
			return err
		}
		if n := binary.BigEndian.Uint64(b[:]); n != want {
			report.Exit(programs.ExitStream, "message %d came when %d was due", n, want)
		}
		messages.Store(want)
		if answer != nil {
			if _, err := answer.Write(b[:]); err != nil {
				return err
			}
		}
	}
}

func call(path string, dgram bool, ready func()) error {
	network := map[bool]string{false: "unix", true: "unixgram"}[dgram]
	c, err := dial(network, path)
	if err != nil {
		return err
	}
	ready()
	var b [8]byte
	for n := uint64(1); ; n++ {
		binary.BigEndian.PutUint64(b[:], n)
		if _, err := c.Write(b[:]); err != nil {
			return err
		}
		if !dgram {
			if _, err := io.ReadFull(c, b[:]); err != nil {
				return err
			}
			if got := binary.BigEndian.Uint64(b[:]); got != n {
				report.Exit(programs.ExitStream, "answer %d came to message %d", got, n)
			}
		}
		messages.Store(n)
		time.Sleep(100 * time.Millisecond)
	}
}

// dial waits for a server that is only just starting.
func dial(network, path string) (net.Conn, error) {
	give := time.Now().Add(30 * time.Second)
	for {
		c, err := net.Dial(network, path)
		if err == nil || time.Now().After(give) ||
			!errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
			return c, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}
