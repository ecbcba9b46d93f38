// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Features of userfaultfd, as kernels of these releases answer UFFDIO_API
// (include/uapi/linux/userfaultfd.h, UFFD_API_FEATURES; what the configuration leaves
// out is masked in fs/userfaultfd.c, userfaultfd_api).
const (
	uffd510 = 1<<9 - 1                     // up to THREAD_ID
	uffd61  = 1<<13 - 1                    // MINOR_HUGETLBFS, MINOR_SHMEM, EXACT_ADDRESS, WP_HUGETLBFS_SHMEM
	uffd66  = 1<<15 - 1                    // WP_UNPOPULATED, POISON
	uffd67  = 1<<16 - 1                    // WP_ASYNC
	uffd68  = 1<<17 - 1                    // MOVE
	noWP    = 1<<0 | 1<<12 | 1<<13 | 1<<15 // absent without HAVE_ARCH_USERFAULTFD_WP, on arm64 before 6.10
)

func TestTheBestEngineThatAKernelHasIsChosen(t *testing.T) {
	for _, c := range []struct {
		name  string
		facts Facts
		want  Engine
		why   []string
	}{
		{"5.10 of a distribution with soft-dirty", Facts{Kernel: "5.10.0-28-amd64", Arch: "amd64", UffdFeatures: uffd510, SoftDirty: true}, SoftDirty, []string{"5.10.0-28-amd64", "WP_ASYNC", "pre-dump"}},
		{"6.1 with soft-dirty", Facts{Kernel: "6.1.0-18-amd64", Arch: "amd64", UffdFeatures: uffd61, SoftDirty: true}, SoftDirty, []string{"6.1.0", "WP_ASYNC"}},
		{"6.6 has WP_UNPOPULATED only", Facts{Kernel: "6.6.20", Arch: "amd64", UffdFeatures: uffd66, SoftDirty: true}, SoftDirty, []string{"6.6.20", "WP_ASYNC"}},
		{"6.6 without soft-dirty", Facts{Kernel: "6.6.20", Arch: "amd64", UffdFeatures: uffd66}, Full, []string{"WP_ASYNC", "CONFIG_MEM_SOFT_DIRTY"}},
		{"6.7", Facts{Kernel: "6.7.4", Arch: "amd64", UffdFeatures: uffd67, PagemapScan: true, SoftDirty: true}, WPAsync, []string{"PAGEMAP_SCAN"}},
		{"6.8 without soft-dirty", Facts{Kernel: "6.8.0-31-generic", Arch: "amd64", UffdFeatures: uffd68, PagemapScan: true}, WPAsync, nil},
		{"6.18, this project's machines", Facts{Kernel: "6.18.5", Arch: "amd64", UffdFeatures: uffd68, PagemapScan: true}, WPAsync, nil},
		{"6.8 that leaves moved memory unmarked", Facts{Kernel: "6.8.0", Arch: "amd64", UffdFeatures: uffd68, PagemapScan: true, SoftDirty: true, Trial: "mremap"}, SoftDirty, []string{"mremap"}},
		{"arm64 of 6.1: no soft-dirty there", Facts{Kernel: "6.1.0-18-arm64", Arch: "arm64", UffdFeatures: uffd61 &^ noWP}, Full, []string{"arm64", "CONFIG_MEM_SOFT_DIRTY"}},
		{"arm64 of 6.8: PAGEMAP_SCAN, and no write protection", Facts{Kernel: "6.8.0", Arch: "arm64", UffdFeatures: uffd68 &^ noWP, PagemapScan: true}, Full, []string{"WP_ASYNC"}},
		{"arm64 of 6.12", Facts{Kernel: "6.12.1", Arch: "arm64", UffdFeatures: uffd68, PagemapScan: true}, WPAsync, nil},
		{"PAGEMAP_SCAN alone is not enough", Facts{Kernel: "6.7.4", Arch: "amd64", UffdFeatures: uffd67 &^ (1 << 15), PagemapScan: true}, Full, []string{"WP_ASYNC"}},
		{"a backport without PAGEMAP_SCAN", Facts{Kernel: "5.14.0-el9", Arch: "amd64", UffdFeatures: uffd67, SoftDirty: true}, SoftDirty, []string{"PAGEMAP_SCAN"}},
		{"userfaultfd denied", Facts{Kernel: "6.8.0", Arch: "amd64", UffdError: "userfaultfd: operation not permitted", PagemapScan: true}, Full, []string{"not permitted"}},
		{"gVisor and its kind: nothing at all", Facts{Kernel: "4.4.0", Arch: "amd64", UffdError: "userfaultfd: function not implemented"}, Full, []string{"not implemented", "CONFIG_MEM_SOFT_DIRTY"}},
	} {
		got, err := Choose(c.facts, "")
		if err != nil || got.Engine != c.want {
			t.Errorf("%s: %v, %v; want %s", c.name, got, err, c.want)
		}
		for _, w := range c.why {
			if !strings.Contains(got.Why, w) {
				t.Errorf("%s: why does not tell of %q: %s", c.name, w, got.Why)
			}
		}
		if auto, err := Choose(c.facts, "auto"); err != nil || auto != got {
			t.Errorf("%s: auto gives %v, %v", c.name, auto, err)
		}
	}
}

func TestWhatIsForcedIsTakenOrRefusedAndNeverReplaced(t *testing.T) {
	old := Facts{Kernel: "6.1.0", Arch: "amd64", UffdFeatures: uffd61, SoftDirty: true}
	now := Facts{Kernel: "6.18.5", Arch: "amd64", UffdFeatures: uffd68, PagemapScan: true}
	for _, c := range []struct {
		facts  Facts
		forced string
		refuse string // "" where it is taken
	}{
		{old, "full", ""},
		{old, "soft-dirty", ""},
		{old, "wp-async", "WP_ASYNC"},
		{now, "full", ""},
		{now, "wp-async", ""},
		{now, "soft-dirty", "CONFIG_MEM_SOFT_DIRTY"},
	} {
		got, err := Choose(c.facts, c.forced)
		if c.refuse == "" {
			if err != nil || string(got.Engine) != c.forced || got.Why != "it was asked for" {
				t.Errorf("%s on %s: %v, %v", c.forced, c.facts.Kernel, got, err)
			}
			continue
		}
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), c.refuse) || !strings.Contains(err.Error(), c.forced) || got != (Choice{}) {
			t.Errorf("%s on %s: %v, %v; want a refusal that tells of %s", c.forced, c.facts.Kernel, got, err, c.refuse)
		}
	}
	if _, err := Choose(now, "fast"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "wp-async") {
		t.Errorf("no engine: %v", err)
	}
}

func TestTheProbeFindsWhatThisKernelHas(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("missing: root")
		}
		t.Skip("missing: root")
	}
	f := Probe()
	t.Logf("%+v", f)
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil || f.Kernel != unix.ByteSliceToString(u.Release[:]) {
		t.Errorf("kernel %q", f.Kernel)
	}
	// Both are of Linux 6.7, but not every architecture has write protection.
	if async := f.UffdFeatures&(1<<15) != 0; async && !f.PagemapScan {
		t.Error("WP_ASYNC without PAGEMAP_SCAN")
	}
	if f.Arch == "arm64" && f.SoftDirty {
		t.Error("arm64 has no soft-dirty bits")
	}
	if again := Probe(); again != f {
		t.Errorf("asked again: %+v", again)
	}
	if c, err := Choose(f, ""); err != nil || c.Engine == WPAsync && f.Trial != "" {
		t.Errorf("%v, %v", c, err)
	}
}
