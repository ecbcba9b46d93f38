// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// epochs takes n checkpoints of the running program, the last of which ends it; how says of each in which way.
func (m *mutator) epochs(root string, n int, how func(int) (tracked bool)) (dirs []string) {
	m.t.Helper()
	for i := range n {
		m.keep = i < n-1
		dir := filepath.Join(root, fmt.Sprint(i), "checkpoint")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			m.t.Fatal(err)
		}
		var chain *Chain
		if i > 0 {
			var err error
			if chain, err = OpenChain(dirs); err != nil {
				m.t.Fatal(err)
			}
		}
		if how(i) {
			m.epoch(dir, chain)
		} else {
			m.dump(dir)
		}
		own := imageSize(m.t, dir)
		if i > 0 {
			stats, err := Dedupe(context.Background(), dir, chain)
			if err != nil {
				m.t.Fatal(err)
			}
			m.t.Logf("%d: %+v", i, stats)
			if stats.InheritedPages == 0 || imageSize(m.t, dir) > own {
				m.t.Errorf("checkpoint %d holds everything: %d bytes of %d, %+v", i, imageSize(m.t, dir), own, stats)
			}
			checkSharedIncrement(m.t, dir)
			if err := chain.Close(); err != nil {
				m.t.Fatal(err)
			}
		}
		dirs = slices.Insert(dirs, 0, dir)
		time.Sleep(3 * time.Millisecond)
	}
	return dirs
}

func imageSize(t testing.TB, dir string) (n int64) {
	t.Helper()
	err := filepath.Walk(dir, func(_ string, st os.FileInfo, err error) error {
		if err == nil {
			n += st.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// checkSharedIncrement: shared memory is in the parent, too.
func checkSharedIncrement(t testing.TB, dir string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, shmemPrefix+"*"+imageSuffix))
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	m, err := readPagemap(names[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range m.entries {
		if e.flags == flagParent {
			return
		}
	}
	t.Errorf("%s has nothing in its parent", names[0])
}

// epoch is a checkpoint with pre-copy.
func (m *mutator) epoch(dir string, chain *Chain) {
	m.t.Helper()
	s, err := NewStore(filepath.Join(filepath.Dir(dir), "store"))
	if err != nil {
		m.t.Fatal(err)
	}
	defer s.Discard()
	m.preCopy(s, 2)
	time.Sleep(3 * time.Millisecond)
	clean := m.dump(dir, "COHORT_CRIU_SKIP_CLEAN=1")
	if missing, err := s.Process(m.pid).MissingFrom(chain, clean); err != nil || len(missing) > 0 {
		m.t.Fatalf("missing %v, %v", missing, err)
	}
	var options []ComposeOption
	if chain != nil {
		options = append(options, WithParent(chain, func(int) bool { return true }))
	}
	stats, err := Compose(context.Background(), dir, s, map[int][]Range{m.pid: clean}, options...)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Logf("%+v", stats)
}

// restoreChain restores from links or merged, and has the program compare its memory.
func (m *mutator) restoreChain(dirs []string, merged bool) {
	m.t.Helper()
	dst := filepath.Join(m.t.TempDir(), "images")
	if merged {
		c, err := OpenChain(dirs)
		if err != nil {
			m.t.Fatal(err)
		}
		defer c.Close()
		materialise(m.t, c, dst)
	} else if err := Link(dst, dirs); err != nil {
		m.t.Fatal(err)
	}
	verdict, took := m.restore(dst)
	if !strings.HasPrefix(verdict, "0 of ") {
		m.t.Errorf("%s, merged=%v", verdict, merged)
	}
	m.t.Logf("%d checkpoints, merged=%v: %s, restored in %v", len(dirs), merged, verdict, took)
}

// TestEveryCheckpointOfAChainIsRestoredByPlainCRIU, by tracking, by content, and by both in turns.
func TestEveryCheckpointOfAChainIsRestoredByPlainCRIU(t *testing.T) {
	needRoot(t, "gcc", "criu")
	const pages, steps, depth = 3000, 10, 12
	for _, test := range []struct {
		name string
		how  func(int) bool
	}{
		{"tracked", func(int) bool { return true }},
		{"by content", func(int) bool { return false }},
		{"in turns", func(i int) bool { return i/2%2 == 0 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startMutator(t, pages, steps)
			dirs := m.epochs(t.TempDir(), depth, test.how)
			m.restoreChain(dirs, false)
			m.restoreChain(dirs, true)
			m.restoreChain(dirs[depth/2:], false)
			m.restoreChain(dirs[depth-1:], false)
			checkMissing(t, dirs, m.pid)
		})
	}
}

// checkMissing takes a page away that an older checkpoint must have: CRIU does not go on with zeros.
func checkMissing(t *testing.T, dirs []string, pid int) {
	t.Helper()
	dst := filepath.Join(t.TempDir(), "images")
	if err := Link(dst, dirs); err != nil {
		t.Fatal(err)
	}
	deepest := dst
	for {
		next := filepath.Join(deepest, parentDir)
		if _, err := os.Stat(filepath.Join(next, Object{Task, uint64(pid)}.pagemapName())); err != nil {
			break
		}
		deepest = next
	}
	path := filepath.Join(deepest, Object{Task, uint64(pid)}.pagemapName())
	m, err := readPagemap(path)
	if err != nil {
		t.Fatal(err)
	}
	m.entries = m.entries[:0]
	rewrite(t, path, m)
	err = tryCRIU(nil, dst, "restore", "--restore-detached")
	if err == nil || !strings.Contains(err.Error(), "in parent pagemap") {
		t.Errorf("restored with pages missing: %v", err)
	}
}

// TestAProcessWithAnotherRootIsRestoredThroughLinks: CRIU reads its pages when it has that root already.
func TestAProcessWithAnotherRootIsRestoredThroughLinks(t *testing.T) {
	needRoot(t, "gcc", "criu", "unshare")
	root := filepath.Join(t.TempDir(), "rootfs")
	for _, dir := range []string{"dev", "proc", "old"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(root, "mutator")
	output(t, "gcc", "-O2", "-static", "-o", program, "testdata/mutator.c")
	output(t, "mknod", filepath.Join(root, "dev", "null"), "c", "1", "3")
	enter := filepath.Join(t.TempDir(), "enter")
	output(t, "gcc", "-O2", "-Wall", "-o", enter, "testdata/enter.c")
	m := startMutatorAs(t, filepath.Join(root, "result"), exec.Command(enter, root, "/mutator", "1500", "10", "/result"))
	m.root = root
	m.before = append([]string{"unshare", "--mount", "--propagation", "private", "sh", "-e", "-c"}, fmt.Sprintf("mount --bind %[1]s %[1]s; exec \"$@\"", root), "sh")
	dirs := m.epochs(t.TempDir(), 3, func(i int) bool { return i != 1 })
	m.restoreChain(dirs, false)
}
