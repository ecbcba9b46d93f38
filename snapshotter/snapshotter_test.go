// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/capture"
	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

// containerd's mount package changes the working directory of a thread and lets the
// thread end. The process's first thread cannot end, and would keep the test's disk
// busy; so it is given to the main goroutine, which mounts nothing.
func init() { runtime.LockOSThread() }

// disk is a file system on which roots for one backend can be made.
type disk struct {
	name string
	dir  string
	n    *atomic.Int32
}

func disks(t *testing.T) []disk {
	t.Helper()
	testdisk.Root(t)
	return []disk{
		{backend.Btrfs, testdisk.Btrfs(t), new(atomic.Int32)},
		{backend.Reflink, testdisk.XFS(t), new(atomic.Int32)},
		{backend.Copy, testdisk.Ext4(t), new(atomic.Int32)},
	}
}

// root makes a fresh root.
func (d disk) root() (string, error) {
	dir := filepath.Join(d.dir, fmt.Sprint(d.n.Add(1)))
	if d.name == backend.Btrfs {
		return dir, uapi.CreateSubvolume(dir)
	}
	return dir, os.Mkdir(dir, 0o700)
}

func (d disk) backend(root string) (backend.Backend, error) {
	switch d.name {
	case backend.Btrfs:
		return backend.NewBtrfs(root)
	case backend.Reflink:
		return backend.NewReflink(), nil
	}
	return backend.NewCopy(root)
}

// open opens the snapshotter and the captures of a root, as cohortd does.
func (d disk) open(ctx context.Context, root string) (*Snapshotter, *capture.Store, error) {
	b, err := d.backend(root)
	if err != nil {
		return nil, nil, err
	}
	store, err := capture.NewStore(ctx, root, b)
	if err != nil {
		return nil, nil, err
	}
	sn, err := New(ctx, root, store)
	return sn, store, err
}

// containerd's own conformance suite, on every backend.
func TestSuite(t *testing.T) {
	for _, d := range disks(t) {
		t.Run(d.name, func(t *testing.T) {
			// The name tells the suite that directories of lower layers cannot be renamed.
			testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, _ string) (snapshots.Snapshotter, func() error, error) {
				root, err := d.root()
				if err != nil {
					return nil, nil, err
				}
				sn, store, err := d.open(ctx, root)
				if err != nil {
					return nil, nil, err
				}
				return sn, func() error { return errors.Join(sn.Close(), store.Close()) }, nil
			})
		})
	}
}

// world is one root, opened, with what tests do all the time.
type world struct {
	*testing.T
	disk  disk
	root  string
	sn    *Snapshotter
	store *capture.Store
}

// each runs a test on every backend.
func each(t *testing.T, fn func(w *world)) {
	t.Helper()
	for _, d := range disks(t) {
		t.Run(d.name, func(t *testing.T) { fn(newWorld(t, d)) })
	}
}

// one runs a test whose promise has nothing to do with the backend.
func one(t *testing.T) *world {
	t.Helper()
	testdisk.Root(t)
	return newWorld(t, disk{backend.Copy, t.TempDir(), new(atomic.Int32)})
}

func newWorld(t *testing.T, d disk) *world {
	t.Helper()
	root, err := d.root()
	w := &world{T: t, disk: d, root: root}
	w.must(err)
	w.start()
	t.Cleanup(func() {
		w.must(w.sn.Close())
		w.must(w.store.Close())
	})
	return w
}

func (w *world) start() {
	w.Helper()
	var err error
	w.sn, w.store, err = w.disk.open(w.Context(), w.root)
	w.must(err)
}

// crash gives up everything in memory and starts again from the disk. The old metastore
// must be closed for that, since a lock on it dies only with the process.
func (w *world) crash() {
	w.Helper()
	w.must(w.sn.Close())
	w.start()
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.root}, elem...)...)
}

func (w *world) id(key string) string {
	w.Helper()
	m, err := w.sn.Mounts(w.Context(), key)
	w.must(err)
	for _, o := range m[0].Options {
		if v, ok := strings.CutPrefix(o, "upperdir="); ok {
			return filepath.Base(filepath.Dir(v))
		}
	}
	return filepath.Base(filepath.Dir(m[0].Source))
}

