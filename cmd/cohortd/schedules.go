// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/log"

	"github.com/cohort-project/cohort/runtime/schedule"
	"github.com/cohort-project/cohort/runtime/schedule/service"
)

// openSchedules takes up the schedules of a root.
func openSchedules(ctx context.Context, root string) (*schedule.Keeper, error) {
	keeper, bad, err := schedule.New(filepath.Join(root, "schedules"), service.Passes{})
	if err != nil {
		return nil, fmt.Errorf("open the schedules: %w", err)
	}
	if bad != nil {
		log.G(ctx).WithError(bad).Error("set these schedules again")
	}
	return keeper, nil
}

// runSchedules runs passes until ctx ends. end returns when the members of those
// under way have been told to undo them, or at stopTimeout: they do so on their own
// when their leases end.
func runSchedules(ctx context.Context, keeper *schedule.Keeper) (end func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		keeper.Run(ctx)
	}()
	return func() {
		late := time.NewTimer(stopTimeout)
		defer late.Stop()
		select {
		case <-done:
		case <-late.C:
			log.L.Warn("passes of schedules are still being undone; the members go on by themselves")
		}
	}
}
