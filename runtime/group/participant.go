// SPDX-License-Identifier: Apache-2.0

package group

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Host is what a [Participant] needs of the place it runs in.
type Host struct {
	// Save replaces the record on disk by rename, so that a successor process
	// finds the whole of it. It is called before each act and after it, while
	// members are frozen, and must be quick: it need not be synced, for a host
	// that goes down takes with it all that a record could undo. A record of an
	// earlier boot must not be given to a Participant.
	Save func(record []byte) error
	// Undo carries out one step for the epoch. It must be idempotent, and must
	// end soon after its context. It is repeated until it succeeds.
	Undo func(ctx context.Context, e Epoch, s Step) error
	// UndoLimit bounds one attempt at one step; 5 s if zero.
	UndoLimit time.Duration
}

// The pause between attempts at an undo that fails doubles between these.
const (
	undoPauseMin = 50 * time.Millisecond
	undoPauseMax = time.Second
)

// An Act does to a container what a call asks for. What it answers is kept for
// repeats of the call. When its context ends (the call's, or because the epoch
// was aborted or its lease ended) it must return soon, with nothing of it still
// going on. It must be able to run again after it has failed.
type Act func(ctx context.Context) (reply []byte, err error)

// Participant takes one container through epochs, on the member's side. It runs
// one act at a time, recorded before and after; it answers repeats; it watches
// the lease; and it undoes what is owed when the epoch ends early, again and
// again until that has succeeded. It is safe for concurrent use.
type Participant struct {
	host Host

	// acting is held by the one act or undo that is going on. It is a channel
	// and no mutex so that a waiting call can be cancelled.
	acting chan struct{}

	mu     sync.Mutex // guards what follows; held while saving, never while acting
	ledger Ledger
	// ending counts aborts and lapses that wait for the act to let go; while
	// there is one no act begins and no lease is renewed.
	ending  int
	cancel  context.CancelFunc // of the act going on
	expires time.Time
	lease   *time.Timer
	retry   *time.Timer
	pause   time.Duration
	closed  bool
}

// NewParticipant takes the record last saved, empty if there is none. If an
// epoch is open in it, the process that watched its lease is gone: call Lapse.
// An unreadable record gives a usable Participant beside the error, see
// [ParseLedger].
func NewParticipant(host Host, record []byte) (*Participant, error) {
	if host.UndoLimit <= 0 {
		host.UndoLimit = 5 * time.Second
	}
	l, err := ParseLedger(record)
	return &Participant{host: host, ledger: l, acting: make(chan struct{}, 1), pause: undoPauseMin}, err
}

// Open is the call Prepare: it opens the epoch and its lease.
func (p *Participant) Open(ctx context.Context, e Epoch, act Act) ([]byte, error) {
	return p.do(ctx, e.ID, Prepared, act, func(l *Ledger) (bool, error) { return l.Open(e) })
}

// Do carries out one act of the open epoch, unless it was carried out before,
// and answers what the act answered. Errors wrap [ErrRefused] where the ledger
// does not allow the act; otherwise they are the act's own or Save's.
func (p *Participant) Do(ctx context.Context, epoch string, next State, act Act) ([]byte, error) {
	return p.do(ctx, epoch, next, act, func(l *Ledger) (bool, error) { return l.Begin(epoch, next) })
}

func (p *Participant) do(ctx context.Context, epoch string, next State, act Act, begin func(*Ledger) (bool, error)) ([]byte, error) {
	if err := p.enter(ctx); err != nil {
		return nil, err
	}
	defer p.leave()

	p.mu.Lock()
	if p.ending > 0 {
		p.mu.Unlock()
		return nil, refuse("epoch %s is ending here", epoch)
	}
	opened := p.ledger.clone()
	todo, err := begin(&opened)
	if todo { // a repeat changes nothing, and costs no write
		if err = p.save(opened); err == nil {
			p.ledger = opened
		}
	}
	if err != nil || !todo {
		reply := p.ledger.Replies[next]
		if err == nil {
			p.touch()
		}
		p.mu.Unlock()
		return reply, err
	}
	p.touch()
	ctx, cancel := context.WithCancel(ctx)
	p.cancel = cancel
	p.mu.Unlock()

	reply, err := act(ctx)
	cancel()

	p.mu.Lock()
	defer p.mu.Unlock()
	p.cancel = nil
	if err != nil {
		if p.ending > 0 {
			return nil, refuse("epoch %s is ending here, which interrupted the act: %v", epoch, err)
		}
		return nil, err
	}
	// Completed is completed, even where the epoch began to end meanwhile: what
	// is owed is computed from the truth.
	if err := p.change(func(l *Ledger) error { return l.Done(next, reply) }); err != nil {
		return nil, err
	}
	p.touch()
	return reply, nil
}

// Renew extends the lease. It does not wait for the act going on.
func (p *Participant) Renew(epoch string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ledger.Check(epoch); err != nil {
		return err
	}
	if p.ending > 0 {
		return refuse("epoch %s is ending here", epoch)
	}
	p.touch()
	return nil
}

// Finish ends a complete epoch; its capture stays.
func (p *Participant) Finish(ctx context.Context, epoch string) error {
	if err := p.enter(ctx); err != nil {
		return err
	}
	defer p.leave()
	p.mu.Lock()
	err := p.change(func(l *Ledger) error { return l.Finish(epoch) })
	p.mu.Unlock()
	if err != nil {
		return err
	}
	return p.undo()
}