// unpack makes a layer as containerd's unpacker does, and returns its name.
func (w *world) unpack(parent, name string, fill func(dir string)) error {
	w.Helper()
	key := "ns/7/" + fmt.Sprintf(snapshots.UnpackKeyFormat, "123-ab_-", digest.FromString(name))
	_, err := w.sn.Prepare(w.Context(), key, parent)
	w.must(err)
	fill(w.path("snapshots", w.id(key), "fs"))
	err = w.sn.Commit(w.Context(), name, key)
	if err != nil {
		w.must(w.sn.Remove(w.Context(), key))
	}
	return err
}

func (w *world) mounted(mounts []mount.Mount, fn func(dir string)) {
	w.Helper()
	dir := w.TempDir()
	w.must(mount.All(mounts, dir))
	defer func() { w.must(unix.Unmount(dir, 0)) }()
	fn(dir)
}

func write(w *world, path, content string) {
	w.Helper()
	w.must(os.MkdirAll(filepath.Dir(path), 0o755))
	w.must(os.WriteFile(path, []byte(content), 0o644))
}

func read(w *world, path string) string {
	w.Helper()
	data, err := os.ReadFile(path)
	w.must(err)
	return string(data)
}

// checkpointOf returns what is kept beside the layer that is topmost in a view.
func (w *world) checkpointOf(name string) string {
	w.Helper()
	key := "view of " + name
	m, err := w.sn.View(w.Context(), key, name)
	w.must(err)
	defer func() { w.must(w.sn.Remove(w.Context(), key)) }()
	top := m[0].Source
	for _, o := range m[0].Options {
		if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
			top, _, _ = strings.Cut(v, ":")
		}
	}
	return filepath.Join(filepath.Dir(top), "checkpoint")
}

func TestCheckpointLayerIsTakenApart(t *testing.T) {
	each(t, func(w *world) {
		w.must(w.unpack("", "base", func(dir string) { write(w, dir+"/bin/app", "app") }))
		w.must(w.unpack("base", "cp", func(dir string) {
			write(w, dir+"/.cohort/checkpoint/pages-1.img", "pages"+strings.Repeat("x", 1<<20))
			w.must(os.Chown(dir+"/.cohort", 1000, 1000))
			w.must(os.Chmod(dir+"/.cohort", 0o777))
		}))
		dir := w.checkpointOf("cp")
		if got := read(w, dir+"/checkpoint/pages-1.img"); !strings.HasPrefix(got, "pages") {
			t.Errorf("content %q", got[:10])
		}
		if u, err := w.sn.Usage(w.Context(), "cp"); err != nil || u.Size < 1<<20 {
			t.Errorf("usage %v does not count the checkpoint: %v", u, err)
		}
		var st unix.Stat_t
		w.must(unix.Lstat(dir, &st))
		if st.Mode != unix.S_IFDIR|0o700 || st.Uid != 0 || st.Gid != 0 {
			t.Errorf("mode %o of %d:%d", st.Mode, st.Uid, st.Gid)
		}
		m, err := w.sn.Prepare(w.Context(), "container", "cp")
		w.must(err)
		w.mounted(m, func(dir string) {
			read(w, dir+"/bin/app")
			for _, name := range []string{".cohort", "checkpoint"} {
				if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the container sees /%s: %v", name, err)
				}
			}
		})
	})
}

