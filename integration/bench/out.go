// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/harness"
)

// row is one line of the results. What was not measured is null.
type row struct {
	Case       string   `json:"case"`
	System     string   `json:"system"`
	StopP50    *float64 `json:"stop_ms_p50"`
	StopMax    *float64 `json:"stop_ms_max"`
	Total      *float64 `json:"total_ms"`
	Restore    *float64 `json:"restore_ms"`
	ImageBytes *int64   `json:"image_bytes"`

	RunP50 *float64 `json:"run_ms_p50,omitempty"`

	Members   int `json:"members,omitempty"`
	MemoryMiB int `json:"memory_mib,omitempty"`
	Repeats   int `json:"repeats"`
	Failures  int `json:"failures"`
	// StopReportedP50 is the stop that the system itself reports.
	StopReportedP50 *float64 `json:"stop_reported_ms_p50,omitempty"`
	// IdleGapMax is the longest gap while nothing was being checkpointed: below
	// this, a stop cannot be told from the machine's own noise.
	IdleGapMax *float64 `json:"idle_gap_ms_max,omitempty"`
	Error      string   `json:"error,omitempty"`
}

// header is the first line of the results.
type header struct {
	Time     time.Time         `json:"time"`
	Kernel   string            `json:"kernel"`
	Arch     string            `json:"arch"`
	CPU      string            `json:"cpu"`
	Cores    int               `json:"cores"`
	Memory   uint64            `json:"memory_bytes"`
	Load     string            `json:"load"`
	Disk     string            `json:"disk"`
	Cgroups  string            `json:"cgroups"`
	Versions map[string]string `json:"versions"`
}

func (h header) String() string {
	return fmt.Sprintf("Linux %s, %s, %d cores, load %s", h.Kernel, h.CPU, h.Cores, h.Load)
}

// facts describes the machine; what cannot be found out is left empty.
func facts(ctx context.Context, in *harness.Instance) header {
	h := header{Time: time.Now().UTC(), Arch: runtime.GOARCH, Cores: runtime.NumCPU(), CPU: runtime.GOARCH, Versions: map[string]string{}}
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

// write writes the results in one piece.
func write(path string, h header, rows []row) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	if err := e.Encode(map[string]any{"header": h}); err != nil {
		return err
	}
	for _, r := range rows {
		if err := e.Encode(r); err != nil {
			return err
		}
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// printTable prints the rows with the ratio of containerd's value to cohort's: how
// many times as much containerd needs.
func printTable(w io.Writer, rows []row) {
	buffered := bufio.NewWriter(w)
	defer buffered.Flush()
	t := tabwriter.NewWriter(buffered, 0, 0, 2, ' ', tabwriter.AlignRight)
	defer t.Flush()
	fmt.Fprintln(t, "case\tsystem\tstop p50\tstop max\ttotal\trestore\timage\trun\t")
	for i, r := range rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", r.Case, r.System, ms(r.StopP50), ms(r.StopMax), ms(r.Total), ms(r.Restore), mib(r.ImageBytes), ms(r.RunP50))
		if i+1 < len(rows) && rows[i+1].Case == r.Case {
			continue
		}
		for _, other := range rows {
			if other.Case != r.Case || other.System == systems[0].name {
				continue
			}
			stock := rows[slices.IndexFunc(rows, func(x row) bool { return x.Case == r.Case && x.System == systems[0].name })]
			fmt.Fprintf(t, "\t%s : %s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", systems[0].name, other.System,
				ratio(stock.StopP50, other.StopP50), ratio(stock.StopMax, other.StopMax), ratio(stock.Total, other.Total),
				ratio(stock.Restore, other.Restore), ratio(stock.ImageBytes, other.ImageBytes), ratio(stock.RunP50, other.RunP50))
		}
		for _, other := range rows {
			if other.Case == r.Case && other.Error != "" {
				first, _, _ := strings.Cut(other.Error, "\n")
				fmt.Fprintf(t, "%s failed %d of %d times: %s\n", other.System, other.Failures, other.Repeats, first)
			}
		}
	}
}

func ms(v *float64) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f ms", *v)
}

func mib(v *int64) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f MiB", float64(*v)/(1<<20))
}

func ratio[N int64 | float64](stock, other *N) string {
	if stock == nil || other == nil || *other == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", float64(*stock)/float64(*other))
}
