// SPDX-License-Identifier: Apache-2.0

package schedule

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

const (
	// startDelay is what passes that are due wait when a keeper starts. It is longer
	// than the lease of a member (runtime/group, Epoch.Lease), which a pass of a keeper
	// that was killed may have left behind, and gives containerd time to start.
	startDelay = 5 * time.Second
	// passTimeout bounds one pass; what it waits for has bounds of its own, except
	// the writing of large images.
	passTimeout = 30 * time.Minute
	// endTimeout bounds the calls that end a removed schedule's tracking.
	endTimeout = 10 * time.Second
	// maxError bounds what is kept of an error, in bytes.
	maxError = 4096
)

var errCut = errors.New("the daemon ended in the middle of the pass; the members have undone it")

// Keeper holds schedules and runs their passes. Its methods may be called
// concurrently.
type Keeper struct {
	dir     string
	runner  Runner
	mu      sync.Mutex // of all below, and of the files
	entries map[Key]*entry
	// ctx is Run's; nil before. Ended, it stays.
	ctx     context.Context
	workers sync.WaitGroup
}

// entry is one schedule. Its worker is the only one who runs passes.
type entry struct {
	rec record
	// set counts the calls of Set, so that a pass does not report to its successor.
	set     int
	running bool
	// notBefore holds the first pass back.
	notBefore time.Time
	changed   chan struct{} // has room for one
	removed   bool
	stop      context.CancelFunc // nil until there is a worker
	done      chan struct{}
	tracking  error // why it may go on though the entry was removed; set before done
}

// New takes up the schedules in dir, which is made if need be. bad tells of files
// there that are none; they are left alone, and it is no reason not to go on.
func New(dir string, runner Runner) (k *Keeper, bad, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("make the directory of the schedules: %w", err)
	}
	all, bad := load(dir)
	k = &Keeper{dir: dir, runner: runner, entries: map[Key]*entry{}}
	for _, r := range all {
		if r.Begun.After(r.Ended) {
			r.fail(errCut, r.Begun)
		}
		e := newEntry(*r)
		e.notBefore = time.Now().Add(startDelay)
		k.entries[r.Key()] = e
	}
	return k, bad, nil
}

func newEntry(r record) *entry {
	return &entry{rec: r, changed: make(chan struct{}, 1), done: make(chan struct{})}
}

// Run runs passes until ctx ends and those under way have been undone. It is
// called once.
func (k *Keeper) Run(ctx context.Context) {
	k.mu.Lock()
	k.ctx = ctx
	for _, e := range k.entries {
		k.start(e)
	}
	k.mu.Unlock()
	<-ctx.Done()
	// Whoever holds the lock and saw ctx alive has started its worker by then.
	k.mu.Lock()
	k.mu.Unlock() //nolint:staticcheck // SA2001: waiting for it is the point
	k.workers.Wait()
}

// start starts an entry's worker, once Run is there. The lock is held.
func (k *Keeper) start(e *entry) {
	if k.ctx == nil {
		return
	}
	ctx, stop := context.WithCancel(k.ctx)
	e.stop = stop
	k.workers.Go(func() {
		defer close(e.done)
		defer stop()
		k.work(ctx, e)
		k.mu.Lock()
		removed := e.removed
		k.mu.Unlock()
		if removed {
			e.tracking = k.endTracking(ctx, e)
		}
	})
}

// endTracking has the members of a removed schedule stop what they do for its next
// pass. They would by themselves, but only after a time in which no pass comes.
func (k *Keeper) endTracking(ctx context.Context, e *entry) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	err := k.runner.EndTracking(ctx, e.rec.Spec)
	if err != nil {
		return fmt.Errorf("the schedule of group %s is removed, but the writes of its members may still be tracked, for an hour at the most: %w", e.rec.Key(), err)
	}
	return nil
}

