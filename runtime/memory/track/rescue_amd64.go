// SPDX-License-Identifier: Apache-2.0

package track

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

// rescue makes the death of the tracer harmless. A tracee whose tracer dies runs on
// with the registers of that moment; so these are chosen such that running on leads
// home: the injected call is a `syscall; ret` of the program's own code, the stack
// pointer is at a signal frame laid below the thread's stack, whose first word, the
// return address, is the C library's (or Go's) signal restorer. rt_sigreturn then
// brings back every register, the FPU state and the signal mask.
//
// In normal operation nothing of it is ever run: the tracer restores the registers
// and then the bytes that the frame took.
//
// It is not always possible: the frame needs a thread that is on the main stack, and
// a program that has both instruction sequences. Two things are lost even so if the
// tracer dies: an interrupted wait begins its timeout anew (and ends with EINTR if
// this happens twice to the same wait), and the
// userfaultfd may stay open in the process, closed on exec (see closeLeftover).
type rescue struct {
	mem   *os.File // of the process
	call  uint64   // address of `syscall; ret`
	frame uint64   // address of the frame, 0 when there is none
	saved []byte   // what was there
}

var (
	callGadget = []byte{0x0f, 0x05, 0xc3} // syscall; ret
	// mov $15,%rax (glibc, musl) or mov $15,%eax (Go); syscall
	homeGadgets = [][]byte{
		{0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05},
		{0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05},
	}
)

// gadgetCache remembers where in a file they were, which is checked on use, and that
// they were not there: to look through the text of a large program takes 20 ms of
// processor time, and a container may have dozens of processes of it.
var gadgetCache sync.Map // string → [2]uint64, offsets from the mapping's start; none where there is none

const none = ^uint64(0)

// findRescue looks for both instruction sequences in one mapping.
func findRescue(mem *os.File, a area, c *code) {
	if c.call != 0 && c.home != 0 {
		return
	}
	call, home := gadgetsIn(mem, a)
	if c.call == 0 {
		c.call = call
	}
	if c.home == 0 {
		c.home = home
	}
}

func gadgetsIn(mem *os.File, a area) (call, home uint64) {
	key := fmt.Sprintf("%s %d %d %d %s", a.device, a.inode, a.offset, a.Size(), a.path)
	if known, ok := gadgetCache.Load(key); ok {
		at := known.([2]uint64)
		if at[0] != none {
			call = a.Start + at[0]
		}
		if at[1] != none {
			home = a.Start + at[1]
		}
		if (call == 0 || holds(mem, call, callGadget)) && (home == 0 || holds(mem, home, homeGadgets...)) {
			return call, home
		}
	}
	at := [2]uint64{none, none}
	var ok bool
	if call, ok = searchArea(mem, a, 1, callGadget); ok {
		at[0] = call - a.Start
	}
	if home, ok = searchArea(mem, a, 1, homeGadgets...); ok {
		at[1] = home - a.Start
	}
	gadgetCache.Store(key, at)
	return call, home
}

// rescueHolds looks whether both are where they were.
func (c code) rescueHolds(mem *os.File) bool {
	return c.call == 0 || c.home == 0 || (holds(mem, c.call, callGadget) && holds(mem, c.home, homeGadgets...))
}

// Layout of struct rt_sigframe, arch/x86/include/asm/sigframe.h: the return
// address, struct ucontext with struct sigcontext_64 in it, a siginfo.
const (
	frameFlags   = 8
	frameAltMode = frameFlags + 24 // uc_stack.ss_flags
	frameContext = frameFlags + 40 // uc_mcontext
	frameFPState = frameContext + 184
	frameMask    = frameContext + 256
	frameSize    = frameMask + 8 + 128

	ucFPXState = 1
	ucSegments = 2 | 4 // UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS

	redZone = 128

	// struct _fpx_sw_bytes, arch/x86/include/uapi/asm/sigcontext.h
	fpSwBytes  = 464
	fpHeader   = 512
	fpMinimum  = 576
	fpMagic1   = 0x46505853
	fpMagic2   = 0x46505845
	ntX86State = 0x202 // NT_X86_XSTATE, include/uapi/linux/elf.h

	amxFeatures = 3 << 17 // XFEATURE_MASK_XTILE
	beforeAMX   = 2696    // where PKRU ends, the last part before AMX on CPUs that have it
)

