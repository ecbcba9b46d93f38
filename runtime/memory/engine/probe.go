// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
	"github.com/cohort-project/cohort/runtime/memory/track"
)

// Probe finds out what this host can do. It takes tens of milliseconds, starts a
// child of this program (see track.Supported), and holds until the next boot.
func Probe() Facts {
	f := Facts{Kernel: "of unknown release", Arch: runtime.GOARCH}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		f.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var err error
	if f.UffdFeatures, err = uffdFeatures(); err != nil {
		f.UffdError = err.Error()
	}
	f.PagemapScan = hasPagemapScan()
	if f.noWPAsync() == "" {
		if err := track.Supported(); err != nil {
			f.Trial = err.Error()
		}
	}
	f.SoftDirty = hasSoftDirty()
	return f
}

func uffdFeatures() (uint64, error) {
	fd, err := uapi.Userfaultfd(unix.O_CLOEXEC | unix.O_NONBLOCK | uapi.UffdUserModeOnly)
	if errors.Is(err, unix.EINVAL) {
		// UFFD_USER_MODE_ONLY is Linux 5.11.
		fd, err = uapi.Userfaultfd(unix.O_CLOEXEC | unix.O_NONBLOCK)
	}
	if err != nil {
		return 0, fmt.Errorf("userfaultfd: %w", err)
	}
	defer unix.Close(fd)
	features, err := uapi.UffdFeatures(fd)
	if err != nil {
		return 0, fmt.Errorf("ask userfaultfd for its features: %w", err)
	}
	return features, nil
}

// hasPagemapScan asks for nothing, of an empty range.
func hasPagemapScan() bool {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = uapi.PagemapScan(int(f.Fd()), &uapi.PmScanArg{CategoryMask: uapi.PageIsPresent, ReturnMask: uapi.PageIsPresent}, nil)
	return err == nil
}

// hasSoftDirty has the kernel forget what this process wrote, writes to a page, and
// looks whether that is seen; so does CRIU (criu/kerndat.c, kerndat_get_dirty_track), and
// only by its own answer to the same question it takes "track-mem". Nobody else goes by
// the bits of this process.
func hasSoftDirty() bool {
	size := os.Getpagesize()
	page, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Munmap(page) }()
	// Without CONFIG_MEM_SOFT_DIRTY some kernels accept this and do nothing.
	if os.WriteFile("/proc/self/clear_refs", []byte("4"), 0) != nil {
		return false
	}
	page[0] = 1
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false
	}
	defer f.Close()
	var entry [8]byte
	at := uintptr(unsafe.Pointer(&page[0])) / uintptr(size) * uintptr(len(entry))
	if _, err := f.ReadAt(entry[:], int64(at)); err != nil {
		return false
	}
	return binary.NativeEndian.Uint64(entry[:])&uapi.PagemapSoftDirty != 0
}
