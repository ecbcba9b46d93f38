// SPDX-License-Identifier: Apache-2.0

// Package engine decides how the memory of containers is taken on this host.
//
// There are three ways, best first:
//
//   - [WPAsync]: cohort tracks writes by userfaultfd write protection and copies memory
//     while the container runs (packages track and precopy). Linux 6.7, x86-64 and
//     arm64.
//   - [SoftDirty]: CRIU copies memory while the container runs, by the soft-dirty bits of
//     the page tables ("pre-dump", "--track-mem"; runtime/criu). Linux 3.11 with
//     CONFIG_MEM_SOFT_DIRTY, which many distributions leave out; on arm64 there is none.
//   - [Full]: CRIU dumps everything while the container is frozen. Always there.
//
// [Probe] finds out what the kernel can do by trying it on this process and on a child of
// it; [Choose] is a function of what was found, and can be told by hand what to take
// (COHORT_MEMORY of the shim, cohort checkpoint --memory). What a host cannot do is
// refused then, not replaced.
package engine
