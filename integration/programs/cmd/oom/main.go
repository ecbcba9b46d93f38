// SPDX-License-Identifier: Apache-2.0

// Oom takes and touches memory until the kernel kills it. It asks for a
// memory limit of its container's, or stops at --most.
package main

import (
	"flag"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/programs/internal/report"
)

func main() {
	most := flag.Int("most", 4096, "give up at so many `MiB`, for want of a limit")
	pause := flag.Duration("pause", 5*time.Millisecond, "between two MiB")
	flag.Parse()
	for n := range *most {
		m, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			report.Exit(1, "after %d MiB: %v", n, err)
		}
		for i := 0; i < len(m); i += 4096 {
			m[i] = 1
		}
		time.Sleep(*pause)
	}
	report.Exit(1, "not killed after %d MiB: set a memory limit", *most)
}
