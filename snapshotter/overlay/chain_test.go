// SPDX-License-Identifier: Apache-2.0

package overlay_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
	"github.com/cohort-project/cohort/snapshotter/overlay"
)

// epochs is the number of increments on top of the first capture.
const epochs = 10

// A container's life on a real overlay mount, captured again and again: every epoch is
// reduced to what changed, and a mount of the whole chain shows what the container saw.
func TestChainOfDeltasShowsWhatTheContainerSaw(t *testing.T) {
	testdisk.Root(t)
	for _, disk := range []struct {
		name  string
		mount func(testing.TB) string
		make  func(root string) (backend.Backend, error)
	}{
		{"btrfs", testdisk.Btrfs, backend.NewBtrfs},
		{"btrfs-reduced", testdisk.Btrfs, backend.NewBtrfsSnapshots},
		{"xfs", testdisk.XFS, func(string) (backend.Backend, error) { return backend.NewReflink(), nil }},
		{"ext4", testdisk.Ext4, backend.NewCopy},
	} {
		t.Run(disk.name, func(t *testing.T) {
			root := disk.mount(t)
			b, err := disk.make(root)
			must(t, err)
			runs := 6
			if testing.Short() {
				runs = 1
			}
			for n := range runs {
				seed := uint64(time.Now().UnixNano()) + uint64(n) //nolint:gosec // any number will do
				if s := os.Getenv("COHORT_SEED"); s != "" {
					seed, err = strconv.ParseUint(s, 10, 64)
					must(t, err)
				}
				dir := filepath.Join(root, strconv.Itoa(n))
				must(t, os.Mkdir(dir, 0o755))
				if !t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { live(t, dir, b, seed) }) {
					t.Fatalf("again with COHORT_SEED=%d", seed)
				}
			}
		})
	}
}

// live is one container's life in dir.
func live(t *testing.T, dir string, b backend.Backend, seed uint64) {
	c := &container{Rand: rand.New(rand.NewPCG(seed, 0)), dir: dir, b: b}
	c.base(t)
	unmount := c.mount(t, "m", []string{c.path("base")}, c.path("upper"), c.path("work"))
	defer unmount()
	var chain []string // newest first
	var want map[string]string
	var full, kept, unchanged uint64
	for epoch := range epochs + 1 {
		for range 40 {
			c.act(t)
		}
		want = describe(t, c.path("m"))
		name := fmt.Sprint("epoch", epoch)
		if epoch == 0 {
			c.capture(t, name)
		} else {
			d := c.increment(t, name, chain)
			full, kept, unchanged = full+du(t, c.path("upper")), kept+du(t, c.path(name)), unchanged+d.UnchangedBytes
		}
		chain = append([]string{c.path(name)}, chain...)
		done := c.mount(t, "check", append(slices.Clone(chain), c.path("base")), "", "")
		got := describe(t, c.path("check"))
		done()
		if !same(t, want, got) {
			t.Fatalf("epoch %d: the chain shows something else; %d operations so far", epoch, c.done)
		}
		if epoch == epochs { // nothing happens in one more
			if d := c.increment(t, "idle", chain); !d.Empty() || du(t, c.path("idle")) > 0 {
				t.Errorf("something changed without an operation: %v", describe(t, c.path("idle")))
			}
		}
	}
	c.capture(t, "whole")
	c.merge(t, chain, want)
	if full != kept+unchanged {
		t.Errorf("%d bytes were captured, but %d kept and %d unchanged", full, kept, unchanged)
	}
	if unchanged == 0 {
		t.Error("nothing was ever found unchanged")
	}
	t.Logf("%d operations; of %d bytes in %d captures %d kept", c.done, full, epochs, kept)
}

