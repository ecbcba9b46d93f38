// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// tree describes a directory so that two can be compared: everything a process
// could see of it but sockets.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	firstOf := map[uint64]string{}
	must(t, filepath.Walk(root, func(p string, _ os.FileInfo, err error) error {
		must(t, err)
		rel, _ := filepath.Rel(root, p)
		if rel == "." {
			return nil
		}
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		desc := fmt.Sprintf("mode=%o owner=%d:%d rdev=%d", st.Mode, st.Uid, st.Gid, st.Rdev)
		kind := st.Mode & unix.S_IFMT
		if kind == unix.S_IFSOCK {
			return nil
		}
		if kind != unix.S_IFCHR || st.Rdev != 0 { // a whiteout has no time of its own
			desc += fmt.Sprintf(" mtime=%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		if kind != unix.S_IFDIR && st.Nlink > 1 && (kind != unix.S_IFCHR || st.Rdev != 0) {
			if f, ok := firstOf[st.Ino]; ok {
				desc += " link=" + f
			} else {
				firstOf[st.Ino] = rel
			}
		}
		switch kind {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			must(t, err)
			desc += " data=" + digest.FromBytes(b).Encoded()[:12]
		case unix.S_IFLNK:
			l, err := os.Readlink(p)
			must(t, err)
			desc += " -> " + l
		}
		names, err := listXattr(p)
		must(t, err)
		for _, n := range names {
			if strings.HasPrefix(n, "security.") && n != "security.capability" || strings.HasPrefix(n, "trusted.overlay.") && n != "trusted.overlay.opaque" {
				continue
			}
			v, err := getXattr(p, n)
			must(t, err)
			desc += fmt.Sprintf(" %s=%x", n, v)
		}
		out[rel] = desc
		return nil
	}))
	return out
}

func diffTrees(t *testing.T, want, got map[string]string) {
	t.Helper()
	keys := slices.Sorted(maps.Keys(want))
	for _, k := range keys {
		if got[k] != want[k] {
			t.Errorf("%s:\n want %s\n  got %s", k, want[k], got[k])
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %s: was not there before", k, got[k])
		}
	}
}

// overlayWhiteouts makes of OCI's markers what overlayfs has, as containerd's
// overlay differ does on unpacking.
func overlayWhiteouts(root string) archive.ApplyOpt {
	return archive.WithConvertWhiteout(func(hdr *tar.Header, path string) (bool, error) {
		base, dir := filepath.Base(path), filepath.Dir(path)
		if base == whiteoutOpaque {
			return false, unix.Setxattr(dir, "trusted.overlay.opaque", []byte{'y'}, 0)
		}
		if name, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
			p := filepath.Join(dir, name)
			if err := unix.Mknod(p, unix.S_IFCHR, 0); err != nil {
				return false, err
			}
			return false, os.Chown(p, hdr.Uid, hdr.Gid)
		}
		return true, nil
	})
}

