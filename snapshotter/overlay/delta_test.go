// SPDX-License-Identifier: Apache-2.0

package overlay

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
)

var past = time.Unix(1_000_000_000, 123)

// plant makes a tree, all of the same time. An entry is a path and what it is:
//
//	d/      directory          d/!     opaque directory
//	f=data  file               f-      whiteout
//	l>to    symbolic link      l~f     hard link to f, made before
//	p|      fifo
func plant(t *testing.T, entries ...string) string {
	t.Helper()
	testdisk.Root(t)
	dir := filepath.Join(t.TempDir(), "tree")
	must(t, os.Mkdir(dir, 0o755))
	for _, e := range entries {
		i := strings.IndexAny(e, "=>~|-!")
		if i < 0 {
			i = len(e)
		}
		p := filepath.Join(dir, e[:i])
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		switch {
		case i == len(e):
			must(t, os.MkdirAll(p, 0o755))
		case e[i] == '!':
			must(t, os.MkdirAll(p, 0o755))
			must(t, unix.Setxattr(p, xattrOpaque, []byte(opaqueYes), 0))
		case e[i] == '=':
			must(t, os.WriteFile(p, []byte(e[i+1:]), 0o644))
		case e[i] == '>':
			must(t, os.Symlink(e[i+1:], p))
		case e[i] == '~':
			must(t, os.Link(filepath.Join(dir, e[i+1:]), p))
		case e[i] == '|':
			must(t, unix.Mkfifo(p, 0o644))
		case e[i] == '-':
			must(t, unix.Mknod(p, unix.S_IFCHR, 0))
		}
	}
	must(t, filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		must(t, err)
		age(t, p)
		return nil
	}))
	return dir
}

func age(t *testing.T, p string) {
	t.Helper()
	ts := unix.NsecToTimespec(past.UnixNano())
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}

// listing is a tree in the language of plant, without content.
func listing(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		rel, _ := filepath.Rel(dir, p)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			d, err := openDir(unix.AT_FDCWD, p)
			must(t, err)
			flag, err := opaqueFlag(d)
			must(t, errors.Join(err, d.Close()))
			if st.Mtim != unix.NsecToTimespec(past.UnixNano()) {
				rel += " (time)"
			}
			if rel += "/"; flag == opaqueYes {
				rel += "!"
			}
		case unix.S_IFCHR:
			rel += "-"
		}
		if rel != "./" {
			out = append(out, rel)
		}
		return nil
	}))
	return out
}

func union(t *testing.T, dirs ...string) *Union {
	t.Helper()
	u, err := OpenUnion(dirs...)
	must(t, err)
	t.Cleanup(func() { u.Close() })
	return u
}

