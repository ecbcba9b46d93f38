// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
	"golang.org/x/sys/unix"
)

// Tracker tracks the pages of one address space. Its methods may be called from
// any goroutine, one at a time; they serialize themselves.
type Tracker struct {
	pid  int
	cost Cost

	mu        sync.Mutex
	closed    bool
	pidfd     int
	uffd      int
	pagemap   *os.File // opened at Attach: always this address space, even after execve
	dir       string   // in /proc, where the process's maps are
	tracked   []span   // sorted, disjoint
	untracked []Mapping
	shared    []Range // see WatchShared
	vec       []uapi.PageRegion
	guards    bool   // the kernel knows PAGE_IS_GUARD
	still     *still // see SetFrozen
	alone     uint64 // from this size on, in bytes, a mapping is scanned by what is not clean
}

// still is what does not change while a process is frozen; read when first asked for.
type still struct {
	sameSpace bool
	areas     []area
}

// SetFrozen says that the process is frozen from now on, or that it will run again. While it is
// frozen its mappings are read once only, and whether it has begun another program is asked once: what CRIU
// maps into it meanwhile is not seen, and is not its own.
func (t *Tracker) SetFrozen(frozen bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.still = nil; frozen {
		t.still = &still{}
	}
}

// Cost is what Attach did to the process.
type Cost struct {
	Attach  time.Duration // of the call
	Stopped time.Duration // one thread of the process did not run
	Width   time.Duration // within Stopped: its registers were not its own
	Rescue  bool          // within Width, even the injector's death would have been harmless
}

// Attach begins to track a process: it must run, or be stopped by a signal, but not
// be frozen by a cgroup. Every page counts as written until the first Take.
//
// One thread of the process is stopped for less than a millisecond. Errors wrap
// ErrGone, ErrExec, ErrTraced, ErrUnsupported or the context's error; after any of
// them the process runs on as it was and nothing is left in it. Without a deadline
// in ctx ten seconds are the limit.
func Attach(ctx context.Context, pid int) (*Tracker, error) {
	t, err := attach(ctx, pid)
	if err != nil {
		return nil, fmt.Errorf("tracking the memory of process %d: %w", pid, err)
	}
	return t, nil
}

func attach(ctx context.Context, pid int) (_ *Tracker, err error) {
	begin := time.Now()
	t := &Tracker{pid: pid, pidfd: -1, uffd: -1, vec: make([]uapi.PageRegion, 4096), guards: true, alone: aloneLeast}
	defer func() {
		if err != nil {
			_ = t.free()
		}
	}()
	// The descriptor comes first: from here on a reused pid is not mistaken for it.
	if t.pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
		return nil, goneIfMissing(fmt.Errorf("pidfd_open: %w", err))
	}
	inj, err := inject(ctx, pid)
	if err != nil {
		return nil, err
	}
	t.uffd = inj.fd
	if err := uapi.UffdAPI(t.uffd, uapi.UffdFeatureWPAsync|uapi.UffdFeatureWPUnpopulated|uapi.UffdFeatureWPShmem); err != nil {
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w: the kernel has no asynchronous write protection (UFFD_FEATURE_WP_ASYNC, Linux 6.7): %w", ErrUnsupported, err)
		}
		return nil, err
	}
	if t.dir, err = memoryDir(pid); err != nil {
		return nil, err
	}
	if t.pagemap, err = os.Open(t.dir + "/pagemap"); err != nil {
		return nil, goneIfMissing(err)
	}
	if _, err := t.refresh(ctx); err != nil {
		return nil, err
	}
	// The page map was opened after the injection: it must be of the same program.
	if !slices.ContainsFunc(t.tracked, func(s span) bool { return allowsWP(t.pagemap, s.Start) }) {
		return nil, t.goneOrExec()
	}
	t.cost = Cost{Attach: time.Since(begin), Stopped: inj.stopped, Width: inj.width, Rescue: inj.rescue}
	return t, nil
}

// Cost says what Attach cost the process.
func (t *Tracker) Cost() Cost { return t.cost }

// PID is the process's, as given to Attach.
func (t *Tracker) PID() int { return t.pid }