func TestMalformedCheckpointLayerIsRefused(t *testing.T) {
	w := one(t)
	outside := t.TempDir()
	for name, fill := range map[string]func(dir string){
		"symbolic link":        func(dir string) { w.must(os.Symlink(outside, dir+"/.cohort")) },
		"file":                 func(dir string) { write(w, dir+"/.cohort", "") },
		"whiteout":             func(dir string) { w.must(unix.Mknod(dir+"/.cohort", unix.S_IFCHR, 0)) },
		"symbolic link inside": func(dir string) { w.must(os.Mkdir(dir+"/.cohort", 0o755)); w.must(os.Symlink("/", dir+"/.cohort/c")) },
		"device inside": func(dir string) {
			w.must(os.Mkdir(dir+"/.cohort", 0o755))
			w.must(unix.Mknod(dir+"/.cohort/d", unix.S_IFCHR, 1))
		},
		"fifo inside": func(dir string) {
			w.must(os.Mkdir(dir+"/.cohort", 0o755))
			w.must(unix.Mkfifo(dir+"/.cohort/p", 0o600))
		},
	} {
		if err := w.unpack("", name, fill); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if fi, err := os.Stat(outside); err != nil || fi.Mode().Perm() == 0o700 && fi.Sys() == nil {
		t.Errorf("outside: %v", err)
	}
}

// What a container writes never becomes a checkpoint, and is not in the layer either.
func TestContainersOwnReservedDirectoryIsNoCheckpoint(t *testing.T) {
	w := one(t)
	w.must(w.unpack("", "base", func(dir string) { write(w, dir+"/f", "") }))
	for _, key := range []string{
		"container", "ns/3/container", "extract-container", "ns/3/extract-1 container",
		"ns/3/extract-1 2 " + digest.FromString("x").String(), "ns/3/a/extract-1 " + digest.FromString("x").String(),
	} {
		_, err := w.sn.Prepare(w.Context(), key, "base")
		w.must(err)
		write(w, w.path("snapshots", w.id(key), "fs/.cohort/config.dump"), "forged")
		w.must(w.sn.Commit(w.Context(), "commit of "+key, key))
		if _, err := os.Lstat(w.checkpointOf("commit of " + key)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s became a checkpoint: %v", key, err)
		}
		if m, _ := filepath.Glob(w.path("snapshots/*/fs/.cohort")); len(m) > 0 {
			t.Errorf("%s left %v", key, m)
		}
	}
	// By way of an image: the diff of a container's layer, unpacked.
	w.must(w.unpack("base", "image", func(dir string) {
		write(w, dir+"/.cohort/config.dump", "forged")
		write(w, dir+"/tmp/other", "")
	}))
	if _, err := os.Lstat(w.checkpointOf("image")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a layer with other files became a checkpoint: %v", err)
	}
	if m, _ := filepath.Glob(w.path("snapshots/*/fs/.cohort")); len(m) > 0 {
		t.Errorf("left %v", m)
	}
}

func TestMountsKeepTheUpperDirectorySelfContained(t *testing.T) {
	each(t, func(w *world) {
		w.must(w.unpack("", "base", func(dir string) {
			write(w, dir+"/d/f", "old")
			write(w, dir+"/big", strings.Repeat("x", 1<<16))
		}))
		m, err := w.sn.Prepare(w.Context(), "c", "base")
		w.must(err)
		for _, o := range []string{"index=off", "redirect_dir=off", "metacopy=off"} {
			if !slices.Contains(m[0].Options, o) {
				t.Errorf("%s is not in %v", o, m[0].Options)
			}
		}
		w.mounted(m, func(dir string) {
			if err := os.Rename(dir+"/d", dir+"/e"); !errors.Is(err, unix.EXDEV) {
				t.Errorf("a directory of a layer was renamed by reference: %v", err)
			}
			w.must(os.Chmod(dir+"/big", 0o600))
		})
		if got := len(read(w, w.path("snapshots", w.id("c"), "fs/big"))); got != 1<<16 {
			t.Errorf("a changed mode copied %d bytes of 65536", got)
		}
	})
}

func TestHalfMadeDirectoriesAreClearedAtStart(t *testing.T) {
	each(t, func(w *world) {
		_, err := w.sn.Prepare(w.Context(), "kept", "")
		w.must(err)
		write(w, w.path("snapshots", w.id("kept"), "fs/f"), "kept")
		for _, name := range []string{"new-123/fs", "new-123/work", "99/fs", "rm-5/fs", "100/fs/.cohort"} {
			write(w, w.path("snapshots", name, "x"), "garbage")
		}
		w.crash()
		w.must(w.sn.Cleanup(w.Context()))
		got, err := filepath.Glob(w.path("snapshots/*"))
		w.must(err)
		if want := []string{w.path("snapshots", w.id("kept"))}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		if read(w, w.path("snapshots", w.id("kept"), "fs/f")) != "kept" {
			t.Error("content lost")
		}
	})
}

func TestActiveSnapshotSurvivesARestartWhileMounted(t *testing.T) {
	each(t, func(w *world) {
		w.must(w.unpack("", "base", func(dir string) { write(w, dir+"/f", "base") }))
		m, err := w.sn.Prepare(w.Context(), "c", "base")
		w.must(err)
		w.mounted(m, func(dir string) {
			write(w, dir+"/before", "1")
			w.crash()
			write(w, dir+"/after", "2")
			again, err := w.sn.Mounts(w.Context(), "c")
			w.must(err)
			if fmt.Sprint(again) != fmt.Sprint(m) {
				t.Errorf("other mounts: %v, %v", again, m)
			}
		})
		info, err := w.sn.Stat(w.Context(), "c")
		w.must(err)
		if info.Kind != snapshots.KindActive {
			t.Errorf("kind %v", info.Kind)
		}
		w.must(w.sn.Commit(w.Context(), "done", "c"))
		v, err := w.sn.View(w.Context(), "v", "done")
		w.must(err)
		w.mounted(v, func(dir string) {
			if read(w, dir+"/before") != "1" || read(w, dir+"/after") != "2" {
				t.Error("content lost")
			}
		})
	})
}

func TestRemoveFreesTheDirectoryAndNeverWaitsForIt(t *testing.T) {
	w := one(t)
	_, err := w.sn.Prepare(w.Context(), "c", "")
	w.must(err)
	id := w.id("c")
	write(w, w.path("snapshots", id, "fs/f"), "x")
	w.must(w.sn.Remove(w.Context(), "c"))
	if _, err := os.Lstat(w.path("snapshots", id)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	w.must(w.sn.Cleanup(w.Context()))
	if left, _ := filepath.Glob(w.path("snapshots/*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func TestUsageCountsWhatWasWritten(t *testing.T) {
	each(t, func(w *world) {
		_, err := w.sn.Prepare(w.Context(), "c", "")
		w.must(err)
		empty, err := w.sn.Usage(w.Context(), "c")
		w.must(err)
		write(w, w.path("snapshots", w.id("c"), "fs/f"), strings.Repeat("x", 1<<20))
		full, err := w.sn.Usage(w.Context(), "c")
		w.must(err)
		if d := full.Size - empty.Size; d < 1<<20 || d > 2<<20 || full.Inodes != empty.Inodes+1 {
			t.Errorf("1 MiB in one file counts %d bytes, %d inodes", d, full.Inodes-empty.Inodes)
		}
		w.must(w.sn.Commit(w.Context(), "l", "c"))
		committed, err := w.sn.Usage(w.Context(), "l")
		w.must(err)
		if committed != full {
			t.Errorf("committed %v, was %v", committed, full)
		}
	})
}

func TestMappedRootOwnsTheUpperDirectory(t *testing.T) {
	w := one(t)
	labels := map[string]string{
		snapshots.LabelSnapshotUIDMapping: "1:5:1,0:7000:65536", snapshots.LabelSnapshotGIDMapping: "0:8000:65536",
	}
	m, err := w.sn.Prepare(w.Context(), "c", "", snapshots.WithLabels(labels))
	w.must(err)
	var st unix.Stat_t
	w.must(unix.Stat(w.path("snapshots", w.id("c"), "fs"), &st))
	if st.Uid != 7000 || st.Gid != 8000 || !slices.Contains(m[0].Options, "uidmap=1:5:1,0:7000:65536") {
		t.Errorf("owner %d:%d, options %v", st.Uid, st.Gid, m[0].Options)
	}
	for _, bad := range []string{"", "0:1", "a:b:c", "5:7000:1", "0:-1:1"} {
		labels[snapshots.LabelSnapshotUIDMapping] = bad
		if _, err := w.sn.Prepare(w.Context(), "bad", "", snapshots.WithLabels(labels)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

const leaseForTests = time.Minute
