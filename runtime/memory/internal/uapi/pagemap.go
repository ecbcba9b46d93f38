// SPDX-License-Identifier: Apache-2.0

package uapi

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Categories of a page, include/uapi/linux/fs.h. PageIsGuard is Linux 6.15;
// older kernels answer EINVAL to it.
const (
	PageIsWPAllowed = 1 << 0
	PageIsWritten   = 1 << 1
	PageIsFile      = 1 << 2
	PageIsPresent   = 1 << 3
	PageIsSwapped   = 1 << 4
	PageIsPfnZero   = 1 << 5
	PageIsHuge      = 1 << 6
	PageIsSoftDirty = 1 << 7
	PageIsGuard     = 1 << 8
)

// Flags of PAGEMAP_SCAN, include/uapi/linux/fs.h.
const (
	PmScanWPMatching   = 1 << 0
	PmScanCheckWPAsync = 1 << 1
)

const ioctlPagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

// PageRegion is struct page_region, include/uapi/linux/fs.h.
type PageRegion struct {
	Start      uint64
	End        uint64
	Categories uint64
}

// PmScanArg is struct pm_scan_arg, include/uapi/linux/fs.h.
type PmScanArg struct {
	size              uint64
	Flags             uint64
	Start             uint64
	End               uint64
	WalkEnd           uint64
	vec               uint64
	vecLen            uint64
	MaxPages          uint64
	CategoryInverted  uint64
	CategoryMask      uint64
	CategoryAnyofMask uint64
	ReturnMask        uint64
}

// PagemapScan fills vec and says how many entries it used; arg.WalkEnd tells
// where the walk ended. The kernel is given vec's address as a number, hence the
// pin. What a failed call armed and did not report is lost: ask for nothing that
// can fail half way.
func PagemapScan(fd int, arg *PmScanArg, vec []PageRegion) (int, error) {
	arg.size = uint64(unsafe.Sizeof(*arg))
	arg.vecLen = uint64(len(vec))
	arg.vec = 0
	var pin runtime.Pinner
	defer pin.Unpin()
	if len(vec) > 0 {
		pin.Pin(&vec[0])
		arg.vec = uint64(uintptr(unsafe.Pointer(&vec[0])))
	}
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlPagemapScan, uintptr(unsafe.Pointer(arg)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// Entries of /proc/PID/pagemap, fs/proc/task_mmu.c and
// Documentation/admin-guide/mm/pagemap.rst.
const (
	PagemapPresent = 1 << 63
	PagemapSwapped = 1 << 62
	// PagemapSoftDirty is set where the kernel tracks writes by itself
	// (CONFIG_MEM_SOFT_DIRTY) and the page was written since it was told to forget them.
	PagemapSoftDirty = 1 << 55
	// pagemapSwapTypeMask are bits 0-4, MAX_SWAPFILES_SHIFT in include/linux/swap.h.
	pagemapSwapTypeMask = 0x1f
	// swpPTEMarker is the last swap type, SWP_PTE_MARKER in include/linux/swap.h:
	// not a swapped page but a note in the page table (write protection of a page
	// that is not there, a guard, poison).
	swpPTEMarker = 31
)

// PagemapIsMarker tells a page table marker from a page that is on swap; both
// are PAGE_IS_SWAPPED. It needs CAP_SYS_ADMIN at the time the file was opened.
func PagemapIsMarker(entry uint64) bool {
	return entry&PagemapPresent == 0 && entry&PagemapSwapped != 0 && entry&pagemapSwapTypeMask == swpPTEMarker
}