// Set makes or replaces a schedule; it is on disk then, and its first pass begins.
// What is wrong with s is an InvalidArgument.
func (k *Keeper) Set(ctx context.Context, s Spec) (Status, error) {
	if err := s.check(); err != nil {
		return Status{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		e := k.entries[s.Key()]
		if e == nil || !e.removed {
			break
		}
		// Its pass is being undone; the new one must not begin before.
		k.mu.Unlock()
		select {
		case <-e.done:
		case <-ctx.Done():
		}
		k.mu.Lock()
		if ctx.Err() != nil {
			return Status{}, fmt.Errorf("the schedule of group %s is still being removed: %w", s.Key(), ctx.Err())
		}
		k.forget(e)
	}
	if k.ctx != nil && k.ctx.Err() != nil {
		return Status{}, fmt.Errorf("the daemon is about to end: %w", errdefs.ErrUnavailable)
	}
	r := record{Spec: s, Progress: Progress{Created: time.Now().Round(0)}}
	if err := r.write(k.dir); err != nil {
		return Status{}, err
	}
	e := k.entries[s.Key()]
	if e == nil {
		e = newEntry(r)
		k.entries[s.Key()] = e
		k.start(e)
	} else {
		e.rec = r
		e.set++
		select {
		case e.changed <- struct{}{}:
		default:
		}
	}
	return e.status(), nil
}

// Remove ends a schedule, and returns when its pass has been undone, if one was
// under way, and its members are not tracked any more. It does not come back, also
// where ctx ends first, or members cannot be reached. NotFound if there is none.
func (k *Keeper) Remove(ctx context.Context, key Key) error {
	k.mu.Lock()
	e := k.entries[key]
	if e == nil {
		k.mu.Unlock()
		return fmt.Errorf("no schedule for group %q in namespace %q: %w", key.Group, key.Namespace, errdefs.ErrNotFound)
	}
	if err := e.rec.remove(k.dir); err != nil {
		k.mu.Unlock()
		return err
	}
	e.removed = true
	if e.stop == nil {
		k.forget(e)
		k.mu.Unlock()
		return k.endTracking(ctx, e)
	}
	e.stop()
	k.mu.Unlock()
	select {
	case <-e.done:
	case <-ctx.Done():
		return fmt.Errorf("the schedule of group %s is removed, and its last pass is still being undone: %w", key, ctx.Err())
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.forget(e)
	return e.tracking
}

// forget takes a removed entry off the list. The lock is held.
func (k *Keeper) forget(e *entry) {
	if key := e.rec.Key(); k.entries[key] == e {
		delete(k.entries, key)
	}
}

// List tells of the schedules of a namespace, all if it is empty, by name.
func (k *Keeper) List(namespace string) []Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []Status
	for key, e := range k.entries {
		if !e.removed && (namespace == "" || key.Namespace == namespace) {
			out = append(out, e.status())
		}
	}
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.Key().String(), b.Key().String()) })
	return out
}

// status copies; the lock is held.
func (e *entry) status() Status {
	s := Status{Spec: e.rec.Spec, Progress: e.rec.Progress, Running: e.running, Next: e.due(time.Now())}
	if s.Last != nil {
		last := *s.Last
		s.Last = &last
	}
	return s
}

func (e *entry) due(now time.Time) time.Time {
	at := e.rec.due(e.rec.Progress, now)
	if at.Before(e.notBefore) {
		return e.notBefore
	}
	return at
}

// work is an entry's worker.
func (k *Keeper) work(ctx context.Context, e *entry) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		k.mu.Lock()
		now := time.Now()
		timer.Reset(e.due(now).Sub(now))
		k.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-e.changed:
			continue
		case <-timer.C:
		}
		if ctx.Err() != nil {
			return
		}
		k.pass(ctx, e)
	}
}

// pass runs one pass and writes down what became of it.
func (k *Keeper) pass(ctx context.Context, e *entry) {
	k.mu.Lock()
	if e.removed {
		k.mu.Unlock()
		return
	}
	before, set, spec := e.rec.Progress, e.set, e.rec.Spec
	e.running = true
	e.rec.Begun = time.Now().Round(0)
	err := e.rec.write(k.dir)
	k.mu.Unlock()

	var made *Epoch
	if err == nil {
		made, err = k.run(ctx, spec)
	}

	k.mu.Lock()
	defer k.mu.Unlock()
	e.running = false
	logger := log.G(ctx).WithField("namespace", spec.Namespace).WithField("group", spec.Group)
	switch {
	case err != nil && made == nil && ctx.Err() != nil:
		logger.WithError(err).Info("a pass of the schedule was cancelled")
	case err != nil && err.Error() == before.Error:
		// A group that is gone need not fill the log.
	case err != nil:
		logger.WithError(err).Warn("a pass of the schedule failed")
	default:
		logger.WithField("epoch", made.Number).WithField("stop_ms", made.StopMS).Debug("a pass of the schedule is done")
	}
	if e.removed || e.set != set {
		return
	}
	p := &e.rec.Progress
	now := time.Now().Round(0)
	if made != nil {
		p.Last = made
	}
	switch {
	case err == nil:
		p.Ended, p.Failures, p.Error, p.ErrorAt = now, 0, "", time.Time{}
		p.Passes++
	case made == nil && ctx.Err() != nil:
		// Nobody's fault: it is due when the next keeper comes.
		*p = before
	default:
		p.fail(err, now)
	}
	if err := e.rec.write(k.dir); err != nil {
		logger.WithError(err).Warn("what became of a pass is lost if the daemon ends")
	}
}

// run is one pass. The epoch is not nil if there is one, also where err tells that
// pruning failed.
func (k *Keeper) run(ctx context.Context, s Spec) (*Epoch, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, passTimeout, fmt.Errorf("the pass took longer than %s", passTimeout))
	defer cancel()
	made, err := k.runner.Checkpoint(ctx, s)
	if err != nil {
		return nil, err
	}
	made.At = time.Now().Round(0)
	if err := k.runner.Prune(ctx, s); err != nil {
		return &made, fmt.Errorf("epoch %d is there as %s, but older ones could not be removed: %w", made.Number, made.Ref, err)
	}
	return &made, nil
}

// fail notes a failure.
func (p *Progress) fail(err error, at time.Time) {
	p.Ended, p.ErrorAt = at, at
	p.Failed++
	p.Failures++
	p.Error = err.Error()
	if len(p.Error) > maxError {
		p.Error = strings.ToValidUTF8(p.Error[:maxError], "") + " ..."
	}
}
