// SPDX-License-Identifier: Apache-2.0

package ops

import "runtime"

// What CRIU needs of a processor for a container, and for each further process in it, in
// tenths of a millisecond. Only the ratio matters. Measured with containers of one Go process and
// PostgreSQL's 14 (docs/stop.md).
const (
	dumpContainer = 120
	dumpProcess   = 40
)

// yields tells which members' CRIUs leave one processor to others. CRIU dumps one
// process after the other, and waits for code that it runs in each of them, at
// that process' own priority. Where one member has so many that the group
// waits for it in the end, the others' CRIUs together would keep that code from
// running as long as they last; confined to the other processors they are done before it
// all the same.
func yields(processes []int) []bool { return yieldsOn(processes, runtime.NumCPU()) }

func yieldsOn(processes []int, cpus int) []bool {
	out := make([]bool, len(processes))
	all, most, largest := 0, 0, 0
	for i, n := range processes {
		work := dumpContainer + max(0, n-1)*dumpProcess
		all += work
		if work > most {
			most, largest = work, i
		}
	}
	// More than its part of all processors, and the others fit into the rest.
	if cpus < 2 || most*cpus <= all {
		return out
	}
	for i := range out {
		out[i] = i != largest
	}
	return out
}
