// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"math"
	"os"
	"path"
	"strconv"
	"strings"
)

// Spare is how much memory, in bytes, this process may take for copies without hurting
// anybody: what is available beyond a quarter of the host's memory, or less where a
// cgroup that this process is in is nearer to its limit: a quarter of that stays as well. 0
// where nothing can be found out.
func Spare() uint64 { return spareIn("/") }

// spareIn is Spare of the /proc and /sys below root.
func spareIn(root string) uint64 {
	total, available := hostMemory(path.Join(root, "proc/meminfo"))
	spare := beyondQuarter(available, total)
	cgroups, err := os.ReadFile(path.Join(root, "proc/self/cgroup"))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(cgroups)) {
		// hierarchy:controllers:path, see cgroups(7).
		part := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(part) != 3 {
			continue
		}
		switch {
		case part[1] == "":
			for _, mount := range []string{"sys/fs/cgroup", "sys/fs/cgroup/unified"} {
				for dir := part[2]; dir != "/" && dir != "."; dir = path.Dir(dir) {
					at := path.Join(root, mount, dir)
					spare = min(spare, room(at+"/memory.max", at+"/memory.current"))
				}
			}
		case part[1] == "memory":
			for dir := part[2]; dir != "/" && dir != "."; dir = path.Dir(dir) {
				at := path.Join(root, "sys/fs/cgroup/memory", dir)
				spare = min(spare, room(at+"/memory.limit_in_bytes", at+"/memory.usage_in_bytes"))
			}
		}
	}
	return spare
}

func beyondQuarter(left, all uint64) uint64 {
	if left <= all/4 {
		return 0
	}
	return left - all/4
}

// room is what a cgroup has left; no limit where it has no such file.
func room(limitFile, usedFile string) uint64 {
	limit, ok := readNumber(limitFile)
	if !ok {
		return math.MaxUint64
	}
	used, ok := readNumber(usedFile)
	if !ok || used >= limit {
		return 0
	}
	return beyondQuarter(limit-used, limit)
}

// readNumber takes "max" for no number.
func readNumber(file string) (uint64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 64)
	return n, err == nil
}

// hostMemory reads MemTotal and MemAvailable, in bytes.
func hostMemory(file string) (total, available uint64) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseUint(f[1], 10, 64)
		switch f[0] {
		case "MemTotal:":
			total = n << 10
		case "MemAvailable:":
			available = n << 10
		}
	}
	return total, available
}
