// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// settle is how long what a checkpoint used may take to go away by itself after
// the command has returned: longer than any lease of an aborted epoch.
const settle = 15 * time.Second

// CheckClean fails the test for everything that cohort left behind: a frozen
// container, a communication rule, a CRIU, the record of an open epoch, an
// unsealed capture. Containers may be running. What is on its way out is given
// some seconds.
func (in *Instance) CheckClean(t testing.TB) {
	t.Helper()
	if err := eventually(settle, in.Leaks); err != nil {
		t.Errorf("left behind: %v", err)
	}
}

// Leaks is CheckClean as an error, at this instant.
func (in *Instance) Leaks() error {
	frozen, err1 := in.frozen()
	tables, err2 := in.tables()
	epochs, err3 := filepath.Glob(filepath.Join(in.State, "epochs", "*", "*.json"))
	captures, err4 := in.unsealed()
	var found []error
	for what, list := range map[string][]string{
		"frozen cgroup": frozen, "nftables table": tables, "CRIU process": in.criu(),
		"record of an open epoch": epochs, "unsealed capture": captures,
	} {
		for _, x := range list {
			found = append(found, fmt.Errorf("%s %s", what, x))
		}
	}
	return errors.Join(append(found, err1, err2, err3, err4)...)
}

// mine tells whether a name is one that Name gave.
func (in *Instance) mine(name string) bool { return strings.Contains(name, "-"+in.tag) }

// frozen finds frozen cgroups of the instance's containers, in the v1 freezer
// hierarchy and in the v2 one, wherever they are mounted.
func (in *Instance) frozen() ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range mounts {
		file, bad := "cgroup.freeze", "1"
		if m.FSType == "cgroup" {
			if !slices.Contains(strings.Split(m.VFSOptions, ","), "freezer") {
				continue
			}
			file, bad = "freezer.state", "FRO" // FROZEN; FREEZING is on the way
		}
		err := filepath.WalkDir(m.Mountpoint, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() || !in.mine(path) {
				return ignoreGone(err)
			}
			state, err := os.ReadFile(filepath.Join(path, file))
			if s := string(bytes.TrimSpace(state)); strings.HasPrefix(s, bad) || s == "FREEZING" {
				out = append(out, path)
			}
			return ignoreGone(err)
		})
		if err != nil {
			return out, err
		}
	}
	return out, nil
}

// ignoreGone: cgroups and processes come and go while they are looked at.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// tables finds cohort's nftables tables that carry a container's name of this
// instance, in every network namespace that has a process or a name.
func (in *Instance) tables() ([]string, error) {
	paths, _ := filepath.Glob("/run/netns/*")
	for _, pid := range processes() {
		paths = append(paths, fmt.Sprintf("/proc/%d/ns/net", pid))
	}
	seen := map[uint64]bool{}
	var out []string
	for _, path := range paths {
		names, err := tablesIn(path, seen)
		if err != nil {
			return out, fmt.Errorf("nftables tables of %s: %w", path, err)
		}
		for _, name := range names {
			if strings.HasPrefix(name, "cohort-") && in.mine(name) {
				out = append(out, name+" in "+path)
			}
		}
	}
	return out, nil
}

// tablesIn lists the tables of one network namespace, unless it was seen.
func tablesIn(path string, seen map[uint64]bool) ([]string, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return nil, nil // a process with more rights than root has here: no container's
	}
	if err != nil {
		return nil, ignoreGone(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || seen[st.Ino] {
		return nil, err
	}
	var sfs unix.Statfs_t
	// A name that was left without its mount is an empty file.
	if err := unix.Fstatfs(int(f.Fd()), &sfs); err != nil || sfs.Type != unix.NSFS_MAGIC {
		return nil, err
	}
	seen[st.Ino] = true
	conn, err := nftables.New(nftables.WithNetNSFd(int(f.Fd())))
	if err != nil {
		return nil, err
	}
	tables, err := conn.ListTables()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, t := range tables {
		names = append(names, t.Name)
	}
	return names, nil
}

// criu finds CRIU processes that the instance's shims started.
func (in *Instance) criu() []string {
	state := []byte("COHORT_STATE=" + in.State + "\x00")
	var out []string
	for _, pid := range processes() {
		args := cmdline(pid)
		// The set-up runs it through its own loader: the program is some argument.
		if !slices.ContainsFunc(args, func(a string) bool { return filepath.Base(a) == "criu" }) {
			continue
		}
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err == nil && bytes.Contains(append(env, 0), state) {
			out = append(out, fmt.Sprintf("%d (%s)", pid, strings.Join(args, " ")))
		}
	}
	return out
}

// unsealed finds captures that nobody will go on with.
func (in *Instance) unsealed() ([]string, error) {
	dirs, err := filepath.Glob(filepath.Join(in.Root, "captures", "*"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, dir := range dirs {
		var record struct {
			State string `json:"state"`
		}
		b, err := os.ReadFile(filepath.Join(dir, "capture.json"))
		if err == nil {
			err = json.Unmarshal(b, &record)
		}
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return out, err
		case record.State != "sealed":
			out = append(out, fmt.Sprintf("%s (%s)", dir, record.State))
		}
	}
	return out, nil
}

func processes() []int {
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// cmdline is nil for a process that has gone.
func cmdline(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}
