// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// workName is the directory for CRIU's log within the images in memory.
const workName = ".work"

// openDirs opens where CRIU writes. A kernel without detached mounts, or a host that
// allows none, has the images made in their place, which takes longer.
func (d *Dump) openDirs() (err error) {
	if d.cfg.InMemory {
		if d.imgs, d.work, err = memoryDirs(); err == nil {
			d.memory = true
			return nil
		}
	}
	if d.imgs, err = os.Open(d.cfg.ImagesDir); err != nil {
		return fmt.Errorf("open images directory: %w", err)
	}
	if d.work, err = os.Open(d.cfg.WorkDir); err != nil {
		return fmt.Errorf("open CRIU work directory: %w", err)
	}
	return nil
}

// memoryDirs makes a tmpfs that is mounted nowhere: it can be reached through its
// descriptors alone (by CRIU through /proc/PID/fd), and is gone with the last of them, so
// that nothing is left whoever dies. See fsopen(2) and fsmount(2), Linux 5.2.
func memoryDirs() (images, work *os.File, err error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("fsopen tmpfs: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "mode", "0700"); err != nil {
		return nil, nil, fmt.Errorf("set the mode of a tmpfs: %w", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, nil, fmt.Errorf("make a tmpfs: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_NOSUID)
	if err != nil {
		return nil, nil, fmt.Errorf("fsmount: %w", err)
	}
	// This one names the mount but cannot be read, and the mount goes with it; what is
	// open there stays.
	top := os.NewFile(uintptr(mount), "images")
	defer top.Close()
	if err := unix.Mkdirat(mount, workName, 0o700); err != nil {
		return nil, nil, err
	}
	if images, err = openat(top, ".", unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
		return nil, nil, err
	}
	if work, err = openat(top, workName, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
		images.Close()
		return nil, nil, err
	}
	return images, work, nil
}

func openat(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// moveImages writes what is in memory to the directories that it is for, and frees each
// file when it is there.
func (d *Dump) moveImages() error {
	if err := moveFiles(d.work, d.cfg.WorkDir); err != nil {
		return err
	}
	return moveFiles(d.imgs, d.cfg.ImagesDir)
}

func moveFiles(from *os.File, to string) error {
	if _, err := from.Seek(0, io.SeekStart); err != nil {
		return err
	}
	names, err := from.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == workName {
			continue
		}
		if err := copyFile(from, name, filepath.Join(to, name)); err != nil {
			return err
		}
		if err := unix.Unlinkat(int(from.Fd()), name, 0); err != nil {
			return &os.PathError{Op: "remove", Path: name, Err: err}
		}
	}
	return nil
}

// copyFile copies a regular file. CRIU makes no other here: the link to parent images
// is for dumps that it tracks itself.
func copyFile(dir *os.File, name, to string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%s is no regular file (mode %o)", name, st.Mode)
	}
	in, err := openat(dir, name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, os.FileMode(st.Mode&0o777))
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// saveLog brings the log of a dump that failed to where logs are looked for.
func (d *Dump) saveLog() {
	if d.memory && d.work != nil {
		// What cannot be said is missed by the error's text alone.
		_ = copyFile(d.work, LogFile, filepath.Join(d.cfg.WorkDir, LogFile))
	}
}
