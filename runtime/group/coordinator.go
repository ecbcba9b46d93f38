// SPDX-License-Identifier: Apache-2.0

package group

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Run takes the members through one epoch and then calls export, in which the
// caller makes images of the sealed captures.
//
// Cancelling ctx aborts the epoch up to the commit point (see the package
// comment); between there and export it is not heeded. Run returns no error only
// if every member was captured at one cut, sealed and exported, and does what
// Epoch.Stop says. Otherwise:
//
//   - Failed before the commit point: every member runs on as before, nothing of
//     the epoch is left, except at the members that Result.Untold names.
//   - Failed behind it, members running on: the same, and they have seen a stop.
//   - Failed behind it, members stopped: Result.Sealed is set; the captures are
//     kept by their stores until they are exported or discarded by hand. The
//     error says which member was not stopped, or why nothing was exported.
//
// The error is a [PhaseError] except where the configuration is wrong. If export
// has side effects beyond the captures, it must undo them when it fails.
func Run(ctx context.Context, cfg Config, members []Member, export func(context.Context) error) (Result, error) {
	if err := cfg.check(members); err != nil {
		return Result{}, err
	}
	r := newRun(cfg.withDefaults(), members)
	guarded := r.holdLeases(ctx)
	defer r.dropLeases()
	defer func() { r.calm() }()

	var err error
	switch {
	case r.cfg.Epoch.Stop:
		err = r.stopping(ctx, guarded, export)
	case r.cfg.NoBarrier:
		err = r.oneByOne(ctx, guarded, export)
	default:
		err = r.live(ctx, guarded, export)
	}
	return r.measured(), err
}

// live is the epoch of a group that runs on. guarded ends also when a member
// has given the epoch up on its own.
func (r *run) live(ctx, guarded context.Context, export func(context.Context) error) error {
	if err := r.toCapture(guarded); err != nil {
		return r.abort(ctx, err)
	}
	resume := func(ctx context.Context) error {
		// Nobody runs before the last rule is down: what the first one sent into
		// a rule would come a retransmission time-out late.
		if err := r.each(ctx, PhaseRelease, r.cfg.Limits.Release, r.unlock); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return r.insist(ctx, PhaseRelease, r.cfg.Limits.Release, r.resume)
	}
	err := r.phase(guarded, PhaseRelease, resume)
	r.calm()
	if err != nil {
		return r.abort(ctx, err)
	}
	return r.sealAndExport(ctx, guarded, export)
}

// sealAndExport ends an epoch of members that run on.
func (r *run) sealAndExport(ctx, guarded context.Context, export func(context.Context) error) error {
	if err := r.phase(guarded, PhaseSeal, r.seal); err != nil {
		return r.abort(ctx, err)
	}
	r.result.Sealed = true
	if err := r.phase(ctx, PhaseExport, r.export(export)); err != nil {
		r.result.Sealed = false
		return r.abort(ctx, err)
	}
	return nil
}

// stopping is the epoch of a group that ends in the barrier.
func (r *run) stopping(ctx, guarded context.Context, export func(context.Context) error) error {
	err := r.toCapture(guarded)
	r.calm()
	if err != nil {
		return r.abort(ctx, err)
	}
	// A member could have given up since its lease was last renewed; it would
	// run on while the others are killed. So they are asked once more.
	sealAndAsk := func(ctx context.Context) error {
		if err := r.seal(ctx); err != nil {
			return err
		}
		return r.each(ctx, PhaseSeal, r.cfg.Limits.Close, r.renew)
	}
	if err := r.phase(guarded, PhaseSeal, sealAndAsk); err != nil {
		return r.abort(ctx, err)
	}

	// The commit point. From here on no capture may be discarded, so there is no
	// Abort: a member that cannot be told to die thaws when its lease ends.
	r.result.Sealed = true
	kill := func(ctx context.Context) error {
		err := r.insist(ctx, PhaseRelease, r.cfg.Limits.Release, r.resume)
		r.dropLeases() // a member that was not reached must thaw
		// Rules last: nobody outside shall hear the members die. A shim may be
		// gone with its container; its deletion removes the rules then.
		r.tell(ctx, "Unlock", r.cfg.Limits.Release, r.unlock)
		return err
	}
	notKilled := r.phase(context.WithoutCancel(ctx), PhaseRelease, kill)
	if notKilled != nil {
		notKilled = fmt.Errorf("%w; that member was not seen to stop: end it by hand before it is restored elsewhere", notKilled)
	}
	if err := r.phase(ctx, PhaseExport, r.export(export)); err != nil {
		return errors.Join(notKilled, fmt.Errorf("%w; the members are stopped and their sealed captures of epoch %s are kept", err, r.cfg.Epoch.ID))
	}
	return notKilled
}

