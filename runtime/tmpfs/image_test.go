// SPDX-License-Identifier: Apache-2.0

package tmpfs

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// mountTwice makes a tmpfs that List leaves to CRIU, as runc's /dev is: parts of it are
// mounted in other places too.
func mountTwice(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "null"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".wh.note"), []byte("kept"), 0o640); err != nil {
		t.Fatal(err)
	}
	// CRIU's, which is there for a moment.
	if err := os.Mkdir(filepath.Join(dir, "cr-tmpfs.aBcDeF"), 0o700); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "null")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(filepath.Join(dir, "null"), other, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(other, unix.MNT_DETACH) })
	return dir
}

// imageOf finds a mount among those that CRIU would archive on this host, where others
// may be of a kind that is CRIU's alone.
func imageOf(t *testing.T, dir string) FS {
	t.Helper()
	list, err := List(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		if f.Destination == dir {
			t.Fatalf("%s is carried beside CRIU", dir)
		}
	}
	mounts, err := mountsOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if m.Mountpoint != dir {
			continue
		}
		f := FS{Destination: dir, File: imagePrefix + "1" + imageSuffix}
		if err := isWhole(os.Getpid(), f, m.Root, unix.Mkdev(uint32(m.Major), uint32(m.Minor))); err != nil {
			t.Fatal(err)
		}
		return f
	}
	t.Fatalf("%s is not mounted", dir)
	return FS{}
}

func TestImagesThatCRIULeftEmptyAreFilledForTar(t *testing.T) {
	requireRoot(t)
	tar, err := exec.LookPath("tar")
	if err != nil {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("tar is missing")
		}
		t.Skip("tar is missing")
	}
	f := imageOf(t, mountTwice(t))
	dir := t.TempDir()
	path := filepath.Join(dir, f.File)
	c, err := Archive(os.Getpid(), f, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CheckImages(dir); err == nil {
		t.Error("an image that nobody filled passed")
	}
	if err := c.Save(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := CheckImages(dir); err != nil {
		t.Error(err)
	}
	// As CRIU does (criu/filesystems.c, tmpfs_restore).
	dst := t.TempDir()
	cmd := exec.Command(tar, "--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory="+dst)
	if cmd.Stdin, err = os.Open(path); err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dst, "null"), &st); err != nil || st.Rdev != unix.Mkdev(1, 3) || st.Mode != unix.S_IFCHR|0o666 {
		t.Errorf("device: %x, mode %o (%v)", st.Rdev, st.Mode, err)
	}
	if b, err := os.ReadFile(filepath.Join(dst, ".wh.note")); err != nil || string(b) != "kept" {
		t.Errorf("file: %q, %v", b, err)
	}
	if err := unix.Stat(dst, &st); err != nil || st.Mode&0o7777 != 0o755 {
		t.Errorf("top: mode %o (%v)", st.Mode, err)
	}
	if _, err := os.Stat(filepath.Join(dst, "cr-tmpfs.aBcDeF")); err == nil {
		t.Error("CRIU's mount point was archived")
	}
}

func TestImagesThatCRIUFilledOrDidNotMakeAreLeftAlone(t *testing.T) {
	requireRoot(t)
	f := imageOf(t, mountTwice(t))
	dir := t.TempDir()
	path := filepath.Join(dir, f.File)
	for _, exists := range []bool{false, true} {
		c, err := Archive(os.Getpid(), f, dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if exists {
			if err := os.WriteFile(path, []byte("CRIU's own"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Save(t.Context()); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if exists && string(b) != "CRIU's own" || !exists && !os.IsNotExist(err) {
			t.Errorf("there is %q (%v)", b, err)
		}
	}
}
