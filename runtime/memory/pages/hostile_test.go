// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// twoEpochs are a checkpoint with two levels and one that builds on it.
func twoEpochs(t *testing.T) *group {
	g := newGroup(t, 100, 1)
	for i := range 100 {
		g.write(g.addr(i), uint64(i+1))
	}
	g.checkpoint(false, true, false)
	for _, i := range []int{10, 50, 51, 90} {
		g.write(g.addr(i), 1000)
	}
	g.checkpoint(true, false, false)
	return g
}

// TestHostileChainsAreRefused, and soon: nothing of them is believed.
func TestHostileChainsAreRefused(t *testing.T) {
	move := func(path string) string {
		to := path + ".moved"
		must(t, os.Rename(path, to))
		return to
	}
	edit := func(t *testing.T, path string, change func(m *pagemap)) {
		m, err := readPagemap(path)
		must(t, err)
		change(m)
		rewrite(t, path, m)
	}
	for _, test := range []struct {
		name string
		want error
		harm func(t *testing.T, g *group, top, lower, old string) // pagemaps
	}{
		{"nothing", nil, func(*testing.T, *group, string, string, string) {}},
		{"truncated", errImage, func(t *testing.T, _ *group, _, lower, _ string) {
			st, err := os.Stat(lower)
			must(t, err)
			must(t, os.Truncate(lower, st.Size()-1))
		}},
		{"a pages file that is too short", errImage, func(t *testing.T, g *group, _, _, _ string) {
			must(t, os.Truncate(imagePath(filepath.Join(g.dirs[1], parentDir), "pages", testPid), int64(50*pageSize)))
		}},
		{"no pages file", os.ErrNotExist, func(t *testing.T, g *group, _, _, _ string) {
			must(t, os.Remove(imagePath(filepath.Join(g.dirs[1], parentDir), "pages", testPid)))
		}},
		{"an entry beyond the pages file", errImage, func(t *testing.T, _ *group, top, _, _ string) {
			edit(t, top, func(m *pagemap) { m.entries = append(m.entries, entry{1 << 60, 1 << 33, flagPresent}) })
		}},
		{"overlapping entries", errImage, func(t *testing.T, _ *group, top, _, _ string) {
			edit(t, top, func(m *pagemap) { m.entries[0].nr += 2 })
		}},
		{"entries out of order", errImage, func(t *testing.T, _ *group, top, _, _ string) {
			edit(t, top, func(m *pagemap) { slices.Reverse(m.entries) })
		}},
		{"an entry of no page", errImage, func(t *testing.T, _ *group, top, _, _ string) {
			edit(t, top, func(m *pagemap) { m.entries[0].nr = 0 })
		}},
		{"an entry round the end of memory", errImage, func(t *testing.T, _ *group, top, _, _ string) {
			edit(t, top, func(m *pagemap) { m.entries[len(m.entries)-1].nr = 1 << 52 })
		}},
		{"here and in the parent", errImage, func(t *testing.T, _ *group, top, _, _ string) {
			edit(t, top, func(m *pagemap) { m.entries[0].flags = flagParent | flagPresent })
		}},
		{"neither here nor there", errImage, func(t *testing.T, _ *group, top, _, _ string) {
			edit(t, top, func(m *pagemap) { m.entries[0].flags = 0 })
		}},
		{"a page that the older checkpoint had not", ErrIncomplete, func(t *testing.T, _ *group, _, _, old string) {
			edit(t, old, func(m *pagemap) { m.entries = m.entries[1:] })
		}},
		{"a page that nobody has", ErrIncomplete, func(t *testing.T, _ *group, top, _, _ string) {
			edit(t, top, func(m *pagemap) { m.entries = append(m.entries, entry{1 << 60, 1 << 33, flagParent}) })
		}},
		{"a process that the older checkpoint had not", ErrIncomplete, func(t *testing.T, _ *group, _, _, old string) {
			must(t, os.Remove(old))
		}},
		{"one file for two", errImage, func(t *testing.T, g *group, top, _, _ string) {
			m, err := readPagemap(top)
			must(t, err)
			m.entries = nil
			must(t, (&composer{}).writePagemap(filepath.Join(g.dirs[0], Object{Task, 5}.pagemapName()), m))
		}},
		{"a pagemap that is a link", errImage, func(t *testing.T, _ *group, _, lower, _ string) {
			must(t, os.Symlink(move(lower), lower))
		}},
		{"a pages file that is a link", errImage, func(t *testing.T, g *group, _, _, _ string) {
			path := imagePath(filepath.Join(g.dirs[1], parentDir), "pages", testPid)
			must(t, os.Symlink(move(path), path))
		}},
		{"a pages file that is a pipe", errImage, func(t *testing.T, g *group, _, _, _ string) {
			path := imagePath(filepath.Join(g.dirs[1], parentDir), "pages", testPid)
			must(t, os.Remove(path))
			must(t, unix.Mkfifo(path, 0o600))
		}},
		{"a parent that is a link", errImage, func(t *testing.T, g *group, _, _, _ string) {
			path := filepath.Join(g.dirs[1], parentDir)
			must(t, os.Symlink(move(path), path))
		}},
		{"a parent that leads back", errImage, func(t *testing.T, g *group, _, _, _ string) {
			must(t, os.Symlink("..", filepath.Join(g.dirs[1], parentDir, parentDir)))
		}},
		{"a parent that is a file", errImage, func(t *testing.T, g *group, _, _, _ string) {
			must(t, os.WriteFile(filepath.Join(g.dirs[1], parentDir, parentDir), nil, 0o600))
		}},
		{"a checkpoint twice", errImage, func(_ *testing.T, g *group, _, _, _ string) { g.dirs = append(g.dirs, g.dirs[0]) }},
		{"too deep", errImage, func(t *testing.T, g *group, _, _, _ string) {
			dir := filepath.Join(g.dirs[1], parentDir)
			for range maxLevels {
				dir = filepath.Join(dir, parentDir)
				must(t, os.MkdirAll(dir, 0o700))
			}
		}},
		{"no checkpoint", os.ErrNotExist, func(_ *testing.T, g *group, _, _, _ string) { g.dirs[1] += "x" }},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := twoEpochs(t)
			pagemap := func(dir string) string { return filepath.Join(dir, testTask.pagemapName()) }
			test.harm(t, g, pagemap(g.dirs[0]), pagemap(filepath.Join(g.dirs[1], parentDir)), pagemap(g.dirs[1]))
			c, err := OpenChain(g.dirs)
			if !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
			if err == nil {
				must(t, c.Close())
			}
			dst := filepath.Join(t.TempDir(), "linked")
			if err := Link(dst, g.dirs); !errors.Is(err, test.want) {
				t.Errorf("linked: %v, want %v", err, test.want)
			}
			if _, err := os.Lstat(dst); (err == nil) != (test.want == nil) {
				t.Errorf("links are left: %v", err)
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestAFileThatIsALinkIsNotLinked: who restores would follow it out of the checkpoint.
func TestAFileThatIsALinkIsNotLinked(t *testing.T) {
	g := twoEpochs(t)
	must(t, os.Symlink("/etc/shadow", filepath.Join(g.dirs[0], "core-1.img")))
	if err := Link(filepath.Join(t.TempDir(), "linked"), g.dirs); !errors.Is(err, errImage) {
		t.Error(err)
	}
	if _, err := Merge(g.chain()); !errors.Is(err, errImage) {
		t.Error(err)
	}
}

// TestComposedImagesAreNotComposedAgain, whatever their parent is.
func TestComposedImagesAreNotComposedAgain(t *testing.T) {
	g := newGroup(t, 20, 1)
	g.live(20)
	g.checkpoint(false, true, false)
	if _, err := Compose(context.Background(), g.dirs[0], newStore(t), nil); err == nil {
		t.Error("composed on top of a parent")
	}
}

// FuzzChain: whatever pagemaps say, a chain is refused, or CRIU's way of reading its links, a merge and the
// chain itself agree on every page.
func FuzzChain(f *testing.F) {
	image := func(entries ...entry) []byte {
		var b bytes.Buffer
		must(f, (&pagemap{pagesID: 1, entries: entries}).encode(&b))
		return b.Bytes()
	}
	at := func(page, nr, flags uint64) entry { return entry{page * pageSize, nr, flags} }
	f.Add(image(at(1, 2, 4), at(5, 6, 1)), image(at(5, 1, 4), at(9, 2, 4)), image(at(1, 1, 4), at(4, 9, 1)), image(at(2, 8, 4)))
	f.Add(image(at(1, 2, 4), at(5, 6, 1)), []byte{}, image(at(5, 9, 4)), []byte{})
	f.Add(image(at(1, 12, 1)), image(at(1, 3, 4), at(8, 2, 1)), image(at(1, 4, 1), at(5, 9, 4)), image(at(3, 3, 4)))
	const pages = 16 // of each file
	f.Fuzz(func(t *testing.T, top, lower, old, oldest []byte) {
		root := t.TempDir()
		dirs := []string{filepath.Join(root, "b"), filepath.Join(root, "a")}
		for i, data := range [][]byte{top, lower, old, oldest} {
			dir := dirs[i/2]
			if i%2 == 1 {
				dir = filepath.Join(dir, parentDir)
			}
			must(t, os.Mkdir(dir, 0o700))
			if len(data) > 0 {
				must(t, os.WriteFile(filepath.Join(dir, testShmem.pagemapName()), data, 0o600))
			}
			content := make([]byte, pages*pageSize)
			for p := range uint64(pages) {
				binary.LittleEndian.PutUint64(content[p*pageSize:], uint64(i+1)<<32|p)
			}
			must(t, os.WriteFile(filepath.Join(dir, pagesName(1)), content, 0o600))
		}
		c, err := OpenChain(dirs)
		if err != nil {
			return
		}
		defer c.Close()
		linked := filepath.Join(root, "linked")
		must(t, Link(linked, dirs))
		if len(c.Pages(testShmem)) == 0 {
			return
		}
		r, err := openReader(linked, testShmem)
		must(t, err)
		defer r.close()
		m, err := Merge(c)
		must(t, err)
		i := slices.IndexFunc(m.Files, func(f MergedFile) bool { return f.Name == pagesName(1) })
		merged, err := m.Files[i].Open()
		must(t, err)
		defer merged.Close()
		var last uint64
		a, b, d := make([]byte, pageSize), make([]byte, pageSize), make([]byte, pageSize)
		for s := range c.Segments(testShmem) {
			if s.Start < last || s.Start >= s.End {
				t.Fatalf("%s behind %#x", s.Range, last)
			}
			last = s.End
			file, err := os.Open(s.Path)
			must(t, err)
			for off := uint64(0); off < s.End-s.Start; off += pageSize {
				_, err := file.ReadAt(a, s.Offset+int64(off))
				must(t, err)
				_, err = io.ReadFull(merged, b)
				must(t, err)
				ok, err := r.page(s.Start+off, d)
				if err != nil || !ok || !bytes.Equal(a, b) || !bytes.Equal(a, d) {
					t.Fatalf("page at %#x: %x, merged %x, linked %x, %v, %v", s.Start+off, a[:8], b[:8], d[:8], ok, err)
				}
			}
			file.Close()
		}
		if n, _ := io.Copy(io.Discard, merged); n > 0 {
			t.Errorf("%d bytes too many are merged", n)
		}
	})
}
