// SPDX-License-Identifier: Apache-2.0

package uapi

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flags of the userfaultfd system call, include/uapi/linux/userfaultfd.h.
// UserModeOnly is what lets an unprivileged process make one whatever
// vm.unprivileged_userfaultfd says; write protection in async mode resolves
// faults of the kernel (read(2) into a tracked page) all the same.
const UffdUserModeOnly = 1

// Features and modes, include/uapi/linux/userfaultfd.h (Linux 6.7 for WP_ASYNC).
const (
	uffdAPI = 0xAA

	UffdFeatureWPShmem       = 1 << 12 // UFFD_FEATURE_WP_HUGETLBFS_SHMEM
	UffdFeatureWPUnpopulated = 1 << 13
	UffdFeatureWPAsync       = 1 << 15

	uffdioRegisterModeWP = 1 << 1

	uffdioWriteProtectModeWP = 1 << 0
)

// ioctl numbers, include/uapi/linux/userfaultfd.h; the same on x86-64 and arm64.
const (
	ioctlUffdAPI          = 0xc018aa3f // _IOWR(0xAA, 0x3F, struct uffdio_api)
	ioctlUffdRegister     = 0xc020aa00 // _IOWR(0xAA, 0x00, struct uffdio_register)
	ioctlUffdUnregister   = 0x8010aa01 // _IOR(0xAA, 0x01, struct uffdio_range)
	ioctlUffdWriteProtect = 0xc018aa06 // _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
)

// struct uffdio_api
type uffdioAPI struct {
	api      uint64
	features uint64
	ioctls   uint64
}

// struct uffdio_range
type uffdioRange struct {
	start uint64
	len   uint64
}

// struct uffdio_register
type uffdioRegister struct {
	rng    uffdioRange
	mode   uint64
	ioctls uint64
}

// struct uffdio_writeprotect
type uffdioWriteProtect struct {
	rng  uffdioRange
	mode uint64
}

// Userfaultfd makes one for the calling process.
func Userfaultfd(flags int) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, uintptr(flags), 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// UffdAPI does the handshake. EINVAL says that the kernel lacks a feature.
func UffdAPI(fd int, features uint64) error {
	arg := uffdioAPI{api: uffdAPI, features: features}
	return ioctl(fd, ioctlUffdAPI, unsafe.Pointer(&arg))
}

// UffdRegisterWP registers [start, end) for write protection. EBUSY: another
// userfaultfd has it; EINVAL: nothing is mapped there, or it cannot be tracked;
// ENOMEM: the address space is gone, or the kernel is short of memory.
func UffdRegisterWP(fd int, start, end uint64) error {
	arg := uffdioRegister{rng: uffdioRange{start, end - start}, mode: uffdioRegisterModeWP}
	return ioctl(fd, ioctlUffdRegister, unsafe.Pointer(&arg))
}

// UffdUnregister takes [start, end) out. ENOMEM: the address space is gone; EINVAL:
// nothing is mapped there.
func UffdUnregister(fd int, start, end uint64) error {
	arg := uffdioRange{start, end - start}
	return ioctl(fd, ioctlUffdUnregister, unsafe.Pointer(&arg))
}

// UffdProtect write-protects every page of [start, end), also those that are not
// there.
func UffdProtect(fd int, start, end uint64) error {
	arg := uffdioWriteProtect{rng: uffdioRange{start, end - start}, mode: uffdioWriteProtectModeWP}
	return ioctl(fd, ioctlUffdWriteProtect, unsafe.Pointer(&arg))
}

// UffdUnprotect clears write protection of [start, end), so that every page of
// it counts as written again.
func UffdUnprotect(fd int, start, end uint64) error {
	arg := uffdioWriteProtect{rng: uffdioRange{start, end - start}}
	return ioctl(fd, ioctlUffdWriteProtect, unsafe.Pointer(&arg))
}

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// UffdFeatures asks the kernel which features it has; the handshake of fd is done
// then, without any.
func UffdFeatures(fd int) (uint64, error) {
	arg := uffdioAPI{api: uffdAPI}
	err := ioctl(fd, ioctlUffdAPI, unsafe.Pointer(&arg))
	return arg.features, err
}