func delta(t *testing.T, cur string, parents ...string) *Delta {
	t.Helper()
	d, err := Compare(t.Context(), cur, union(t, parents...))
	must(t, err)
	must(t, d.Apply(cur))
	return d
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func TestDeltaKeepsExactlyWhatChanged(t *testing.T) {
	type tree = []string
	for _, c := range []struct {
		name    string
		parents []tree // newest first
		cur     tree
		want    tree
	}{
		{"nothing changed", []tree{{"a=1", "d/b=2", "l>a", "p|", "gone-"}}, tree{"a=1", "d/b=2", "l>a", "p|", "gone-"}, nil},
		{"content", []tree{{"a=1", "b=1"}}, tree{"a=1", "b=2"}, tree{"b"}},
		{"link target", []tree{{"l>a", "m>a"}}, tree{"l>a", "m>b"}, tree{"m"}},
		{"new", []tree{{"a=1"}}, tree{"a=1", "d/e/n=1"}, tree{"d/", "d/e/", "d/e/n"}},
		{"removed", []tree{{"a=1", "d/b=1", "e/x=1"}}, tree{"d/"}, tree{"a-", "d/", "d/b-", "e-"}},
		{"removed, and in the image too", []tree{{"a=1"}}, tree{"a-"}, tree{"a-"}},
		{"removed out of the image", []tree{{"d/b=1"}}, tree{"d/b=1", "d/c-"}, tree{"d/", "d/c-"}},
		{"back again", []tree{{"a-"}}, tree{"a=1"}, tree{"a"}},
		{"the second layer counts", []tree{{"a=1", "b-"}, {"a=0", "b=1", "c=1"}}, tree{"a=1", "c=1"}, nil},
		{"under a whiteout of the parent", []tree{{"d-"}, {"d/x=1"}}, tree{"d/x=1"}, tree{"d/!", "d/x"}},
		{"under an opaque directory of the parent", []tree{{"d/!", "d/y=1"}, {"d/x=1"}}, tree{"d/!", "d/x=1"}, tree{"d/", "d/x", "d/y-"}},
		{"opaque in both", []tree{{"d/!", "d/a=1", "d/b=1", "d/s/c=1"}}, tree{"d/!", "d/a=1", "d/b=2", "d/s/c=1"}, tree{"d/", "d/b"}},
		{"opaque in both, unchanged", []tree{{"d/!", "d/a=1"}}, tree{"d/!", "d/a=1"}, nil},
		{"opaque now", []tree{{"d/a=1", "d/b=1"}}, tree{"d/!", "d/a=1"}, tree{"d/!", "d/a"}},
		{"opaque now, whiteouts hide nothing", []tree{{"d/a=1"}}, tree{"d/!", "d/s/x-", "d/s/y=1"}, tree{"d/!", "d/s/", "d/s/y"}},
		{"opaque within opaque", []tree{{"d/!", "d/s/a=1"}}, tree{"d/!", "d/s/!", "d/s/b=1"}, tree{"d/", "d/s/", "d/s/a-", "d/s/b"}},
		{"whiteout below an opaque parent", []tree{{"d/!", "d/a=1"}}, tree{"d/!", "d/a=1", "d/x-"}, nil},
		{"opaque by a whiteout below", []tree{{"d/a=1"}, {"d-"}}, tree{"d/!", "d/a=1"}, nil},
		{"opaque by a file below", []tree{{"d/a=1"}, {"d=f"}}, tree{"d/!", "d/a=2"}, tree{"d/", "d/a"}},
		{"file becomes directory", []tree{{"a=1"}}, tree{"a/b=1"}, tree{"a/!", "a/b"}},
		{"file becomes directory, whiteouts in it hide nothing", []tree{{"a=1"}}, tree{"a/b=1", "a/w-"}, tree{"a/!", "a/b"}},
		{"directory becomes file", []tree{{"a/b=1"}}, tree{"a=1"}, tree{"a"}},
		{"directory becomes link", []tree{{"a/b=1", "c/b=1"}}, tree{"a>c", "c/b=1"}, tree{"a"}},
		{"new directory over the image", []tree{{"z=1"}}, tree{"z=1", "d/w-", "d/n=1"}, tree{"d/", "d/n", "d/w-"}},
		{"links unchanged", []tree{{"a=1", "d/b~a"}}, tree{"a=1", "d/b~a"}, nil},
		{"link added", []tree{{"a=1", "b~a"}}, tree{"a=1", "b~a", "c~a"}, tree{"a", "b", "c"}},
		{"link taken away", []tree{{"a=1", "b~a", "c~a"}}, tree{"a=1", "b~a"}, tree{"a", "b", "c-"}},
		{"links torn", []tree{{"a=1", "b~a"}}, tree{"a=1", "b=1"}, tree{"a", "b"}},
		{"links joined", []tree{{"a=1", "b=1"}}, tree{"a=1", "b~a"}, tree{"a", "b"}},
		{"links swapped", []tree{{"a=1", "c~a", "b=1", "d~b"}}, tree{"a=1", "b~a", "c=1", "d~c"}, tree{"a", "b", "c", "d"}},
		{"a link in a directory that is new", []tree{{"a=1", "b~a"}}, tree{"a=1", "n/b~a"}, tree{"a", "b-", "n/", "n/b"}},
		{"whiteouts are no links", []tree{{"a-", "b-"}}, tree{"a-", "b~a", "c~a"}, tree{"c-"}},
		{"empty parents", nil, tree{"a=1", "b-", "d/!"}, tree{"a", "b-", "d/!"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var parents []string
			for _, p := range c.parents {
				parents = append(parents, plant(t, p...))
			}
			cur := plant(t, c.cur...)
			d, err := Compare(t.Context(), cur, union(t, parents...))
			must(t, err)
			if d.Empty() != (len(c.want) == 0) {
				t.Errorf("empty: %v", d.Empty())
			}
			must(t, d.Apply(cur))
			want := slices.Sorted(slices.Values(c.want))
			got := slices.Sorted(slices.Values(listing(t, cur)))
			if !slices.Equal(got, want) {
				t.Errorf("left: %q\nwant: %q", got, want)
			}
		})
	}
}

func TestDeltaNoticesEveryPropertyOfAFile(t *testing.T) {
	for name, change := range map[string]func(p string) error{
		"mode":       func(p string) error { return os.Chmod(p, 0o640) },
		"set-id":     func(p string) error { return unix.Chmod(p, 0o4644) },
		"owner":      func(p string) error { return os.Chown(p, 5, -1) },
		"group":      func(p string) error { return os.Chown(p, -1, 5) },
		"time":       func(p string) error { return os.Chtimes(p, past, past.Add(1)) },
		"attribute":  func(p string) error { return unix.Setxattr(p, "user.a", []byte("x"), 0) },
		"capability": func(p string) error { return unix.Setxattr(p, "trusted.x", []byte("x"), 0) },
		// What a container set as trusted.overlay.opaque within itself.
		"own overlay attribute": func(p string) error { return unix.Setxattr(p, "trusted.overlay.overlay.opaque", []byte("y"), 0) },
		"file flags":            func(p string) error { return unix.Setxattr(p, "trusted.overlay.protattr", []byte("a"), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, what := range []string{"f", "d"} {
				parent, cur := plant(t, "f=1", "d/x=1"), plant(t, "f=1", "d/x=1")
				must(t, change(filepath.Join(cur, what)))
				if name == "mode" {
					age(t, filepath.Join(cur, what))
				}
				delta(t, cur, parent)
				got, err := os.ReadDir(cur)
				must(t, err)
				if len(got) != 1 || got[0].Name() != what {
					t.Errorf("%s: left %v", what, got)
				}
				if _, err := os.Lstat(filepath.Join(cur, "d/x")); err == nil {
					t.Error("the unchanged file in it is still there")
				}
			}
		})
	}
	for _, own := range []string{"origin", "impure", "nlink", "upper", "uuid"} {
		parent, cur := plant(t, "f=1", "d/x=1"), plant(t, "f=1", "d/x=1")
		for _, what := range []string{"f", "d"} {
			must(t, unix.Setxattr(filepath.Join(cur, what), xattrPrefix+own, []byte("n"), 0))
		}
		delta(t, cur, parent)
		if got := listing(t, cur); len(got) > 0 {
			t.Errorf("a mount's own note %s counted as a change: left %v", own, got)
		}
	}
}

func TestSameTimesAndSizeDoNotHideAChange(t *testing.T) {
	parent, cur := plant(t, "small=1", "big="+strings.Repeat("a", 3<<20)), plant(t, "small=2", "big="+strings.Repeat("a", 3<<20-1)+"b")
	if delta(t, cur, parent); len(listing(t, cur)) != 2 {
		t.Errorf("left %v", listing(t, cur))
	}
}

func TestPartsKeptInLowerLayersAreRefused(t *testing.T) {
	for _, x := range []string{"redirect", "metacopy"} {
		for _, in := range []int{0, 1} {
			trees := []string{plant(t, "d/f=1"), plant(t, "d/f=1")}
			must(t, unix.Setxattr(filepath.Join(trees[in], "d"), xattrPrefix+x, []byte("/x"), 0))
			before := listing(t, trees[0])
			_, err := Compare(t.Context(), trees[0], union(t, trees[1]))
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/d") || !strings.Contains(err.Error(), x) {
				t.Errorf("%s: %v", x, err)
			}
			if !slices.Equal(before, listing(t, trees[0])) {
				t.Error("the tree was changed")
			}
		}
	}
}

