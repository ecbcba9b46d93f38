// SPDX-License-Identifier: Apache-2.0

// Package lifecycle tests what becomes of checkpoints: restores by the stock client
// and by cohort, on the same containerd and on another, from a registry, after
// the originals are gone; what the command line says and how it fails; and what is
// left when somebody is killed at the worst moment.
//
// All of it is tests, see harness for the containerd they run against. Kill tests
// print a seed; -seed takes it again.
package lifecycle
