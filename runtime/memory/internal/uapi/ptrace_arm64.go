// SPDX-License-Identifier: Apache-2.0

package uapi

import "golang.org/x/sys/unix"

// Regs is struct user_pt_regs, arch/arm64/include/uapi/asm/ptrace.h.
type Regs = unix.PtraceRegsArm64
