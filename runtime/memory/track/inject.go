// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"time"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
	"golang.org/x/sys/unix"
)

// tracee is one thread that the calling OS thread has seized.
type tracee struct {
	pid, tid int
	code     code
	rescue   rescue
	leftover []int

	saved   bool      // regs and sigmask are valid
	changed bool      // the thread's are not its own: nothing may give up
	regs    uapi.Regs // as they must be when the thread runs on
	sigmask uint64
}

// injection is what injectUserfaultfd brings back.
type injection struct {
	fd      int           // the userfaultfd, ours
	stopped time.Duration // one thread of the process did not run for this long
	width   time.Duration // of this, its registers were not its own for this long
	rescue  bool          // and if the injector had died then, a signal frame was there
}

// injectUserfaultfd has one thread of the process make a userfaultfd, takes it,
// and has it closed there. Other threads run on meanwhile.
//
// ctx bounds the wait for the thread to stop, which is the only part that can be
// long (a thread in uninterruptible sleep, a frozen cgroup). From the first change
// of a register on, nothing is given up until the thread is as it was: there are
// four stops to wait for, each a system call away.
//
// It runs on an OS thread of its own that ends with it. A tracer's death detaches
// its tracees, so nothing stays attached even where detaching was impossible.
func injectUserfaultfd(ctx context.Context, pid int) (injection, error) {
	type result struct {
		inj    injection
		err    error
		thread int
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the runtime ends the thread with the goroutine.
		runtime.LockOSThread()
		// The process waits for this thread; on a busy machine that counts. Without
		// CAP_SYS_NICE it is as it is.
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20)
		inj, err := injectAny(ctx, pid)
		done <- result{inj, err, unix.Gettid()}
	}()
	r := <-done
	if r.err != nil {
		awaitThreadEnd(r.thread)
	}
	return r.inj, r.err
}

// awaitThreadEnd returns when an OS thread of ours that is about to end has ended,
// and what it traced is free. PIDFD_THREAD makes that an event (Linux 6.9); before,
// it is asked for again and again, for microseconds.
func awaitThreadEnd(tid int) {
	const limit = time.Second
	if pidfd, err := unix.PidfdOpen(tid, unix.PIDFD_THREAD); err == nil {
		defer unix.Close(pidfd)
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(limit.Milliseconds()))
	}
	for begin := time.Now(); time.Since(begin) < limit; runtime.Gosched() {
		if errors.Is(unix.Tgkill(os.Getpid(), tid, 0), unix.ESRCH) {
			return
		}
	}
}

// injectAny does one injection, from the start again if the process executes
// another program meanwhile.
func injectAny(ctx context.Context, pid int) (inj injection, err error) {
	const patience = 2 * time.Second // a busy machine, and a program that keeps doing it
	for begin := time.Now(); time.Since(begin) < patience; {
		inj, err = injectOnce(ctx, pid)
		if !errors.Is(err, errMoved) && !errors.Is(err, errNoCode) || ctx.Err() != nil {
			break
		}
		// Nothing tells when an execve is through.
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
		}
	}
	switch {
	case errors.Is(err, errMoved):
		err = fmt.Errorf("%w, again and again", ErrExec)
	case errors.Is(err, errNoCode):
		err = fmt.Errorf("%w: %w", ErrUnsupported, err)
	case errors.Is(err, errThreadGone):
		err = ErrGone
	}
	return inj, err
}

var (
	// errThreadGone: the thread ended or was replaced by an execve; another may do.
	errThreadGone = errors.New("the thread is gone")
	// errMoved: what was found out about the process before it was stopped is not
	// so any more.
	errMoved  = errors.New("the process executed another program")
	errNoCode = errors.New("the process has no system call instruction in its vDSO or code")
)

