// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// An injector that was killed between the making of a userfaultfd and its closing
// leaves it open in the process. It does no harm there, but CRIU cannot dump one.
// The next injection closes it.
//
// It is told from one of the process's own by never having been initialized, which
// a program does at once. Being still without it after this long is the proof.
const (
	leftoverAge = 100 * time.Millisecond
	leftoverMax = 16 // per injection, each is two stops more
)

// findLeftover lists descriptors to close; nearly always none, at the price of
// reading one folder.
func findLeftover(ctx context.Context, pid int) []int {
	first := uninitialized(pid)
	if len(first) == 0 {
		return nil
	}
	timer := time.NewTimer(leftoverAge)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil
	}
	second := uninitialized(pid)
	still := slices.DeleteFunc(first, func(fd int) bool { return !slices.Contains(second, fd) })
	return still[:min(len(still), leftoverMax)]
}

func uninitialized(pid int) []int {
	dir, err := memoryDir(pid)
	if err != nil {
		return nil
	}
	entries, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return nil
	}
	var fds []int
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if target, err := os.Readlink(dir + "/fd/" + e.Name()); err != nil || target != userfaultfdName {
			continue
		}
		if neverInitialized(dir + "/fdinfo/" + e.Name()) {
			fds = append(fds, fd)
		}
	}
	return fds
}

const userfaultfdName = "anon_inode:[userfaultfd]"

// neverInitialized reads the features of "API:\taa:features:all", fs/userfaultfd.c,
// userfaultfd_show_fdinfo. UFFDIO_API sets at least one, an internal one.
func neverInitialized(fdinfo string) bool {
	data, err := os.ReadFile(fdinfo)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "API:"); ok {
			parts := strings.Split(strings.TrimSpace(value), ":")
			return len(parts) == 3 && parts[1] == "0"
		}
	}
	return false
}

// closeLeftover has the stopped thread close them. It looks at each once more:
// the number may mean something else by now.
func (t *tracee) closeLeftover(pidfd int, fds []int) error {
	for _, fd := range fds {
		ours, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			continue
		}
		leftover := isUserfaultfd(ours) && neverInitialized(fmt.Sprintf("/proc/self/fdinfo/%d", ours))
		unix.Close(ours)
		if !leftover {
			continue
		}
		if _, err := t.syscall(unix.SYS_CLOSE, uint64(fd)); err != nil {
			return fmt.Errorf("closing what a killed injector left in process %d: %w", t.pid, err)
		}
	}
	return nil
}
