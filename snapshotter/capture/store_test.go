// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/snapshotter/backend"
)

const (
	id1 = "11111111111111111111111111111111"
	id2 = "22222222222222222222222222222222"
)

// fake is a backend that only counts. Its captures are a directory with one file.
type fake struct {
	mu      sync.Mutex
	open    int
	openErr error
	takeErr error
}

func (f *fake) Name() string { return "fake" }

func (f *fake) Open(_ context.Context, _, dst string) (backend.Capture, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.openErr != nil {
		return nil, f.openErr
	}
	f.open++
	return &fakeCapture{f: f, dst: dst}, nil
}

func (f *fake) Discard(dst string) error { return os.RemoveAll(dst) }

func (f *fake) running() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open
}

type fakeCapture struct {
	f    *fake
	dst  string
	once sync.Once
}

func (c *fakeCapture) Ready(context.Context) error { return nil }

func (c *fakeCapture) Take(context.Context) error { return c.f.takeErr }

func (c *fakeCapture) Seal(context.Context) error {
	return errors.Join(os.Mkdir(c.dst, 0o755), os.WriteFile(filepath.Join(c.dst, "file"), []byte("12345"), 0o600))
}

func (c *fakeCapture) Close() error {
	c.once.Do(func() {
		c.f.mu.Lock()
		defer c.f.mu.Unlock()
		c.f.open--
	})
	return nil
}

func newStore(t *testing.T, root string) (*Store, *fake) {
	t.Helper()
	f := &fake{}
	s, err := NewStore(t.Context(), root, f)
	must(t, err)
	return s, f
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// nothing checks that no capture is known, under way or on the disk.
func nothing(t *testing.T, s *Store, f *fake) {
	t.Helper()
	left, err := os.ReadDir(s.dir)
	must(t, err)
	if n := len(s.List()); n+f.running()+len(left) > 0 {
		t.Fatalf("%d captures known, %d under way, %v on disk", n, f.running(), left)
	}
}

func TestStatesFollowEachOther(t *testing.T) {
	s, f := newStore(t, t.TempDir())
	ctx := t.Context()
	if _, err := s.Take(ctx, id1, 0); !errdefs.IsNotFound(err) {
		t.Errorf("take of nothing: %v", err)
	}
	info, err := s.Open(ctx, id1, "/upper", time.Minute, map[string]string{"k": "v"})
	must(t, err)
	if fi, err := os.Stat(filepath.Join(info.Dir, "checkpoint")); err != nil || fi.Mode() != os.ModeDir|0o700 {
		t.Errorf("checkpoint directory: %v, %v", fi, err)
	}
	if _, err := s.Seal(ctx, id1); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("seal before take: %v", err)
	}
	if _, err := s.Open(ctx, id1, "/upper", 0, nil); err != nil {
		t.Errorf("open again: %v", err)
	}
	if _, err := s.Open(ctx, id1, "/other", 0, nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("open with an id in use: %v", err)
	}
	for range 2 { // may be called again
		_, err = s.Take(ctx, id1, 0)
		must(t, err)
	}
	for range 2 {
		sealed, err := s.Seal(ctx, id1)
		must(t, err)
		if sealed.State != Sealed || sealed.StorageBytes != 5 {
			t.Errorf("sealed: %+v", sealed)
		}
	}
	if f.running() != 0 {
		t.Error("the backend's capture was not closed")
	}
	for range 2 {
		must(t, s.Discard(id1))
	}
	nothing(t, s, f)
}

func TestFailedOpenLeavesNothing(t *testing.T) {
	s, f := newStore(t, t.TempDir())
	f.openErr = fmt.Errorf("disk full")
	if _, err := s.Open(t.Context(), id1, "/upper", 0, nil); !errors.Is(err, f.openErr) {
		t.Fatalf("got %v", err)
	}
	nothing(t, s, f)
	f.openErr = nil
	_, err := s.Open(t.Context(), id1, "/upper", 0, nil)
	must(t, err)
}

func TestMountPointsOfADumpAreNoPartOfACapture(t *testing.T) {
	dir := t.TempDir()
	removed, kept := "tmp/cr-tmpfs.aBcDeF", []string{"tmp/cr-tmpfs.mine/file", "tmp/other", "cr-tmpfs.aBcDeF"}
	for _, d := range append(kept, removed) {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	must(t, removeMountPoints(dir))
	for _, d := range kept {
		_, err := os.Stat(filepath.Join(dir, d))
		must(t, err)
	}
	if _, err := os.Stat(filepath.Join(dir, removed)); !os.IsNotExist(err) {
		t.Errorf("%s is still there (%v)", removed, err)
	}
	// What the container makes of its /tmp leads nowhere else.
	outside := t.TempDir()
	must(t, os.Mkdir(filepath.Join(outside, "cr-tmpfs.x"), 0o700))
	must(t, os.RemoveAll(filepath.Join(dir, "tmp")))
	must(t, removeMountPoints(dir))
	must(t, os.Symlink(outside, filepath.Join(dir, "tmp")))
	must(t, removeMountPoints(dir))
	_, err := os.Stat(filepath.Join(outside, "cr-tmpfs.x"))
	must(t, err)
}

func TestFailedTakeCanBeTriedAgainOrDiscarded(t *testing.T) {
	s, f := newStore(t, t.TempDir())
	_, err := s.Open(t.Context(), id1, "/upper", time.Minute, nil)
	must(t, err)
	f.takeErr = fmt.Errorf("once")
	if _, err := s.Take(t.Context(), id1, 0); !errors.Is(err, f.takeErr) {
		t.Fatalf("got %v", err)
	}
	if _, err := s.Seal(t.Context(), id1); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a capture that was not taken was sealed: %v", err)
	}
	f.takeErr = nil
	_, err = s.Take(t.Context(), id1, 0)
	must(t, err)
	must(t, s.Discard(id1))
	nothing(t, s, f)
}