// injectOnce tries the threads of the process in turn: the leader first, because
// everything is certain to share its memory and descriptors. Each is given a part
// of the time, so that one in uninterruptible sleep does not use up all of it.
func injectOnce(ctx context.Context, pid int) (injection, error) {
	st, err := readStatus(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return injection{}, err
	}
	if st.tracer != 0 {
		return injection{}, fmt.Errorf("%w by process %d", ErrTraced, st.tracer)
	}
	code, err := findCode(pid)
	if err != nil {
		return injection{}, err
	}
	leftover := findLeftover(ctx, pid)
	tids, err := liveThreads(pid)
	if err != nil {
		return injection{}, err
	}
	const maxTried = 8
	tids = tids[:min(len(tids), maxTried)]
	var inj injection
	for i, tid := range tids {
		tctx, cancel := ctx, context.CancelFunc(func() {})
		if deadline, ok := ctx.Deadline(); ok && i < len(tids)-1 {
			tctx, cancel = context.WithDeadline(ctx, time.Now().Add(time.Until(deadline)/2))
		}
		inj, err = injectThread(tctx, tracee{pid: pid, tid: tid, code: code, leftover: leftover})
		cancel()
		if !errors.Is(err, errThreadGone) && !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			break
		}
	}
	return inj, err
}

func injectThread(ctx context.Context, t tracee) (inj injection, err error) {
	// For a thread that is not the leader the descriptor must be of the thread:
	// the leader may have no descriptors any more. PIDFD_THREAD is Linux 6.9.
	flags := 0
	if t.tid != t.pid {
		flags = unix.PIDFD_THREAD
	}
	pidfd, err := unix.PidfdOpen(t.tid, flags)
	if errors.Is(err, unix.ESRCH) {
		return inj, errThreadGone
	}
	if err != nil {
		return inj, fmt.Errorf("pidfd_open of thread %d: %w", t.tid, err)
	}
	defer unix.Close(pidfd)

	stops := make(chan os.Signal, 1)
	signal.Notify(stops, unix.SIGCHLD)
	defer signal.Stop(stops)

	if err := t.seize(); err != nil {
		return inj, err
	}
	begin := time.Now()
	if err := t.stop(ctx, stops); err != nil {
		return inj, err
	}
	var changed time.Time
	inj.fd = -1
	defer func() {
		rerr := t.release()
		now := time.Now()
		inj.stopped = now.Sub(begin)
		if !changed.IsZero() {
			inj.width = now.Sub(changed)
		}
		if rerr != nil && err == nil {
			err = rerr
		}
		if err != nil && inj.fd >= 0 {
			unix.Close(inj.fd)
			inj.fd = -1
		}
	}()
	if err := t.save(); err != nil {
		return inj, err
	}
	if err := ctx.Err(); err != nil {
		return inj, fmt.Errorf("stopping thread %d of process %d: %w", t.tid, t.pid, err)
	}
	mem, err := t.code.open(t.pid, t.tid)
	if err != nil {
		return inj, err
	}
	defer mem.Close()
	t.rescue.lay(mem, t.code, t.tid, &t.regs, t.sigmask)
	inj.rescue = t.rescue.laid()
	changed = time.Now()
	if inj.fd, err = t.makeAndSteal(pidfd); err == nil {
		err = t.closeLeftover(pidfd, t.leftover)
	}
	return inj, err
}

func (t *tracee) makeAndSteal(pidfd int) (int, error) {
	fd, err := t.syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|uapi.UffdUserModeOnly)
	if err != nil {
		return -1, fmt.Errorf("userfaultfd in process %d: %w", t.pid, err)
	}
	ours, stealErr := unix.PidfdGetfd(pidfd, int(fd), 0)
	if stealErr == nil {
		// Another thread may have closed or replaced a descriptor that it does not
		// know (closefrom): then this is something else, and not ours to close.
		if same, err := uapi.KcmpFile(os.Getpid(), ours, t.tid, int(fd)); (err == nil && !same) || !isUserfaultfd(ours) {
			unix.Close(ours)
			return -1, fmt.Errorf("the process took descriptor %d for itself in the same moment; try again", fd)
		}
	}
	if _, err := t.syscall(unix.SYS_CLOSE, uint64(fd)); err != nil && stealErr == nil {
		unix.Close(ours)
		return -1, fmt.Errorf("close in process %d: %w", t.pid, err)
	}
	if stealErr != nil {
		return -1, fmt.Errorf("pidfd_getfd from process %d: %w", t.pid, stealErr)
	}
	return ours, nil
}

