// SPDX-License-Identifier: Apache-2.0

package tmpfs

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CRIU's image of a tmpfs is named after its device number (criu/image-desc.c), which has
// the minor number in its lower 20 bits (criu/include/util.h, MKKDEV).
const (
	imagePrefix = "tmpfs-dev-"
	imageSuffix = ".tar.gz.img"
	minorBits   = 20
)

// Images lists the tmpfs file systems of pid that are not in carried: those that CRIU
// archives itself, such as a container's /dev. [Archive] of one, with the images
// directory, takes the content in CRIU's place where CRIU was told to leave its image empty.
//
// It fails where one of them cannot be taken so: then all are CRIU's.
func Images(pid int, carried []FS) ([]FS, error) {
	mounts, err := mountsOf(pid)
	if err != nil {
		return nil, err
	}
	type device struct{ major, minor int }
	done := map[device]bool{}
	known := map[string]bool{}
	for _, f := range carried {
		known[f.Destination] = true
	}
	for _, m := range mounts {
		if known[m.Mountpoint] {
			done[device{m.Major, m.Minor}] = true
		}
	}
	var out []FS
	var missing error
	for _, m := range mounts {
		d := device{m.Major, m.Minor}
		if m.FSType == "devtmpfs" {
			return nil, fmt.Errorf("a devtmpfs is mounted at %s", m.Mountpoint)
		}
		if m.FSType != "tmpfs" || done[d] {
			continue
		}
		f := FS{Destination: m.Mountpoint, File: fmt.Sprintf("%s%d%s", imagePrefix, m.Major<<minorBits|m.Minor, imageSuffix)}
		// A part of it, or one that another mount covers, is not the whole.
		if err := isWhole(pid, f, m.Root, unix.Mkdev(uint32(m.Major), uint32(m.Minor))); err != nil {
			missing = errors.Join(missing, err)
			continue
		}
		done[d] = true
		out = append(out, f)
	}
	for _, m := range mounts {
		if m.FSType == "tmpfs" && !done[device{m.Major, m.Minor}] {
			return nil, missing
		}
	}
	return out, nil
}

func isWhole(pid int, f FS, root string, dev uint64) error {
	if root != "/" || f.Destination == "/" {
		return fmt.Errorf("the tmpfs at %s is not mounted whole, or is the root", f.Destination)
	}
	path := rootOf(pid, f)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Dev != dev {
		return fmt.Errorf("the tmpfs at %s is covered by another mount", f.Destination)
	}
	if used, err := usedBytes(path); err != nil || used > inMemory {
		return errors.Join(err, fmt.Errorf("the tmpfs at %s holds more than %d bytes", f.Destination, inMemory))
	}
	return nil
}

// fillImage writes the archive that CRIU has left out. CRIU's own is kept, and what CRIU
// has not asked for is not made.
func (c *Contents) fillImage() error {
	fi, err := os.Stat(c.path)
	if errors.Is(err, os.ErrNotExist) || (err == nil && fi.Size() > 0) {
		c.memory = nil
		return nil
	}
	if err != nil {
		return err
	}
	err = c.writeFile(func(w io.Writer) error {
		z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
		if err != nil {
			return err
		}
		_, err = z.Write(c.memory.Bytes())
		return errors.Join(err, z.Close())
	})
	if err == nil {
		c.memory = nil
	}
	return err
}

// CheckImages finds an image of a tmpfs that nobody has filled.
func CheckImages(dir string) error {
	images, err := filepath.Glob(filepath.Join(dir, imagePrefix+"*"+imageSuffix))
	if err != nil {
		return err
	}
	for _, path := range images {
		if fi, err := os.Stat(path); err != nil || fi.Size() == 0 {
			return errors.Join(err, fmt.Errorf("the tmpfs image %s is empty: a tmpfs was mounted during the checkpoint; try again", path))
		}
	}
	return nil
}
