// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"time"

	"github.com/containerd/log"

	"github.com/cohort-project/cohort/runtime/ops"
	"github.com/cohort-project/cohort/runtime/schedule"
)

// captureTimeout is the longest that members may stand still for a pass; the
// default of "cohort checkpoint --timeout".
const captureTimeout = 60 * time.Second

// Passes does what a schedule asks for with the containerd that it names. It
// connects for each step, so that a containerd that was away, or was replaced, is no
// more than an error of one pass.
type Passes struct{}

var _ schedule.Runner = Passes{}

// Checkpoint implements schedule.Runner.
func (Passes) Checkpoint(ctx context.Context, s schedule.Spec) (schedule.Epoch, error) {
	h, err := ops.Open(s.Address, s.Namespace)
	if err != nil {
		return schedule.Epoch{}, err
	}
	defer h.Close()
	res, err := h.Checkpoint(h.Context(ctx), ops.CheckpointOptions{
		Group: s.Group, Ref: s.Ref, Numbered: true, KeepTracking: true, Timeout: captureTimeout,
	})
	if err != nil {
		return schedule.Epoch{}, err
	}
	if res.MergeError != "" {
		// The epoch is whole all the same, and the next one tries again.
		log.G(ctx).WithField("namespace", s.Namespace).WithField("group", s.Group).WithField("epoch", res.Number).Warnf("the chain of epochs was not merged: %s", res.MergeError)
	}
	return schedule.Epoch{ID: res.Epoch, Number: res.Number, Ref: res.Ref, StopMS: res.StopMS}, nil
}

// Prune implements schedule.Runner.
func (Passes) Prune(ctx context.Context, s schedule.Spec) error {
	h, err := ops.Open(s.Address, s.Namespace)
	if err != nil {
		return err
	}
	defer h.Close()
	_, err = h.PruneNumbered(h.Context(ctx), s.Group, s.Ref, s.Keep)
	return err
}

// EndTracking implements schedule.Runner.
func (Passes) EndTracking(ctx context.Context, s schedule.Spec) error {
	h, err := ops.Open(s.Address, s.Namespace)
	if err != nil {
		return err
	}
	defer h.Close()
	return h.EndTracking(h.Context(ctx), s.Group)
}
