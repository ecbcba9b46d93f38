// SPDX-License-Identifier: Apache-2.0

package precopy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/track"
)

var pageSize = uint64(os.Getpagesize())

// parallel is how many processes are worked on at once.
const parallel = 4

// Process is one process of a container.
type Process struct {
	// Pid is the host's, NsPid the container's.
	Pid, NsPid int
}

// Options bound the copying. Zero values take the defaults given with each.
type Options struct {
	// Enough is the number of written bytes at which another round is not worth
	// it (2 MiB).
	Enough uint64
	// Rounds is the largest number of rounds before the container is declared
	// ready (6).
	Rounds int
	// Time bounds them together (20 s).
	Time time.Duration
	// Rate bounds the copying, in bytes a second; 0 means no bound.
	Rate int64
}

// Stats tell what pre-copy did.
type Stats struct {
	// Engine is "wp-async", or "none" where CRIU dumps everything.
	Engine string `json:"engine"`
	// Why is the reason for "none".
	Why    string `json:"why,omitempty"`
	Rounds int    `json:"rounds"`
	// CopiedBytes were read in all rounds, pages that changed more than once
	// counted each time.
	CopiedBytes uint64 `json:"copied_bytes"`
	// End says why the rounds ended: "enough", "rounds", "time" or "no longer shrinking".
	End string `json:"end"`
	// Untracked are processes that could not be tracked: CRIU dumps them whole.
	Untracked int `json:"untracked,omitempty"`
}

// member is one tracked process.
type member struct {
	Process
	tracker *track.Tracker
	store   *pages.Process
	clean   []pages.Range
	// again is set where what counts as clean is not believed, and is copied again
	// in the barrier.
	again bool
}

// Session is the pre-copy of one container. Its methods are called one at a
// time, but Close.
type Session struct {
	store   *pages.Store
	opts    Options
	members []*member
	stats   Stats

	warm   context.CancelFunc
	warmed chan struct{}
	once   sync.Once
}

// Start begins to track the processes and copies their memory, round after
// round, until what is left is small or no longer shrinks. The processes run
// meanwhile. dir is on the file system of the images; the store is made below it.
// Processes that cannot be tracked are left to CRIU; only a container of which
// none can be is an error.
func Start(ctx context.Context, dir string, list []Process, o Options) (_ *Session, err error) {
	if o.Enough == 0 {
		o.Enough = 2 << 20
	}
	if o.Rounds == 0 {
		o.Rounds = 6
	}
	if o.Time == 0 {
		o.Time = 20 * time.Second
	}
	var options []pages.Option
	if o.Rate > 0 {
		options = append(options, pages.WithRate(o.Rate))
	}
	store, err := pages.NewStore(dir, options...)
	if err != nil {
		return nil, err
	}
	s := &Session{store: store, opts: o, stats: Stats{Engine: "wp-async"}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	var last error
	for _, p := range list {
		t, err := attach(ctx, p.Pid)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			last = err
			s.stats.Untracked++
			continue
		}
		s.members = append(s.members, &member{Process: p, tracker: t, store: store.Process(p.NsPid)})
	}
	if len(s.members) == 0 {
		return nil, fmt.Errorf("no process can be tracked: %w", last)
	}
	return s, s.rounds(ctx)
}

// attach tracks a process whose page tables tell all of its writes.
func attach(ctx context.Context, pid int) (*track.Tracker, error) {
	blind, err := track.Blind(pid)
	if err != nil {
		return nil, err
	}
	if len(blind) > 0 {
		return nil, fmt.Errorf("process %d has %s, which writes past the page tables", pid, blind[0])
	}
	return track.Attach(ctx, pid)
}

// rounds copies until it no longer pays.
func (s *Session) rounds(ctx context.Context) error {
	deadline := time.Now().Add(s.opts.Time)
	before := ^uint64(0)
	for {
		n, err := s.round(ctx)
		if err != nil {
			return err
		}
		left, err := s.written()
		if err != nil {
			return err
		}
		switch {
		case left <= s.opts.Enough:
			s.stats.End = "enough"
		case s.stats.Rounds >= s.opts.Rounds:
			s.stats.End = "rounds"
		case time.Now().After(deadline):
			s.stats.End = "time"
		case s.stats.Rounds > 1 && n >= before-before/8:
			s.stats.End = "no longer shrinking"
		default:
			before = n
			continue
		}
		return nil
	}
}

// round copies once what was written since the last one.
func (s *Session) round(ctx context.Context) (uint64, error) {
	var mu sync.Mutex
	var copied uint64
	err := s.each(func(m *member) error {
		n, err := m.copy(ctx)
		mu.Lock()
		copied += n
		mu.Unlock()
		return err
	})
	s.stats.Rounds++
	s.stats.CopiedBytes += copied
	return copied, err
}

// copy takes the written pages of one process. One that has ended is none of our
// business any more: CRIU will not find it.
func (m *member) copy(ctx context.Context) (uint64, error) {
	// What the tracker has handed over counts as clean from then on, so all of it
	// must be stored, also when the context ends in between: CopyFrom sees to that.
	c, err := m.store.CopyFrom(ctx, m.Pid, func(accept func(pages.Range) error) error {
		return m.tracker.Take(ctx, func(r track.Range) error { return accept(pages.Range(r)) })
	})
	n := c.Pages * pageSize
	if errors.Is(err, track.ErrGone) || errors.Is(err, pages.ErrExited) {
		return n, nil
	} else if err != nil {
		return n, fmt.Errorf("copy the memory of process %d: %w", m.Pid, err)
	}
	return n, nil
}

// written is how many bytes another round would copy.
func (s *Session) written() (n uint64, err error) {
	for _, m := range s.members {
		p, err := m.tracker.Written()
		if errors.Is(err, track.ErrGone) {
			continue
		} else if err != nil {
			return 0, err
		}
		n += p * pageSize
	}
	return n, nil
}
