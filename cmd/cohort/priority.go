// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// yieldNice is what the export runs with: hashing and compressing gives way to
// what the members do meanwhile.
const yieldNice = 10

// yield lowers the priority of the whole process, for the rest of its life: of
// each thread there is, from which later ones have theirs
// (setpriority(2): on Linux the nice value is a thread's). It is a courtesy, so errors are passed
// over.
func yield() {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, tid, yieldNice)
		}
	}
}
