// SPDX-License-Identifier: Apache-2.0

// Package schedule takes checkpoints of groups by itself, each group at its own
// interval, for as long as its schedule is set.
//
// A [Keeper] holds the schedules of one cohortd. Each is a file in its directory,
// which a keeper that starts later takes up again. What a pass does is behind
// [Runner]; this package knows of times and failures only, so that it can be
// simulated.
//
// It promises:
//
//   - A group has one schedule, and never two passes at once.
//   - Passes begin at multiples of the interval. One that takes longer than the
//     interval leaves out those it overran. A time that passed while no keeper ran
//     is made up for once, not once for each pass that was missed.
//   - A pass that fails is tried again at the next multiple, then after twice as long,
//     and so on up to [MaxPause]; the first success ends that. Nothing but
//     [Keeper.Remove] ends a schedule: a group that is not there may come back.
//   - A schedule that is removed leaves nothing in the members: the tracking of their
//     writes, which each pass keeps for the next, is ended.
//   - When the context of [Keeper.Run] ends, passes are cancelled, and the next keeper
//     takes them up first.
//   - A keeper that was killed in a pass is seen by the next one, which counts the pass
//     as failed and waits until leases of the dead have run out.
package schedule
