// SPDX-License-Identifier: Apache-2.0

package track

import (
	"unsafe"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
	"golang.org/x/sys/unix"
)

// syscallInsn is `syscall`; instructions may begin at any byte.
var (
	syscallInsn  = []byte{0x0f, 0x05}
	syscallAlign = 1
)

// Kernel-internal results, include/linux/errno.h: seen by a tracer only.
const restartNoHand = 514

// userCS64 is __USER_CS, arch/x86/include/asm/segment.h; 32-bit code of a 64-bit
// process has another one.
const userCS64 = 0x33

func is64bit(r *uapi.Regs, size int) bool {
	return size == int(unsafe.Sizeof(*r)) && r.Cs == userCS64
}

// setSyscall points the registers at a system call instruction. Orig_rax -1 says
// "not in a system call", so the kernel does not restart the interrupted one with
// these registers.
func setSyscall(r *uapi.Regs, insn, nr uint64, args []uint64) {
	var a [6]uint64
	copy(a[:], args)
	r.Rip, r.Rax, r.Orig_rax = insn, nr, ^uint64(0)
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = a[0], a[1], a[2], a[3], a[4], a[5]
}

func syscallResult(r *uapi.Regs) int64 { return int64(r.Rax) }

// keepWaiting spares the program an EINTR that no signal of its own caused. Most
// system calls restart by themselves after a stop; these few end with EINTR
// (signal(7), "Interruption of system calls and library functions by stop
// signals"). Those that wait without limit, or for at most a second, are made to
// restart as well, unless a handler runs. A longer limit is left alone: restarted,
// it would begin anew.
func keepWaiting(r *uapi.Regs) {
	if int64(r.Rax) != -int64(unix.EINTR) {
		return
	}
	const shortWaitMillis = 1000
	switch r.Orig_rax {
	case unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT:
		if int32(r.R10) > shortWaitMillis {
			return
		}
	case unix.SYS_EPOLL_PWAIT2, unix.SYS_SEMTIMEDOP:
		if r.R10 != 0 { // a timeout in memory
			return
		}
	case unix.SYS_RT_SIGTIMEDWAIT:
		if r.Rdx != 0 {
			return
		}
	case unix.SYS_IO_GETEVENTS:
		if r.R8 != 0 {
			return
		}
	case unix.SYS_SEMOP:
	default:
		return
	}
	restart := int64(-restartNoHand)
	r.Rax = uint64(restart)
}

// setIP moves the program counter.
func setIP(r *uapi.Regs, ip uint64) { r.Rip = ip }

func ipOf(r *uapi.Regs) uint64 { return r.Rip }
