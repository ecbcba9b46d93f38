// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/bench/result"
	"github.com/cohort-project/cohort/integration/harness"
)

// facts describes the machine; what cannot be found out is left empty.
func facts(ctx context.Context, in *harness.Instance) result.Header {
	h := result.Header{Time: time.Now().UTC(), Arch: runtime.GOARCH, Cores: runtime.NumCPU(), CPU: runtime.GOARCH, Versions: map[string]string{}}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		h.Memory = s.Totalram * uint64(s.Unit)
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		h.Load = strings.Join(strings.Fields(string(b))[:3], " ")
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				h.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	h.Disk = fileSystem(in.Dir) + ", cohort on " + fileSystem(filepath.Join(in.Root, "snapshots"))
	h.Cgroups = "v1"
	if fileSystem("/sys/fs/cgroup") == "cgroup2" {
		h.Cgroups = "v2"
	}
	for program, flag := range map[string]string{
		"containerd": "--version", "runc": "--version", "criu": "--version", "cohort": "--version",
		"containerd-shim-cohort-v2": "--version", "cohortd": "--version",
	} {
		if out, err := in.Command(ctx, program, flag); err == nil {
			h.Versions[program], _, _ = strings.Cut(strings.TrimSpace(out), "\n")
		}
	}
	return h
}

// fileSystem is the type of the file system that holds path.
func fileSystem(path string) string {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return "?"
	}
	// linux/magic.h
	name := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
		unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.CGROUP2_SUPER_MAGIC: "cgroup2",
	}[s.Type]
	if name == "" {
		name = fmt.Sprintf("%#x", s.Type)
	}
	return name
}
