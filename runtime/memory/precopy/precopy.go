// SPDX-License-Identifier: Apache-2.0

package precopy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/shm"
	"github.com/cohort-project/cohort/runtime/memory/track"
	"github.com/cohort-project/cohort/runtime/pace"
)

var pageSize = uint64(os.Getpagesize())

// parallel is how many processes are worked on at once.
const parallel = 4

// Process is one process of a container.
type Process struct {
	// Pid is the host's, NsPid the container's.
	Pid, NsPid int
}

// List tells the processes of a container. It is asked before each round: what
// was born since is tracked from then on.
type List func() ([]Process, error)

// Options bound the copying. Zero values take the defaults given with each.
type Options struct {
	// Enough is the number of written bytes at which another round is not worth
	// it (2 MiB).
	Enough uint64
	// Rounds is the largest number of rounds before the container is declared
	// ready (6).
	Rounds int
	// Time bounds those after the first together (20 s).
	Time time.Duration
	// Parent is the memory of the epoch at whose cut Kept was armed: a page not
	// written since is not copied, it is the parent's.
	Parent *pages.Chain
	// Kept is what [Session.Keep] gave when the parent epoch ended. Start takes it
	// over, also when it fails.
	Kept *Tracking

	spare func() uint64 // instead of pages.Spare, for tests
}

// Why rounds end.
const (
	EndEnough    = "enough"
	EndRounds    = "rounds"
	EndTime      = "time"
	EndShrinking = "no longer shrinking"
	// EndCaughtUp is a container that wrote about as fast as it could be copied to the
	// disk: the rest was copied into memory, until enough.
	EndCaughtUp = "caught up in memory"
	// EndBehind is one that wrote faster than that, too: what was left was copied in the barrier.
	EndBehind = "fell behind"
)

// Stats tell what pre-copy did.
type Stats struct {
	// Engine is "wp-async", or "none" where CRIU dumps everything.
	Engine string `json:"engine"`
	// Why is the reason for "none", or for the last process that is untracked.
	Why    string `json:"why,omitempty"`
	Rounds int    `json:"rounds"`
	// CopiedBytes were read in all rounds, pages that changed more than once
	// counted each time.
	CopiedBytes uint64 `json:"copied_bytes"`
	// BarrierBytes of them were read while the container was frozen.
	BarrierBytes uint64 `json:"barrier_bytes"`
	// End says why the rounds ended: one of the constants.
	End string `json:"end"`
	// Untracked are processes that could not be tracked: CRIU dumps them whole.
	Untracked int `json:"untracked,omitempty"`
	// Continuous are processes tracked since the parent's cut.
	Continuous int `json:"continuous,omitempty"`
	// Shared is about shared memory; it is known after Compose.
	Shared shm.Stats `json:"shared"`
}

// member is one tracked process.
type member struct {
	Process
	tracker *track.Tracker
	store   *pages.Process
	clean   []pages.Range
	// continuous is set for a process that was tracked since the parent's cut: its
	// pages that were not written are the parent's.
	continuous bool
	// gone is set for a process that has ended or begun another program.
	gone bool
	// again is set where what counts as clean is not believed, and is copied again
	// in the barrier.
	again bool
	// armed is set by Rearm; kept by Keep: the tracker is not the session's any more.
	armed, kept bool
}

// Session is the pre-copy of one container. Its methods are called one at a
// time, but Close.
type Session struct {
	store   *pages.Store
	list    List
	opts    Options
	members []*member
	all     []Process     // as last listed
	refused map[int]error // those that cannot be tracked
	ended   []*track.Tracker
	shared  *shm.Session
	stats   Stats
	pace    *pace.Pacer // of the context of Start, for KeepWarm
	holding bool        // CatchUp or KeepWarm has begun
	looked  time.Time   // at shared memory

	warm   context.CancelFunc
	warmed chan struct{}
	once   sync.Once
}