// What this test compares with would notice an increment that lacks a whiteout, a byte
// or a time.
func TestTheChainTestNoticesAWrongIncrement(t *testing.T) {
	root := testdisk.Btrfs(t)
	for name, spoil := range map[string]func(dir string) error{
		"nothing": func(string) error { return nil },
		"whiteout": func(dir string) error {
			var st unix.Stat_t
			must(t, unix.Stat(dir, &st))
			return errors.Join(os.Remove(filepath.Join(dir, "gone")), unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, 0))
		},
		"byte": func(dir string) error {
			fi, err := os.Stat(filepath.Join(dir, "f"))
			must(t, err)
			return errors.Join(os.WriteFile(filepath.Join(dir, "f"), []byte("z"), 0o644), os.Chtimes(filepath.Join(dir, "f"), fi.ModTime(), fi.ModTime()))
		},
		"time": func(dir string) error { return os.Chtimes(dir, time.Now(), time.Now()) },
	} {
		t.Run(name, func(t *testing.T) {
			c := &container{dir: filepath.Join(root, name), b: backend.NewReflink()}
			must(t, os.Mkdir(c.dir, 0o755))
			c.base(t)
			defer c.mount(t, "m", []string{c.path("base")}, c.path("upper"), c.path("work"))()
			must(t, errors.Join(os.WriteFile(c.path("m/f"), []byte("x"), 0o644), os.WriteFile(c.path("m/gone"), []byte("x"), 0o644)))
			c.capture(t, "epoch0")
			must(t, errors.Join(os.WriteFile(c.path("m/f"), []byte("y"), 0o644), os.Remove(c.path("m/gone"))))
			c.capture(t, "epoch1")
			c.delta(t, "epoch1", []string{c.path("epoch0")})
			want := describe(t, c.path("m"))
			must(t, spoil(c.path("epoch1")))
			defer c.mount(t, "check", []string{c.path("epoch1"), c.path("epoch0"), c.path("base")}, "", "")()
			if ok := same(t, want, describe(t, c.path("check"))); ok != (name == "nothing") {
				t.Errorf("same: %v", ok)
			}
		})
	}
}

// container is a file system with somebody at work in it.
type container struct {
	*rand.Rand
	dir  string
	b    backend.Backend
	done int
}

func (c *container) path(n string) string { return filepath.Join(c.dir, n) }

func (c *container) mount(t *testing.T, at string, lower []string, upper, work string) func() {
	t.Helper()
	for _, d := range []string{c.path(at), upper, work} {
		if d != "" {
			must(t, os.MkdirAll(d, 0o755))
		}
	}
	options := "index=off,redirect_dir=off,metacopy=off,lowerdir=" + strings.Join(lower, ":")
	if upper != "" {
		options += ",upperdir=" + upper + ",workdir=" + work
	}
	must(t, unix.Mount("overlay", c.path(at), "overlay", 0, options))
	return func() { must(t, unix.Unmount(c.path(at), 0)) }
}

// base fills the image: names that the container will meet, and hard links.
func (c *container) base(t *testing.T) {
	must(t, os.Mkdir(c.path("base"), 0o755))
	for i, n := range []string{"a", "b", "d0/a", "d0/c", "d1/a", "d1/d0/b", "d1/d2/a", "d2/d0/c"} {
		p := filepath.Join(c.path("base"), n)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		must(t, os.WriteFile(p, []byte(strings.Repeat(n, 100*i)), 0o644))
	}
	must(t, os.Link(c.path("base/a"), c.path("base/d1/c")))
	must(t, os.Symlink("a", c.path("base/c")))
}

// increment captures what changed since the chain.
func (c *container) increment(t *testing.T, name string, chain []string) *overlay.Delta {
	t.Helper()
	cp, err := c.b.Open(t.Context(), c.path("upper"), c.path(name))
	must(t, err)
	defer cp.Close()
	must(t, cp.Take(t.Context()))
	r, ok := cp.(backend.Reducer)
	if !ok {
		must(t, cp.Seal(t.Context()))
		return c.delta(t, name, chain)
	}
	u, err := overlay.OpenUnion(chain...)
	must(t, err)
	defer u.Close()
	var d *overlay.Delta
	err = r.SealReduced(t.Context(), func(src string) (map[string]struct{}, error) {
		if d, err = overlay.Compare(t.Context(), src, u); err != nil {
			return nil, err
		}
		return d.Skips(), nil
	})
	if errdefs.IsNotImplemented(err) {
		must(t, cp.Seal(t.Context()))
		return c.delta(t, name, chain)
	}
	must(t, err)
	must(t, d.Apply(c.path(name)))
	return d
}

func (c *container) capture(t *testing.T, name string) {
	t.Helper()
	cp, err := c.b.Open(t.Context(), c.path("upper"), c.path(name))
	must(t, err)
	must(t, cp.Take(t.Context()))
	must(t, cp.Seal(t.Context()))
	must(t, cp.Close())
}

