// SPDX-License-Identifier: Apache-2.0

// Package freezer stops and starts every task of one container at once, through
// the container's own cgroup.
//
// Two kernel interfaces do this and both are met on real hosts: the v1 freezer
// controller (freezer.state, kernel/cgroup/legacy_freezer.c) and the v2 core
// file cgroup.freeze (kernel/cgroup/freezer.c). Open finds which of them holds a
// process and opens every file that Freeze will need, so that nothing slow is
// left for the moment at which the container stops.
//
// What the package promises:
//
//   - Freeze returns when the kernel says that every task is frozen, with the
//     times at which it was asked for and at which it was complete. If it cannot
//     be completed it is taken back before Freeze returns.
//   - A container that somebody else froze or paused is not touched: Freeze
//     fails with errdefs.ErrFailedPrecondition, so that thawing later never
//     undoes another's pause.
//   - A cgroup that holds the calling process is refused by Open; nobody freezes
//     himself.
//
// What it never does: freeze a parent of the container's cgroup (CRIU, which
// reads and writes the freezer of the container, would hang on it), create or
// remove a cgroup, or move a task.
package freezer
