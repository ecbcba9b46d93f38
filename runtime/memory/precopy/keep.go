// SPDX-License-Identifier: Apache-2.0

package precopy

import (
	"context"
	"errors"
	"sync"

	"github.com/cohort-project/cohort/runtime/memory/track"
)

// Tracking is what goes on being tracked when a session has ended: the writes of
// a container's processes since the cut of one epoch. It stops no one: a process
// that was forked or began another program since is simply not in it.
type Tracking struct {
	mu      sync.Mutex
	members []*member
}

// Rearm begins to note the writes anew, for an epoch whose cut is now: the
// container is frozen and CRIU has taken what it takes. Call Keep when the epoch is
// sealed.
func (s *Session) Rearm(ctx context.Context) error {
	return s.each(func(m *member) error {
		if m.gone || m.again {
			return nil
		}
		// What CRIU wrote meanwhile it has put back.
		err := m.tracker.Take(ctx, func(track.Range) error { return nil })
		m.armed = err == nil
		return m.ended(err)
	})
}

// Keep takes the armed trackers out of the session, so that Untrack and Close
// leave them.
func (s *Session) Keep() *Tracking {
	t := &Tracking{}
	for _, m := range s.members {
		if m.armed && !m.gone {
			m.tracker.SetFrozen(false)
			t.members = append(t.members, &member{Process: m.Process, tracker: m.tracker})
			m.kept = true
		}
	}
	return t
}

// Close ends the tracking. It may be called again, and of nil.
func (t *Tracking) Close() error {
	var errs []error
	for _, m := range t.take() {
		errs = append(errs, m.tracker.Close())
	}
	return errors.Join(errs...)
}

// take hands the trackers over to the caller.
func (t *Tracking) take() []*member {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.members
	t.members = nil
	return m
}