func isUserfaultfd(fd int) bool {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	return err == nil && name == userfaultfdName
}

// seize attaches without stopping. A refusal of PTRACE_O_SUSPEND_SECCOMP (it takes
// CAP_SYS_ADMIN and a tracer that is not confined itself) matters only for a
// confined process.
func (t *tracee) seize() error {
	const options = unix.PTRACE_O_TRACESYSGOOD
	err := uapi.PtraceSeize(t.tid, options|unix.PTRACE_O_SUSPEND_SECCOMP)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		st, serr := readStatus(fmt.Sprintf("/proc/%d/task/%d/status", t.pid, t.tid))
		switch {
		case serr != nil || st.state == 'Z' || st.state == 'X':
			return errThreadGone
		case st.tracer != 0:
			return fmt.Errorf("%w by process %d", ErrTraced, st.tracer)
		case st.seccomp != 0:
			return fmt.Errorf("%w: thread %d is confined by seccomp and PTRACE_O_SUSPEND_SECCOMP is refused "+
				"(it needs CAP_SYS_ADMIN and a tracer without seccomp): %w", ErrUnsupported, t.tid, err)
		}
		err = uapi.PtraceSeize(t.tid, options)
	}
	if errors.Is(err, unix.ESRCH) {
		return errThreadGone
	}
	if err != nil {
		return fmt.Errorf("tracing thread %d of process %d: %w", t.tid, t.pid, err)
	}
	return nil
}

// stop brings the thread to a stop inside the kernel's signal delivery, where it
// can be released again with a system call half done. Signals that arrive first
// are delivered.
//
// A thread that was asked to stop nearly always does at once, and is best let go
// from there, with its system call restarted; so the end of ctx has a short grace.
func (t *tracee) stop(ctx context.Context, stops <-chan os.Signal) error {
	if err := uapi.PtraceInterrupt(t.tid); err != nil {
		return t.vanished("interrupting", err)
	}
	const graceAfterEnd = 50 * time.Millisecond
	ended := ctx.Done()
	var grace <-chan time.Time
	for {
		got, ws, err := uapi.WaitTracee(t.tid, unix.WNOHANG)
		if err != nil {
			return t.vanished("waiting for", err)
		}
		if got == 0 {
			select {
			case <-stops:
			case <-ended:
				ended, grace = nil, time.After(graceAfterEnd)
			case <-grace:
				return fmt.Errorf("thread %d of process %d does not stop (frozen, or in uninterruptible sleep): %w", t.tid, t.pid, ctx.Err())
			}
			continue
		}
		if !ws.Stopped() {
			return errThreadGone
		}
		if eventOf(ws) == uapi.PtraceEventStop {
			return nil
		}
		if err := uapi.PtraceCont(t.tid, ws.StopSignal()); err != nil {
			return t.vanished("resuming", err)
		}
	}
}

// eventOf is the ptrace event of a stop, status>>16.
func eventOf(ws unix.WaitStatus) int { return int(ws) >> 16 }

// save reads what release will restore.
func (t *tracee) save() error {
	size, err := uapi.PtraceGetRegs(t.tid, &t.regs)
	if err != nil {
		return t.vanished("reading the registers of", err)
	}
	if !is64bit(&t.regs, size) {
		return fmt.Errorf("%w: process %d runs 32-bit code", ErrUnsupported, t.pid)
	}
	if uapi.PtraceSyscallUserDispatch(t.tid) {
		return fmt.Errorf("%w: process %d uses syscall user dispatch", ErrUnsupported, t.pid)
	}
	if t.sigmask, err = uapi.PtraceGetSigmask(t.tid); err != nil {
		return t.vanished("reading the signal mask of", err)
	}
	leaveRseq(t.pid, t.tid, &t.regs)
	keepWaiting(&t.regs)
	t.saved = true
	return nil
}

