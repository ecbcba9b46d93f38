// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

// conformance checks every promise of Backend and Capture against the backend that
// the factory makes, with the root that it works below.
func conformance(t *testing.T, factory func(testing.TB) (string, Backend)) {
	root, b := factory(t)
	n := 0
	// Each test has a source directory and a name for the capture.
	dirs := func(t *testing.T) (src, dst string) {
		n++
		src = filepath.Join(root, fmt.Sprintf("src%d", n))
		must(t, os.Mkdir(src, 0o755))
		must(t, os.MkdirAll(filepath.Join(root, "captures"), 0o700))
		dst = filepath.Join(root, "captures", fmt.Sprintf("fs%d", n))
		t.Cleanup(func() {
			must(t, b.Discard(dst))
			must(t, os.RemoveAll(src))
		})
		return src, dst
	}

	t.Run("CapturesEveryKindOfFileWithAllItsAttributes", func(t *testing.T) {
		src, dst := dirs(t)
		everyKind(t, src)
		want := describe(t, src)
		capture(t, b, src, dst, nil)
		diff(t, want, describe(t, dst))
	})
	t.Run("SeesWhatChangedAfterOpen", func(t *testing.T) {
		src, dst := dirs(t)
		everyKind(t, src)
		var want []string
		capture(t, b, src, dst, func() {
			mutate(t, src)
			want = describe(t, src)
		})
		diff(t, want, describe(t, dst))
	})
	t.Run("SeesNothingThatChangedAfterTake", func(t *testing.T) {
		src, dst := dirs(t)
		everyKind(t, src)
		want := describe(t, src)
		c, err := b.Open(t.Context(), src, dst)
		must(t, err)
		defer c.Close()
		must(t, c.Take(t.Context()))
		mutate(t, src)
		must(t, c.Seal(t.Context()))
		diff(t, want, describe(t, dst))
		must(t, os.WriteFile(filepath.Join(src, "file"), []byte("later still"), 0o600))
		diff(t, want, describe(t, dst))
	})
	t.Run("TakesAnewWhenAskedAgain", func(t *testing.T) {
		src, dst := dirs(t)
		everyKind(t, src)
		c, err := b.Open(t.Context(), src, dst)
		must(t, err)
		defer c.Close()
		must(t, c.Take(t.Context()))
		mutate(t, src)
		want := describe(t, src)
		must(t, c.Take(t.Context()))
		must(t, os.WriteFile(filepath.Join(src, "file"), []byte("later still"), 0o600))
		must(t, c.Seal(t.Context()))
		diff(t, want, describe(t, dst))
	})
	t.Run("SeesDirtyPages", func(t *testing.T) {
		src, dst := dirs(t)
		f, err := os.Create(filepath.Join(src, "dirty"))
		must(t, err)
		defer f.Close()
		capture(t, b, src, dst, func() {
			_, err := f.Write(make([]byte, 32<<20)) // no fsync
			must(t, err)
			_, err = f.WriteAt([]byte("here"), 20<<20)
			must(t, err)
		})
		got, err := os.ReadFile(filepath.Join(dst, "dirty"))
		must(t, err)
		if len(got) != 32<<20 || string(got[20<<20:20<<20+4]) != "here" {
			t.Fatalf("%d bytes, not the ones written", len(got))
		}
	})
	t.Run("SeesStoresThroughASharedMapping", func(t *testing.T) {
		src, dst := dirs(t)
		f, err := os.Create(filepath.Join(src, "mapped"))
		must(t, err)
		defer f.Close()
		must(t, f.Truncate(8<<10))
		mem, err := unix.Mmap(int(f.Fd()), 0, 8<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		must(t, err)
		defer func() { must(t, unix.Munmap(mem)) }()
		// The page is writable in the page table before Open, so that the store after it
		// is noticed only if Open made it read-only again. Older than racyWindow, or the
		// file would be read again anyway.
		mem[0] = 1
		<-time.After(2 * racyWindow)
		capture(t, b, src, dst, func() { mem[0] = 2 })
		got, err := os.ReadFile(filepath.Join(dst, "mapped"))
		must(t, err)
		if got[0] != 2 {
			t.Fatalf("got the store before Open (%d), not the one after", got[0])
		}
	})
	t.Run("FollowsNoLink", func(t *testing.T) {
		src, dst := dirs(t)
		outside := t.TempDir()
		must(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o600))
		must(t, os.MkdirAll(filepath.Join(src, "d/e"), 0o755))
		must(t, os.WriteFile(filepath.Join(src, "d/e/secret"), nil, 0o600))
		capture(t, b, src, dst, func() {
			must(t, os.RemoveAll(filepath.Join(src, "d/e")))
			must(t, os.Symlink(outside, filepath.Join(src, "d/e")))
		})
		if to, err := os.Readlink(filepath.Join(dst, "d/e")); err != nil || to != outside {
			t.Fatalf("not the link itself: %q, %v", to, err)
		}
		if _, err := os.Stat(filepath.Join(outside, "secret")); err != nil {
			t.Fatalf("a file outside was touched: %v", err)
		}
	})
	t.Run("KeepsHolesAsHoles", func(t *testing.T) {
		src, dst := dirs(t)
		f, err := os.Create(filepath.Join(src, "sparse"))
		must(t, err)
		defer f.Close()
		must(t, f.Truncate(1<<40))
		_, err = f.WriteAt([]byte("end"), 1<<40-3)
		must(t, err)
		capture(t, b, src, dst, nil)
		var st unix.Stat_t
		must(t, unix.Stat(filepath.Join(dst, "sparse"), &st))
		if st.Size != 1<<40 || st.Blocks > 1<<11 {
			t.Fatalf("size %d, %d blocks", st.Size, st.Blocks)
		}
	})
	t.Run("GivesUniqueInodeNumbers", func(t *testing.T) {
		// What overlayfs relies on: see the package's documentation.
		src, dst := dirs(t)
		for i := range 64 {
			must(t, os.WriteFile(filepath.Join(src, fmt.Sprint(i)), nil, 0o600))
		}
		capture(t, b, src, dst, nil)
		seen := map[uint64]string{}
		for _, top := range []string{src, dst} {
			must(t, filepath.WalkDir(top, func(p string, _ fs.DirEntry, err error) error {
				var st unix.Stat_t
				must(t, errors.Join(err, unix.Lstat(p, &st)))
				if other, ok := seen[st.Ino]; ok {
					t.Errorf("%s and %s both have inode %d", other, p, st.Ino)
				}
				seen[st.Ino] = p
				return nil
			}))
		}
	})
	t.Run("DiscardLeavesNothingInAnyState", func(t *testing.T) {
		for state := range 4 {
			src, dst := dirs(t)
			everyKind(t, src)
			if state > 0 {
				c, err := b.Open(t.Context(), src, dst)
				must(t, err)
				if state > 1 {
					must(t, c.Take(t.Context()))
				}
				if state > 2 {
					must(t, c.Seal(t.Context()))
				}
				must(t, c.Close())
				must(t, c.Close())
			}
			for range 2 {
				must(t, b.Discard(dst))
			}
			left, err := filepath.Glob(dst + "*")
			if err != nil || len(left) > 0 {
				t.Fatalf("state %d left %v, %v", state, left, err)
			}
		}
	})
	t.Run("SealWithoutTakeIsRefused", func(t *testing.T) {
		src, dst := dirs(t)
		c, err := b.Open(t.Context(), src, dst)
		must(t, err)
		defer c.Close()
		if err := c.Seal(t.Context()); err == nil {
			t.Fatal("accepted")
		}
	})
	t.Run("ResultCanBeRenamedAndRemovedAsAPlainDirectory", func(t *testing.T) {
		src, dst := dirs(t)
		everyKind(t, src)
		capture(t, b, src, dst, nil)
		if sub, err := uapi.IsSubvolume(dst); err != nil || sub {
			t.Fatalf("a subvolume: %v, %v", sub, err)
		}
		to := src + ".adopted"
		must(t, os.Rename(dst, to))
		must(t, os.RemoveAll(to))
	})
	t.Run("OpenEndsWithItsContext", func(t *testing.T) {
		src, dst := dirs(t)
		everyKind(t, src)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := b.Open(ctx, src, dst); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
	})
}

