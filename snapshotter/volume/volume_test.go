// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// setup resolves and readies a root, and unmounts its image at the end.
func setup(t *testing.T, root, name string) (*Volume, error) {
	t.Helper()
	root, err := Resolve(root)
	must(t, err)
	t.Cleanup(func() { must(t, Unmount(t.Context(), root)) })
	return Setup(t.Context(), root, name)
}

func TestBackendIsChosenByWhatTheDiskCanDo(t *testing.T) {
	for _, c := range []struct {
		disk  string
		dir   func(testing.TB) string
		want  string
		image bool
	}{
		{"btrfs", testdisk.Btrfs, backend.Btrfs, false},
		{"xfs", testdisk.XFS, backend.Reflink, false},
		{"ext4", testdisk.Ext4, backend.Btrfs, true},
	} {
		t.Run(c.disk, func(t *testing.T) {
			if _, err := exec.LookPath("mkfs.btrfs"); err != nil {
				testdisk.Missing(t, "mkfs.btrfs")
			}
			root := filepath.Join(c.dir(t), "root")
			v, err := setup(t, root, Auto)
			must(t, err)
			if v.Backend.Name() != c.want || (v.Image() != "") != c.image {
				t.Errorf("backend %s, image %q", v.Backend.Name(), v.Image())
			}
			if fi, err := os.Stat(root); err != nil || fi.Mode() != os.ModeDir|0o700 {
				t.Errorf("root: %v, %v", fi.Mode(), err)
			}
			if c.image {
				fi, err := os.Stat(v.Image())
				must(t, err)
				if fi.Mode() != 0o600 {
					t.Errorf("image: %v", fi.Mode())
				}
			}
			// The second start chooses the same.
			again, err := Setup(t.Context(), v.Root, Auto)
			must(t, err)
			if again.Backend.Name() != c.want || again.Image() != v.Image() {
				t.Errorf("then backend %s, image %q", again.Backend.Name(), again.Image())
			}
		})
	}
}

func TestBackendAskedForIsGivenOrRefusedWithTheReason(t *testing.T) {
	ext4, btrfs := testdisk.Ext4(t), testdisk.Btrfs(t)
	for _, c := range []struct{ dir, name, want, reason string }{
		{ext4, backend.Copy, backend.Copy, ""},
		{ext4, backend.Reflink, "", "reflink=1"},
		{ext4, "zfs", "", "unknown backend"},
		{btrfs, backend.Copy, backend.Copy, ""},
		{btrfs, backend.Reflink, backend.Reflink, ""},
		{btrfs, backend.Btrfs, backend.Btrfs, ""},
	} {
		v, err := setup(t, filepath.Join(c.dir, c.name), c.name)
		switch {
		case c.reason != "" && (err == nil || !strings.Contains(err.Error(), c.reason)):
			t.Errorf("%+v: %v", c, err)
		case c.reason == "" && err != nil:
			t.Errorf("%+v: %v", c, err)
		case c.reason == "" && v.Backend.Name() != c.want:
			t.Errorf("%+v: got %s", c, v.Backend.Name())
		}
	}
}

// A directory on btrfs that holds something cannot become a subvolume.
func TestFilesInTheRootAreNeverReplaced(t *testing.T) {
	root := filepath.Join(testdisk.Btrfs(t), "root")
	must(t, os.MkdirAll(root, 0o700))
	precious := filepath.Join(root, "precious")
	must(t, os.WriteFile(precious, []byte("x"), 0o600))
	if _, err := setup(t, root, backend.Btrfs); err == nil {
		t.Error("accepted")
	}
	v, err := setup(t, root, Auto)
	must(t, err)
	if v.Backend.Name() != backend.Reflink {
		t.Errorf("backend %s", v.Backend.Name())
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
}

func TestForeignFileInTheImagesPlaceIsLeftAlone(t *testing.T) {
	root := filepath.Join(testdisk.Ext4(t), "root")
	must(t, os.WriteFile(root+".img", []byte("precious"), 0o600))
	root, err := Resolve(root)
	must(t, err)
	if _, err := Setup(t.Context(), root, Auto); err == nil || !strings.Contains(err.Error(), "in the way") {
		t.Errorf("got %v", err)
	}
	if got, err := os.ReadFile(root + ".img"); err != nil || string(got) != "precious" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestImageGrowsWhenItIsNearlyFull(t *testing.T) {
	if _, err := exec.LookPath("mkfs.btrfs"); err != nil {
		testdisk.Missing(t, "mkfs.btrfs")
	}
	v, err := setup(t, filepath.Join(testdisk.Ext4(t), "root"), Auto)
	must(t, err)
	if n, err := v.Grow(); n != 0 || err != nil {
		t.Fatalf("an empty image grew: %d, %v", n, err)
	}
	_, before, err := Free(v.Root)
	must(t, err)
	// Reserved in the image without writing, so that the disk below keeps its room.
	f, err := os.Create(filepath.Join(v.Root, "fill"))
	must(t, err)
	defer f.Close()
	free, _, err := Free(v.Root)
	must(t, err)
	must(t, unix.Fallocate(int(f.Fd()), 0, 0, int64(free-free/20)))
	n, err := v.Grow()
	must(t, err)
	_, after, err := Free(v.Root)
	must(t, err)
	if n <= before || after != n {
		t.Errorf("from %d MiB to %d MiB, said %d", before>>20, after>>20, n>>20)
	}
	// What a crash between the steps leaves is completed by the next time.
	must(t, os.Truncate(v.Image(), int64(after)+64<<20))
	must(t, v.resize(after+64<<20))
	if _, size, err := Free(v.Root); err != nil || size != after+64<<20 {
		t.Errorf("%d MiB, %v", size>>20, err)
	}
}

func TestHalfMadeImageIsMadeAnew(t *testing.T) {
	if _, err := exec.LookPath("mkfs.btrfs"); err != nil {
		testdisk.Missing(t, "mkfs.btrfs")
	}
	root := filepath.Join(testdisk.Ext4(t), "root")
	must(t, os.WriteFile(root+".img.new", []byte("half"), 0o600))
	v, err := setup(t, root, Auto)
	must(t, err)
	if v.Backend.Name() != backend.Btrfs {
		t.Errorf("backend %s", v.Backend.Name())
	}
	if _, err := os.Stat(root + ".img.new"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
}

func TestUnmountFreesTheLoopDevice(t *testing.T) {
	if _, err := exec.LookPath("mkfs.btrfs"); err != nil {
		testdisk.Missing(t, "mkfs.btrfs")
	}
	v, err := setup(t, filepath.Join(testdisk.Ext4(t), "root"), Auto)
	must(t, err)
	for range 2 {
		must(t, Unmount(t.Context(), v.Root))
	}
	// A mount namespace that somebody made at this moment holds a copy of the mount,
	// and the kernel lets go of the device when the last one is gone.
	deadline := time.Now().Add(10 * time.Second)
	for {
		dev, err := uapi.FindLoop(v.Image())
		must(t, err)
		if dev == nil {
			return
		}
		dev.Close()
		if time.Now().After(deadline) {
			t.Fatalf("%s is still attached", dev.Name())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestRootThatAMountOptionCannotNameIsRefused(t *testing.T) {
	for _, bad := range []string{"a:b", "a,b", `a\b`} {
		if _, err := Resolve(filepath.Join(t.TempDir(), bad)); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
	if _, err := Resolve("/"); err == nil {
		t.Error("/ accepted")
	}
}
