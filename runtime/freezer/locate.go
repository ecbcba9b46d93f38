// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// location is where the freezer of a process is.
type location struct {
	dir string
	v2  bool
}

// membership is a process's place in the two hierarchies that can freeze it;
// empty where it has none.
type membership struct {
	v1, v2 string
}

// cgroupMount is one mounted cgroup hierarchy: where it is mounted and which
// directory of the hierarchy is its root (not "/" in a bind mount).
type cgroupMount struct {
	point, root string
}

// locate prefers the v1 freezer where the process has a cgroup of its own there:
// on hosts with both hierarchies runc uses the v1 one, and CRIU is told the same.
func locate(pid int) (location, error) {
	if pid <= 0 {
		return location{}, fmt.Errorf("finding the freezer of pid %d: no such process: %w", pid, errdefs.ErrInvalidArgument)
	}
	m, err := readMembership(pid)
	if err != nil {
		return location{}, err
	}
	v1, v2, err := freezerMounts()
	if err != nil {
		return location{}, err
	}
	var reasons []error
	for _, c := range []struct {
		path   string
		mounts []cgroupMount
		v2     bool
		file   string
	}{
		{m.v1, v1, false, "freezer.state"},
		{m.v2, v2, true, "cgroup.freeze"},
	} {
		if c.path == "" || len(c.mounts) == 0 {
			continue
		}
		if c.path == "/" {
			reasons = append(reasons, fmt.Errorf("it is in the root cgroup of %s", c.mounts[0].point))
			continue
		}
		dir, err := resolve(c.path, c.mounts)
		if err == nil {
			_, err = os.Stat(filepath.Join(dir, c.file))
		}
		if err != nil {
			reasons = append(reasons, err)
			continue
		}
		if err := refuseOwn(c.path, c.v2); err != nil {
			return location{}, fmt.Errorf("finding the freezer of process %d: %w", pid, err)
		}
		return location{dir: dir, v2: c.v2}, nil
	}
	if len(reasons) == 0 {
		reasons = append(reasons, errors.New("no cgroup file system with a freezer is mounted here"))
	}
	return location{}, fmt.Errorf("finding the freezer of process %d: %w (run the container in a cgroup of its own): %w",
		pid, errors.Join(reasons...), errdefs.ErrFailedPrecondition)
}

// readMembership parses /proc/PID/cgroup (cgroups(7)). A zombie is treated as
// gone: its cgroup may be removed at any time.
func readMembership(pid int) (membership, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return membership{}, fmt.Errorf("finding the freezer of process %d: the process is gone: %w", pid, errdefs.ErrNotFound)
		}
		return membership{}, fmt.Errorf("finding the freezer of process %d: %w", pid, err)
	}
	if _, state := stat(pid); state == 0 || state == 'Z' || state == 'X' {
		return membership{}, fmt.Errorf("finding the freezer of process %d: the process has ended: %w", pid, errdefs.ErrNotFound)
	}
	return parseMembership(string(data)), nil
}

func parseMembership(data string) membership {
	var m membership
	for line := range strings.Lines(data) {
		// hierarchy-ID:controller-list:path; the path may hold colons.
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		switch {
		case parts[0] == "0" && parts[1] == "":
			m.v2 = parts[2]
		case slices.Contains(strings.Split(parts[1], ","), "freezer"):
			m.v1 = parts[2]
		}
	}
	return m
}

// freezerMounts finds the mounted hierarchies in /proc/self/mountinfo
// (proc_pid_mountinfo(5)).
func freezerMounts() (v1, v2 []cgroupMount, err error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, nil, fmt.Errorf("finding the cgroup file systems: %w", err)
	}
	v1, v2 = parseMounts(data)
	return v1, v2, nil
}

func parseMounts(data []byte) (v1, v2 []cgroupMount) {
	sc := bufio.NewScanner(bytes.NewReader(data))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		if !ok {
			continue
		}
		pre, post := strings.Fields(before), strings.Fields(after)
		if len(pre) < 5 || len(post) < 3 {
			continue
		}
		m := cgroupMount{point: unescape(pre[4]), root: unescape(pre[3])}
		switch {
		case post[0] == "cgroup2":
			v2 = append(v2, m)
		case post[0] == "cgroup" && slices.Contains(strings.Split(post[2], ","), "freezer"):
			v1 = append(v1, m)
		}
	}
	// A later mount hides an earlier one on the same place.
	slices.Reverse(v1)
	slices.Reverse(v2)
	return v1, v2
}

// resolve turns a path of the hierarchy into a directory below one of its
// mounts.
func resolve(path string, mounts []cgroupMount) (string, error) {
	if strings.HasPrefix(path, "/..") {
		// The kernel shows it thus to a reader in another cgroup namespace.
		return "", fmt.Errorf("cgroup %s is outside the caller's cgroup namespace", path)
	}
	for _, m := range mounts {
		rel, ok := strings.CutPrefix(path, strings.TrimSuffix(m.root, "/"))
		if !ok || (rel != "" && rel[0] != '/') {
			continue
		}
		dir := filepath.Join(m.point, rel)
		if _, err := os.Stat(dir); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("cgroup %s is under no mounted hierarchy: %w", path, fs.ErrNotExist)
}

// refuseOwn keeps the caller from freezing itself.
func refuseOwn(path string, v2 bool) error {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return fmt.Errorf("reading the caller's cgroup: %w", err)
	}
	m := parseMembership(string(data))
	own := m.v1
	if v2 {
		own = m.v2
	}
	if own == path || strings.HasPrefix(own, path+"/") {
		return fmt.Errorf("cgroup %s holds the calling process too; run the container in a cgroup of its own: %w",
			path, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// unescape undoes the octal escapes of mountinfo (\040 and the like).
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
