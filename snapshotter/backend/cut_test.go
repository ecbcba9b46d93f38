// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// ledger writes one byte to the file a, then one to the file b, again and again. In
// any cut of one instant, a is as long as b or one byte longer.
type ledger struct {
	stop chan struct{}
	done chan error
}

func startLedger(t *testing.T, dir string, flags int) *ledger {
	t.Helper()
	var files [2]*os.File
	for i, name := range []string{"a", "b"} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY|os.O_APPEND|flags, 0o600)
		must(t, err)
		files[i] = f
	}
	l := &ledger{stop: make(chan struct{}), done: make(chan error, 1)}
	running := make(chan struct{})
	go func() {
		defer files[0].Close()
		defer files[1].Close()
		for n := 0; ; n++ {
			select {
			case <-l.stop:
				l.done <- nil
				return
			default:
			}
			for _, f := range files {
				if _, err := f.Write([]byte{'x'}); err != nil {
					l.done <- err
					return
				}
			}
			if n == 100 {
				close(running)
			}
		}
	}()
	select {
	case <-running:
	case err := <-l.done:
		t.Fatal(err)
	}
	return l
}

func (l *ledger) end(t *testing.T) {
	t.Helper()
	close(l.stop)
	must(t, <-l.done)
}

func consistent(t *testing.T, dir string) bool {
	t.Helper()
	var size [2]int64
	for i, name := range []string{"a", "b"} {
		fi, err := os.Stat(filepath.Join(dir, name))
		must(t, err)
		size[i] = fi.Size()
	}
	return size[0] == size[1] || size[0] == size[1]+1
}

// cuts captures a ledger's directory until one capture is not of one instant, at most
// rounds times, and tells how many were and whether one was not.
func cuts(t *testing.T, factory func(testing.TB) (string, Backend), rounds, flags int, stopped bool) (good int, torn bool) {
	t.Helper()
	root, b := factory(t)
	src, dst := filepath.Join(root, "src"), filepath.Join(root, "dst")
	must(t, os.Mkdir(src, 0o755))
	for good = range rounds {
		l := startLedger(t, src, flags)
		c, err := b.Open(t.Context(), src, dst)
		must(t, err)
		if stopped {
			l.end(t)
		}
		must(t, c.Take(t.Context()))
		if !stopped {
			// So that the second pass has not only just begun when the writer ends.
			<-time.After(time.Millisecond)
			l.end(t)
		}
		must(t, c.Seal(t.Context()))
		must(t, c.Close())
		ok := consistent(t, dst)
		must(t, b.Discard(dst))
		must(t, os.Remove(filepath.Join(src, "a")))
		must(t, os.Remove(filepath.Join(src, "b")))
		if !ok {
			return good, true
		}
	}
	return rounds, false
}

// In a snapshot what a running writer has synced is captured at one instant; what is
// only in the page cache is not, because the snapshot writes back file after file
// first. Therefore the barrier freezes the writers for every backend.
func TestSnapshotCutIsOneInstantForSyncedWritesOfRunningWriters(t *testing.T) {
	if good, torn := cuts(t, newSnapshots, 10, os.O_SYNC, false); torn {
		t.Fatalf("capture %d is not of one instant", good)
	}
}

func TestCutIsOneInstantWithStoppedWriters(t *testing.T) {
	for name, factory := range map[string]func(testing.TB) (string, Backend){Btrfs: newBtrfs, "snapshots": newSnapshots, Reflink: newReflink, Copy: newCopy} {
		t.Run(name, func(t *testing.T) {
			if good, torn := cuts(t, factory, 10, 0, true); torn {
				t.Fatalf("capture %d is not of one instant", good)
			}
		})
	}
}

// The negative controls of the two tests above: where the promise is not given, the
// same check must find that it is not kept.
func TestLedgerFindsATornCut(t *testing.T) {
	for name, flags := range map[string]int{"buffered": 0, "synced": os.O_SYNC} {
		t.Run(name, func(t *testing.T) {
			if _, torn := cuts(t, newCopy, 200, flags, false); !torn {
				t.Fatal("200 captures file by file, with the writer running, and none was seen to be torn: the check sees nothing")
			}
		})
	}
}
