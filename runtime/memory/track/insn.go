// SPDX-License-Identifier: Apache-2.0

package track

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

// code is what an injection uses of the process's own, found before it is stopped:
// no page of its text is changed.
type code struct {
	insn  uint64 // a system call instruction
	call  uint64 // one that is followed by a return, for a rescue; 0 if there is none
	home  uint64 // a call of rt_sigreturn, for a rescue; 0 if there is none
	stack Range  // of the main thread
}

// findCode looks for a system call instruction in the vDSO, which programs without a
// C library have too, else in any executable mapping of a file; and for what a
// rescue takes.
func findCode(pid int) (code, error) {
	var c code
	dir, err := memoryDir(pid)
	if err != nil {
		return c, err
	}
	areas, err := readMaps(dir + "/maps")
	if errors.Is(err, ErrGone) {
		if _, err := memoryDir(pid); err == nil {
			return c, errMoved
		}
	}
	if err != nil {
		return c, err
	}
	mem, err := os.Open(dir + "/mem")
	if err != nil {
		return c, goneIfMissing(err)
	}
	defer mem.Close()
	for _, vdso := range []bool{true, false} {
		for _, a := range areas {
			if c.insn != 0 || a.perms[2] != 'x' || (a.path == "[vdso]") != vdso || (!vdso && !a.file()) {
				continue
			}
			if at, ok := searchArea(mem, a, syscallAlign, syscallInsn); ok {
				c.insn = at
			}
		}
	}
	if c.insn == 0 {
		return c, errNoCode // or it is in the middle of an execve
	}
	for _, a := range areas {
		if a.path == "[stack]" {
			c.stack = a.Range
		}
		if a.perms[2] == 'x' && a.file() && a.untrackable() == "" {
			findRescue(mem, a, &c)
		}
	}
	return c, nil
}

// open opens the memory of the thread, now that it is stopped, and looks whether
// the code is where it was: after an execve the address means something else.
func (c code) open(pid, tid int) (*os.File, error) {
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/task/%d/mem", pid, tid), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the memory of process %d: %w", pid, err)
	}
	if !holds(mem, c.insn, syscallInsn) || !c.rescueHolds(mem) {
		mem.Close()
		return nil, errMoved
	}
	return mem, nil
}

func holds(mem *os.File, at uint64, sequences ...[]byte) bool {
	var buf [16]byte
	n, _ := mem.ReadAt(buf[:], int64(at)) // may end at the mapping's end
	for _, want := range sequences {
		if bytes.HasPrefix(buf[:n], want) {
			return true
		}
	}
	return false
}

// searchArea finds the first of several byte sequences in a mapping.
func searchArea(mem *os.File, a area, align int, sequences ...[]byte) (uint64, bool) {
	const window, longest = 64 << 10, 16
	buf := make([]byte, window+longest)
	for at := a.Start; at < a.End; at += window {
		n := min(uint64(len(buf)), a.End-at)
		got, err := mem.ReadAt(buf[:n], int64(at))
		if got == 0 && err != nil {
			return 0, false
		}
		for _, seq := range sequences {
			for off := 0; ; off++ {
				i := bytes.Index(buf[off:got], seq)
				if i < 0 {
					break
				}
				if off += i; off%align == 0 {
					return at + uint64(off), true
				}
			}
		}
	}
	return 0, false
}

// leaveRseq moves a thread that was stopped inside a restartable sequence to the
// sequence's abort handler, as the kernel would have. The kernel itself no longer
// does, because while the injected call runs the thread looks as if it had left
// the sequence, and it forgets about it (kernel/rseq.c, rseq_ip_fixup).
func leaveRseq(pid, tid int, regs *uapi.Regs) {
	conf, err := uapi.PtraceRseq(tid)
	if err != nil || conf.Pointer == 0 {
		return
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/task/%d/mem", pid, tid))
	if err != nil {
		return
	}
	defer mem.Close()
	// struct rseq, include/uapi/linux/rseq.h: rseq_cs at byte 8.
	var ptr [8]byte
	if _, err := mem.ReadAt(ptr[:], int64(conf.Pointer)+8); err != nil {
		return
	}
	cs := binary.NativeEndian.Uint64(ptr[:])
	if cs == 0 {
		return
	}
	// struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
	var seq [32]byte
	if _, err := mem.ReadAt(seq[:], int64(cs)); err != nil {
		return
	}
	start := binary.NativeEndian.Uint64(seq[8:])
	length := binary.NativeEndian.Uint64(seq[16:])
	if ipOf(regs)-start < length {
		setIP(regs, binary.NativeEndian.Uint64(seq[24:]))
	}
}
