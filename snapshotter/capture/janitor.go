// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"context"
	"time"

	"github.com/containerd/log"
)

// labelStop is the shim's label that says whether the member was to end with its
// capture.
const labelStop = "stop"

// The janitor's times. The first is docs/barrier.md's, "What stays in the store".
const (
	abandonedAfter = 24 * time.Hour
	janitorPeriod  = time.Hour
)

// Janitor discards what nobody will export any more, until ctx ends.
func (s *Store) Janitor(ctx context.Context) {
	t := time.NewTicker(janitorPeriod)
	defer t.Stop()
	for {
		s.DiscardAbandoned(ctx, time.Now())
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// DiscardAbandoned discards the sealed captures that were opened more than a day
// before now and whose members were to run on: whoever sealed them died before it
// exported them. An export discards, or adopts whole, all that it has used, so no
// image refers to what is left. Captures of members that were to end stay, for they
// may be all that is left of a group; so do those that do not say.
func (s *Store) DiscardAbandoned(ctx context.Context, now time.Time) {
	for _, i := range s.List() {
		if i.State != Sealed || i.Labels[labelStop] != "false" {
			continue
		}
		c, err := s.lock(i.ID)
		if err != nil {
			continue // gone meanwhile
		}
		if now.Sub(c.rec.Created) > abandonedAfter {
			logger := log.G(ctx).WithField("capture", i.ID).WithField("labels", i.Labels)
			logger.Info("discarding a capture that was never exported")
			if err := s.discard(c); err != nil {
				logger.WithError(err).Error("discarding a capture")
			}
		}
		c.mu.Unlock()
	}
}
