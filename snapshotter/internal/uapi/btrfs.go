// SPDX-License-Identifier: Apache-2.0

package uapi

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BtrfsSuperMagic is f_type of a btrfs file system (include/uapi/linux/magic.h).
const BtrfsSuperMagic = 0x9123683e

// BtrfsSubvolumeInode is the inode number of the root directory of every
// subvolume: BTRFS_FIRST_FREE_OBJECTID in include/uapi/linux/btrfs_tree.h.
const BtrfsSubvolumeInode = 256

// volArgs is struct btrfs_ioctl_vol_args of include/uapi/linux/btrfs.h.
type volArgs struct {
	fd   int64
	name [4088]byte
}

// volArgsV2 is struct btrfs_ioctl_vol_args_v2 of include/uapi/linux/btrfs.h,
// with its unions flattened to the members that are used here.
type volArgsV2 struct {
	fd      int64
	transid uint64
	flags   uint64
	unused  [4]uint64
	name    [4040]byte
}

// fsInfoArgs is the beginning of struct btrfs_ioctl_fs_info_args of
// include/uapi/linux/btrfs.h, and its size.
type fsInfoArgs struct {
	maxID      uint64
	numDevices uint64
	fsid       [16]byte
	_          [992]byte
}

// Request numbers of include/uapi/linux/btrfs.h.
var (
	btrfsIocResize         = iow(0x94, 3, unsafe.Sizeof(volArgs{}))
	btrfsIocSnapDestroy    = iow(0x94, 15, unsafe.Sizeof(volArgs{}))
	btrfsIocSnapCreateV2   = iow(0x94, 23, unsafe.Sizeof(volArgsV2{}))
	btrfsIocSubvolCreateV2 = iow(0x94, 24, unsafe.Sizeof(volArgsV2{}))
	btrfsIocFSInfo         = ior(0x94, 31, unsafe.Sizeof(fsInfoArgs{}))
)

// iow is _IOW of include/uapi/asm-generic/ioctl.h: direction in the top two
// bits, then fourteen of size, eight of type and eight of number.
func iow(typ, nr, size uintptr) uintptr {
	return 1<<30 | size<<16 | typ<<8 | nr
}

// ior is _IOR, the same for the other direction.
func ior(typ, nr, size uintptr) uintptr {
	return 2<<30 | size<<16 | typ<<8 | nr
}

// IsBtrfs tells whether path lies on btrfs.
func IsBtrfs(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return st.Type == BtrfsSuperMagic, nil
}

// BtrfsID returns the id of the btrfs that the open file f lies on; ok is false where
// that is another file system. It is the same in all subvolumes, unlike st_dev.
func BtrfsID(f *os.File) (id [16]byte, ok bool, err error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return id, false, &os.PathError{Op: "fstatfs", Path: f.Name(), Err: err}
	}
	if st.Type != BtrfsSuperMagic {
		return id, false, nil
	}
	var args fsInfoArgs
	if err := ioctl(int(f.Fd()), btrfsIocFSInfo, unsafe.Pointer(&args)); err != nil {
		return id, false, &os.PathError{Op: "BTRFS_IOC_FS_INFO", Path: f.Name(), Err: err}
	}
	runtime.KeepAlive(f)
	return args.fsid, true, nil
}

// IsSubvolume tells whether path is the root directory of a btrfs subvolume.
// It does not follow a symbolic link.
func IsSubvolume(path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Ino != BtrfsSubvolumeInode {
		return false, nil
	}
	return IsBtrfs(path)
}

// CreateSubvolume makes an empty btrfs subvolume at path, whose parent exists.
func CreateSubvolume(path string) error {
	return inParent(path, "BTRFS_IOC_SUBVOL_CREATE_V2", func(parent int, name string) error {
		var args volArgsV2
		if err := setName(args.name[:], name); err != nil {
			return err
		}
		return ioctl(parent, btrfsIocSubvolCreateV2, unsafe.Pointer(&args))
	})
}

// SnapshotSubvolume makes dst a writable snapshot of the subvolume src. The
// kernel writes back what is dirty in src first and commits a transaction, so
// the snapshot holds every byte written before the call.
func SnapshotSubvolume(src, dst string) error {
	s, err := os.Open(src)
	if err != nil {
		return err
	}
	defer s.Close()
	return inParent(dst, "BTRFS_IOC_SNAP_CREATE_V2", func(parent int, name string) error {
		args := volArgsV2{fd: int64(s.Fd())}
		if err := setName(args.name[:], name); err != nil {
			return err
		}
		err := ioctl(parent, btrfsIocSnapCreateV2, unsafe.Pointer(&args))
		runtime.KeepAlive(s)
		return err
	})
}

// DestroySubvolume deletes the subvolume at path with all that is in it, except
// that it fails with ENOTEMPTY while another subvolume lies inside. Space is
// given back by the kernel in the background.
func DestroySubvolume(path string) error {
	return inParent(path, "BTRFS_IOC_SNAP_DESTROY", func(parent int, name string) error {
		var args volArgs
		if err := setName(args.name[:], name); err != nil {
			return err
		}
		return ioctl(parent, btrfsIocSnapDestroy, unsafe.Pointer(&args))
	})
}

// ResizeBtrfsToDevice grows the single-device btrfs mounted at path to the size
// of its device.
func ResizeBtrfsToDevice(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	var args volArgs
	copy(args.name[:], "max")
	if err := ioctl(int(d.Fd()), btrfsIocResize, unsafe.Pointer(&args)); err != nil {
		return &os.PathError{Op: "BTRFS_IOC_RESIZE", Path: path, Err: err}
	}
	runtime.KeepAlive(d)
	return nil
}

// inParent opens the directory that holds path and calls fn with it.
func inParent(path, op string, fn func(parent int, name string) error) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	if err := fn(int(d.Fd()), filepath.Base(path)); err != nil {
		return &os.PathError{Op: op, Path: path, Err: err}
	}
	return nil
}

// setName copies name as a NUL-terminated string into the fixed array dst.
func setName(dst []byte, name string) error {
	if len(name) > 255 { // BTRFS_NAME_LEN; the arrays are larger
		return fmt.Errorf("name of %d bytes: %w", len(name), unix.ENAMETOOLONG)
	}
	copy(dst, name)
	return nil
}

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}
