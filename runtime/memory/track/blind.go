// SPDX-License-Identifier: Apache-2.0

package track

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Blind lists what lets memory of a process change without its page tables saying
// so: a device or the kernel writes to pages it was given before a Take, and is
// done after it. The write was noted when it was begun; its data comes later. A
// page that such a transfer can reach must not be believed to be clean, so the
// memory of a process for which the list is not empty is best copied whole inside
// the barrier, when transfers have ended.
//
// Known are: a file open with O_DIRECT, an AIO context, an io_uring, RDMA and VFIO
// devices. The list is of now; none of these can be found out afterwards.
func Blind(pid int) ([]string, error) {
	dir, err := memoryDir(pid)
	var areas []area
	if err == nil {
		areas, err = readMaps(dir + "/maps")
	}
	return blind(pid, dir, areas, err)
}

// Blind is [Blind] of the process that is tracked.
func (t *Tracker) Blind() ([]string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	areas, err := t.maps()
	return blind(t.pid, t.dir, areas, err)
}

func blind(pid int, dir string, areas []area, err error) ([]string, error) {
	if err != nil {
		return nil, fmt.Errorf("looking for direct transfers of process %d: %w", pid, err)
	}
	var found []string
	for _, a := range areas {
		// fs/aio.c names the file behind a context's ring so.
		if strings.HasPrefix(a.path, "/[aio]") {
			found = append(found, "an asynchronous I/O context (io_setup)")
			break
		}
	}
	entries, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return nil, fmt.Errorf("looking for direct transfers of process %d: %w", pid, goneIfMissing(err))
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, "fd", e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		switch {
		case target == "anon_inode:[io_uring]":
			found = append(found, "an io_uring")
		case strings.HasPrefix(target, "/dev/infiniband/"), strings.HasPrefix(target, "/dev/vfio/"):
			found = append(found, target)
		case strings.HasPrefix(target, "/") && openFlags(filepath.Join(dir, "fdinfo", e.Name()))&unix.O_DIRECT != 0:
			found = append(found, target+" open with O_DIRECT")
		}
	}
	return found, nil
}

// openFlags reads the octal flags line of a fdinfo file; 0 if it is gone.
func openFlags(path string) int {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, _ := strconv.ParseInt(strings.TrimSpace(value), 8, 64)
			return int(flags)
		}
	}
	return 0
}