// lay writes the frame for a stopped thread; regs and mask are what it leads home
// to. Without a frame the rest goes on as well, so there is no error.
func (r *rescue) lay(mem *os.File, c code, tid int, regs *uapi.Regs, mask uint64) {
	if c.call == 0 || c.home == 0 || uapi.PtraceShadowStack(tid) {
		return
	}
	if regs.Rsp <= c.stack.Start || regs.Rsp > c.stack.End {
		return
	}
	fp := fpuState(tid)
	if fp == nil {
		return
	}
	fpAt := (regs.Rsp - redZone - uint64(len(fp))) &^ 63
	at := (fpAt-frameSize)&^15 - 8
	if at < c.stack.Start+pageSize {
		return
	}
	image := make([]byte, fpAt-at+uint64(len(fp)))
	copy(image[fpAt-at:], fp)
	writeFrame(image, c.home, fpAt, regs, mask)
	saved := make([]byte, len(image))
	if _, err := mem.ReadAt(saved, int64(at)); err != nil {
		return
	}
	if _, err := mem.WriteAt(image, int64(at)); err != nil {
		return
	}
	*r = rescue{mem: mem, call: c.call, frame: at, saved: saved}
}

func writeFrame(image []byte, home, fpAt uint64, regs *uapi.Regs, mask uint64) {
	le := binary.LittleEndian
	le.PutUint64(image, home)
	le.PutUint64(image[frameFlags:], ucFPXState|ucSegments)
	// No such mode: the kernel leaves the alternate stack alone (restore_altstack).
	le.PutUint32(image[frameAltMode:], 7)
	rax, rip := regs.Rax, regs.Rip
	if int64(regs.Orig_rax) >= 0 {
		// An interrupted call begins anew, as the kernel would have it
		// (arch/x86/kernel/signal.c). For the last the kernel would go on with what is
		// left of a timeout, which cannot be had here.
		switch -int64(rax) {
		case 512, 513, restartNoHand, 516: // ERESTARTSYS, NOINTR, NOHAND, _RESTARTBLOCK
			rax, rip = regs.Orig_rax, rip-2
		}
	}
	for i, v := range []uint64{
		regs.R8, regs.R9, regs.R10, regs.R11, regs.R12, regs.R13, regs.R14, regs.R15,
		regs.Rdi, regs.Rsi, regs.Rbp, regs.Rbx, regs.Rdx, rax, regs.Rcx, regs.Rsp, rip, regs.Eflags,
	} {
		le.PutUint64(image[frameContext+8*i:], v)
	}
	le.PutUint16(image[frameContext+144:], uint16(regs.Cs))
	le.PutUint16(image[frameContext+150:], uint16(regs.Ss))
	le.PutUint64(image[frameFPState:], fpAt)
	le.PutUint64(image[frameMask:], mask)
}

// fpuState is the thread's FPU state as a signal frame has it; nil if it cannot be
// had whole.
func fpuState(tid int) []byte {
	buf := make([]byte, 16<<10)
	n, err := uapi.PtraceGetRegset(tid, ntX86State, buf)
	if err != nil || n < fpMinimum || n > len(buf)-4 {
		return nil
	}
	le := binary.LittleEndian
	features := le.Uint64(buf[fpSwBytes:])
	if features&amxFeatures != 0 {
		// A frame has room for AMX only where the thread asked for it.
		if le.Uint64(buf[fpHeader:])&amxFeatures != 0 {
			return nil
		}
		features &^= amxFeatures
		n = beforeAMX
	}
	clear(buf[fpSwBytes:fpHeader])
	le.PutUint32(buf[fpSwBytes:], fpMagic1)
	le.PutUint32(buf[fpSwBytes+4:], uint32(n)+4)
	le.PutUint64(buf[fpSwBytes+8:], features)
	le.PutUint32(buf[fpSwBytes+16:], uint32(n))
	le.PutUint32(buf[n:], fpMagic2)
	return buf[:n+4]
}

// prepare points the injected call at the frame.
func (r *rescue) prepare(regs *uapi.Regs) {
	if r.laid() {
		regs.Rip, regs.Rsp = r.call, r.frame
	}
}

// lift gives the stack its bytes back.
func (r *rescue) lift() {
	if r.laid() {
		_, _ = r.mem.WriteAt(r.saved, int64(r.frame))
		r.frame = 0
	}
}

func (r *rescue) laid() bool { return r.frame != 0 }
