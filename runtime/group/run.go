// SPDX-License-Identifier: Apache-2.0

package group

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// retryPause is the pause before the first repeat of a call; it doubles.
const retryPause = 20 * time.Millisecond

// run is one epoch being coordinated: the means by which coordinator.go tells
// its story.
type run struct {
	cfg     Config
	members []Member
	stamps  []stamps
	// prepared is set once a member's Prepare was answered: only then does a
	// refused renewal mean that the member has given up.
	prepared []atomic.Bool
	// dropLeases ends the renewals; it may be called again.
	dropLeases func()
	// freezeAt is when all members are to freeze; 0 where each does when it likes.
	freezeAt int64
	// calm ends what Config.Hurry began; it may be called again.
	calm   func()
	result Result
}

// stamps are one member's own times, CLOCK_MONOTONIC ns; zero if not known.
type stamps struct{ asked, frozen, resumed int64 }

// call is one call to the member with the given index.
type call func(ctx context.Context, m int) error

func newRun(cfg Config, members []Member) *run {
	return &run{
		cfg: cfg, members: members,
		stamps:   make([]stamps, len(members)),
		prepared: make([]atomic.Bool, len(members)),
		calm:     func() {},
		result:   Result{PhasesMS: map[string]float64{}},
	}
}

func (r *run) prepare(ctx context.Context, m int) error {
	err := r.members[m].Prepare(ctx, r.cfg.Epoch)
	r.prepared[m].Store(err == nil)
	return err
}

func (r *run) freeze(ctx context.Context, m int) error {
	asked, frozen, err := r.members[m].Freeze(ctx, r.cfg.Epoch.ID, r.freezeAt)
	r.stamps[m].asked, r.stamps[m].frozen = asked, frozen
	return err
}

func (r *run) resume(ctx context.Context, m int) error {
	at, err := r.members[m].Resume(ctx, r.cfg.Epoch.ID, r.cfg.Epoch.Stop)
	r.stamps[m].resumed = at
	return err
}

func (r *run) lock(ctx context.Context, m int) error {
	return r.members[m].Lock(ctx, r.cfg.Epoch.ID)
}

func (r *run) capture(ctx context.Context, m int) error {
	return r.members[m].Capture(ctx, r.cfg.Epoch.ID)
}

func (r *run) unlock(ctx context.Context, m int) error {
	return r.members[m].Unlock(ctx, r.cfg.Epoch.ID)
}

func (r *run) sealOne(ctx context.Context, m int) error {
	return r.members[m].Seal(ctx, r.cfg.Epoch.ID)
}

func (r *run) renew(ctx context.Context, m int) error {
	return r.members[m].Renew(ctx, r.cfg.Epoch.ID)
}

// phase runs one phase under the observer's eyes and adds up its time.
func (r *run) phase(ctx context.Context, name string, do func(context.Context) error) error {
	if ctx.Err() != nil {
		return r.blame(name, "", context.Cause(ctx))
	}
	if r.cfg.Observer != nil {
		r.cfg.Observer.PhaseStarted(name)
	}
	begun := time.Now()
	err := do(ctx)
	took := time.Since(begun)
	r.result.PhasesMS[name] += float64(took) / float64(time.Millisecond)
	if err != nil {
		err = r.blame(name, "", err)
	}
	if r.cfg.Observer != nil {
		r.cfg.Observer.PhaseEnded(name, took, err)
	}
	return err
}

// blame makes a PhaseError of a cause, unless it is one.
func (r *run) blame(phase, member string, err error) error {
	var known *PhaseError
	if errors.As(err, &known) {
		return err
	}
	return &PhaseError{Phase: phase, Member: member, Err: err}
}

// all is each as a phase's work.
func (r *run) all(phase string, limit time.Duration, c call) func(context.Context) error {
	return func(ctx context.Context) error { return r.each(ctx, phase, limit, c) }
}

// each makes one call to every member at once. It fails with the first failure,
// which ends the context of the others, and returns when all have returned.
func (r *run) each(ctx context.Context, phase string, limit time.Duration, c call) error {
	var everyone []int
	for m := range r.members {
		everyone = append(everyone, m)
	}
	return r.some(ctx, everyone, phase, limit, c)
}