// syscall has the thread run one system call and leaves it in the same kind of stop.
//
// The thread is taken to the entry of the system call and interrupted there, so
// that on the way out of it, before any instruction of the program, it stops in
// signal delivery again. Single-stepping would do with one stop less, but its
// SIGTRAP resets the program's disposition of it.
func (t *tracee) syscall(nr uint64, args ...uint64) (int64, error) {
	regs := t.regs
	setSyscall(&regs, t.code.insn, nr, args)
	t.rescue.prepare(&regs)
	first := !t.changed
	t.changed = true
	if err := uapi.PtraceSetRegs(t.tid, &regs); err != nil {
		return 0, t.vanished("setting the registers of", err)
	}
	// Signals stay pending while registers are not the thread's own: a handler
	// would be entered with them. The mask comes after the registers and goes
	// before them, so that a rescue brings back both at any instant.
	if first {
		if err := uapi.PtraceSetSigmask(t.tid, ^uint64(0)); err != nil {
			return 0, t.vanished("blocking the signals of", err)
		}
	}
	if err := t.runTo(uapi.PtraceSyscall, func(ws unix.WaitStatus) bool { return ws.StopSignal() == uapi.SyscallStop }); err != nil {
		return 0, err
	}
	if err := uapi.PtraceInterrupt(t.tid); err != nil {
		return 0, t.vanished("interrupting", err)
	}
	if err := t.runTo(uapi.PtraceCont, func(ws unix.WaitStatus) bool { return eventOf(ws) == uapi.PtraceEventStop }); err != nil {
		return 0, err
	}
	if _, err := uapi.PtraceGetRegs(t.tid, &regs); err != nil {
		return 0, t.vanished("reading the registers of", err)
	}
	if v := syscallResult(&regs); v < 0 && v > -4096 {
		return 0, unix.Errno(-v)
	} else {
		return v, nil
	}
}

// runTo resumes the thread until the wanted stop. Others on the way are a stop
// signal, which is let through (the group stop that follows is resumed from; it
// comes into force at the detach), and notices of job control.
func (t *tracee) runTo(resume func(int, unix.Signal) error, wanted func(unix.WaitStatus) bool) error {
	sig := unix.Signal(0)
	for {
		if err := resume(t.tid, sig); err != nil {
			return t.vanished("resuming", err)
		}
		_, ws, err := uapi.WaitTracee(t.tid, 0)
		if err != nil {
			return t.vanished("waiting for", err)
		}
		if !ws.Stopped() {
			return errThreadGone
		}
		if wanted(ws) {
			return nil
		}
		sig = 0
		if eventOf(ws) == 0 && ws.StopSignal() != uapi.SyscallStop {
			sig = ws.StopSignal()
		}
	}
}

// release gives the thread back what save read, and detaches.
func (t *tracee) release() error {
	if t.changed {
		if err := uapi.PtraceSetSigmask(t.tid, t.sigmask); err != nil {
			return t.vanished("restoring the signal mask of", err)
		}
	}
	if t.saved {
		if err := uapi.PtraceSetRegs(t.tid, &t.regs); err != nil {
			return t.vanished("restoring the registers of", err)
		}
		t.changed = false
		t.rescue.lift()
	}
	if err := uapi.PtraceDetach(t.tid, 0); err != nil {
		return t.vanished("detaching from", err)
	}
	return nil
}

// vanished turns what ptrace says about a thread that was killed meanwhile into
// errThreadGone.
func (t *tracee) vanished(doing string, err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ECHILD) {
		return errThreadGone
	}
	return fmt.Errorf("%s thread %d of process %d: %w", doing, t.tid, t.pid, err)
}
