// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What is said at the gate: CRIU's side in capitals, the answers that let it go on in
// small letters. See contrib/criu-preload/gate.c.
const (
	gateHello = 'h'
	gateTasks = 'A' // CRIU is about to look for the tasks
	gateTouch = 'B' // and to change something in one for the first time

	gateEnv = "COHORT_CRIU_GATE=4" // the descriptor after the one of the conversation
)

// gate holds CRIU where its notifications cannot. It needs the preload library.
type gate struct {
	conn *net.UnixConn
	once sync.Once
}

// newGate returns the near end, and the far one for CRIU.
func newGate() (*gate, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_LOCAL, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair for CRIU: %w", err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "criu-gate"), os.NewFile(uintptr(fds[1]), "criu-gate")
	c, err := net.FileConn(near)
	near.Close()
	if err != nil {
		far.Close()
		return nil, nil, fmt.Errorf("use socket pair for CRIU: %w", err)
	}
	return &gate{conn: c.(*net.UnixConn)}, far, nil
}

// isThere tells whether CRIU knows of the gate. It has said so before its first
// notification, or never will.
func (g *gate) isThere() bool {
	if err := g.conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		return false
	}
	return g.read(gateHello) == nil && g.conn.SetReadDeadline(time.Time{}) == nil
}

func (g *gate) read(want byte) error {
	var b [1]byte
	if _, err := g.conn.Read(b[:]); err != nil {
		return err
	}
	if b[0] != want {
		return fmt.Errorf("it said %q where %q was due", b[0], want)
	}
	return nil
}

// await waits until CRIU is there.
func (g *gate) await(ctx context.Context, at byte) error {
	stop := context.AfterFunc(ctx, g.close)
	defer stop()
	if err := g.read(at); err != nil {
		return errors.Join(ctx.Err(), fmt.Errorf("wait for CRIU at gate %q: %w", at, err))
	}
	return nil
}

// open lets CRIU go on, with what it is told there.
func (g *gate) open(at byte, told ...byte) error {
	if _, err := g.conn.Write(append([]byte{at | 0x20}, told...)); err != nil {
		return fmt.Errorf("open gate %q to CRIU: %w", at, err)
	}
	return nil
}

// everybody stands for all processes in what CRIU is told.
const everybody = "*\n"

// skipOf is what CRIU is told of the processes whose clean pages it is to leave out.
func skipOf(pids []int) []byte {
	var b []byte
	for i, pid := range pids {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, int64(pid), 10)
	}
	return append(b, '\n')
}

// openAfter starts f, and lets CRIU touch the tasks when it has returned the processes
// whose clean pages CRIU is to leave out; then it calls beside, unless either has failed. The function
// that it returns waits for that and may be called again; it returns the error of f, and
// one if CRIU has not waited. CRIU is let on after an error of f as well: ended where it is, it would leave the
// tasks running that it found frozen.
func (g *gate) openAfter(f func() ([]int, error), beside func()) func() error {
	result := make(chan error, 1)
	go func() {
		finished := make(chan error, 1)
		told := []byte(everybody) // a dump that fails is to be short
		go func() {
			skip, err := f()
			if err == nil {
				told = skipOf(skip)
			}
			finished <- err
		}()
		err := g.read(gateTouch)
		fErr := <-finished
		if err == nil {
			err = g.open(gateTouch, told...)
		}
		if err == nil && fErr == nil {
			beside()
		}
		if err != nil {
			err = fmt.Errorf("CRIU did not wait at gate %q: %w", gateTouch, err)
		}
		result <- errors.Join(fErr, err)
	}()
	return sync.OnceValue(func() error { return <-result })
}

func (g *gate) close() { g.once.Do(func() { g.conn.Close() }) }
