// SPDX-License-Identifier: Apache-2.0

package tmpfs

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// FS is one tmpfs of a container.
type FS struct {
	// Destination is the mount point, as the container sees it.
	Destination string `json:"destination"`
	// Options are the file system's own (size=, mode=, nr_inodes=, uid=, gid=),
	// as mount(2) takes them.
	Options string `json:"options,omitempty"`
	// ReadOnly is set where the file system, not only the mount, is read-only.
	ReadOnly bool `json:"read_only,omitempty"`
	// File is the name of the archive of its content.
	File string `json:"file,omitempty"`
}

// kept are the mount options of a tmpfs that are carried over (tmpfs(5)).
var kept = []string{"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "huge"}

// List finds the tmpfs mounts of the mount namespace of pid whose content can be
// carried: mounted whole, in one place only, and not as the root.
func List(pid int) ([]FS, error) {
	mounts, err := mountsOf(pid)
	if err != nil {
		return nil, err
	}
	uses := map[[2]int]int{}
	points := map[string]int{}
	for _, m := range mounts {
		uses[[2]int{m.Major, m.Minor}]++
		points[m.Mountpoint]++
	}
	var out []FS
	for _, m := range mounts {
		if m.FSType != "tmpfs" || m.Root != "/" || m.Mountpoint == "/" || uses[[2]int{m.Major, m.Minor}] > 1 || points[m.Mountpoint] > 1 {
			continue
		}
		super := strings.Split(m.VFSOptions, ",")
		var options []string
		for _, o := range super {
			if k, _, _ := strings.Cut(o, "="); slices.Contains(kept, k) {
				options = append(options, o)
			}
		}
		out = append(out, FS{
			Destination: m.Mountpoint, Options: strings.Join(options, ","), ReadOnly: slices.Contains(super, "ro"),
			File: fmt.Sprintf("%02d.tar", len(out)),
		})
	}
	return out, nil
}

func mountsOf(pid int) ([]*mountinfo.Info, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return nil, fmt.Errorf("read the mounts of process %d: %w", pid, err)
	}
	return mounts, nil
}

// Validate refuses a description that did not come from List: it is read out of
// images, and its options go to mount(2).
func (f FS) Validate() error {
	if !filepath.IsAbs(f.Destination) || filepath.Clean(f.Destination) != f.Destination || strings.ContainsAny(f.Destination, "\n\x00[]:") {
		return fmt.Errorf("tmpfs destination %q", f.Destination)
	}
	if f.Options != "" {
		for o := range strings.SplitSeq(f.Options, ",") {
			if k, _, _ := strings.Cut(o, "="); !slices.Contains(kept, k) || len(o) > 64 {
				return fmt.Errorf("tmpfs option %q of %s", o, f.Destination)
			}
		}
	}
	if f.File == "" || f.File != filepath.Base(f.File) || f.File[0] == '.' {
		return fmt.Errorf("tmpfs archive %q of %s", f.File, f.Destination)
	}
	return nil
}

// inMemory bounds, in bytes, what an archive keeps in memory until it is saved.
const inMemory = 32 << 20

// Contents is the archive of one tmpfs. What is small stays in memory until Save,
// so that no file is made while the container is frozen.
type Contents struct {
	path   string
	memory *bytes.Buffer
	later  *splicer // what of it is not in memory
	image  bool     // fills an image of CRIU's, see Images
}

// Archive reads the content of a tmpfs of the container whose init is pid, for a
// file in dir; large files it leaves to earlier, which Take has brought up to date.
// The container is frozen.
func Archive(pid int, f FS, dir string, earlier *Copy) (*Contents, error) {
	c := &Contents{path: filepath.Join(dir, f.File), image: strings.HasSuffix(f.File, imageSuffix)}
	root := rootOf(pid, f)
	used, err := usedBytes(root)
	if err != nil {
		return nil, fmt.Errorf("archive the tmpfs at %s: %w", f.Destination, err)
	}
	if used <= inMemory+earlier.size() || c.image {
		c.memory = &bytes.Buffer{}
		if !c.image {
			c.later = &splicer{copy: earlier, into: c.memory}
		}
		err = writeTree(c.memory, root, c.later, c.image)
	} else {
		err = c.writeFile(func(w io.Writer) error { return writeTree(w, root, nil, false) })
	}
	if err != nil {
		return nil, fmt.Errorf("archive the tmpfs at %s: %w", f.Destination, err)
	}
	return c, nil
}