// Abort ends the epoch and undoes it. It interrupts the act going on, and
// returns when all is undone or some step has failed; failed steps are tried
// again in the background. Once begun it goes on when its context has ended.
func (p *Participant) Abort(ctx context.Context, epoch string) error {
	p.mu.Lock()
	next := p.ledger.clone()
	refusal := next.Abort(epoch)
	if p.ledger.Epoch.ID != epoch {
		// Nothing of this epoch is here, but its id must be remembered as ended:
		// its Prepare may still be on its way. Another epoch goes on undisturbed.
		defer p.mu.Unlock()
		if err := p.save(next); err != nil {
			return errors.Join(refusal, err)
		}
		p.ledger = next
		return refusal
	}
	if refusal != nil {
		p.mu.Unlock()
		return refusal
	}
	p.interrupt()
	p.mu.Unlock()
	return p.wait(ctx, func() error {
		return p.end(func(l *Ledger) error { return l.Abort(epoch) })
	})
}

// Lapse ends the open epoch, if there is one, as the end of its lease does. A
// shim calls it when it finds a record of a dead predecessor, and when its
// container is deleted.
func (p *Participant) Lapse(ctx context.Context) error {
	p.mu.Lock()
	if !p.ledger.open() {
		p.mu.Unlock()
		return nil
	}
	p.interrupt()
	p.mu.Unlock()
	return p.wait(ctx, p.lapse)
}

func (p *Participant) lapse() error {
	return p.end(func(l *Ledger) error { l.Lapse(); return nil })
}

// end waits for the act that was interrupted and undoes the epoch. The caller
// has called interrupt.
func (p *Participant) end(ending func(*Ledger) error) error {
	_ = p.enter(context.Background())
	defer p.leave()
	p.mu.Lock()
	p.ending--
	next := p.ledger.clone()
	if err := ending(&next); err != nil {
		p.mu.Unlock()
		return err
	}
	// If the record cannot be written, undo all the same: a thawed container is
	// worth more than a record, and the one on disk owes the same steps.
	err := p.save(next)
	p.ledger = next
	p.mu.Unlock()
	return errors.Join(p.undo(), err)
}

// wait runs f to its end, and waits for it as long as the context lasts.
func (p *Participant) wait(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("undo goes on in the background: %w", context.Cause(ctx))
	}
}

// Ledger is a copy of the record, for showing.
func (p *Participant) Ledger() Ledger {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ledger.clone()
}

// Close stops the timers. It undoes nothing: the record remains for a successor.
func (p *Participant) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, t := range []*time.Timer{p.lease, p.retry} {
		if t != nil {
			t.Stop()
		}
	}
}

// undo carries out what is owed. The caller holds acting.
func (p *Participant) undo() error {
	p.mu.Lock()
	epoch, steps := p.ledger.Epoch, p.ledger.Owed()
	p.mu.Unlock()
	var errs []error
	for _, s := range steps {
		// A failed step does not keep the others from being done: a container
		// must not stay frozen because a rule cannot be removed.
		ctx, cancel := context.WithTimeout(context.Background(), p.host.UndoLimit)
		err := p.host.Undo(ctx, epoch, s)
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("undo epoch %s: %s: %w", epoch.ID, s, err))
			continue
		}
		p.mu.Lock()
		next := p.ledger.clone()
		next.Undone(s)
		if err := p.save(next); err != nil {
			errs = append(errs, err)
		} else {
			p.ledger = next
		}
		p.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ledger.Undo) == 0 {
		p.pause = undoPauseMin
		return nil
	}
	if p.retry != nil {
		p.retry.Stop()
	}
	if !p.closed {
		p.retry = time.AfterFunc(p.pause, p.undoAgain)
		p.pause = min(2*p.pause, undoPauseMax)
	}
	return errors.Join(errs...)
}

func (p *Participant) undoAgain() {
	if p.enter(context.Background()) != nil {
		return
	}
	defer p.leave()
	p.mu.Lock()
	idle := p.closed || len(p.ledger.Undo) == 0
	p.mu.Unlock()
	if !idle {
		_ = p.undo() // it has arranged for the next attempt itself
	}
}

// change applies f to the ledger and saves the result, or leaves both alone.
func (p *Participant) change(f func(*Ledger) error) error {
	next := p.ledger.clone()
	if err := f(&next); err != nil {
		return err
	}
	if err := p.save(next); err != nil {
		return err
	}
	p.ledger = next
	return nil
}

func (p *Participant) save(l Ledger) error {
	record, err := json.Marshal(l)
	if err == nil {
		err = p.host.Save(record)
	}
	if err != nil {
		return fmt.Errorf("write epoch record: %w", err)
	}
	return nil
}

// interrupt announces an ending and makes the act going on return.
func (p *Participant) interrupt() {
	p.ending++
	if p.cancel != nil {
		p.cancel()
	}
}

// touch restarts the lease.
func (p *Participant) touch() {
	d := p.ledger.Epoch.Lease
	if d <= 0 || p.closed {
		return
	}
	p.expires = time.Now().Add(d)
	if p.lease == nil {
		p.lease = time.AfterFunc(d, p.leaseEnded)
	} else {
		p.lease.Reset(d)
	}
}

func (p *Participant) leaseEnded() {
	p.mu.Lock()
	// A timer that was reset may still fire for its old time.
	if p.closed || !p.ledger.open() || len(p.ledger.Undo) > 0 || time.Now().Before(p.expires) {
		p.mu.Unlock()
		return
	}
	p.interrupt()
	p.mu.Unlock()
	_ = p.lapse() // arranges for its own repeats
}

func (p *Participant) enter(ctx context.Context) error {
	select {
	case p.acting <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the act going on: %w", context.Cause(ctx))
	}
}

func (p *Participant) leave() { <-p.acting }
