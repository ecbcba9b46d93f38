// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// State is what the kernel says of a cgroup.
type State string

// States of a cgroup. A cgroup is Freezing while the freeze was asked for and
// at least one task still runs.
const (
	Thawed   State = "thawed"
	Freezing State = "freezing"
	Frozen   State = "frozen"
)

// MaxWait bounds every wait of this package for callers whose context carries no
// deadline of its own.
const MaxWait = 10 * time.Second

// hierarchy is one of the kernel's two freezers. Its methods are called with
// Freezer.mu held.
type hierarchy interface {
	// state reads the kernel's answer; it never waits.
	state() (State, error)
	// ask requests the freeze, or the thaw, and returns at once.
	ask(freeze bool) error
	// await returns nil when the cgroup has reached want.
	await(ctx context.Context, want State) error
	// kill ends every task and returns when none is left.
	kill(ctx context.Context) error
	version() int
	close() error
}

// Freezer is the freezer of one container's cgroup. It is safe for concurrent
// use; calls that change the state follow each other.
type Freezer struct {
	dir string

	mu     sync.Mutex
	h      hierarchy
	closed bool
}

// Open finds the freezer of the cgroup that holds pid and opens its files. The
// cgroup file systems are looked up in the mount namespace of the caller, which
// must be the host's or see the same hierarchies.
//
// It fails with errdefs.ErrNotFound when the process is gone, and with
// errdefs.ErrFailedPrecondition when its cgroup cannot be frozen on its own: the
// root of a hierarchy, or a cgroup that holds the caller too.
func Open(pid int) (*Freezer, error) {
	loc, err := locate(pid)
	if err != nil {
		return nil, err
	}
	return open(loc)
}

func open(loc location) (*Freezer, error) {
	var (
		h   hierarchy
		err error
	)
	if loc.v2 {
		h, err = openV2(loc.dir)
	} else {
		h, err = openV1(loc.dir)
	}
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
		}
		return nil, fmt.Errorf("opening the freezer in %s: %w", loc.dir, err)
	}
	return &Freezer{dir: loc.dir, h: h}, nil
}

// Path is the directory of the cgroup in the freezer's hierarchy, the value that
// CRIU wants as its freeze-cgroup option.
func (f *Freezer) Path() string { return f.dir }

// Version is 1 for the v1 freezer controller and 2 for cgroup v2.
func (f *Freezer) Version() int { return f.h.version() }

// State reports the state of the cgroup now. A cgroup that is frozen through a
// parent is Frozen.
func (f *Freezer) State() (State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return "", f.errClosed()
	}
	st, err := f.h.state()
	if err != nil {
		return "", fmt.Errorf("reading the freezer state of %s: %w", f.dir, err)
	}
	return st, nil
}

// Freeze stops every task of the cgroup and returns when all of them are
// stopped. The times are CLOCK_MONOTONIC nanoseconds, comparable between
// processes of one boot: when the freeze was asked for, and when the kernel first
// said that it is complete.
//
// Thaw is its undo. When Freeze fails it has already undone itself. It fails with
// errdefs.ErrFailedPrecondition when the cgroup is frozen or freezing by
// somebody else's doing, and with the context's error, naming the tasks that
// kept running, when its deadline (MaxWait at the most) passes first.
func (f *Freezer) Freeze(ctx context.Context) (asked, frozen int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, MaxWait)
	defer cancel()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0, 0, f.errClosed()
	}
	if err := ctx.Err(); err != nil {
		return 0, 0, fmt.Errorf("freezing %s: %w", f.dir, err)
	}
	st, err := f.h.state()
	if err != nil {
		return 0, 0, fmt.Errorf("reading the freezer state of %s: %w", f.dir, err)
	}
	if st != Thawed {
		return 0, 0, fmt.Errorf("freezing %s: it is %s already; resume the container first: %w", f.dir, st, errdefs.ErrFailedPrecondition)
	}
	asked = monotonic()
	if err := f.h.ask(true); err != nil {
		return 0, 0, errors.Join(fmt.Errorf("freezing %s: %w", f.dir, err), f.h.ask(false))
	}
	if err := f.h.await(ctx, Frozen); err != nil {
		// Which tasks resist can only be seen before the freeze is taken back.
		running := stillRunning(f.dir)
		err = fmt.Errorf("freezing %s: not complete after %s%s: %w", f.dir,
			time.Duration(monotonic()-asked).Round(time.Microsecond), running, err)
		return 0, 0, errors.Join(err, f.h.ask(false))
	}
	return asked, monotonic(), nil
}

