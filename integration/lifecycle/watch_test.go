// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	barrier "github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/journal"
)

// watch tells of files that appear in a directory or leave it (inotify(7)).
type watch struct {
	f   *os.File
	dir string
	buf []byte
}

// change is one file that was renamed into the directory, made in it, or removed.
type change struct {
	name    string
	removed bool
}

// watchDir begins to watch; changes are kept until they are asked for.
func (w *world) watchDir(dir string) *watch {
	w.Helper()
	w.must(os.MkdirAll(dir, 0o700))
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	w.must(err)
	f := os.NewFile(uintptr(fd), "inotify")
	w.Cleanup(func() { _ = f.Close() })
	_, err = unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO|unix.IN_CREATE|unix.IN_DELETE|unix.IN_ONLYDIR)
	w.must(err)
	return &watch{f: f, dir: dir}
}

// next waits for the next change.
func (x *watch) next(ctx context.Context) (change, error) {
	for len(x.buf) == 0 {
		// The context has no descriptor to wait on: look at it now and then.
		if err := x.f.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			return change{}, err
		}
		b := make([]byte, 16<<10)
		n, err := x.f.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if ctx.Err() != nil {
				return change{}, context.Cause(ctx)
			}
			continue
		}
		if err != nil {
			return change{}, err
		}
		x.buf = b[:n]
	}
	// struct inotify_event of include/uapi/linux/inotify.h: wd, mask, cookie, len, name.
	mask := binary.NativeEndian.Uint32(x.buf[4:])
	end := 16 + binary.NativeEndian.Uint32(x.buf[12:])
	name := string(bytes.TrimRight(x.buf[16:end], "\x00"))
	x.buf = x.buf[end:]
	return change{name: name, removed: mask&unix.IN_DELETE != 0}, nil
}

// seen takes what has changed until now.
func (x *watch) seen() ([]change, error) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var out []change
	for {
		c, err := x.next(ctx)
		if errors.Is(err, context.Canceled) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, c)
	}
}

// point is a moment in a member's epoch: an act that has begun, or is complete.
type point struct {
	state barrier.State
	begun bool
}

func (p point) String() string {
	if p.begun {
		return string(p.state) + " begun"
	}
	return string(p.state)
}

// The order of a member's states, see docs/barrier.md.
var (
	livePath = []barrier.State{barrier.Prepared, barrier.Frozen, barrier.Locked, barrier.Captured, barrier.Unlocked, barrier.Resumed, barrier.Sealed}
	stopPath = []barrier.State{barrier.Prepared, barrier.Frozen, barrier.Locked, barrier.Captured, barrier.Sealed, barrier.Stopped, barrier.Unlocked}
)

// points are all moments of an epoch.
func points(stop bool) []point {
	path := livePath
	if stop {
		path = stopPath
	}
	var out []point
	for _, s := range path {
		out = append(out, point{s, true}, point{s, false})
	}
	return out
}

// at is the moment that a record tells of.
func at(e *journal.Epoch) (p point, stop bool, err error) {
	l, err := barrier.ParseLedger(e.State)
	if l.Next != "" {
		return point{l.Next, true}, l.Epoch.Stop, err
	}
	return point{l.State, false}, l.Epoch.Stop, err
}

// until waits for the moment p of the member id, or for a later one, and returns
// the record. It returns nil when the epoch ended before it was seen there.
func (x *watch) until(ctx context.Context, id string, p point) (*journal.Epoch, error) {
	for {
		c, err := x.next(ctx)
		if err != nil {
			return nil, fmt.Errorf("waiting for container %s to be %v: %w", id, p, err)
		}
		if c.name != id+".json" {
			continue
		}
		if c.removed {
			return nil, nil
		}
		e, err := readEpoch(x.dir, id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its removal is among the changes to come
		}
		if err != nil {
			return nil, err
		}
		now, stop, err := at(e)
		if err != nil {
			return nil, err
		}
		order := points(stop)
		if slices.Index(order, now) >= slices.Index(order, p) {
			return e, nil
		}
	}
}

// readEpoch reads the record of an open epoch from its directory.
func readEpoch(dir, id string) (*journal.Epoch, error) {
	state, ns, _ := strings.Cut(dir, "/epochs/")
	return journal.ReadEpoch(state, ns, id)
}
