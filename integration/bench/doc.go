// SPDX-License-Identifier: Apache-2.0

// Bench is `make bench`: it measures cohort beside stock containerd and plain
// CRIU, in the same run, with the same program, in turns.
//
//	containerd   the stock shim on overlayfs: ctr containers checkpoint --rw --task,
//	             then ctr containers restore --rw --live, for one member after the
//	             other, which is all that it can do with a group
//	criu         criu dump --leave-running of a container of the stock shim, by
//	             runc checkpoint --leave-running, then runc restore; into a folder,
//	             without an image
//	cohort       cohort's shim and snapshotter: cohort checkpoint, then cohort restore
//
// Cases (see cases.go for which, and how often):
//
//	process-SIZE-RATE   one process (the program memload, in a container) that holds
//	                    incompressible memory and dirties so much of it a second
//	group-NxSIZE        several of them, at 1 % a second
//	shop                integration/shop under load, and a member that only ticks
//	postgres            PostgreSQL with 128 MiB of shared buffers under pgbench
//	increment-WAY-N     the Nth checkpoint of a process, 1 % of which changed since
//	                    the one before
//	run_latency         ctr run --rm of /bin/true: what is never checkpointed pays
//
// A container is started, filled, checkpointed several times, its images dropped
// after each, and once restored; then it is the next system's turn. What is
// measured, result.Row describes; the stop is the longest time between two ticks
// of a member's own 1 ms ticker around the checkpoint, by CLOCK_MONOTONIC; of a
// group the longest of any member, which for systems that take one member after
// the other is kind: the group as a whole stands still for the sum. After each
// restore the members verify every byte.
//
// The environment: BENCH_OUT names the file for the results (package result).
// BENCH_CASES is a regular expression that chooses cases. BENCH_N is how often cohort is
// measured in the cases that targets are about, 20 if not given; all other
// numbers go with it. BENCH_MINUTES is how long the run may take, about, 25 if not
// given: each case has its share of it, and is measured less often where that does
// not suffice. BENCH_QUICK=1 leaves out what needs more than 1 GiB and measures twice.
//
// bench -draw FILE,... measures nothing: it draws the pictures, and writes the tables
// of the page -page, from files of results.
package main
