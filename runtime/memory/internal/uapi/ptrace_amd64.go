// SPDX-License-Identifier: Apache-2.0

package uapi

import "golang.org/x/sys/unix"

// Regs is struct user_regs_struct, arch/x86/include/asm/user_64.h.
type Regs = unix.PtraceRegsAmd64
