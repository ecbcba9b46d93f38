// SPDX-License-Identifier: Apache-2.0

// Echo is both ends of a TCP stream whose every byte is verified by its
// position, in both directions at once.
//
//	echo serve --listen 127.0.0.1:9000 --report /report
//	echo send --to 127.0.0.1:9000 --size 8388608 --rate 2 --report /report
//
// The sender sends bursts of --size bytes, --rate of them a second, and reads
// the whole burst back; the server verifies what it receives and sends the
// same positions on. SIGUSR1 asks either for a report (programs.Echo). Exit
// code 4: a byte was lost, doubled or out of order; 5: the connection broke.
package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/programs/internal/pattern"
	"github.com/cohort-project/cohort/integration/programs/internal/report"
)

const piece = 64 << 10

func main() {
	if len(os.Args) < 2 {
		report.Exit(2, "usage: echo serve|send [option]...")
	}
	f := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	listen := f.String("listen", "127.0.0.1:9000", "serve: `address` to listen on")
	to := f.String("to", "127.0.0.1:9000", "send: `address` to connect to")
	size := f.Uint64("size", 4<<20, "send: `bytes` of a burst")
	rate := f.Float64("rate", 0, "send: bursts a second, 0 for one after the other")
	path := f.String("report", "", "`file` for reports")
	_ = f.Parse(os.Args[2:]) // exits by itself
	e := &end{}
	switch os.Args[1] {
	case "serve":
		// CRIU 4.2 cannot dump multipath TCP, which is Go's default to listen.
		var plain net.ListenConfig
		plain.SetMultipathTCP(false)
		l, err := plain.Listen(context.Background(), "tcp", *listen)
		if err != nil {
			report.Exit(1, "%v", err)
		}
		report.Serve(*path, e.report)
		for {
			c, err := l.Accept()
			if err != nil {
				report.Exit(programs.ExitBroken, "accept: %v", err)
			}
			go e.serve(c)
		}
	case "send":
		c, err := dial(*to)
		if err != nil {
			report.Exit(programs.ExitBroken, "%v", err)
		}
		report.Serve(*path, e.report)
		e.send(c, *size, *rate)
	default:
		report.Exit(2, "%q is neither serve nor send", os.Args[1])
	}
}

// dial waits for a server that is only just starting.
func dial(to string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", to)
		if err == nil || !errors.Is(err, syscall.ECONNREFUSED) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-tick.C:
		}
	}
}

// end is one end's counts.
type end struct {
	mu sync.Mutex
	r  programs.Echo
}

func (e *end) report(n int) any {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := e.r
	r.N = n
	return r
}

func (e *end) count(f func(*programs.Echo)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f(&e.r)
}

// receive reads some bytes of the stream's position pos and verifies them.
func (e *end) receive(c net.Conn, b []byte, pos uint64) (int, error) {
	n, err := c.Read(b)
	if at, differs := pattern.Verify(b[:n], pos); differs {
		report.Exit(programs.ExitStream, "stream from %v: byte %d is not that position's byte", c.RemoteAddr(), at)
	}
	e.count(func(r *programs.Echo) { r.Received += uint64(n) })
	return n, err
}

func (e *end) transmit(c net.Conn, b []byte, pos uint64) error {
	pattern.Fill(b, pos)
	n, err := c.Write(b)
	e.count(func(r *programs.Echo) { r.Sent += uint64(n) })
	return err
}

// serve echoes one connection until it ends.
func (e *end) serve(c net.Conn) {
	defer c.Close()
	e.count(func(r *programs.Echo) { r.Connections++ })
	in, out := make([]byte, piece), make([]byte, piece)
	for pos := uint64(0); ; {
		n, err := e.receive(c, in, pos)
		if err == nil {
			err = e.transmit(c, out[:n], pos)
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			e.count(func(r *programs.Echo) { r.Broken++; r.LastError = err.Error() })
			return
		}
		pos += uint64(n)
	}
}

// send sends bursts and reads them back until the process ends.
func (e *end) send(c net.Conn, size uint64, rate float64) {
	e.count(func(r *programs.Echo) { r.Connections++ })
	// One burst's room: the writer is told how far to go, the reader when to
	// expect it back. Both run at once, or a burst larger than the sockets'
	// buffers would never end.
	goal := make(chan uint64)
	go func() {
		out := make([]byte, piece)
		pos := uint64(0)
		for to := range goal {
			for pos < to {
				n := min(uint64(len(out)), to-pos)
				if err := e.transmit(c, out[:n], pos); err != nil {
					report.Exit(programs.ExitBroken, "sending byte %d: %v", pos, err)
				}
				pos += n
			}
		}
	}()
	in := make([]byte, piece)
	pos := uint64(0)
	for burst := uint64(1); ; burst++ {
		began := time.Now()
		goal <- burst * size
		for pos < burst*size {
			n, err := e.receive(c, in[:min(uint64(len(in)), burst*size-pos)], pos)
			if err != nil {
				report.Exit(programs.ExitBroken, "receiving byte %d: %v", pos, err)
			}
			pos += uint64(n)
		}
		e.count(func(r *programs.Echo) { r.Bursts++ })
		if rate > 0 {
			time.Sleep(time.Until(began.Add(time.Duration(float64(time.Second) / rate))))
		}
	}
}