// Hold is Freeze in the form for a caller that stays on the stack: it returns the
// undo to defer. The undo does not depend on ctx.
func (f *Freezer) Hold(ctx context.Context) (asked, frozen int64, undo func() error, err error) {
	asked, frozen, err = f.Freeze(ctx)
	if err != nil {
		return 0, 0, nil, err
	}
	return asked, frozen, func() error { return f.Thaw(context.Background()) }, nil
}

// Thaw lets every task of the cgroup run again and returns when the kernel says
// so. A thawed cgroup, and one that is gone with its tasks, is left alone without
// an error. It fails with errdefs.ErrFailedPrecondition when a parent cgroup is
// frozen, which only the parent's owner may undo.
func (f *Freezer) Thaw(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, MaxWait)
	defer cancel()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return f.errClosed()
	}
	if err := f.h.ask(false); err != nil {
		if gone(err) {
			return nil
		}
		return fmt.Errorf("thawing %s: %w", f.dir, err)
	}
	if err := f.h.await(ctx, Thawed); err != nil && !gone(err) {
		return fmt.Errorf("thawing %s: %w", f.dir, err)
	}
	return nil
}

// Kill ends every task of the cgroup and of the cgroups below it with SIGKILL
// and returns when none is left. Frozen tasks die without running another
// instruction of their own: the signal is pending before they are let go.
func (f *Freezer) Kill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, MaxWait)
	defer cancel()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return f.errClosed()
	}
	if err := f.h.kill(ctx); err != nil && !gone(err) {
		return fmt.Errorf("killing the tasks of %s: %w", f.dir, err)
	}
	return nil
}

// Tasks lists the processes in the cgroup and in the cgroups below it, as pids of
// the caller's pid namespace, without an order. A cgroup that is gone has none.
func (f *Freezer) Tasks() ([]int, error) {
	pids, err := tasks(f.dir)
	if err != nil {
		return nil, fmt.Errorf("listing the tasks of %s: %w", f.dir, err)
	}
	return pids, nil
}

// Close lets the files go. It does not thaw.
func (f *Freezer) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	return f.h.close()
}

func (f *Freezer) errClosed() error {
	return fmt.Errorf("freezer of %s: %w", f.dir, fs.ErrClosed)
}

// gone tells that the cgroup was removed. Its directory cannot be removed while
// it holds a task, so there is nothing left to thaw or kill.
func gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, fs.ErrNotExist)
}

func monotonic() int64 {
	var ts unix.Timespec
	// CLOCK_MONOTONIC cannot fail on Linux (clock_gettime(2)).
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// tasks reads cgroup.procs of dir and of every directory below.
func tasks(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			// A child cgroup may go while it is walked.
			if gone(err) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		data, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			// EOPNOTSUPP: a threaded v2 cgroup, whose processes are listed by
			// the domain above it.
			if gone(err) || errors.Is(err, unix.EOPNOTSUPP) {
				return nil
			}
			return err
		}
		for field := range strings.FieldsSeq(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return fmt.Errorf("%s/cgroup.procs holds %q: %w", path, field, err)
			}
			// 0 stands for a task of a pid namespace that the reader cannot see.
			if pid != 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// stillRunning names up to four tasks that are on a CPU or in an uninterruptible
// wait, the two things that keep a freeze from completing.
func stillRunning(dir string) string {
	pids, err := tasks(dir)
	if err != nil {
		return ""
	}
	var names []string
	for _, pid := range pids {
		comm, state := stat(pid)
		if state != 'R' && state != 'D' {
			continue
		}
		if len(names) == 4 {
			names = append(names, "...")
			break
		}
		names = append(names, fmt.Sprintf("%d (%s) in state %c", pid, comm, state))
	}
	if len(names) == 0 {
		return ""
	}
	return ", still running: " + strings.Join(names, ", ")
}

// stat returns the name and the state letter of a process, or zeroes.
func stat(pid int) (comm string, state byte) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", 0
	}
	// The name is in parentheses and may hold parentheses itself.
	s := string(data)
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 0 || end < open || end+2 >= len(s) {
		return "", 0
	}
	return s[open+1 : end], s[end+2]
}