// Close ends tracking; the process notices nothing. Idempotent.
func (t *Tracker) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	// Closing alone would do, but under the lock that page faults and mmap wait for,
	// a tenth of a second for each GiB on a busy machine: so piece by piece. And a fork of
	// another thread may have fallen into the injection, and the child hold a copy
	// of the descriptor.
	for _, s := range t.tracked {
		for r := range s.pieces(closePiece) {
			_ = uapi.UffdUnregister(t.uffd, r.Start, r.End)
		}
	}
	for _, s := range t.shared {
		for r := range (span{Range: s}).pieces(closePiece) {
			_ = uapi.UffdUnregister(t.uffd, r.Start, r.End)
		}
	}
	return t.free()
}

// What one system call does at most, in bytes, while the process runs: both hold
// the lock of its mappings, Close against all others, Take only against changes of
// mappings. A millisecond or two, either.
const (
	closePiece = 16 << 20
	takePiece  = 64 << 20
)

func (t *Tracker) free() error {
	t.closed = true
	var err error
	if t.uffd >= 0 {
		err = unix.Close(t.uffd)
	}
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
	}
	if t.pagemap != nil {
		t.pagemap.Close()
	}
	t.tracked, t.untracked, t.vec = nil, nil, nil
	return err
}

// Alive returns nil if the process still runs in the address space that is
// tracked; else ErrGone or ErrExec. Take, Clean, Written and Refresh ask it
// themselves, before and after; who reads the process's memory by pid in between
// may want to ask again.
func (t *Tracker) Alive() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.alive()
}

func (t *Tracker) alive() error {
	if t.closed {
		return ErrClosed
	}
	fds := []unix.PollFd{{Fd: int32(t.pidfd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, 0)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("asking whether process %d runs: %w", t.pid, err)
		}
	}
	if fds[0].Revents != 0 {
		return ErrGone
	}
	if t.spaceEnded() {
		return t.goneOrExec()
	}
	if t.still != nil && t.still.sameSpace {
		return nil
	}
	err := t.sameSpace()
	if t.still != nil {
		t.still.sameSpace = err == nil
	}
	return err
}

// spaceEnded asks whether anybody still uses the address space. If nobody does, the
// answer to this is ENOMEM, whatever is asked (fs/userfaultfd.c,
// userfaultfd_unregister); else EINVAL, because nothing is mapped there.
func (t *Tracker) spaceEnded() bool {
	err := uapi.UffdUnregister(t.uffd, probeAddress, probeAddress+pageSize)
	return errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ESRCH)
}

// goneOrExec tells which of the two it is when the address space has ended. The
// process may be on its way out, without memory but not yet dead.
func (t *Tracker) goneOrExec() error {
	if _, err := memoryDir(t.pid); err != nil {
		return ErrGone
	}
	return ErrExec
}

// sameSpace finds an execve whose old address space lives on in another process
// (vfork, CLONE_VM): the pagemap of now must still allow, on one page, what the one
// of Attach allows. No other way to compare an address space with a descriptor is
// known; a fresh program has nothing registered.
func (t *Tracker) sameSpace() error {
	dir, err := memoryDir(t.pid)
	if err != nil {
		return err
	}
	now, err := os.Open(dir + "/pagemap")
	if err != nil {
		return goneIfMissing(err)
	}
	defer now.Close()
	for i := len(t.tracked) - 1; i >= 0; i-- {
		r := t.tracked[i]
		if !allowsWP(t.pagemap, r.Start) {
			continue
		}
		if allowsWP(now, r.Start) {
			return nil
		}
		return t.goneOrExec()
	}
	// Nothing tracked is mapped any more: there is nothing to be wrong about.
	return nil
}

// allowsWP reports whether the page's mapping is registered for asynchronous write
// protection; nothing is changed.
func allowsWP(pagemap *os.File, addr uint64) bool {
	arg := uapi.PmScanArg{
		Flags: uapi.PmScanCheckWPAsync, Start: addr, End: addr + pageSize,
		CategoryAnyofMask: uapi.PageIsWPAllowed, ReturnMask: uapi.PageIsWPAllowed,
	}
	var vec [1]uapi.PageRegion
	n, err := uapi.PagemapScan(int(pagemap.Fd()), &arg, vec[:])
	return err == nil && n == 1
}

