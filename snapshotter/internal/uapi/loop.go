// SPDX-License-Identifier: Apache-2.0

package uapi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// AttachLoop attaches the image file at path to a free loop device and returns the
// open device. The device detaches itself when its last user goes (LO_FLAGS_AUTOCLEAR):
// after an unmount, or when the process dies before it could mount.
//
// Direct I/O is asked for, so that the image's pages are not cached twice; where the file
// system of the image has none, the kernel falls back by itself
// (drivers/block/loop.c, loop_update_dio).
func AttachLoop(path string) (*os.File, error) {
	img, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	// Another process may take the free device between the two calls.
	for range 32 {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, ctl.Fd(), unix.LOOP_CTL_GET_FREE, 0)
		if errno != 0 {
			return nil, &os.PathError{Op: "LOOP_CTL_GET_FREE", Path: ctl.Name(), Err: errno}
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(int(n)), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		cfg := unix.LoopConfig{
			Fd:   uint32(img.Fd()), //nolint:gosec // a descriptor fits
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO},
		}
		// The name is for people, in losetup's output.
		copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], path)
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, &os.PathError{Op: "LOOP_CONFIGURE", Path: dev.Name(), Err: err}
		}
	}
	return nil, fmt.Errorf("attach %s to a loop device: all were taken at once: %w", path, unix.EBUSY)
}

// FindLoop returns the open loop device that the image file at path is attached to, or
// nil if there is none. The file is compared by inode, not by name.
func FindLoop(path string) (*os.File, error) {
	var img unix.Stat_t
	if err := unix.Stat(path, &img); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	// Only attached devices have the directory "loop".
	attached, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, err
	}
	for _, a := range attached {
		dev, err := os.OpenFile("/dev/"+strings.TrimPrefix(filepath.Dir(a), "/sys/block/"), os.O_RDWR, 0)
		if err != nil {
			continue // gone meanwhile, or in nobody's reach
		}
		info, err := unix.IoctlLoopGetStatus64(int(dev.Fd()))
		if err == nil && info.Device == img.Dev && info.Inode == img.Ino {
			return dev, nil
		}
		dev.Close()
	}
	return nil, nil
}

// RefreshLoopSize makes the loop device dev as large as its file has become.
func RefreshLoopSize(dev *os.File) error {
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return &os.PathError{Op: "LOOP_SET_CAPACITY", Path: dev.Name(), Err: err}
	}
	return nil
}
