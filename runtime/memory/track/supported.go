// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
	"golang.org/x/sys/unix"
)

// Supported tells by trying whether this machine and this process's privileges
// allow tracking; nil if so. It starts a child of ours, confined by a seccomp
// filter that denies userfaultfd as container runtimes' profiles do, and tracks it:
// that takes PTRACE_O_SUSPEND_SECCOMP, pidfd_getfd, UFFD_FEATURE_WP_ASYNC and
// PAGEMAP_SCAN. An error wraps ErrUnsupported and names what is missing.
//
// It takes tens of milliseconds; the answer holds until the next boot.
func Supported() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := trySubject(ctx)
	if err == nil || errors.Is(err, ErrUnsupported) {
		return err
	}
	return fmt.Errorf("%w here: %w", ErrUnsupported, err)
}

// The child, when asked with one byte, moves its pages elsewhere and answers with
// the new address: kernels before 6.13 without the fix "mm/mremap: clear uffd-wp
// PTE/PMD state on mremap()" leave them marked as unchanged, for ever.
const (
	subjectEnv   = "probe"
	subjectPages = 8
)

func trySubject(ctx context.Context) error {
	theirs, ours, err := socketFiles()
	if err != nil {
		return err
	}
	defer ours.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{injectorArg0}
	cmd.Env = []string{injectorEnv + "=" + subjectEnv}
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("starting a child to try on: %w", err)
	}
	defer func() {
		ours.Close() // ends it
		_ = cmd.Wait()
	}()
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()

	old, err := readAddress(ours)
	if err != nil {
		return fmt.Errorf("starting a child to try on: %w", err)
	}
	t, err := Attach(ctx, cmd.Process.Pid)
	if err != nil {
		return err
	}
	defer t.Close()
	var taken uint64
	inside := func(r Range) error {
		taken += overlap(r, Range{old, old + subjectPages*pageSize})
		return nil
	}
	if err := t.Take(ctx, inside); err != nil {
		if errors.Is(err, unix.ENOTTY) {
			return fmt.Errorf("%w: the kernel has no PAGEMAP_SCAN (Linux 6.7): %w", ErrUnsupported, err)
		}
		return err
	}
	if taken != subjectPages*pageSize {
		return fmt.Errorf("%w: the kernel reported %d of %d written pages", ErrUnsupported, taken/pageSize, subjectPages)
	}
	if _, err := ours.Write([]byte{1}); err != nil {
		return fmt.Errorf("asking the child to move its memory: %w", err)
	}
	moved, err := readAddress(ours)
	if err != nil {
		return fmt.Errorf("asking the child to move its memory: %w", err)
	}
	stale := errors.New("stale")
	err = t.scan(ctx, span{Range: Range{moved, moved + subjectPages*pageSize}},
		selection{without: uapi.PageIsWritten}, 0, func(Range) error { return stale })
	if errors.Is(err, stale) {
		return fmt.Errorf("%w: this kernel leaves memory moved by mremap marked as unchanged (fixed in Linux 6.13)", ErrUnsupported)
	}
	return err
}

func overlap(a, b Range) uint64 {
	lo, hi := max(a.Start, b.Start), min(a.End, b.End)
	if lo >= hi {
		return 0
	}
	return hi - lo
}

func readAddress(r io.Reader) (uint64, error) {
	var b [8]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint64(b[:]), nil
}

func socketFiles() (theirs, ours *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket: %w", err)
	}
	return os.NewFile(uintptr(pair[0]), "theirs"), os.NewFile(uintptr(pair[1]), "ours"), nil
}

// serveSubject is the child.
func serveSubject() error {
	if err := denyUserfaultfd(); err != nil {
		return err
	}
	sock := os.NewFile(injectorSocket, "socket")
	size := uintptr(subjectPages) * uintptr(pageSize)
	at, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	memory := unsafe.Slice((*byte)(at), size)
	for i := range memory {
		memory[i] = 1
	}
	say := func(p unsafe.Pointer) error {
		return binary.Write(sock, binary.NativeEndian, uint64(uintptr(p)))
	}
	if err := say(at); err != nil {
		return err
	}
	var b [1]byte
	if _, err := sock.Read(b[:]); err != nil {
		return err
	}
	target, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	_, _, errno := unix.Syscall6(unix.SYS_MREMAP, uintptr(at), size, size, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uintptr(target), 0)
	if errno != 0 {
		return errno
	}
	if err := say(target); err != nil {
		return err
	}
	_, err = sock.Read(b[:])
	return err
}

// denyUserfaultfd confines every thread of this process as container runtimes do:
// the call fails with EPERM.
func denyUserfaultfd() error {
	const (
		ldWord = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jumpEq = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret    = unix.BPF_RET | unix.BPF_K
		// include/uapi/linux/seccomp.h
		retAllow = 0x7fff0000
		retErrno = 0x00050000
		tsync    = 1
		setMode  = 1
	)
	filter := []unix.SockFilter{
		{Code: ldWord, K: 0}, // seccomp_data.nr
		{Code: jumpEq, K: unix.SYS_USERFAULTFD, Jf: 1},
		{Code: ret, K: retErrno | uint32(unix.EPERM)},
		{Code: ret, K: retAllow},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, setMode, tsync, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return errno
	}
	return nil
}