// Refresh registers mappings that appeared since Attach or the last Refresh and
// brings Tracked and Untracked up to date. added counts newly registered ranges.
// Nothing depends on it for being right: what is not registered counts as written.
func (t *Tracker) Refresh(ctx context.Context) (added int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.alive(); err != nil {
		return 0, t.failed("looking for new mappings of", err)
	}
	added, err = t.refresh(ctx)
	if err != nil {
		return added, t.failed("registering new mappings of", err)
	}
	return added, nil
}

func (t *Tracker) failed(doing string, err error) error {
	return fmt.Errorf("%s process %d: %w", doing, t.pid, err)
}

// refresh rebuilds both lists from the maps file of now. It registers everything
// anew: the kernel does nothing for what is registered already, and a list of ours
// could not tell a mapping from another one that took its place.
func (t *Tracker) refresh(ctx context.Context) (int, error) {
	areas, err := t.maps()
	if err != nil {
		return 0, err
	}
	var (
		added     int
		tracked   []span
		untracked []Mapping
	)
	leave := func(a area, why string) { untracked = append(untracked, Mapping{a.Range, a.path, why}) }
	for _, a := range areas {
		if err := ctx.Err(); err != nil {
			return added, err
		}
		if why := a.untrackable(); why != "" {
			leave(a, why)
			continue
		}
		already := allowsWP(t.pagemap, a.Start)
		if a.file() && !a.writable() && !already {
			// Registering switches fault-around off: a cost for code and constants,
			// which rarely have a page of their own.
			private, err := t.hasPrivatePages(span{Range: a.Range, file: true})
			if err != nil {
				return added, err
			}
			if !private {
				leave(a, whyReadOnly)
				continue
			}
		}
		fresh := a.Range
		if already {
			// Not all of it once more: were it another mapping by now, the marks of that would
			// count. The first page tells whether it belongs to another userfaultfd.
			fresh.End = fresh.Start + pageSize
		}
		err := uapi.UffdRegisterWP(t.uffd, fresh.Start, fresh.End)
		if already && errors.Is(err, unix.EINVAL) {
			fresh = a.Range // of explicit huge pages
			err = uapi.UffdRegisterWP(t.uffd, fresh.Start, fresh.End)
		}
		switch {
		case err == nil:
			tracked = join(tracked, span{Range: a.Range, file: a.file()})
			if !already {
				added++
			} else if within(a.Range, t.tracked) {
				continue
			}
			if err := t.unmark(fresh); err != nil {
				return added, err
			}
		case t.spaceEnded():
			return added, t.goneOrExec()
		case errors.Is(err, unix.EBUSY):
			leave(a, whyOther)
		default:
			// Unmapped in the meantime, or of a kind that the kernel refuses. Either
			// way it counts as written.
			leave(a, whyRefused+": "+err.Error())
		}
	}
	t.tracked, t.untracked = tracked, untracked
	return added, nil
}

// unmark makes the pages of a mapping that has been registered just now count as written. It may
// have the marks of where it was before, on kernels that leave them there when a mapping moves, or of
// an earlier registration (see Clean): its pages are not the ones that were copied from these addresses.
func (t *Tracker) unmark(r Range) error {
	for r := range (span{Range: r}).pieces(takePiece) {
		if t.tracked == nil {
			// At first it is nearly never so, and looking costs a tenth of changing.
			marked, err := found(func(fn func(Range) error) error { return t.marked(span{Range: r}, 0, fn) })
			if err != nil {
				return err
			}
			if !marked {
				continue
			}
		}
		t.giveBack(r)
	}
	return nil
}

// maps returns the mappings of now, or those of a process that is frozen.
func (t *Tracker) maps() ([]area, error) {
	if t.still != nil && t.still.areas != nil {
		return t.still.areas, nil
	}
	areas, err := t.readMaps()
	if t.still != nil && err == nil {
		t.still.areas = areas
	}
	return areas, err
}

// readMaps reads the mappings of now; through another thread when the one before has
// ended and the process has not.
func (t *Tracker) readMaps() ([]area, error) {
	areas, err := readMaps(t.dir + "/maps")
	if !errors.Is(err, ErrGone) {
		return areas, err
	}
	dir, err := memoryDir(t.pid)
	if err != nil {
		return nil, err
	}
	t.dir = dir
	if areas, err = readMaps(t.dir + "/maps"); errors.Is(err, ErrGone) {
		err = t.goneOrExec()
	}
	return areas, err
}
