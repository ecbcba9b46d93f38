// SPDX-License-Identifier: Apache-2.0

package uapi

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Extent is struct fiemap_extent of include/uapi/linux/fiemap.h: a range of a file
// and where it is on the disk, in bytes.
type Extent struct {
	Logical  uint64
	Physical uint64
	Length   uint64
	_        [2]uint64
	Flags    uint32
	_        [3]uint32
}

// Flags of an extent (include/uapi/linux/fiemap.h).
const (
	ExtentLast              = 0x0001 // the file's last one
	ExtentUnknown           = 0x0002 // no place on the disk yet
	ExtentDelalloc          = 0x0004 // likewise, sets ExtentUnknown too
	ExtentEncoded           = 0x0008 // compressed
	ExtentEncrypted         = 0x0080
	ExtentNotAligned        = 0x0100 // sets for the next two
	ExtentInline            = 0x0200 // among metadata
	ExtentTail              = 0x0400 // in a block with other files' tails
	ExtentUnwritten         = 0x0800 // allocated, reads as zeros
	ExtentMerged            = 0x1000 // made up from blocks, for file systems without extents
	ExtentShared            = 0x2000 // with another file
	fiemapBatch             = 128
	fiemapMax        uint64 = 1<<64 - 1
)

// fiemap is struct fiemap of include/uapi/linux/fiemap.h, with room for extents.
type fiemap struct {
	start   uint64
	length  uint64
	flags   uint32
	mapped  uint32
	count   uint32
	_       uint32
	extents [fiemapBatch]Extent
}

// iocFiemap is FS_IOC_FIEMAP, _IOWR('f', 11, struct fiemap) without the extents.
const iocFiemap = 3<<30 | 32<<16 | 'f'<<8 | 11

// Extents lists the extents of the open file f in order. Ranges that no extent covers
// are holes. Nothing is written back first: what is dirty shows as ExtentDelalloc.
// A file with more than limit extents gives the error E2BIG; a file system that
// cannot tell gives EOPNOTSUPP or ENOTTY.
func Extents(f *os.File, limit int) ([]Extent, error) {
	var (
		out []Extent
		arg fiemap
	)
	for start := uint64(0); ; {
		arg.start, arg.length, arg.count, arg.mapped = start, fiemapMax-start, fiemapBatch, 0
		if err := ioctl(int(f.Fd()), iocFiemap, unsafe.Pointer(&arg)); err != nil {
			return nil, &os.PathError{Op: "FS_IOC_FIEMAP", Path: f.Name(), Err: err}
		}
		runtime.KeepAlive(f)
		if arg.mapped == 0 {
			return out, nil
		}
		out = append(out, arg.extents[:arg.mapped]...)
		last := out[len(out)-1]
		if last.Flags&ExtentLast != 0 {
			return out, nil
		}
		if len(out) > limit {
			return nil, &os.PathError{Op: "FS_IOC_FIEMAP", Path: f.Name(), Err: unix.E2BIG}
		}
		if next := last.Logical + last.Length; next > start {
			start = next
		} else {
			return nil, &os.PathError{Op: "FS_IOC_FIEMAP", Path: f.Name(), Err: unix.EIO}
		}
	}
}
