// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

// childEnv names the root in which a child of the test seals, to be killed.
const childEnv = "COHORT_TEST_SEAL"

func TestMain(m *testing.M) {
	if root := os.Getenv(childEnv); root != "" {
		if err := sealAsChild(root); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func sealAsChild(root string) error {
	ctx := context.Background()
	b, err := backend.NewCopy(root)
	if err != nil {
		return err
	}
	s, err := NewStore(ctx, root, b)
	if err != nil {
		return err
	}
	if _, err := s.Open(ctx, id2, filepath.Join(root, "snapshots/9/fs"), time.Hour, nil); err != nil {
		return err
	}
	if _, err := s.Take(ctx, id2, 0); err != nil {
		return err
	}
	fmt.Println("taken")
	_, err = s.Seal(ctx, id2, filepath.Join(root, "snapshots/1/fs"))
	fmt.Println("sealed")
	return err
}

// container makes a root on disk with a writable layer of some files, of which an earlier
// capture is a snapshot, and then changes one, removes one and adds one.
func container(t *testing.T, disk string, files int) (root, upper, parent string) {
	t.Helper()
	root, err := os.MkdirTemp(disk, "root")
	must(t, err)
	upper, parent = filepath.Join(root, "snapshots/9/fs"), filepath.Join(root, "snapshots/1/fs")
	must(t, os.MkdirAll(upper, 0o755))
	must(t, os.MkdirAll(filepath.Dir(parent), 0o755))
	for n := range files {
		p := filepath.Join(upper, fmt.Sprint("d", n%10), fmt.Sprint("f", n))
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		must(t, os.WriteFile(p, []byte(strings.Repeat("x", 100)), 0o600))
	}
	b, err := backend.NewCopy(root)
	must(t, err)
	c, err := b.Open(t.Context(), upper, parent)
	must(t, err)
	must(t, c.Take(t.Context()))
	must(t, c.Seal(t.Context()))
	must(t, os.WriteFile(filepath.Join(upper, "d0/f0"), []byte("changed"), 0o600))
	must(t, os.Remove(filepath.Join(upper, "d1/f1")))
	must(t, os.WriteFile(filepath.Join(upper, "d2/new"), []byte("new"), 0o600))
	return root, upper, parent
}

// increment is what is left of the container's layer.
var increment = []string{"d0/f0", "d1/f1 (whiteout)", "d2/new"}

func leaves(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if e.Type()&os.ModeCharDevice != 0 {
			rel += " (whiteout)"
		}
		out = append(out, rel)
		return nil
	}))
	return out
}

func TestSealLeavesOutWhatTheParentHas(t *testing.T) {
	ctx := t.Context()
	root, upper, parent := container(t, testdisk.Ext4(t), 50)
	b, err := backend.NewCopy(root)
	must(t, err)
	s, err := NewStore(ctx, root, b)
	must(t, err)
	_, err = s.Open(ctx, id1, upper, time.Hour, nil)
	must(t, err)
	_, err = s.Take(ctx, id1, 0)
	must(t, err)

	// One that ends before anything is removed can be tried again.
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Seal(ended, id1, parent); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	for range 2 {
		info, err := s.Seal(ctx, id1, parent)
		must(t, err)
		if info.StorageBytes != 10 || info.UnchangedBytes != 4800 {
			t.Errorf("%+v", info)
		}
		if got := leaves(t, info.Path(FS)); !slices.Equal(got, increment) {
			t.Errorf("left %q", got)
		}
	}
	if got := leaves(t, parent); len(got) != 50 {
		t.Errorf("the parent has %d files", len(got))
	}
	// Another process knows as much.
	s, err = NewStore(ctx, root, b)
	must(t, err)
	if l := s.List(); len(l) != 1 || l[0].UnchangedBytes != 4800 {
		t.Errorf("%+v", l)
	}
}

func TestParentsOutsideTheSnapshotsAreRefused(t *testing.T) {
	ctx := t.Context()
	root, upper, parent := container(t, testdisk.Ext4(t), 20)
	must(t, os.Symlink(parent, filepath.Join(root, "snapshots/2")))
	must(t, os.MkdirAll(filepath.Join(root, "snapshots/3"), 0o755))
	must(t, os.Symlink(parent, filepath.Join(root, "snapshots/3/fs")))
	b, err := backend.NewCopy(root)
	must(t, err)
	s, err := NewStore(ctx, root, b)
	must(t, err)
	_, err = s.Open(ctx, id1, upper, time.Hour, nil)
	must(t, err)
	_, err = s.Take(ctx, id1, 0)
	must(t, err)
	for _, bad := range []string{
		"", "/", "/etc", "snapshots/1/fs", root + "/snapshots", root + "/snapshots/1", root + "/snapshots//fs", root + "/snapshots/../fs",
		root + "/snapshots/1/fs/", root + "/snapshots/1/fs/d0", root + "/snapshots/1/../9/fs", root + "/snapshots/new-1/fs",
		root + "/captures/" + id1 + "/fs", root + "/snapshots/2/fs", root + "/snapshots/3/fs", root + "/snapshots/4/fs",
	} {
		for _, uppers := range [][]string{{bad}, {parent, bad}} {
			if _, err := s.Seal(ctx, id1, uppers...); err == nil {
				t.Fatalf("accepted %q", bad)
			} else if !errdefs.IsInvalidArgument(err) && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
				t.Errorf("%q: %v", bad, err)
			}
		}
	}
	_, err = s.Seal(ctx, id1, parent)
	must(t, err)
}

// sticky is a backend whose captures hold a file that cannot be removed.
type sticky struct {
	backend.Backend
	flags int
}