// Start begins to track the processes and copies their memory, round after
// round, until what is left is small or no longer shrinks. The processes run
// meanwhile. dir is on the file system of the images; the store is made below it, and its
// parent's parent is common to all sessions on the host.
// Processes that cannot be tracked are left to CRIU; only a container of which
// none can be is an error.
func Start(ctx context.Context, dir string, list List, o Options) (_ *Session, err error) {
	if o.Enough == 0 {
		o.Enough = 2 << 20
	}
	if o.Rounds == 0 {
		o.Rounds = 6
	}
	if o.Time == 0 {
		o.Time = 20 * time.Second
	}
	kept := o.Kept.take()
	defer func() {
		for _, m := range kept {
			err = errors.Join(err, m.tracker.Close())
		}
	}()
	// Captures of all containers are side by side.
	store, err := pages.NewStore(dir, pages.WithGate(filepath.Dir(filepath.Dir(dir))))
	if err != nil {
		return nil, err
	}
	s := &Session{store: store, list: list, opts: o, refused: map[int]error{}, pace: pace.From(ctx), stats: Stats{Engine: "wp-async"}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if o.Parent != nil {
		processes, err := list()
		if err != nil {
			return nil, err
		}
		for _, p := range processes {
			i := slices.IndexFunc(kept, func(k *member) bool { return k.Process == p && k.tracker.Alive() == nil })
			if i < 0 {
				continue
			}
			m := kept[i]
			kept = slices.Delete(kept, i, i+1)
			s.members = append(s.members, &member{Process: p, tracker: m.tracker, store: store.Process(p.NsPid), continuous: true})
		}
	}
	if err := s.renew(ctx, 0); err != nil {
		return nil, err
	}
	if len(s.members) == 0 {
		var last error
		for _, last = range s.refused {
		}
		return nil, fmt.Errorf("no process can be tracked: %w", last)
	}
	writers := make([]shm.Writer, len(s.all))
	for i, p := range s.all {
		writers[i] = shm.Writer{Pid: p.Pid, NsPid: p.NsPid}
		for _, m := range s.members {
			if m.Process == p {
				writers[i].Tracker = m.tracker
			}
		}
	}
	if s.shared, err = shm.Start(ctx, writers, store); err != nil {
		return nil, err
	}
	return s, s.rounds(ctx)
}

// newborn is how large a process must be, in private resident bytes, to be tracked when
// it is born after the first round: a small one is dumped sooner than tracked.
const newborn = 4 << 20

// renew begins to track processes born since that have at least so many bytes of
// their own, and forgets those that ended.
func (s *Session) renew(ctx context.Context, least uint64) error {
	processes, err := s.list()
	if err != nil {
		return err
	}
	var errs []error
	s.members = slices.DeleteFunc(s.members, func(m *member) bool {
		if !m.gone && slices.Contains(processes, m.Process) {
			return false
		}
		// Its tracker still tells the shared memory's watch that it has ended.
		s.ended = append(s.ended, m.tracker)
		errs = append(errs, s.store.Forget(m.NsPid))
		return true
	})
	if err := errors.Join(errs...); err != nil {
		return err
	}
	s.all = processes
	s.stats.Untracked, s.stats.Continuous = 0, 0
	for _, p := range processes {
		i := slices.IndexFunc(s.members, func(m *member) bool { return m.Process == p })
		if i >= 0 {
			if s.members[i].continuous {
				s.stats.Continuous++
			}
			continue
		}
		if s.refused[p.Pid] != nil || private(p.Pid) < least {
			s.stats.Untracked++
			continue
		}
		t, err := attach(ctx, p.Pid)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if !errors.Is(err, track.ErrGone) {
				s.refused[p.Pid] = err
				s.stats.Untracked++
				s.stats.Why = err.Error()
			}
			continue
		}
		s.members = append(s.members, &member{Process: p, tracker: t, store: s.store.Process(p.NsPid)})
	}
	return nil
}