// capture runs the three calls, and between in the middle of them.
func capture(t *testing.T, b Backend, src, dst string, between func()) {
	t.Helper()
	c, err := b.Open(t.Context(), src, dst)
	must(t, err)
	defer c.Close()
	if between != nil {
		between()
	}
	must(t, c.Take(t.Context()))
	must(t, c.Seal(t.Context()))
}

// everyKind fills dir with one of everything that an overlay's upper directory holds.
func everyKind(t *testing.T, dir string) {
	t.Helper()
	p := func(n string) string { return filepath.Join(dir, n) }
	past := unix.NsecToTimespec(time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC).UnixNano())
	must(t, os.WriteFile(p("file"), []byte("content"), 0o600))
	must(t, os.WriteFile(p("empty"), nil, 0o640))
	must(t, os.WriteFile(p("big"), []byte(strings.Repeat("0123456789abcdef", 1<<16)), 0o600))
	must(t, os.WriteFile(p("setuid"), []byte("x"), 0o700))
	must(t, os.Chown(p("setuid"), 12, 34))
	must(t, unix.Chmod(p("setuid"), 0o6755))
	// VFS_CAP_REVISION_2 with CAP_NET_RAW (include/uapi/linux/capability.h).
	must(t, unix.Setxattr(p("setuid"), "security.capability", []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	must(t, unix.Setxattr(p("file"), "user.note", []byte("kept"), 0))
	must(t, os.MkdirAll(p("dir/sub/deep"), 0o750))
	must(t, os.WriteFile(p("dir/sub/deep/leaf"), []byte("leaf"), 0o604))
	must(t, unix.Setxattr(p("dir/sub"), "trusted.overlay.opaque", []byte("y"), 0))
	must(t, unix.Mknod(p("whiteout"), unix.S_IFCHR, 0))
	must(t, unix.Mknod(p("device"), unix.S_IFBLK|0o660, int(unix.Mkdev(7, 300))))
	must(t, unix.Mkfifo(p("fifo"), 0o622))
	must(t, unix.Mknod(p("socket"), unix.S_IFSOCK|0o755, 0))
	must(t, os.Symlink("../../../etc/passwd", p("link")))
	must(t, os.Lchown(p("link"), 5, 6))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p("link"), []unix.Timespec{past, past}, unix.AT_SYMLINK_NOFOLLOW))
	must(t, os.Link(p("big"), p("dir/hard")))
	must(t, os.WriteFile(p("odd \n\xff name"), []byte("odd"), 0o400))
	must(t, os.WriteFile(p(strings.Repeat("l", 255)), nil, 0o600))
	must(t, os.Mkdir(p("gone"), 0o755))
	must(t, os.WriteFile(p("gone/file"), nil, 0o600))
	must(t, os.Mkdir(p("turns"), 0o755))
	must(t, os.WriteFile(p("turns/a"), nil, 0o600))
	must(t, os.Mkdir(p("sticky"), 0o755))
	must(t, unix.Chmod(p("sticky"), 0o1777))
	must(t, os.Chown(dir, 7, 8))
	must(t, os.Chmod(dir, 0o711))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p("file"), []unix.Timespec{past, past}, 0))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p("dir/sub"), []unix.Timespec{past, past}, 0))
}

