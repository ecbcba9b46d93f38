// SPDX-License-Identifier: Apache-2.0

package uapi

import (
	"testing"
	"unsafe"
)

// The kernel takes the size of the structure out of the request number, so a wrong one
// is a request that it does not know.
func TestRequestsHaveTheKernelsNumbers(t *testing.T) {
	if a, b := unsafe.Sizeof(volArgs{}), unsafe.Sizeof(volArgsV2{}); a != 4096 || b != 4096 {
		t.Errorf("sizes %d and %d, the kernel's are 4096", a, b)
	}
	// As a C program that includes linux/btrfs.h prints them.
	for name, c := range map[string][2]uintptr{
		"RESIZE":           {btrfsIocResize, 0x50009403},
		"SNAP_DESTROY":     {btrfsIocSnapDestroy, 0x5000940f},
		"SNAP_CREATE_V2":   {btrfsIocSnapCreateV2, 0x50009417},
		"SUBVOL_CREATE_V2": {btrfsIocSubvolCreateV2, 0x50009418},
	} {
		if c[0] != c[1] {
			t.Errorf("BTRFS_IOC_%s is %#x, want %#x", name, c[0], c[1])
		}
	}
}
