// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"time"

	"github.com/containerd/log"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/runtime/memory/precopy"
)

// trackingLimit ends a tracking that no later epoch has asked for: it costs the
// container a page fault for each page that it writes to.
const trackingLimit = time.Hour

// kept is the tracking that goes on between two epochs.
type kept struct {
	epoch    string // since whose cut
	tracking *precopy.Tracking
	limit    *time.Timer
}

// keep holds the tracking until the next epoch, or until it is given up.
func (c *container) keep(epoch string, t *precopy.Tracking) {
	if t == nil {
		return
	}
	k := &kept{epoch: epoch, tracking: t}
	c.keptMu.Lock()
	old := c.kept
	c.kept = k
	k.limit = time.AfterFunc(trackingLimit, func() { c.dropKept(epoch) })
	c.keptMu.Unlock()
	old.close(c.id)
}

// takeKept hands over the tracking since the parent's cut. Any other one is of no
// use any more, and ended.
func (c *container) takeKept(parent *parentEpoch) *precopy.Tracking {
	c.keptMu.Lock()
	k := c.kept
	c.kept = nil
	c.keptMu.Unlock()
	if k == nil {
		return nil
	}
	if parent == nil || parent.epoch != k.epoch {
		k.close(c.id)
		return nil
	}
	k.limit.Stop()
	return k.tracking
}

// dropKept ends the tracking since the cut of an epoch; of any for "".
func (c *container) dropKept(epoch string) {
	c.keptMu.Lock()
	k := c.kept
	if k != nil && epoch != "" && k.epoch != epoch {
		k = nil
	}
	if k != nil {
		c.kept = nil
	}
	c.keptMu.Unlock()
	k.close(c.id)
}

// EndTracking implements the Member service.
func (s memberService) EndTracking(_ context.Context, r *memberAPI.EndTrackingRequest) (*memberAPI.EndTrackingResponse, error) {
	c, err := s.get(r.Id)
	if err != nil {
		return nil, err
	}
	c.dropKept("")
	return &memberAPI.EndTrackingResponse{}, nil
}

// trackedEpoch is the epoch since whose cut writes are known, or empty.
func (c *container) trackedEpoch() string {
	c.keptMu.Lock()
	defer c.keptMu.Unlock()
	if c.kept == nil {
		return ""
	}
	return c.kept.epoch
}

func (k *kept) close(id string) {
	if k == nil {
		return
	}
	k.limit.Stop()
	if err := k.tracking.Close(); err != nil {
		log.L.WithError(err).WithField("id", id).Warn("end the tracking between two epochs")
	}
}
