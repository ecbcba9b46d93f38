// SPDX-License-Identifier: Apache-2.0

package uapi

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// include/uapi/linux/ptrace.h
const (
	// PtraceEventStop is the event of a stop that PTRACE_INTERRUPT or a job
	// control stop made.
	PtraceEventStop = unix.PTRACE_EVENT_STOP
	// SyscallStop is the stop signal of a system call stop with
	// PTRACE_O_TRACESYSGOOD.
	SyscallStop = unix.SIGTRAP | 0x80

	ntPrstatus = 1
	// PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, Linux 6.4.
	ptraceGetSyscallUserDispatch = 0x4211
	// NT_X86_SHSTK, include/uapi/linux/elf.h.
	ntX86Shstk = 0x204
)

// RseqConfiguration is struct ptrace_rseq_configuration, include/uapi/linux/ptrace.h.
type RseqConfiguration struct {
	Pointer   uint64
	Size      uint32
	Signature uint32
	Flags     uint32
	_         uint32
}

// ptraceSudConfig is struct ptrace_sud_config, include/uapi/linux/ptrace.h.
type ptraceSudConfig struct {
	mode     uint64
	selector uint64
	offset   uint64
	len      uint64
}

func ptrace(req, tid int, addr, data uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(req), uintptr(tid), addr, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// ptracePtr is ptrace with an address of ours; it stays a pointer up to the system
// call, because the goroutine's stack may move before it.
func ptracePtr(req, tid int, addr uintptr, data unsafe.Pointer) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(req), uintptr(tid), addr, uintptr(data), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// PtraceSeize attaches without stopping. The calling OS thread is the tracer.
func PtraceSeize(tid, options int) error {
	return ptrace(unix.PTRACE_SEIZE, tid, 0, uintptr(options))
}

// PtraceInterrupt asks a seized thread to stop.
func PtraceInterrupt(tid int) error { return ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0) }

// PtraceCont resumes, delivering sig unless it is 0.
func PtraceCont(tid int, sig unix.Signal) error {
	return ptrace(unix.PTRACE_CONT, tid, 0, uintptr(sig))
}

// PtraceSyscall resumes to the next entry to or exit from a system call.
func PtraceSyscall(tid int, sig unix.Signal) error {
	return ptrace(unix.PTRACE_SYSCALL, tid, 0, uintptr(sig))
}

// PtraceDetach ends tracing of a stopped thread; it runs on, or goes back to its
// job control stop.
func PtraceDetach(tid int, sig unix.Signal) error {
	return ptrace(unix.PTRACE_DETACH, tid, 0, uintptr(sig))
}

// PtraceGetRegs reads NT_PRSTATUS. The returned size tells a 32-bit thread.
func PtraceGetRegs(tid int, regs *Regs) (int, error) {
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(regs))}
	iov.SetLen(int(unsafe.Sizeof(*regs)))
	err := ptracePtr(unix.PTRACE_GETREGSET, tid, ntPrstatus, unsafe.Pointer(&iov))
	return int(iov.Len), err
}

// PtraceSetRegs writes NT_PRSTATUS.
func PtraceSetRegs(tid int, regs *Regs) error {
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(regs))}
	iov.SetLen(int(unsafe.Sizeof(*regs)))
	err := ptracePtr(unix.PTRACE_SETREGSET, tid, ntPrstatus, unsafe.Pointer(&iov))
	return err
}

// PtraceGetRegset reads any other register set and returns its bytes.
func PtraceGetRegset(tid int, set uintptr, buf []byte) (int, error) {
	iov := unix.Iovec{Base: &buf[0]}
	iov.SetLen(len(buf))
	err := ptracePtr(unix.PTRACE_GETREGSET, tid, set, unsafe.Pointer(&iov))
	return int(iov.Len), err
}

// PtraceGetSigmask reads the mask that the thread will have when it is back in
// its own code: the saved one, if a system call such as sigsuspend changed it.
func PtraceGetSigmask(tid int) (uint64, error) {
	var mask uint64
	err := ptracePtr(unix.PTRACE_GETSIGMASK, tid, unsafe.Sizeof(mask), unsafe.Pointer(&mask))
	return mask, err
}

// PtraceSetSigmask sets it.
func PtraceSetSigmask(tid int, mask uint64) error {
	return ptracePtr(unix.PTRACE_SETSIGMASK, tid, unsafe.Sizeof(mask), unsafe.Pointer(&mask))
}

// PtraceRseq reads where the thread's rseq area is; Pointer is 0 without one.
func PtraceRseq(tid int) (RseqConfiguration, error) {
	var c RseqConfiguration
	err := ptracePtr(unix.PTRACE_GET_RSEQ_CONFIGURATION, tid, unsafe.Sizeof(c), unsafe.Pointer(&c))
	return c, err
}

// PtraceSyscallUserDispatch reports whether the thread has its system calls sent
// back to itself as signals (prctl PR_SET_SYSCALL_USER_DISPATCH).
func PtraceSyscallUserDispatch(tid int) bool {
	var c ptraceSudConfig
	err := ptracePtr(ptraceGetSyscallUserDispatch, tid, unsafe.Sizeof(c), unsafe.Pointer(&c))
	return err == nil && c.mode != 0
}

// PtraceShadowStack reports whether the thread runs with a shadow stack.
func PtraceShadowStack(tid int) bool {
	var ssp [8]byte
	_, err := PtraceGetRegset(tid, ntX86Shstk, ssp[:])
	return err == nil
}

// WaitTracee waits for a stop or the end of one traced thread. options may hold
// WNOHANG, then tid 0 with no error says that there is nothing yet.
func WaitTracee(tid, options int) (int, unix.WaitStatus, error) {
	var ws unix.WaitStatus
	for {
		got, err := unix.Wait4(tid, &ws, options|unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		return got, ws, err
	}
}

// KcmpFile reports whether two descriptors are one open file (kcmp KCMP_FILE,
// include/uapi/linux/kcmp.h). ENOSYS where the kernel lacks it.
func KcmpFile(pid1, fd1, pid2, fd2 int) (bool, error) {
	const kcmpFile = 0
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid1), uintptr(pid2), kcmpFile, uintptr(fd1), uintptr(fd2), 0)
	if errno != 0 {
		return false, errno
	}
	return r == 0, nil
}
