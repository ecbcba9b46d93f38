// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/overlay"
)

func entries(t *testing.T, layer []byte) (names []string, byName map[string]*tar.Header) {
	t.Helper()
	byName = map[string]*tar.Header{}
	r := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return names, byName
		}
		must(t, err)
		names, byName[h.Name] = append(names, h.Name), h
	}
}

func pack(t *testing.T, uppers, base []string) []byte {
	t.Helper()
	var b bytes.Buffer
	must(t, WriteUpper(context.Background(), &b, uppers, base))
	return b.Bytes()
}

// plain makes everything below dir of one time.
func plain(t *testing.T, dir string) {
	t.Helper()
	ts := unix.NsecToTimespec(cutTime.UnixNano())
	must(t, filepath.Walk(dir, func(p string, _ os.FileInfo, err error) error {
		return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}))
}

func TestIncrementsMakeTheSameLayerAsTheWhole(t *testing.T) {
	needRoot(t)
	// The same upper directory three times, with a change each.
	first, second, third := messyUpper(t), messyUpper(t), messyUpper(t)
	edit := func(dir string) {
		must(t, os.WriteFile(filepath.Join(dir, "a/plain"), []byte("changed under three names"), 0o640))
		must(t, os.Remove(filepath.Join(dir, "owned/file")))
		must(t, os.RemoveAll(filepath.Join(dir, "opaque/sub")))
		must(t, os.Remove(filepath.Join(dir, "a/symlink")))
		must(t, os.WriteFile(filepath.Join(dir, "a/symlink"), []byte("a file now"), 0o600))
	}
	edit(second)
	edit(third)
	must(t, os.Link(filepath.Join(third, "a/empty"), filepath.Join(third, "zz")))
	must(t, os.RemoveAll(filepath.Join(third, "long")))
	must(t, os.WriteFile(filepath.Join(third, "long"), nil, 0o600))
	for _, d := range []string{first, second, third} {
		plain(t, d)
	}
	base := t.TempDir()
	whole := pack(t, []string{third}, []string{base})

	chain := []string{first}
	for _, d := range []string{second, third} {
		u, err := overlay.OpenUnion(chain...)
		must(t, err)
		delta, err := overlay.Compare(t.Context(), d, u)
		must(t, err)
		must(t, delta.Apply(d))
		u.Close()
		chain = append([]string{d}, chain...)
	}
	if names, _ := entries(t, pack(t, chain[:1], nil)); len(names) == 0 || len(names) > 12 {
		t.Errorf("the last increment has %q", names)
	}
	if got := pack(t, chain, []string{base}); !bytes.Equal(whole, got) {
		a, _ := entries(t, whole)
		b, _ := entries(t, got)
		t.Errorf("whole: %q\nchain: %q", a, b)
	}
}

func TestLayerHidesOnlyWhatIsBelow(t *testing.T) {
	needRoot(t)
	base := upperDir(t, map[string]string{"d/here": "1", "o/x": "1", "sock": "1", "under/f": "1"})
	upper := upperDir(t, map[string]string{"o/y": "1", "new/y": "1", "under/o/z": "1"})
	p := func(n string) string { return filepath.Join(upper, n) }
	must(t, os.Mkdir(p("d"), 0o755))
	for _, n := range []string{"d/here", "d/nowhere", "nowhere", "under/o/w"} {
		must(t, unix.Mknod(p(n), unix.S_IFCHR, 0))
	}
	for _, n := range []string{"o", "new", "under/o"} {
		must(t, unix.Setxattr(p(n), "trusted.overlay.opaque", []byte("y"), 0))
	}
	for _, n := range []string{"sock", "sock2"} {
		must(t, unix.Mknod(p(n), unix.S_IFSOCK|0o755, 0))
	}
	for _, c := range []struct{ base, want []string }{
		{nil, []string{".wh.nowhere", "d/", "d/.wh.here", "d/.wh.nowhere", "new/", "new/.wh..wh..opq", "new/y", "o/", "o/.wh..wh..opq", "o/y", "under/", "under/o/", "under/o/.wh..wh..opq", "under/o/z"}},
		{[]string{base}, []string{".wh.sock", "d/", "d/.wh.here", "new/", "new/y", "o/", "o/.wh..wh..opq", "o/y", "under/", "under/o/", "under/o/z"}},
		{[]string{}, []string{"d/", "new/", "new/y", "o/", "o/y", "under/", "under/o/", "under/o/z"}},
		// What a layer between hides is not below.
		{[]string{upper, base}, []string{".wh.sock", ".wh.sock2", "d/", "new/", "new/.wh..wh..opq", "new/y", "o/", "o/.wh..wh..opq", "o/y", "under/", "under/o/", "under/o/.wh..wh..opq", "under/o/z"}},
	} {
		names, _ := entries(t, pack(t, []string{upper}, c.base))
		slices.Sort(names)
		want := slices.Sorted(slices.Values(c.want))
		if !slices.Equal(names, want) {
			t.Errorf("on %v:\n got %q\nwant %q", c.base, names, want)
		}
	}
}

func TestAttributesOfAContainersOwnOverlaysAreKept(t *testing.T) {
	needRoot(t)
	upper := upperDir(t, map[string]string{"d/f": "1"})
	must(t, unix.Setxattr(filepath.Join(upper, "d"), "user.overlay.opaque", []byte("y"), 0))
	names, byName := entries(t, pack(t, []string{upper}, nil))
	if !slices.Equal(names, []string{"d/", "d/f"}) || byName["d/"].PAXRecords[xattrRecord+"user.overlay.opaque"] != "y" {
		t.Errorf("%q, %v", names, byName["d/"].PAXRecords)
	}
}