func (r *run) some(ctx context.Context, members []int, phase string, limit time.Duration, c call) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %s", limit))
	defer cancel()
	calls, callCtx := errgroup.WithContext(ctx)
	for _, m := range members {
		calls.Go(func() error {
			err := c(callCtx, m)
			if err != nil && ctx.Err() != nil {
				err = fmt.Errorf("%w (%w)", context.Cause(ctx), err)
			}
			if err != nil {
				return r.blame(phase, r.members[m].ID(), err)
			}
			return nil
		})
	}
	return calls.Wait()
}

// insist makes one call to every member at once and repeats it where it fails,
// up to Config.Attempts, unless the member refuses. It does not heed the end of
// ctx: what is told by insistence must be told. It returns the first failure.
func (r *run) insist(ctx context.Context, phase string, limit time.Duration, c call) error {
	for m, err := range r.repeated(ctx, limit, c) {
		if err != nil {
			return r.blame(phase, r.members[m].ID(), err)
		}
	}
	return nil
}

// tell is insist for calls whose failure does not change the epoch's outcome: it
// is noted in the result.
func (r *run) tell(ctx context.Context, name string, limit time.Duration, c call) {
	for m, err := range r.repeated(ctx, limit, c) {
		if err != nil {
			r.result.Untold = append(r.result.Untold, Untold{Member: r.members[m].ID(), Call: name, Reason: err.Error()})
		}
	}
}

func (r *run) repeated(ctx context.Context, limit time.Duration, c call) []error {
	ctx = context.WithoutCancel(ctx)
	errs := make([]error, len(r.members))
	var calls sync.WaitGroup
	for m := range r.members {
		calls.Go(func() {
			pause := retryPause
			for range r.cfg.Attempts {
				attempt, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %s", limit))
				errs[m] = c(attempt, m)
				cancel()
				if errs[m] == nil || errors.Is(errs[m], ErrRefused) {
					return
				}
				time.Sleep(pause)
				pause *= 2
			}
		})
	}
	calls.Wait()
	return errs
}

// holdLeases renews every member's lease until dropLeases is called. The context
// that it returns ends when ctx does, and when a prepared member has given the
// epoch up.
func (r *run) holdLeases(ctx context.Context) context.Context {
	guarded, lost := context.WithCancelCause(ctx)
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var renewals sync.WaitGroup
	for m := range r.members {
		renewals.Go(func() {
			every := time.NewTicker(r.cfg.Epoch.Lease / 4)
			defer every.Stop()
			for {
				select {
				case <-background.Done():
					return
				case <-every.C:
				}
				// Asked before the call: the answer to a renewal that overtook
				// Prepare says nothing.
				prepared := r.prepared[m].Load()
				attempt, cancel := context.WithTimeout(background, r.cfg.Epoch.Lease/4)
				err := r.renew(attempt, m)
				cancel()
				if prepared && errors.Is(err, ErrRefused) {
					lost(&PhaseError{Phase: PhaseLease, Member: r.members[m].ID(), Err: err})
					return
				}
			}
		})
	}
	r.dropLeases = func() {
		stop()
		renewals.Wait()
		lost(nil)
	}
	return guarded
}

// measured completes the result with the members' stamps.
func (r *run) measured() Result {
	const ms = 1e6
	var asked, resumed, first, last int64
	for m, s := range r.stamps {
		result := MemberResult{ID: r.members[m].ID()}
		if s.asked != 0 && s.resumed != 0 {
			result.StopMS = float64(s.resumed-s.asked) / ms
		}
		r.result.Members = append(r.result.Members, result)
		if s.asked != 0 && (asked == 0 || s.asked < asked) {
			asked = s.asked
		}
		if s.frozen != 0 && (first == 0 || s.frozen < first) {
			first = s.frozen
		}
		resumed, last = max(resumed, s.resumed), max(last, s.frozen)
	}
	if asked != 0 && resumed != 0 {
		r.result.StopMS = float64(resumed-asked) / ms
	}
	if first != 0 {
		r.result.SkewMS = float64(last-first) / ms
	}
	return r.result
}

// Monotonic is the clock of all times that members are told and tell.
func Monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}