// messyUpper is an upper directory with one of everything.
func messyUpper(t *testing.T) string {
	t.Helper()
	u := t.TempDir()
	p := func(name string) string { return filepath.Join(u, name) }
	write := func(name, data string, mode os.FileMode) {
		must(t, os.MkdirAll(filepath.Dir(p(name)), 0o755))
		must(t, os.WriteFile(p(name), []byte(data), 0o600))
		must(t, os.Chmod(p(name), mode))
	}
	write("a/plain", "hello", 0o640)
	write("a/empty", "", 0o644)
	write("a/setuid", "s", os.ModeSetuid|0o755)
	write("a/sticky/x", "x", 0o666)
	must(t, os.Chmod(p("a/sticky"), os.ModeSticky|0o777))
	write("a/big", strings.Repeat("0123456789abcdef", 200_000), 0o600)
	write("long/"+strings.Repeat("d", 120)+"/"+strings.Repeat("f", 200), "long", 0o600)
	write("names/sp ace\n\"é\xff", "odd", 0o600)
	write("owned/file", "o", 0o600)
	must(t, os.Lchown(p("owned/file"), 70, 71))
	must(t, os.Lchown(p("owned"), 999, 998))
	must(t, os.Link(p("a/plain"), p("a/zlink")))
	must(t, os.Link(p("a/plain"), p("other-link")))
	must(t, os.Symlink("../../../../etc/passwd", p("a/symlink")))
	must(t, os.Symlink("/proc/self", p("abs")))
	must(t, unix.Mkfifo(p("fifo"), 0o620))
	must(t, unix.Mknod(p("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(p("loop"), unix.S_IFBLK|0o660, int(unix.Mkdev(7, 200))))
	must(t, unix.Mknod(p("a/gone"), unix.S_IFCHR, 0))
	must(t, os.Link(p("a/gone"), p("gone-too"))) // overlayfs links its whiteouts
	must(t, os.MkdirAll(p("opaque/sub"), 0o700))
	must(t, unix.Setxattr(p("opaque"), "trusted.overlay.opaque", []byte{'y'}, 0))
	must(t, unix.Setxattr(p("opaque/sub"), "trusted.overlay.origin", []byte{1, 2}, 0))
	write("opaque/kept", "k", 0o600)
	must(t, unix.Setxattr(p("a/plain"), "user.note", []byte("v\x00\n="), 0))
	must(t, unix.Setxattr(p("a/empty"), "security.capability", []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: p("sock")}))
	for name, ts := range map[string]int64{"a/plain": 1_000_000_001, "a/sticky": 999_999_999_999_999_999, "owned": 5} {
		must(t, os.Chtimes(p(name), time.Unix(0, ts), time.Unix(0, ts)))
	}
	return u
}

func TestWritableLayerComesBackAsItWas(t *testing.T) {
	needRoot(t)
	for _, comp := range []Compression{Zstd, Gzip, None} {
		t.Run(string(comp), func(t *testing.T) {
			h := newHost(t)
			upper := messyUpper(t)
			img, err := BuildMember(h.ctx, h.store, MemberInput{Base: dockerImage(t, h), Upper: upper, CheckpointDir: checkpointDir(t, sampleCheckpoint("db")), Compression: comp})
			must(t, err)
			raw := layerTar(t, h, img.RWLayer)
			if got := digest.FromBytes(raw); got != img.LayerDiffIDs[2] {
				t.Errorf("diff id %s, content is %s", img.LayerDiffIDs[2], got)
			}
			out := t.TempDir()
			_, err = archive.Apply(h.ctx, out, bytes.NewReader(raw), overlayWhiteouts(out))
			must(t, err)
			diffTrees(t, tree(t, upper), tree(t, out))
		})
	}
}

func TestDeletionsHideTheBaseWhenApplied(t *testing.T) {
	needRoot(t)
	upper := messyUpper(t)
	base := upperDir(t, map[string]string{"a/gone": "x", "a/stays": "y", "opaque/hidden": "z", "opaque/sub/hidden": "z", "gone-too": "d"})
	var b bytes.Buffer
	must(t, writeUpper(context.Background(), &b, upper))
	_, err := archive.Apply(context.Background(), base, &b)
	must(t, err)
	for name, want := range map[string]bool{"a/gone": false, "a/stays": true, "opaque/hidden": false, "opaque/sub/hidden": false, "opaque/kept": true, "gone-too": false} {
		if _, err := os.Lstat(filepath.Join(base, name)); (err == nil) != want {
			t.Errorf("%s there: %v, want %v", name, err == nil, want)
		}
	}
}

func TestSameTreeGivesSameDigest(t *testing.T) {
	needRoot(t)
	upper := messyUpper(t)
	dir := checkpointDir(t, sampleCheckpoint("db"))
	base := func(h *host) MemberInput {
		return MemberInput{Base: dockerImage(t, h), Upper: upper, CheckpointDir: dir}
	}
	h1, h2 := newHost(t), newHost(t)
	a, err := BuildMember(h1.ctx, h1.store, base(h1))
	must(t, err)
	must(t, os.Chtimes(filepath.Join(dir, "checkpoint/core-1.img"), time.Now(), time.Now()))
	b, err := BuildMember(h2.ctx, h2.store, base(h2))
	must(t, err)
	if a.Manifest.Digest != b.Manifest.Digest {
		t.Errorf("two builds of one checkpoint differ: %s, %s", a.Manifest.Digest, b.Manifest.Digest)
	}
}

func TestCheckpointLayerComesBackAndVerifies(t *testing.T) {
	needRoot(t)
	h := newHost(t)
	dir := checkpointDir(t, sampleCheckpoint("db"))
	must(t, os.MkdirAll(filepath.Join(dir, "checkpoint/parent"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "checkpoint/parent/pages-1.img"), []byte("old"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "checkpoint/restore.log"), []byte("of an earlier restore"), 0o644))
	img, err := BuildMember(h.ctx, h.store, MemberInput{Base: dockerImage(t, h), Upper: t.TempDir(), CheckpointDir: dir})
	must(t, err)
	must(t, VerifyLayer(h.ctx, h.store, img.CkptLayer, 1<<20))

	raw := layerTar(t, h, img.CkptLayer)
	out := t.TempDir()
	_, err = archive.Apply(h.ctx, out, bytes.NewReader(raw))
	must(t, err)
	got := filepath.Join(out, ReservedDir)
	must(t, VerifyCheckpointDir(h.ctx, got, 1<<20))
	ck, spec, err := ReadCheckpointDir(got)
	must(t, err)
	if ck.Member != "db" || spec.Process.Args[0] != "/bin/app" {
		t.Errorf("read back %+v", ck)
	}
	for name, data := range map[string]string{"checkpoint/parent/pages-1.img": "old", "files/00-hosts": "127.0.0.1 localhost\n", "checkpoint/core-1.img": "core"} {
		b, err := os.ReadFile(filepath.Join(got, name))
		if err != nil || string(b) != data {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if _, err := os.Stat(filepath.Join(got, "checkpoint/restore.log")); err == nil {
		t.Error("the log of a restore is in the image")
	}
	tr := tar.NewReader(bytes.NewReader(raw))
	for i, want := range []string{".cohort/", ".cohort/cohort.json", ".cohort/spec.dump"} {
		hdr, err := tr.Next()
		must(t, err)
		if hdr.Name != want || !hdr.ModTime.Equal(cutTime.Truncate(time.Second)) {
			t.Errorf("entry %d is %s of %s, want %s", i, hdr.Name, hdr.ModTime, want)
		}
	}
}

func TestUpperThatNoLayerCanHoldIsRefusedByName(t *testing.T) {
	needRoot(t)
	for name, create := range map[string]func(u string) error{
		".cohort": func(u string) error { return os.Mkdir(filepath.Join(u, ".cohort"), 0o700) },
		".wh.x":   func(u string) error { return os.WriteFile(filepath.Join(u, ".wh.x"), nil, 0o600) },
		"moved": func(u string) error {
			return errors.Join(os.Mkdir(filepath.Join(u, "moved"), 0o700), unix.Setxattr(filepath.Join(u, "moved"), "trusted.overlay.redirect", []byte("from"), 0))
		},
		"meta": func(u string) error {
			return errors.Join(os.WriteFile(filepath.Join(u, "meta"), nil, 0o600), unix.Setxattr(filepath.Join(u, "meta"), "trusted.overlay.metacopy", nil, 0))
		},
		"equals": func(u string) error {
			return errors.Join(os.WriteFile(filepath.Join(u, "equals"), nil, 0o600), unix.Setxattr(filepath.Join(u, "equals"), "user.a=b", nil, 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := t.TempDir()
			must(t, create(u))
			wantErr(t, writeUpper(context.Background(), io.Discard, u), errdefs.ErrFailedPrecondition, name)
		})
	}
}

func TestFileThatChangesWhilePackedIsAnError(t *testing.T) {
	p := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(p, []byte("12345"), 0o600))
	for _, size := range []int64{4, 6} {
		wantErr(t, copyFile(context.Background(), io.Discard, p, size, make([]byte, 3)), errdefs.ErrAborted, "changed")
	}
	must(t, copyFile(context.Background(), io.Discard, p, 5, make([]byte, 3)))
}

// busy is a store that refuses to remove an ingest for some tries, as containerd does
// while it still writes into its folder.
type busy struct {
	content.Store
	tries int
}

var errBusy = errors.New("unlinkat ingest: directory not empty")

func (b *busy) Abort(ctx context.Context, ref string) error {
	if b.tries--; b.tries >= 0 {
		return errBusy
	}
	return b.Store.Abort(ctx, ref)
}

func TestIngestThatIsStillWrittenToIsRemovedAllTheSame(t *testing.T) {
	h := newHost(t)
	for _, tries := range []int{3, 10 * abortTries} {
		b := &busy{h.store, tries}
		ctx, cancel := context.WithCancel(h.ctx)
		_, err := writeLayer(ctx, b, Zstd, LayerRW, &Checkpoint{}, func(io.Writer) error {
			cancel()
			return ctx.Err()
		})
		wantErr(t, err, context.Canceled)
		left, lerr := h.store.ListStatuses(h.ctx)
		must(t, lerr)
		if soon := tries == 3; soon != (len(left) == 0) || soon == errors.Is(err, errBusy) {
			t.Errorf("refused %d times: left behind %v, error %v", tries, left, err)
		}
		if done := tries - b.tries; done > abortTries {
			t.Errorf("tried %d times", done)
		}
	}
}

func TestFailedBuildLeavesNoIngest(t *testing.T) {
	h := newHost(t)
	base := dockerImage(t, h)
	u := upperDir(t, map[string]string{"a": strings.Repeat("x", 3<<20), ".wh.bad": ""})
	_, err := BuildMember(h.ctx, h.store, MemberInput{Base: base, Upper: u, CheckpointDir: checkpointDir(t, sampleCheckpoint("db"))})
	wantErr(t, err, errdefs.ErrFailedPrecondition, "db", ".wh.bad")

	ctx, cancel := context.WithCancel(h.ctx)
	_, err = writeLayer(ctx, h.store, Zstd, LayerRW, &Checkpoint{}, func(w io.Writer) error {
		for i := 0; ; i++ {
			if i == 20 {
				cancel()
			}
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
		}
	})
	wantErr(t, err, context.Canceled)

	left, err := h.store.ListStatuses(h.ctx)
	must(t, err)
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
