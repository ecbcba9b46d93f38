// SPDX-License-Identifier: Apache-2.0

// Package undo takes back an epoch whose shim is gone, from the record that the
// shim left on disk before it acted (see runtime/journal). The shim's delete
// action calls it for one container; cohortd's janitor for all.
//
// Every step may be repeated and none needs the earlier ones to have succeeded.
package undo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	storageAPI "github.com/cohort-project/cohort/api/storage/v1"
	"github.com/cohort-project/cohort/runtime/freezer"
	"github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/journal"
	"github.com/cohort-project/cohort/runtime/netlock"
)

// period is how often the janitor looks for records of dead shims. A dead
// shim's containers are also undone by containerd's delete action, at once.
const period = 2 * time.Second

// Epoch undoes what the ledger in the record says is owed, as the member itself
// would at the end of its lease. The record stays if a step failed, so that it is
// tried again.
func Epoch(ctx context.Context, dir string, e *journal.Epoch) error {
	// A ledger that cannot be read still owes all that may be undone blindly.
	ledger, err := group.ParseLedger(e.State)
	errs := []error{err}
	ledger.Lapse()
	owed := ledger.Owed()
	for _, step := range owed {
		if err := carryOut(ctx, e, step); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", step, err))
			if step == group.EndDump {
				break // while CRIU lives, nothing else holds
			}
			continue
		}
		ledger.Undone(step)
	}
	if len(owed) > 0 && len(ledger.Owed()) > 0 {
		return fmt.Errorf("undo epoch %s of container %s: %w", e.Epoch, e.ID, errors.Join(errs...))
	}
	return journal.RemoveEpoch(dir, e.Namespace, e.ID)
}

// carryOut undoes one step. A cgroup or namespace that is gone is no error to those
// that are asked: it took with it what is owed.
func carryOut(ctx context.Context, e *journal.Epoch, step group.Step) error {
	switch step {
	case group.EndDump:
		if e.Criu.Pid > 0 && e.Criu.Alive() {
			if err := unix.Kill(-e.Criu.Pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("end CRIU (pid %d): %w", e.Criu.Pid, err)
			}
			// A thaw that came first would be taken back by it.
			for e.Criu.Alive() {
				select {
				case <-ctx.Done():
					return fmt.Errorf("wait for the end of CRIU (pid %d): %w", e.Criu.Pid, ctx.Err())
				case <-time.After(time.Millisecond):
				}
			}
		}
	case group.Kill:
		// After a reboot the path may be another container's.
		if e.Freezer != "" && e.Init.Alive() {
			return freezer.KillPath(ctx, e.Freezer)
		}
	case group.Thaw:
		if e.Freezer != "" {
			return freezer.ThawPath(ctx, e.Freezer)
		}
	case group.RemoveRules, group.StopTracking:
		// The (empty) table is made before the rules are needed.
		if e.Netns != "" {
			return netlock.RemoveStale(e.Netns, e.Table)
		}
	case group.Discard:
		if e.Capture != "" {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			if err := Discard(ctx, e.Storage, e.Capture, time.Second); err != nil {
				// cohortd discards it at the end of its lease or at its next start.
				log.G(ctx).WithError(err).WithField("id", e.ID).Warn("discard the capture of an undone epoch")
			}
		}
	}
	return nil
}

// Discard has cohortd, at its Storage socket, discard a capture; dial bounds the
// connection to it.
func Discard(ctx context.Context, socket, capture string, dial time.Duration) error {
	conn, err := shim.AnonDialer("unix://"+socket, dial)
	if err != nil {
		return fmt.Errorf("connect to cohortd: %w", err)
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	_, err = storageAPI.NewStorageClient(c).Discard(ctx, &storageAPI.CaptureRequest{Id: capture})
	return err
}

// Janitor undoes the epochs of dead shims until ctx ends, and what is left of restores
// whose command has died, and removes records of containers whose shim is gone and
// whose bundle is too.
func Janitor(ctx context.Context, dir string) {
	t := time.NewTicker(period)
	defer t.Stop()
	for {
		Sweep(ctx, dir)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// Sweep is one pass of the janitor.
func Sweep(ctx context.Context, dir string) {
	epochs, _ := journal.Epochs(dir)
	for _, e := range epochs {
		if e.Shim.Alive() {
			continue
		}
		if err := Epoch(ctx, dir, e); err != nil {
			log.G(ctx).WithError(err).Error("janitor")
		}
	}
	members, _ := journal.Members(dir)
	for _, m := range members {
		if m.Shim.Alive() {
			continue
		}
		if _, err := os.Stat(filepath.Join(m.Bundle, "config.json")); err == nil {
			continue // containerd's delete action has still to come
		}
		_ = journal.RemoveMember(dir, m.Namespace, m.ID)
	}
	restores, _ := journal.Restores(dir)
	for _, r := range restores {
		if r.Command.Alive() {
			continue
		}
		if err := restore(dir, r, members); err != nil {
			log.G(ctx).WithError(err).Error("janitor")
		}
	}
}

// restore removes what the command of a restore made and nobody took over: a network
// namespace that a container has goes with the container.
func restore(dir string, r *journal.Restore, members []*journal.Member) error {
	for _, path := range r.Netns {
		if err := netlock.RemoveStale(path, r.Table); err != nil {
			return fmt.Errorf("undo a restore whose command has gone: %w", err)
		}
		taken := func(m *journal.Member) bool { return m.Netns == path && m.Shim.Alive() }
		if slices.ContainsFunc(members, taken) {
			continue
		}
		if err := netlock.Remove(path); err != nil {
			return fmt.Errorf("undo a restore whose command has gone: %w", err)
		}
	}
	return journal.RemoveRestore(dir, r.Namespace, r.ID)
}
