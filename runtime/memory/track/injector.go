// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// defaultAttachTimeout bounds an injection whose context has no deadline.
const defaultAttachTimeout = 10 * time.Second

// injectorIdle is how long an injector outlives its last injection. Starting one
// takes tens of milliseconds, a group has dozens of processes.
const injectorIdle = 5 * time.Second

// injector is our end of a running injector process.
type injector struct {
	sock int
	exit chan struct{} // closed when the process was reaped

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan<- answered
	broken  error
	idle    *time.Timer
}

type answered struct {
	response
	fd  int
	err error
}

var theInjector struct {
	mu  sync.Mutex
	inj *injector
}

// inject has the injector process do one injection.
func inject(ctx context.Context, pid int) (injection, error) {
	timeout := defaultAttachTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = time.Until(deadline)
	}
	if err := ctx.Err(); err != nil {
		return injection{}, err
	}
	inj, id, reply, err := submit(pid, timeout)
	if err != nil {
		return injection{}, err
	}
	var a answered
	select {
	case a = <-reply:
	case <-ctx.Done():
		// The injector undoes first and then answers: after this function the process
		// is not traced any more, whatever the outcome.
		inj.cancel(id)
		a = <-reply
	}
	if a.err != nil {
		return injection{}, a.err
	}
	if a.Error != "" {
		if err := ctx.Err(); err != nil {
			return injection{}, fmt.Errorf("%s: %w", a.Error, err)
		}
		if cause, ok := reasons[a.Reason]; ok {
			return injection{}, &remoteError{a.Error, cause}
		}
		return injection{}, errors.New(a.Error)
	}
	if a.fd < 0 {
		return injection{}, errors.New("the injector answered without a descriptor")
	}
	return injection{fd: a.fd, stopped: a.Stopped, width: a.Width, rescue: a.Rescue}, nil
}

// remoteError keeps the injector's text and its sentinel.
type remoteError struct {
	text  string
	cause error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.cause }

func submit(pid int, timeout time.Duration) (*injector, uint64, <-chan answered, error) {
	theInjector.mu.Lock()
	defer theInjector.mu.Unlock()
	for attempt := 0; ; attempt++ {
		if theInjector.inj == nil {
			inj, err := startInjector()
			if err != nil {
				return nil, 0, nil, err
			}
			theInjector.inj = inj
		}
		inj := theInjector.inj
		id, reply, err := inj.ask(pid, timeout)
		if err == nil {
			return inj, id, reply, nil
		}
		// It ended since its last use (idle, or killed): once more with a new one.
		theInjector.inj = nil
		if attempt > 0 {
			return nil, 0, nil, err
		}
	}
}

// startInjector runs this very program again as an injector: a process of its own
// session, which finishes what it began if we are killed, and whose threads can
// end at will.
func startInjector() (*injector, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("making the injector's socket: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "injector")
	defer theirs.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{injectorArg0}
	cmd.Env = []string{injectorEnv + "=1"}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs} // injectorSocket
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		unix.Close(pair[0])
		return nil, fmt.Errorf("starting the injector: %w", err)
	}
	inj := &injector{sock: pair[0], exit: make(chan struct{}), waiting: map[uint64]chan<- answered{}}
	go func() {
		// A shim reaps every child itself, then Wait finds nothing: either is fine.
		_ = cmd.Wait()
		close(inj.exit)
	}()
	go inj.receive()
	return inj, nil
}

func (inj *injector) ask(pid int, timeout time.Duration) (uint64, <-chan answered, error) {
	inj.mu.Lock()
	defer inj.mu.Unlock()
	if inj.broken != nil {
		return 0, nil, inj.broken
	}
	if inj.idle != nil {
		inj.idle.Stop()
		inj.idle = nil
	}
	inj.next++
	id := inj.next
	reply := make(chan answered, 1)
	if err := inj.send(request{ID: id, PID: pid, Timeout: timeout}); err != nil {
		inj.breakDown(err)
		return 0, nil, err
	}
	inj.waiting[id] = reply
	return id, reply, nil
}

func (inj *injector) cancel(id uint64) {
	inj.mu.Lock()
	defer inj.mu.Unlock()
	if inj.broken == nil {
		_ = inj.send(request{ID: id, Cancel: true}) // a dead injector answers through breakDown
	}
}

// send is called with inj.mu held.
func (inj *injector) send(req request) error {
	data, err := json.Marshal(req)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(inj.sock, data, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("sending to the injector: %w", err)
	}
	return nil
}

// receive hands answers to those who wait, until the injector is gone.
func (inj *injector) receive() {
	buf := make([]byte, 64<<10)
	oob := make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(inj.sock, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		a := answered{fd: -1}
		if err == nil && n > 0 {
			a.fd = receivedFD(oob[:oobn])
			err = json.Unmarshal(buf[:n], &a.response)
		} else if err == nil {
			err = errors.New("it ended")
		}
		inj.mu.Lock()
		if err != nil {
			inj.breakDown(fmt.Errorf("the injector is gone: %w", err))
			unix.Close(inj.sock)
			inj.sock = -1
			inj.mu.Unlock()
			return
		}
		if reply := inj.waiting[a.ID]; reply != nil {
			delete(inj.waiting, a.ID)
			reply <- a
		} else if a.fd >= 0 {
			unix.Close(a.fd)
		}
		if len(inj.waiting) == 0 && inj.broken == nil {
			inj.idle = time.AfterFunc(injectorIdle, inj.retire)
		}
		inj.mu.Unlock()
	}
}

// retire ends an idle injector: it sees the end of its input and exits.
func (inj *injector) retire() {
	inj.mu.Lock()
	defer inj.mu.Unlock()
	if len(inj.waiting) > 0 || inj.broken != nil {
		return
	}
	inj.broken = errors.New("the injector was retired")
	_ = unix.Shutdown(inj.sock, unix.SHUT_WR)
}

// breakDown fails everybody who waits. inj.mu is held.
func (inj *injector) breakDown(err error) {
	if inj.broken == nil {
		inj.broken = err
	}
	for id, reply := range inj.waiting {
		delete(inj.waiting, id)
		reply <- answered{fd: -1, err: err}
	}
}

func receivedFD(oob []byte) int {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1
	}
	for _, m := range msgs {
		if fds, err := unix.ParseUnixRights(&m); err == nil && len(fds) > 0 {
			for _, extra := range fds[1:] {
				unix.Close(extra)
			}
			return fds[0]
		}
	}
	return -1
}
