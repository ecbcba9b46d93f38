// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"fmt"
	"os"
	"path/filepath"
)

// Warm looks at the directories in /proc in which CRIU will look things up for each of the
// processes. The kernel makes the entries at the first look (fs/proc/base.c, proc_fill_cache), some ten
// microseconds each and several hundred for each process, and keeps them as long as the process lives. A process
// that has ended is passed over.
func Warm(pids []int) {
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d", pid)
		for _, sub := range []string{"", "map_files", "fd", "fdinfo", "ns"} {
			_ = list(filepath.Join(dir, sub))
		}
		for _, tid := range list(filepath.Join(dir, "task")) {
			_ = list(filepath.Join(dir, "task", tid))
		}
	}
}

func list(dir string) []string {
	d, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	return names
}
