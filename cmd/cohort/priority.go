// SPDX-License-Identifier: Apache-2.0

package main

import (
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/urgent"
)

// yieldNice is what the export runs with: hashing and compressing gives way to
// what the members do meanwhile.
const yieldNice = 10

// yield lowers the priority of the whole process, for the rest of its life: of
// each thread there is, from which later ones have theirs
// (setpriority(2): on Linux the nice value is a thread's). It is a courtesy, so errors are passed
// over.
func yield() {
	urgent.EachThread(func(tid int) { _ = unix.Setpriority(unix.PRIO_PROCESS, tid, yieldNice) })
}