// oneByOne is the negative control: every member is captured correctly for
// itself, and the group is not.
func (r *run) oneByOne(ctx, guarded context.Context, export func(context.Context) error) error {
	if err := r.phase(guarded, PhasePrepare, r.prepareAll); err != nil {
		return r.abort(ctx, err)
	}
	limits := r.cfg.Limits
	for m := range r.members {
		for _, step := range []struct {
			phase string
			limit time.Duration
			call  call
		}{
			{PhaseFreeze, limits.Freeze, r.freeze},
			{PhaseClose, limits.Close, r.lock},
			{PhaseCapture, limits.Capture, r.capture},
			{PhaseRelease, limits.Release, r.unlock},
			{PhaseRelease, limits.Release, r.resume},
		} {
			alone := func(ctx context.Context) error {
				return r.some(ctx, []int{m}, step.phase, step.limit, step.call)
			}
			if err := r.phase(guarded, step.phase, alone); err != nil {
				return r.abort(ctx, err)
			}
		}
	}
	return r.sealAndExport(ctx, guarded, export)
}

// toCapture is what both kinds of epoch begin with. Each phase ends before the
// next begins, for all members: that is the barrier.
func (r *run) toCapture(ctx context.Context) error {
	if err := r.phase(ctx, PhasePrepare, r.prepareAll); err != nil {
		return err
	}
	r.calm = sync.OnceFunc(r.cfg.Hurry())
	if r.cfg.Lead > 0 {
		r.freezeAt = Monotonic() + int64(r.cfg.Lead)
	}
	if err := r.phase(ctx, PhaseFreeze, r.all(PhaseFreeze, r.cfg.Limits.Freeze, r.freeze)); err != nil {
		return err
	}
	if err := r.phase(ctx, PhaseClose, r.all(PhaseClose, r.cfg.Limits.Close, r.lock)); err != nil {
		return err
	}
	return r.phase(ctx, PhaseCapture, r.all(PhaseCapture, r.cfg.Limits.Capture, r.capture))
}

func (r *run) prepareAll(ctx context.Context) error {
	return r.each(ctx, PhasePrepare, r.cfg.Limits.Prepare, r.prepare)
}

func (r *run) seal(ctx context.Context) error {
	return r.each(ctx, PhaseSeal, r.cfg.Limits.Seal, r.sealOne)
}

// export calls the caller's function and lets the members go.
func (r *run) export(export func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if export != nil {
			if err := export(ctx); err != nil {
				return &PhaseError{Phase: PhaseExport, Err: err}
			}
		}
		r.result.Exported = true
		r.tell(context.WithoutCancel(ctx), "Finish", r.cfg.Limits.Finish, func(ctx context.Context, m int) error {
			return r.members[m].Finish(ctx, r.cfg.Epoch.ID)
		})
		return nil
	}
}

// abort tells every member to undo the epoch, and returns why. The leases go
// first: a member that can be renewed but not be told must not wait for longer.
func (r *run) abort(ctx context.Context, why error) error {
	r.dropLeases()
	r.tell(context.WithoutCancel(ctx), "Abort", r.cfg.Limits.Abort, func(ctx context.Context, m int) error {
		return r.members[m].Abort(ctx, r.cfg.Epoch.ID)
	})
	return why
}
