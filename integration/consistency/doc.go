// SPDX-License-Identifier: Apache-2.0

// Package consistency proves that a cut is consistent: that what is restored from
// the images of a checkpoint is one state that the group was in, with nothing
// between its members lost, doubled or out of order.
//
// Every test restores what it checkpointed and asks the members. They know the
// answer themselves: the shop's four invariants (package integration/shop), the
// byte patterns and counters of the test programs (package integration/programs).
// A group is checkpointed many times at moments that nobody chose, while it works
// as hard as it can; then it is destroyed, and each image is restored in turn under
// the old names and addresses.
//
// A test that cannot fail proves nothing, so the same checks are also held against
// a cohort command whose barrier is switched off (build tag nobarrier), and must
// find it out.
package consistency