// private is how many resident bytes a process shares with no file; 0 if it has ended.
func private(pid int) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	var size, resident, shared uint64
	if _, err := fmt.Sscan(string(b), &size, &resident, &shared); err != nil || shared > resident {
		return 0
	}
	return (resident - shared) * pageSize
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
	var deadline time.Time
	before := ^uint64(0)
	for {
		n, err := s.round(ctx, s.eachLow)
		if err != nil {
			return err
		}
		if deadline.IsZero() {
			// The first round takes what it takes: other containers may have theirs now. Those
			// that follow do not give way: the longer they take, the more they leave to the barrier.
			deadline = time.Now().Add(s.opts.Time)
			ctx = pace.With(ctx, nil)
		}
		left, err := s.written()
		if err != nil {
			return err
		}
		switch {
		case left <= s.opts.Enough:
			s.stats.End = EndEnough
		case left > n/4 && left+left/4 < s.roomInMemory():
			// It would take many rounds, if the disk is as fast as that: see CatchUp.
			s.stats.End = EndBehind
		case s.stats.Rounds >= s.opts.Rounds:
			s.stats.End = EndRounds
		case time.Now().After(deadline):
			s.stats.End = EndTime
		case s.stats.Rounds > 1 && n >= before-before/8:
			s.stats.End = EndShrinking
		default:
			if left > n/2 {
				s.store.SetPace(pages.Brisk)
			}
			before = n
			continue
		}
		return nil
	}
}

// roomInMemory is how much can be copied into memory, in bytes.
func (s *Session) roomInMemory() uint64 {
	if s.opts.spare != nil {
		return s.opts.spare()
	}
	return pages.Spare()
}

// round copies once what was written since the last one, going through the
// processes with each.
func (s *Session) round(ctx context.Context, each func(func(*member) error) error) (uint64, error) {
	if err := s.renew(ctx, newborn); err != nil {
		return 0, err
	}
	var mu sync.Mutex
	var copied uint64
	err := each(func(m *member) error {
		n, err := m.copy(ctx)
		mu.Lock()
		copied += n
		mu.Unlock()
		return err
	})
	if err == nil && (!s.holding || time.Since(s.looked) > sharedPause) {
		var n uint64
		// Its first copy was paced; this is what was written since.
		n, err = s.shared.Round(pace.With(ctx, nil))
		copied += n
		s.looked = time.Now()
	}
	s.stats.Rounds++
	s.stats.CopiedBytes += copied
	return copied, err
}

// copy takes the written pages of one process, unless its memory has ended.
func (m *member) copy(ctx context.Context) (uint64, error) {
	if _, err := m.tracker.Refresh(ctx); err != nil {
		return 0, m.ended(err)
	}
	return m.take(ctx)
}

// take is copy for the mappings that are tracked already.
func (m *member) take(ctx context.Context) (uint64, error) {
	// What the tracker has handed over counts as clean from then on, so all of it
	// must be stored, also when the context ends in between: CopyFrom sees to that.
	c, err := m.store.CopyFrom(ctx, m.Pid, func(accept func(pages.Range) error) error {
		return m.tracker.Take(ctx, func(r track.Range) error { return accept(pages.Range(r)) })
	})
	return c.Pages * pageSize, m.ended(err)
}

// ended notes that the process has ended or begun another program, which the next
// round tracks anew; other errors pass.
func (m *member) ended(err error) error {
	if errors.Is(err, track.ErrGone) || errors.Is(err, track.ErrExec) || errors.Is(err, pages.ErrExited) {
		m.gone = true
		return nil
	} else if err != nil {
		return fmt.Errorf("copy the memory of process %d: %w", m.Pid, err)
	}
	return nil
}

// written is how many bytes another round would copy.
func (s *Session) written() (n uint64, err error) {
	for _, m := range s.members {
		p, err := m.tracker.Written()
		if err := m.ended(err); err != nil {
			return 0, err
		}
		n += p * pageSize
	}
	return n, nil
}