// mutate changes what everyKind made, in every way that a second pass must notice.
func mutate(t *testing.T, dir string) {
	t.Helper()
	p := func(n string) string { return filepath.Join(dir, n) }
	var st unix.Stat_t
	must(t, unix.Stat(p("file"), &st))
	must(t, os.WriteFile(p("file"), []byte("CONTENT"), 0o600)) // same size …
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p("file"), []unix.Timespec{st.Atim, st.Mtim}, 0))
	must(t, os.Rename(p("dir/sub/deep/leaf"), p("leaf")))
	must(t, os.RemoveAll(p("gone")))
	must(t, os.RemoveAll(p("turns")))
	must(t, os.WriteFile(p("turns"), []byte("a file now"), 0o600))
	must(t, os.Remove(p("empty")))
	must(t, os.Mkdir(p("empty"), 0o700))
	must(t, os.WriteFile(p("empty/in"), []byte("in"), 0o600))
	must(t, os.Link(p("big"), p("hard2")))
	must(t, unix.Removexattr(p("dir/sub"), "trusted.overlay.opaque"))
	must(t, os.Chmod(p("sticky"), 0o700))
	must(t, os.Remove(p("whiteout")))
	must(t, os.WriteFile(p("whiteout"), []byte("back"), 0o600))
	must(t, os.Remove(p("setuid")))
	must(t, unix.Mknod(p("setuid"), unix.S_IFCHR, 0))
	f, err := os.OpenFile(p("dir/hard"), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("changed"), 4096)
	must(t, errors.Join(err, f.Close()))
	must(t, os.Chmod(dir, 0o751))
}

// describe lists a tree with everything that a capture must keep, one entry a line.
func describe(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	links := map[uint64]string{}
	must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Lstat(path, &st))
		line := fmt.Sprintf("%q mode=%o own=%d:%d rdev=%d mtime=%d.%d", rel, st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			must(t, err)
			line += fmt.Sprintf(" size=%d sum=%x nlink=%d", st.Size, sha256.Sum256(data), st.Nlink)
			if first, ok := links[st.Ino]; ok {
				line += " same=" + first
			}
			links[st.Ino] = rel
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			must(t, err)
			line += " to=" + to
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			attrs := map[string]string{}
			names, err := listXattrs(path)
			must(t, err)
			for _, n := range names {
				v, err := getXattr(path, n)
				must(t, err)
				attrs[n] = string(v)
			}
			for _, n := range slices.Sorted(maps.Keys(attrs)) {
				line += fmt.Sprintf(" %s=%q", n, attrs[n])
			}
		}
		out = append(out, line)
		return nil
	}))
	return out
}

func diff(t *testing.T, want, got []string) {
	t.Helper()
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("missing in the capture: %s", w)
		}
	}
	for _, g := range got {
		if !slices.Contains(want, g) {
			t.Errorf("not in the source:      %s", g)
		}
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