// gone waits until the store has no captures; leases end by themselves.
func gone(t *testing.T, s *Store, within time.Duration) bool {
	t.Helper()
	for end := time.Now().Add(within); time.Now().Before(end); {
		if len(s.List()) == 0 {
			return true
		}
		<-time.After(2 * time.Millisecond)
	}
	return false
}

func TestLeaseThatEndsDiscardsWhatIsNotSealed(t *testing.T) {
	for _, take := range []bool{false, true} {
		s, f := newStore(t, t.TempDir())
		_, err := s.Open(t.Context(), id1, "/upper", 50*time.Millisecond, nil)
		must(t, err)
		if take {
			_, err = s.Take(t.Context(), id1, 0)
			must(t, err)
		}
		if !gone(t, s, 10*time.Second) {
			t.Fatalf("taken %v: still there", take)
		}
		nothing(t, s, f)
	}
}

func TestRenewedAndSealedCapturesOutliveTheFirstLease(t *testing.T) {
	s, _ := newStore(t, t.TempDir())
	for _, id := range []string{id1, id2} {
		_, err := s.Open(t.Context(), id, "/upper", 100*time.Millisecond, nil)
		must(t, err)
	}
	must(t, s.Renew(id1, time.Minute))
	_, err := s.Take(t.Context(), id2, 0)
	must(t, err)
	_, err = s.Seal(t.Context(), id2)
	must(t, err)
	if gone(t, s, 300*time.Millisecond) || len(s.List()) != 2 {
		t.Fatalf("left: %v", s.List())
	}
}

func TestStartDiscardsTheUnsealedAndKeepsTheSealed(t *testing.T) {
	root := t.TempDir()
	s, _ := newStore(t, root)
	for _, id := range []string{id1, id2} {
		_, err := s.Open(t.Context(), id, "/upper", time.Minute, map[string]string{"k": "v"})
		must(t, err)
		_, err = s.Take(t.Context(), id, 0)
		must(t, err)
	}
	_, err := s.Seal(t.Context(), id2)
	must(t, err)
	// Made by a process that died before it wrote the record.
	must(t, os.MkdirAll(filepath.Join(s.dir, strings.Repeat("3", 32), "fs"), 0o700))
	// Half removed: the record goes first.
	must(t, os.MkdirAll(filepath.Join(s.dir, strings.Repeat("4", 32), "checkpoint"), 0o700))

	s, f := newStore(t, root)
	if l := s.List(); len(l) != 1 || l[0].ID != id2 || l[0].State != Sealed || l[0].StorageBytes != 5 || l[0].Labels["k"] != "v" {
		t.Errorf("after the start: %+v", l)
	}
	if left, _ := filepath.Glob(s.dir + "/*"); len(left) != 1 {
		t.Errorf("on disk: %v", left)
	}
	must(t, s.Discard(id2))
	nothing(t, s, f)
}

// A record that cannot be read may be a sealed capture's: it is not thrown away.
func TestStartLeavesAnUnreadableRecordAlone(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "captures", id1)
	must(t, os.MkdirAll(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, recordName), []byte("{"), 0o600))
	s, _ := newStore(t, root)
	if _, err := os.Stat(dir); err != nil || len(s.List()) != 0 {
		t.Errorf("%v, %v", err, s.List())
	}
}

func TestIdsAreExactly32HexDigits(t *testing.T) {
	s, _ := newStore(t, t.TempDir())
	for _, bad := range []string{"", ".", "..", "../x", id1[1:], id1 + "1", strings.Repeat("A", 32), strings.Repeat("g", 32), id1[:31] + "/", id1[:31] + "\n"} {
		_, err := s.Open(t.Context(), bad, "/upper", 0, nil)
		for what, err := range map[string]error{"open": err, "discard": s.Discard(bad), "renew": s.Renew(bad, 0)} {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s %q: %v", what, bad, err)
			}
		}
	}
}

func TestCloseDiscardsTheUnsealedAndRefusesNew(t *testing.T) {
	s, f := newStore(t, t.TempDir())
	_, err := s.Open(t.Context(), id1, "/upper", time.Minute, nil)
	must(t, err)
	must(t, s.Close())
	nothing(t, s, f)
	if _, err := s.Open(t.Context(), id2, "/upper", 0, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v", err)
	}
}

// Everything at once, for the race detector: at the end nothing may be left.
func TestConcurrentCallsLeaveNothing(t *testing.T) {
	s, f := newStore(t, t.TempDir())
	var all sync.WaitGroup
	for n := range 8 {
		all.Go(func() {
			id := fmt.Sprintf("%032x", n/2) // two for each
			for range 10 {
				_, _ = s.Open(t.Context(), id, "/upper", time.Duration(n+1)*time.Millisecond, nil)
				_, _ = s.Take(t.Context(), id, 0)
				_, _ = s.Seal(t.Context(), id)
				s.List()
				_ = s.Discard(id)
			}
		})
	}
	all.Wait()
	must(t, s.Close())
	nothing(t, s, f)
}
