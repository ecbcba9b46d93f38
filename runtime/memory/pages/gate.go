// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// gate lets one at a time of all stores on the host copy, with pauses. Copying makes
// work for the processor twice, here and in the file system's threads; several of
// them on few processors would keep the containers themselves from running for a
// tenth of a second now and then.
type gate struct {
	mu  sync.Mutex // a lock of flock(2) is one for all of this process
	dir *os.File
}

// Pace is how much a store spares the containers of the host while it copies.
type Pace int32

// The paces, from slow to fast. All but Free are of stores with a gate.
const (
	// Calm waits for its turn and pauses after each.
	Calm Pace = iota
	// Brisk waits for its turn. It is for a container that writes faster than it is
	// copied calmly.
	Brisk
	// Free waits for nobody. It is for the last moments before the freeze, and for frozen
	// containers.
	Free
)

// SetPace changes the pace, which is Calm at first. It may be called at any time.
func (s *Store) SetPace(p Pace) { s.pace.Store(int32(p)) }

// WithGate has the store wait its turn among all stores on the host that were given
// the same directory, for each read of at most a megabyte; see [Pace].
func WithGate(dir string) Option {
	return func(s *Store) { s.gateDir = dir }
}

func openGate(dir string) (*gate, error) {
	if dir == "" {
		return nil, nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the page stores' common directory: %w", err)
	}
	return &gate{dir: f}, nil
}

// pass runs f in its turn. Nobody waits for one who has died: the kernel lets go.
func (g *gate) pass(pace Pace, f func() error) error {
	if g == nil || pace == Free {
		return f()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for {
		err := unix.Flock(int(g.dir.Fd()), unix.LOCK_EX)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for other page stores: %w", err)
		}
	}
	defer func() { _ = unix.Flock(int(g.dir.Fd()), unix.LOCK_UN) }()
	begun := time.Now()
	err := f()
	if pace == Brisk {
		return err
	}
	// The fewer processors there are, the more of its time goes to others.
	time.Sleep(time.Since(begun) / time.Duration(runtime.NumCPU()))
	return err
}

func (g *gate) close() error {
	if g == nil {
		return nil
	}
	return g.dir.Close()
}
