// SPDX-License-Identifier: Apache-2.0

// Package testdisk gives tests file systems of their own: small images, loop-mounted and
// taken away again at the end of the test, also when it failed.
//
// What is missing on a machine (root, a tool, a kernel feature) skips the test by
// its name; with COHORT_REQUIRE=1 in the environment the test fails instead.
package testdisk

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

// Missing skips the test, or fails it where everything is required.
func Missing(tb testing.TB, what string) {
	tb.Helper()
	if os.Getenv("COHORT_REQUIRE") == "1" {
		tb.Fatalf("required by COHORT_REQUIRE=1 and missing: %s", what)
	}
	tb.Skip("missing: " + what)
}

// Root requires the test to run as root.
func Root(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		Missing(tb, "root")
	}
}

// Btrfs mounts a fresh btrfs and returns its mount point.
func Btrfs(tb testing.TB) string {
	tb.Helper()
	return mounted(tb, "btrfs", "mkfs.btrfs", "-q", "-m", "single")
}

// XFS mounts a fresh XFS with shared extents and returns its mount point.
func XFS(tb testing.TB) string {
	tb.Helper()
	return mounted(tb, "xfs", "mkfs.xfs", "-q", "-m", "reflink=1")
}

// Ext4 mounts a fresh ext4, which cannot share extents, and returns its mount point.
func Ext4(tb testing.TB) string {
	tb.Helper()
	return mounted(tb, "ext4", "mkfs.ext4", "-q")
}

func mounted(tb testing.TB, fstype, mkfs string, args ...string) string {
	tb.Helper()
	Root(tb)
	tool, err := exec.LookPath(mkfs)
	if err != nil {
		Missing(tb, mkfs)
	}
	dir := tb.TempDir()
	img := filepath.Join(dir, "img")
	f, err := os.Create(img)
	if err != nil {
		tb.Fatal(err)
	}
	err = f.Truncate(4 << 30) // sparse
	f.Close()
	if err != nil {
		tb.Fatal(err)
	}
	if out, err := exec.Command(tool, append(args, img)...).CombinedOutput(); err != nil {
		tb.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	dev, err := uapi.AttachLoop(img)
	if errors.Is(err, os.ErrNotExist) {
		Missing(tb, "loop devices")
	}
	if err != nil {
		tb.Fatal(err)
	}
	defer dev.Close() // the mount holds it from here on
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		tb.Fatal(err)
	}
	err = unix.Mount(dev.Name(), mnt, fstype, unix.MS_NOATIME, "")
	if errors.Is(err, unix.ENODEV) {
		Missing(tb, fstype+" in the kernel")
	}
	if err != nil {
		tb.Fatalf("mount %s: %v", fstype, err)
	}
	tb.Cleanup(func() {
		// A thread that containerd's mount package has just ended may still have its
		// working directory there, and nothing tells when it is gone.
		err := unix.Unmount(mnt, 0)
		for end := time.Now().Add(5 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(end); {
			<-time.After(20 * time.Millisecond)
			err = unix.Unmount(mnt, 0)
		}
		if err != nil {
			tb.Errorf("unmount %s: %v", mnt, err)
			_ = unix.Unmount(mnt, unix.MNT_DETACH)
		}
	})
	return mnt
}