func TestWhiteoutsThatAreAttributesAreUnderstood(t *testing.T) {
	mark := func(dir string) string {
		must(t, unix.Setxattr(filepath.Join(dir, "d"), xattrOpaque, []byte(opaqueXattrs), 0))
		must(t, unix.Setxattr(filepath.Join(dir, "d/w"), xattrWhiteout, nil, 0))
		return dir
	}
	below := plant(t, "d/w=1", "d/x=1")
	cur := mark(plant(t, "d/w=", "d/x=1"))
	delta(t, cur, below)
	if got := listing(t, cur); !slices.Equal(got, []string{"d/", "d/w"}) {
		t.Errorf("the whiteout is gone: %v", got)
	}
	cur = plant(t, "d/x=1")
	delta(t, cur, mark(plant(t, "d/w=")), below)
	if got := listing(t, cur); len(got) != 0 {
		t.Errorf("what is hidden was seen: %v", got)
	}
}

func TestDeltaFollowsNoLinkOutOfATree(t *testing.T) {
	outside := plant(t, "in/f=secret", "in/g=1")
	for _, trees := range [][2]string{
		{plant(t, "d/f=secret", "d/g=1"), plant(t, "d>"+outside+"/in")},
		{plant(t, "d>"+outside+"/in"), plant(t, "d/f=secret", "d/g=1")},
		{plant(t, "d>"+outside+"/in/f"), plant(t, "d=secret")},
	} {
		before := listing(t, trees[0])
		delta(t, trees[0], trees[1])
		if got := listing(t, trees[0]); len(got) != len(before) {
			t.Errorf("left %v", got)
		}
	}
	if got := listing(t, outside); len(got) != 3 {
		t.Errorf("outside: %v", got)
	}
}

func TestNestingWithoutEndIsRefused(t *testing.T) {
	testdisk.Root(t)
	deep := func() string {
		dir := t.TempDir()
		f, err := openDir(unix.AT_FDCWD, dir)
		must(t, err)
		for range maxDepth + 10 {
			must(t, unix.Mkdirat(int(f.Fd()), "d", 0o755))
			sub, err := openDir(int(f.Fd()), "d")
			must(t, err)
			f.Close()
			f = sub
		}
		f.Close()
		return dir
	}
	_, err := Compare(t.Context(), deep(), union(t, deep()))
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v", err)
	}
}
