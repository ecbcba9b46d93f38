// SPDX-License-Identifier: Apache-2.0

package tmpfs

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("missing: root")
		}
		t.Skip("missing: root")
	}
}

func TestContentComesBackAsItWas(t *testing.T) {
	requireRoot(t)
	src, dir := t.TempDir(), t.TempDir()
	if err := unix.Mount("tmpfs", src, "tmpfs", 0, "size=1m,mode=1777"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Unmount(src) })
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(src, "sub"), 0o750))
	must(os.Chown(filepath.Join(src, "sub"), 70, 71))
	must(os.WriteFile(filepath.Join(src, "sub", "f"), []byte("data"), 0o640))
	must(os.Link(filepath.Join(src, "sub", "f"), filepath.Join(src, "hard")))
	must(os.Symlink("/nowhere", filepath.Join(src, "link")))
	must(unix.Mknod(filepath.Join(src, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Mkfifo(filepath.Join(src, "fifo"), 0o600))
	must(os.Mkdir(filepath.Join(src, "covered"), 0o700))
	must(unix.Mount("tmpfs", filepath.Join(src, "covered"), "tmpfs", 0, ""))
	t.Cleanup(func() { _ = Unmount(filepath.Join(src, "covered")) })
	must(os.WriteFile(filepath.Join(src, "covered", "not-ours"), nil, 0o600))

	list, err := List(os.Getpid())
	must(err)
	var f *FS
	for i := range list {
		if list[i].Destination == src {
			f = &list[i]
		}
	}
	if f == nil {
		t.Fatalf("%s is not in %v", src, list)
	}
	must(f.Validate())
	c, err := Archive(os.Getpid(), *f, dir, nil)
	must(err)
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("a small archive was written to disk at once: %v", left)
	}
	must(c.Save(t.Context()))
	must(c.Save(t.Context()))
	a, err := os.Open(filepath.Join(dir, f.File))
	must(err)
	defer a.Close()
	dst := filepath.Join(t.TempDir(), "m")
	must(Mount(context.Background(), *f, a, dst))
	t.Cleanup(func() { _ = Unmount(dst) })

	var st, st2 unix.Stat_t
	must(unix.Stat(dst, &st))
	if st.Mode&0o7777 != 0o1777 {
		t.Errorf("root: mode %o", st.Mode)
	}
	must(unix.Stat(filepath.Join(dst, "sub"), &st))
	if st.Uid != 70 || st.Gid != 71 || st.Mode&0o777 != 0o750 {
		t.Errorf("sub: %d:%d %o", st.Uid, st.Gid, st.Mode)
	}
	if b, err := os.ReadFile(filepath.Join(dst, "sub", "f")); err != nil || string(b) != "data" {
		t.Errorf("file: %q, %v", b, err)
	}
	must(unix.Stat(filepath.Join(dst, "sub", "f"), &st))
	must(unix.Stat(filepath.Join(dst, "hard"), &st2))
	if st.Ino != st2.Ino {
		t.Error("the hard link is a file of its own")
	}
	if l, err := os.Readlink(filepath.Join(dst, "link")); err != nil || l != "/nowhere" {
		t.Errorf("link: %q, %v", l, err)
	}
	must(unix.Stat(filepath.Join(dst, "null"), &st))
	if st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("device: %x", st.Rdev)
	}
	if left, err := os.ReadDir(filepath.Join(dst, "covered")); err != nil || len(left) != 0 {
		t.Errorf("the covered directory: %v, %v; want it empty", left, err)
	}
	var fst unix.Statfs_t
	must(unix.Statfs(dst, &fst))
	if size := fst.Blocks * uint64(fst.Bsize); size != 1<<20 {
		t.Errorf("size %d; want 1 MiB", size)
	}
}

func TestDescriptionsFromImagesAreNotBelieved(t *testing.T) {
	good := FS{Destination: "/dev/shm", Options: "size=64m,mode=1777", File: "00.tar"}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]FS{
		"relative destination": {Destination: "dev", File: "0"},
		"dots":                 {Destination: "/dev/../etc", File: "0"},
		"breaks the list":      {Destination: "/a]:/etc", File: "0"},
		"unknown option":       {Destination: "/a", Options: "mpol=bind", File: "0"},
		"empty option":         {Destination: "/a", Options: "size=1m,", File: "0"},
		"path as file":         {Destination: "/a", File: "../x"},
		"no file":              {Destination: "/a"},
	} {
		if err := f.Validate(); err == nil {
			t.Errorf("%s: %+v passed", name, f)
		}
	}
}

func TestNameThatWouldRemoveAFileIsRefused(t *testing.T) {
	requireRoot(t)
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, ".wh.x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := writeTree(&strings.Builder{}, src, nil, false)
	if err == nil || !strings.Contains(err.Error(), ".wh.x") {
		t.Fatal(err)
	}
}