func rootOf(pid int, f FS) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", pid), f.Destination)
}

// usedBytes is how much the tmpfs at root holds.
func usedBytes(root string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return 0, err
	}
	return (st.Blocks - st.Bfree) * uint64(st.Bsize), nil
}

// Save puts the archive into its file, unless it is there.
func (c *Contents) Save(ctx context.Context) error {
	if c.memory == nil {
		return nil
	}
	if c.image {
		return c.fillImage()
	}
	err := c.writeFile(func(w io.Writer) error {
		return c.later.write(ctx, w)
	})
	if err == nil {
		c.memory = nil
	}
	return err
}

func (c *Contents) writeFile(write func(io.Writer) error) error {
	file, err := os.OpenFile(c.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(file, 1<<20)
	return errors.Join(write(w), w.Flush(), file.Close())
}

// writeTree writes what is on root's own file system. Sockets are left out: CRIU
// makes them when it restores who is bound to them. Any name will do for CRIU's images.
func writeTree(w io.Writer, root string, later *splicer, image bool) error {
	tw := tar.NewWriter(w)
	var top unix.Stat_t
	if err := unix.Stat(root, &top); err != nil {
		return err
	}
	links := map[uint64]string{}
	err := filepath.WalkDir(root+"/", func(path string, e fs.DirEntry, err error) error {
		if e != nil && e.IsDir() && strings.HasPrefix(e.Name(), criuMount) {
			return fs.SkipDir
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		// The image archives' marks of removal would be obeyed by the unpacking.
		if !image && strings.HasPrefix(e.Name(), archiveWhiteout) {
			return fmt.Errorf("a file is named %s: rename it", rel)
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if st.Dev != top.Dev {
			return mountPoint(tw, rel, &st)
		}
		return writeEntry(tw, path, rel, &st, links, later)
	})
	return errors.Join(err, tw.Close())
}

// criuMount is how the names of directories begin which CRIU, dumping at the same time,
// makes in the container's /tmp for a moment (criu/mount.c, get_clean_mnt).
const criuMount = "cr-tmpfs."

// archiveWhiteout is the prefix by which image layers mark removed files.
const archiveWhiteout = ".wh."

// mountPoint stands for what another mount covers: only that it is there.
func mountPoint(tw *tar.Writer, rel string, st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: rel + "/", Mode: 0o755}); err != nil {
			return err
		}
		return fs.SkipDir
	}
	return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: rel, Mode: 0o644})
}

func writeEntry(tw *tar.Writer, path, rel string, st *unix.Stat_t, links map[uint64]string, later *splicer) error {
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode()&fs.ModeSocket != 0 {
		return err
	}
	target := ""
	if fi.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(fi, target)
	if err != nil {
		return err
	}
	h.Name, h.Format, h.Uname, h.Gname = rel, tar.FormatPAX, "", ""
	if fi.IsDir() {
		h.Name += "/"
	} else if st.Nlink > 1 {
		if first, ok := links[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			links[st.Ino] = rel
		}
	}
	if h.Typeflag == tar.TypeReg && later.has(st.Ino) {
		return later.splice(tw, h, st.Ino)
	}
	if err := tw.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg || h.Size == 0 {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyN(tw, f, h.Size)
	return err
}

// Mount makes the file system again at target, which it creates, with the content
// of its archive. Unmount is its undo.
func Mount(ctx context.Context, f FS, archiveFile io.Reader, target string) (err error) {
	if err := f.Validate(); err != nil {
		return err
	}
	if err := os.MkdirAll(target, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", target, "tmpfs", 0, f.Options); err != nil {
		return fmt.Errorf("mount a tmpfs for %s (%s): %w", f.Destination, f.Options, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Unmount(target))
		}
	}()
	// The archive is hostile input; Apply keeps it below target.
	if _, err := archive.Apply(ctx, target, archiveFile); err != nil {
		return fmt.Errorf("fill the tmpfs for %s: %w", f.Destination, err)
	}
	if f.ReadOnly {
		if err := unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_RDONLY, f.Options); err != nil {
			return fmt.Errorf("make the tmpfs for %s read-only: %w", f.Destination, err)
		}
	}
	return nil
}

// Unmount takes the mount at target away; what was bound from it stays. None is
// no error.
func Unmount(target string) error {
	if err := unix.Unmount(target, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}
