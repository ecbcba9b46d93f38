// SPDX-License-Identifier: Apache-2.0

package precopy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/track"
	"github.com/cohort-project/cohort/runtime/pace"
)

// warmPause is the least pause between two rounds while the container waits for
// the slowest member of its group. A round that takes longer is followed by as
// long a pause: no more than half of a core is spent on one container.
const warmPause = 10 * time.Millisecond

// catchUpTime bounds CatchUp. Even a container of many GiB is copied into memory once in it.
const catchUpTime = 10 * time.Second

// shortRound is a round after which CatchUp is done: some of them fit into Sprint.
const shortRound = 25 * time.Millisecond

// CatchUp copies what was written since Start, which may be long ago, until little is
// left or no longer shrinks. What it copies stays in memory until Compose. It goes as calmly as
// Start, and faster when that is too slow. A container of which Start did not get
// ahead is copied in it. An error other than that of ctx is none: it leaves more to the barrier.
func (s *Session) CatchUp(ctx context.Context) error {
	s.hold()
	pace := pages.Calm
	if s.stats.End != EndEnough {
		pace = pages.Brisk
	}
	until := time.Now().Add(catchUpTime)
	before := ^uint64(0)
	for time.Now().Before(until) {
		s.store.SetPace(pace)
		begun := time.Now()
		// Not on threads of low priority: much else is going on now, and one that waits for a
		// processor while it has the lock of the container's mappings has the container wait.
		n, err := s.round(ctx, s.each)
		if err != nil {
			return ctx.Err()
		}
		// What is written in so short a time another round would not make less.
		if n <= s.opts.Enough || time.Since(begun) < shortRound {
			if s.stats.End == EndBehind {
				s.stats.End = EndCaughtUp
			}
			return nil
		}
		if n > before-before/4 {
			if pace == pages.Free {
				break
			}
			pace++
		}
		before = n
	}
	if s.stats.End == EndEnough {
		s.stats.End = EndShrinking
	}
	return ctx.Err()
}

// hold has what is copied from now on stay in memory.
func (s *Session) hold() {
	s.store.Hold()
	s.holding = true
}

// busyPause is how many times longer it pauses on a busy host.
const busyPause = 5