type stickyCapture struct {
	backend.Capture
	file  string
	flags *int
}

func (b *sticky) Open(ctx context.Context, src, dst string) (backend.Capture, error) {
	c, err := b.Backend.Open(ctx, src, dst)
	return stickyCapture{c, filepath.Join(dst, "d5/f5"), &b.flags}, err
}

func (c stickyCapture) Seal(ctx context.Context) error {
	return errors.Join(c.Capture.Seal(ctx), setFlags(c.file, *c.flags))
}

const immutable = 0x10 // FS_IMMUTABLE_FL, include/uapi/linux/fs.h

func setFlags(file string, flags int) error {
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags)
}

func TestHalfReducedCaptureIsNeverSealed(t *testing.T) {
	ctx := t.Context()
	root, upper, parent := container(t, testdisk.Ext4(t), 50)
	cp, err := backend.NewCopy(root)
	must(t, err)
	b := &sticky{Backend: cp, flags: immutable}
	s, err := NewStore(ctx, root, b)
	must(t, err)
	info, err := s.Open(ctx, id1, upper, time.Hour, nil)
	must(t, err)
	t.Cleanup(func() { must(t, setFlags(filepath.Join(info.Path(FS), "d5/f5"), 0)) }) // if it fails
	_, err = s.Take(ctx, id1, 0)
	must(t, err)
	if _, err := s.Seal(ctx, id1, parent); !errors.Is(err, unix.EPERM) {
		t.Fatalf("an immutable file was removed: %v", err)
	}
	must(t, setFlags(filepath.Join(info.Path(FS), "d5/f5"), 0))
	for _, uppers := range [][]string{{parent}, nil} {
		if _, err := s.Seal(ctx, id1, uppers...); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%v: %v", uppers, err)
		}
	}
	must(t, s.Discard(id1))
	if len(s.List()) != 0 {
		t.Error("still there")
	}
}

// A snapshot leaves out what did not change: what it made is not taken for a
// whole capture, whatever went wrong afterwards.
func TestReducedCaptureIsNotSealedAsAWholeOne(t *testing.T) {
	ctx := t.Context()
	disk := testdisk.Btrfs(t)
	root := filepath.Join(disk, "root")
	must(t, uapi.CreateSubvolume(root))
	upper, parent := filepath.Join(root, "snapshots/9/fs"), filepath.Join(root, "snapshots/1/fs")
	for _, d := range []string{upper, parent} {
		must(t, os.MkdirAll(d, 0o755))
		must(t, os.WriteFile(filepath.Join(d, "stays"), []byte("same"), 0o600))
		must(t, os.Chtimes(filepath.Join(d, "stays"), time.Unix(1, 0), time.Unix(1, 0)))
		must(t, os.WriteFile(filepath.Join(d, "changes"), []byte(d), 0o600))
	}
	b, err := backend.NewBtrfsSnapshots(root)
	must(t, err)
	s, err := NewStore(ctx, root, b)
	must(t, err)
	info, err := s.Open(ctx, id1, upper, time.Hour, nil)
	must(t, err)
	_, err = s.Take(ctx, id1, 0)
	must(t, err)
	// The record cannot be replaced by one that says sealed.
	record := filepath.Join(info.Dir, recordName)
	must(t, os.Rename(record, record+".old"))
	must(t, os.MkdirAll(record+"/full", 0o700))
	if _, err := s.Seal(ctx, id1, parent); err == nil {
		t.Fatal("sealed without a record")
	}
	if _, err := s.Seal(ctx, id1); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("sealed as a whole: %v", err)
	}
	must(t, os.RemoveAll(record))
	must(t, os.Rename(record+".old", record))
	sealed, err := s.Seal(ctx, id1, parent)
	must(t, err)
	if got := leaves(t, sealed.Path(FS)); !slices.Equal(got, []string{"changes"}) || sealed.UnchangedBytes != 4 {
		t.Errorf("%q, %+v", got, sealed)
	}
	must(t, s.Discard(id1))
	if left, err := os.ReadDir(filepath.Join(root, "cuts")); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// Whenever the process that seals dies, what the next one finds sealed is whole, and
// what is not sealed is gone.
func TestKilledSealLeavesAWholeCaptureOrNone(t *testing.T) {
	disk := testdisk.Ext4(t) // others' writes do not slow its flushes
	found := map[bool]int{}
	for n := range 8 {
		root, _, parent := container(t, disk, 600)
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+root)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "taken" {
			t.Fatalf("the child said %q", lines.Text())
		}
		if n == 0 {
			lines.Scan() // not before the end
		} else {
			<-time.After(time.Duration(n) * 4 * time.Millisecond)
		}
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()

		b, err := backend.NewCopy(root)
		must(t, err)
		s, err := NewStore(t.Context(), root, b)
		must(t, err)
		l := s.List()
		found[len(l) == 1]++
		if len(l) == 1 {
			if got := leaves(t, l[0].Path(FS)); !slices.Equal(got, increment) || l[0].StorageBytes != 10 || l[0].UnchangedBytes != 59800 {
				t.Errorf("sealed with %d files: %+v", len(got), l[0])
			}
		} else if left, err := os.ReadDir(s.dir); err != nil || len(left) > 0 {
			t.Errorf("left %v, %v", left, err)
		}
		if got := leaves(t, parent); len(got) != 600 {
			t.Errorf("the parent has %d files", len(got))
		}
	}
	if found[true] == 0 || found[false] == 0 {
		t.Logf("not both cases were met: %v", found)
	}
	t.Logf("sealed %d times, gone %d times", found[true], found[false])
}
