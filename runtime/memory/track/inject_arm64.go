// SPDX-License-Identifier: Apache-2.0

package track

import (
	"unsafe"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

// syscallInsn is `svc #0`, little endian.
var (
	syscallInsn  = []byte{0x01, 0x00, 0x00, 0xd4}
	syscallAlign = 4
)

// pstateAArch32 is PSR_MODE32_BIT, arch/arm64/include/uapi/asm/ptrace.h.
const pstateAArch32 = 0x10

func is64bit(r *uapi.Regs, size int) bool {
	return size == int(unsafe.Sizeof(*r)) && r.Pstate&pstateAArch32 == 0
}

// setSyscall points the registers at a system call instruction.
func setSyscall(r *uapi.Regs, insn, nr uint64, args []uint64) {
	r.Pc = insn
	r.Regs[8] = nr
	for i := range 6 {
		r.Regs[i] = 0
	}
	copy(r.Regs[:6], args)
}

func syscallResult(r *uapi.Regs) int64 { return int64(r.Regs[0]) }

// keepWaiting has nothing to do here: arch/arm64/kernel/signal.c has already put
// the registers back before the system call when a tracer sees them, except for
// results of EINTR, whose first argument is lost to a tracer. One consequence is
// accepted: a relative timeout in the kernel's restart block begins anew.
func keepWaiting(*uapi.Regs) {}

// setIP moves the program counter.
func setIP(r *uapi.Regs, ip uint64) { r.Pc = ip }

func ipOf(r *uapi.Regs) uint64 { return r.Pc }