// merge checks that the chain as one image layer is that of a whole capture, byte by
// byte, and shows on the image what the container saw.
func (c *container) merge(t *testing.T, chain []string, want map[string]string) {
	t.Helper()
	var layers [2]bytes.Buffer
	base := []string{c.path("base")}
	must(t, oci.WriteUpper(t.Context(), &layers[0], chain, base))
	must(t, oci.WriteUpper(t.Context(), &layers[1], []string{c.path("whole")}, base))
	if !bytes.Equal(layers[0].Bytes(), layers[1].Bytes()) {
		t.Errorf("the chain as a layer has %d bytes, the whole capture has %d, or others", layers[0].Len(), layers[1].Len())
	}
	dir := c.path("unpacked")
	must(t, os.Mkdir(dir, 0o755))
	_, err := archive.Apply(t.Context(), dir, &layers[0], archive.WithConvertWhiteout(func(h *tar.Header, p string) (bool, error) {
		name, isWhiteout := strings.CutPrefix(filepath.Base(p), ".wh.")
		switch {
		case name == ".wh..opq":
			return false, unix.Setxattr(filepath.Dir(p), "trusted.overlay.opaque", []byte("y"), 0)
		case isWhiteout:
			return false, unix.Mknod(filepath.Join(filepath.Dir(p), name), unix.S_IFCHR, 0)
		}
		return true, nil
	}))
	must(t, err)
	defer c.mount(t, "check", []string{dir, c.path("base")}, "", "")()
	got := describe(t, c.path("check"))
	for _, m := range []map[string]string{want, got} {
		delete(m, "")                                                                               // a layer has no entry for it
		maps.DeleteFunc(m, func(_, line string) bool { return strings.HasPrefix(line, "mode=14") }) // nor for sockets
	}
	if !same(t, want, got) {
		t.Errorf("the merged layer shows something else")
	}
}

func (c *container) delta(t *testing.T, name string, chain []string) *overlay.Delta {
	t.Helper()
	u, err := overlay.OpenUnion(chain...)
	must(t, err)
	defer u.Close()
	d, err := overlay.Compare(t.Context(), c.path(name), u)
	must(t, err)
	must(t, d.Apply(c.path(name)))
	return d
}

// name picks a path out of few, so that operations meet.
func (c *container) name() string {
	p := c.path("m")
	for range c.IntN(4) {
		sub := filepath.Join(p, fmt.Sprint("d", c.IntN(3)))
		if fi, err := os.Lstat(sub); err == nil && fi.IsDir() {
			p = sub
		}
	}
	return filepath.Join(p, []string{"a", "b", "c", "d0", "d1", "d2", "x"}[c.IntN(7)])
}

func (c *container) bytes() []byte {
	b := make([]byte, []int{0, 10, 1500, 5000, 70_000}[c.IntN(5)])
	for i := range b {
		b[i] = byte(c.Uint32())
	}
	return b
}

// act does one thing. Many are refused, by the state of things or by overlayfs (a
// directory of the image cannot be renamed): that is part of life.
func (c *container) act(t *testing.T) {
	p, q := c.name(), c.name()
	if fi, err := os.Lstat(p); err == nil && !fi.Mode().IsRegular() && !fi.IsDir() && c.IntN(2) == 0 {
		must(t, os.Remove(p))
		c.done++
		return // what opens a pipe waits for its other end
	}
	var err error
	switch c.IntN(24) {
	case 0, 1, 2:
		err = c.write(p)
	case 3:
		err = c.modify(p, func(f *os.File, size int64) error {
			_, err := f.WriteAt(c.bytes(), c.Int64N(size+1))
			return err
		})
	case 4:
		err = c.modify(p, func(f *os.File, size int64) error { return f.Truncate(c.Int64N(2*size + 1)) })
	case 5: // a hole, and data behind it
		err = c.modify(p, func(f *os.File, size int64) error {
			_, err := f.WriteAt([]byte("end"), size+c.Int64N(1<<21))
			return err
		})
	case 6: // same size, same time, other content
		err = c.modify(p, func(f *os.File, size int64) error {
			fi, err := f.Stat()
			must(t, err)
			if size > 0 {
				_, err = f.WriteAt([]byte{byte(c.Uint32())}, c.Int64N(size))
			}
			return errors.Join(err, os.Chtimes(f.Name(), fi.ModTime(), fi.ModTime()))
		})
	case 7: // another file, same in everything
		err = c.again(p)
	case 8, 9:
		err = os.Rename(p, q)
	case 10:
		err = unix.Renameat2(unix.AT_FDCWD, p, unix.AT_FDCWD, q, unix.RENAME_EXCHANGE)
	case 11, 12:
		err = os.Link(p, q)
	case 13:
		err = os.Symlink([]string{"a", "b", "not/there", "d0"}[c.IntN(4)], p)
	case 14, 15:
		err = os.Remove(p)
	case 16:
		err = os.RemoveAll(p)
	case 17: // an opaque directory, where the image has one
		err = errors.Join(os.RemoveAll(p), os.MkdirAll(p, 0o755), c.write(filepath.Join(p, "a")))
	case 18:
		err = os.MkdirAll(p, 0o755)
	case 19:
		err = os.Chmod(p, os.FileMode(0o600+c.IntN(64))) //nolint:gosec // small
	case 20:
		err = os.Lchown(p, c.IntN(3), c.IntN(3))
	case 21:
		if err = unix.Lsetxattr(p, "user.t"+strconv.Itoa(c.IntN(2)), []byte{byte(c.IntN(3))}, 0); c.IntN(2) == 0 {
			err = unix.Lremovexattr(p, "user.t0")
		}
	case 22:
		mode := []uint32{unix.S_IFIFO | 0o622, unix.S_IFSOCK | 0o755, unix.S_IFCHR | 0o600, unix.S_IFBLK | 0o600}[c.IntN(4)]
		err = unix.Mknod(p, mode, int(unix.Mkdev(1, 3)))
	case 23: // a file where a directory was
		err = errors.Join(os.RemoveAll(p), c.write(p))
	}
	if err == nil {
		c.done++
	}
}

