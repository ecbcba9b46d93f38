// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// copyMeta gives the open file or directory d the owner, mode, extended attributes and
// times of s, whose status was st. The order matters: changing the owner clears
// set-id bits and file capabilities, and every change touches the times.
func copyMeta(s, d *os.File, st *unix.Stat_t) error {
	if err := d.Chown(int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(int(d.Fd()), st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	if err := copyXattrs(procPath(s), procPath(d)); err != nil {
		return err
	}
	ts := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, procPath(d), ts, 0); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// copyMetaAt is copyMeta for what cannot be opened: links, devices, sockets.
func copyMetaAt(s, dir *os.File, name string, st *unix.Stat_t) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	d := os.NewFile(uintptr(fd), name)
	defer d.Close()
	if err := unix.Fchownat(fd, "", int(st.Uid), int(st.Gid), unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK { // a link has no mode
		if err := unix.Fchmodat(unix.AT_FDCWD, procPath(d), st.Mode&0o7777, 0); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	if err := copyXattrs(procPath(s), procPath(d)); err != nil {
		return err
	}
	ts := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(int(dir.Fd()), name, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// copyXattrs makes the extended attributes of dst those of src. The paths are those
// of procPath.
func copyXattrs(src, dst string) error {
	want, err := listXattrs(src)
	if err != nil {
		return err
	}
	have, err := listXattrs(dst)
	if err != nil {
		return err
	}
	for _, name := range have {
		if !slices.Contains(want, name) {
			if err := unix.Removexattr(dst, name); err != nil && !errors.Is(err, unix.ENODATA) {
				return fmt.Errorf("remove attribute %s: %w", name, err)
			}
		}
	}
	for _, name := range want {
		value, err := getXattr(src, name)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read attribute %s: %w", name, err)
		}
		if err := unix.Setxattr(dst, name, value, 0); err != nil {
			return fmt.Errorf("set attribute %s: %w", name, err)
		}
	}
	return nil
}

func listXattrs(path string) ([]string, error) {
	// Most files have none: a first call without a buffer settles that.
	for {
		n, err := unix.Listxattr(path, nil)
		if errors.Is(err, unix.ENOTSUP) || (err == nil && n == 0) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list attributes: %w", err)
		}
		buf := make([]byte, n)
		n, err = unix.Listxattr(path, buf)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list attributes: %w", err)
		}
		var names []string
		for name := range bytes.SplitSeq(bytes.TrimSuffix(buf[:n], []byte{0}), []byte{0}) {
			names = append(names, string(name))
		}
		return names, nil
	}
}

func getXattr(path, name string) ([]byte, error) {
	for {
		n, err := unix.Getxattr(path, name, nil)
		if err != nil {
			return nil, err
		}
		buf := make([]byte, n)
		n, err = unix.Getxattr(path, name, buf)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}