// KeepWarm goes on copying in the background what the container writes, so that
// little is left when the freeze comes. Sprint or Cool ends it. What it copies stays
// in memory until Compose.
func (s *Session) KeepWarm() {
	s.hold()
	s.store.SetPace(pages.Free)
	// A sixty-fourth of it may well be written between the last round and the freeze.
	s.store.Reserve(s.stats.CopiedBytes / 64)
	ctx, cancel := context.WithCancel(pace.With(context.Background(), s.pace))
	s.warm, s.warmed = cancel, make(chan struct{})
	go func() {
		defer close(s.warmed)
		for {
			begun := time.Now()
			// A round that fails leaves more to CRIU, or fails again in Capture.
			_, _ = s.round(ctx, s.inTurn)
			pause := max(warmPause, time.Since(begun))
			if pace.Pause(ctx); pace.Busy(ctx) {
				pause *= busyPause
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
		}
	}()
}

// Cool ends what KeepWarm began and returns when it has ended.
func (s *Session) Cool() {
	if s.warm != nil {
		s.warm()
		<-s.warmed
		s.warm = nil
	}
}

// sharedPause is the least pause between two looks at shared memory when all but
// the barrier is done: what they find goes to the disk, and what they leave is
// kept in memory in the barrier.
const sharedPause = 500 * time.Millisecond

// little is what is not worth another round at once, in bytes: CRIU takes it in
// some hundred microseconds.
const little = 256 << 10

// Sprint copies, for a freeze that comes when the time is up: without a pause as
// long as much is written, and so that no round is under way at the end. What it
// has not reached by then counts as written.
func (s *Session) Sprint(ctx context.Context, d time.Duration) {
	until := time.Now().Add(d)
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	s.Cool()
	var took time.Duration
	for time.Until(until) > took+took/2 {
		begun := time.Now()
		n, err := s.round(ctx, s.each)
		if err != nil {
			break
		}
		took = time.Since(begun)
		if n > little {
			continue
		}
		// Once more, late.
		select {
		case <-ctx.Done():
		case <-time.After(max(time.Millisecond, time.Until(until)-2*took-time.Millisecond)):
		}
	}
	<-ctx.Done()
}

// Scan copies, for the frozen container, what was written since the last round, and
// notes which pages are in the store as they are. CRIU would need 15 µs for a page on
// its own, which takes one or two here. Scan must have returned before CRIU touches the tasks: CRIU
// writes into their memory itself, and a page that it changes after it has passed over it would be
// in neither image. What is not copied when ctx ends is CRIU's.
func (s *Session) Scan(ctx context.Context) error {
	s.store.SetPace(pages.Free)
	var copied atomic.Uint64
	defer func() {
		s.stats.BarrierBytes += copied.Load()
		s.stats.CopiedBytes += copied.Load()
	}()
	return s.each(func(m *member) error {
		m.clean = nil
		m.tracker.SetFrozen(true)
		if err := m.ended(breakMemory(m)); err != nil {
			return err
		}
		// No Refresh: it would change the mappings that CRIU is reading.
		n, err := m.take(ctx)
		copied.Add(n)
		if err != nil && ctx.Err() == nil {
			return err
		}
		var list, strays []pages.Range
		err = m.tracker.Clean(appendTo(&list), appendTo(&strays))
		if err := m.ended(err); err != nil || m.gone {
			return err
		}
		if len(strays) > 0 {
			// CRIU will not have them; what the store has of them is of another time.
			c, err := m.store.Copy(ctx, m.Pid, slices.Values(strays))
			copied.Add(c.Pages * pageSize)
			if err := m.ended(err); err != nil || m.gone {
				return err
			}
			list = append(list, strays...)
			slices.SortFunc(list, func(a, b pages.Range) int { return cmp.Compare(a.Start, b.Start) })
		}
		m.clean = list
		return nil
	})
}

func appendTo(list *[]pages.Range) func(track.Range) error {
	return func(r track.Range) error {
		*list = append(*list, pages.Range(r))
		return nil
	}
}

// Held are the processes, by their pid here, of which Scan has what the kernel does not say to be
// written: CRIU may leave that out. Of all others it must dump every page, whatever the page tables say.
func (s *Session) Held() []int {
	var pids []int
	for _, m := range s.members {
		if m.clean != nil {
			pids = append(pids, m.Pid)
		}
	}
	return pids
}

// SkipShared is for criu.Config: the shared memory that CRIU is to leave out.
func (s *Session) SkipShared() string { return s.shared.Skip() }

// Complete reads what has changed of shared memory, and pages that count as
// copied but could not be read when it was their turn. CRIU may be at work
// meanwhile.
func (s *Session) Complete(ctx context.Context) error {
	// They may have begun since to let devices write into their memory.
	_ = s.each(func(m *member) error {
		// What cannot be asked is not believed.
		if blind, err := m.tracker.Blind(); err != nil || len(blind) > 0 {
			m.again = true
		}
		return nil
	})
	var eg errgroup.Group
	eg.Go(func() error {
		s.shared.Scan(slices.ContainsFunc(s.members, func(m *member) bool { return m.again }))
		return s.shared.Take(ctx)
	})
	eg.Go(func() error { return s.complete(ctx) })
	return eg.Wait()
}

func (s *Session) complete(ctx context.Context) error {
	return s.each(func(m *member) error {
		missing, err := m.store.MissingFrom(s.parentOf(m), m.clean)
		if m.again {
			missing = m.clean
		}
		if err == nil && len(missing) > 0 {
			_, err = m.store.Copy(ctx, m.Pid, slices.Values(missing))
		}
		if err != nil {
			return fmt.Errorf("complete the memory of process %d: %w", m.Pid, err)
		}
		return nil
	})
}

func (s *Session) each(f func(*member) error) error {
	var eg errgroup.Group
	eg.SetLimit(parallel)
	for _, m := range s.members {
		eg.Go(func() error { return f(m) })
	}
	return eg.Wait()
}

// eachLow is each on threads that give way to the container.
func (s *Session) eachLow(f func(*member) error) error {
	return s.each(func(m *member) error {
		lowest()
		return f(m)
	})
}

// inTurn goes through the processes on the caller's thread.
func (s *Session) inTurn(f func(*member) error) error {
	for _, m := range s.members {
		if err := f(m); err != nil {
			return err
		}
	}
	return nil
}

// lowest gives the calling goroutine a thread of the lowest priority, for the rest
// of its life: on a busy machine the container comes first. The thread ends with
// the goroutine, since it is never unlocked: raising its priority again would need
// a capability.
func lowest() {
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
}

// Compose makes one checkpoint of what CRIU wrote to imagesDir and of the store,
// whose files it takes.
func (s *Session) Compose(ctx context.Context, imagesDir string) (pages.Stats, error) {
	clean, err := s.shared.Compose(ctx, imagesDir)
	if err != nil {
		return pages.Stats{}, err
	}
	s.stats.Shared = s.shared.Stats()
	continuous := map[int]bool{}
	for _, m := range s.members {
		if m.clean != nil {
			clean[m.NsPid] = m.clean
		}
		continuous[m.NsPid] = m.continuous
	}
	// The caller makes the whole capture durable.
	options := []pages.ComposeOption{pages.WithoutSync()}
	if s.opts.Parent != nil {
		options = append(options, pages.WithParent(s.opts.Parent, func(nsPid int) bool { return continuous[nsPid] }))
	}
	return pages.Compose(ctx, imagesDir, s.store, clean, options...)
}

// parentOf is the chain that holds what the process has not written.
func (s *Session) parentOf(m *member) *pages.Chain {
	if !m.continuous {
		return nil
	}
	return s.opts.Parent
}

// Stats of what was copied so far.
func (s *Session) Stats() Stats { return s.stats }

// Untrack ends the tracking: the processes run as they did before. The store stays.
func (s *Session) Untrack() error {
	s.Cool()
	var errs []error
	for _, m := range s.members {
		if !m.kept {
			errs = append(errs, m.tracker.Close())
		}
	}
	for _, t := range s.ended {
		errs = append(errs, t.Close())
	}
	return errors.Join(errs...)
}

// Close ends the tracking and removes the store. It may be called again.
func (s *Session) Close() (err error) {
	s.once.Do(func() {
		err = s.Untrack()
		if s.shared != nil {
			err = errors.Join(err, s.shared.Close())
		}
		err = errors.Join(err, s.store.Discard())
	})
	return err
}
