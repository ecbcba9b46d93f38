// SPDX-License-Identifier: Apache-2.0

// Package shim is containerd-shim-cohort-v2.
//
// It is containerd's own runc shim with three additions, each in its file:
//
//   - task.go wraps the stock Task service: a container whose image holds a
//     checkpoint is restored instead of started, and calls that would disturb a
//     frozen container wait until it runs again;
//   - restore.go makes the bundle of such a container restorable by runc, and
//     hold.go keeps it at CRIU's "post-restore" until its whole group is there;
//   - member.go serves the Member service, by which a coordinator takes the
//     container through the barrier (see runtime/group).
//
// The shim does nothing for a container that is neither restored nor being
// checkpointed beyond writing one small record (see runtime/journal).
package shim