// write never waits: the name may be a pipe.
func (c *container) write(p string) error {
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(c.bytes())
	return errors.Join(err, f.Close())
}

func (c *container) modify(p string, fn func(f *os.File, size int64) error) error {
	f, err := os.OpenFile(p, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return errors.Join(err, os.ErrInvalid)
	}
	return fn(f, fi.Size())
}

// again replaces a file by one that differs in nothing but its inode.
func (c *container) again(p string) error {
	return c.modify(p, func(f *os.File, _ int64) error {
		fi, _ := f.Stat()
		data, err := io.ReadAll(f)
		if err != nil {
			return err
		}
		return errors.Join(os.Remove(p), os.WriteFile(p, data, fi.Mode().Perm()), os.Chmod(p, fi.Mode().Perm()), os.Chtimes(p, fi.ModTime(), fi.ModTime()))
	})
}

// describe lists a mounted tree, everything a process can see of it. A name that is
// listed but is not there is in the list as such.
func describe(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	first := map[uint64]string{}
	var walk func(rel string)
	walk = func(rel string) {
		p := filepath.Join(dir, rel)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			out[rel] = err.Error()
			return
		}
		line := fmt.Sprintf("mode=%o own=%d:%d rdev=%d mtime=%d.%d", st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		kind := st.Mode & unix.S_IFMT
		if kind != unix.S_IFDIR {
			line += fmt.Sprintf(" nlink=%d", st.Nlink)
			if f, ok := first[st.Ino]; ok && st.Nlink > 1 {
				line += " same=" + f
			}
			first[st.Ino] = rel
		}
		switch kind {
		case unix.S_IFREG:
			f, err := os.Open(p)
			must(t, err)
			h := sha256.New()
			_, err = io.Copy(h, f)
			must(t, errors.Join(err, f.Close()))
			line += fmt.Sprintf(" size=%d sum=%x", st.Size, h.Sum(nil)[:8])
		case unix.S_IFLNK:
			to, err := os.Readlink(p)
			must(t, err)
			line += " to=" + to
		}
		for _, x := range []string{"user.t0", "user.t1"} {
			var b [8]byte
			if n, err := unix.Lgetxattr(p, x, b[:]); err == nil {
				line += fmt.Sprintf(" %s=%x", x, b[:n])
			}
		}
		out[rel] = line
		if kind == unix.S_IFDIR {
			entries, err := os.ReadDir(p)
			must(t, err)
			for _, e := range entries {
				walk(filepath.Join(rel, e.Name()))
			}
		}
	}
	walk("")
	return out
}

func same(t *testing.T, want, got map[string]string) bool {
	t.Helper()
	ok := true
	for _, n := range slices.Sorted(maps.Keys(want)) {
		if got[n] != want[n] {
			t.Logf("/%s:\nwant %s\n got %s", n, want[n], got[n])
			ok = false
		}
	}
	for _, n := range slices.Sorted(maps.Keys(got)) {
		if _, has := want[n]; !has {
			t.Logf("/%s: not there before: %s", n, got[n])
			ok = false
		}
	}
	return ok
}

// du adds up the regular files, each once.
func du(t *testing.T, dir string) (sum uint64) {
	t.Helper()
	seen := map[uint64]bool{}
	must(t, filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		if e.Type().IsRegular() && !seen[st.Ino] {
			seen[st.Ino] = true
			sum += uint64(st.Size) //nolint:gosec // not negative
		}
		return nil
	}))
	return sum
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
