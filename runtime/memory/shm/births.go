// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// births hears of every fork on this host, in the order in which they happen, by
// the kernel's process events connector (drivers/connector/cn_proc.c). An event is
// in our queue before the child first runs.
type births struct {
	fd  int
	buf []byte
	// next is the number that each processor's next event must have.
	next map[uint32]uint32
}

// Layout of a message: struct nlmsghdr, struct cn_msg (include/uapi/linux/connector.h),
// struct proc_event (include/uapi/linux/cn_proc.h); the host's byte order.
const (
	cnIdxProc = 1
	cnValProc = 1
	mcListen  = 1 // PROC_CN_MCAST_LISTEN

	netlinkHeader = 16
	connHeader    = 20
	atSequence    = netlinkHeader + 8
	atEvent       = netlinkHeader + connHeader
	atCPU         = atEvent + 4
	atData        = atEvent + 16
	forkEventEnd  = atData + 16

	eventNone = 0
	eventFork = 1

	// birthsBuffer holds some thousands of events, in bytes.
	birthsBuffer = 8 << 20
	// listenTimeout bounds the wait for the kernel's word that events will come.
	listenTimeout = time.Second
)

// errLost says that events were lost.
var errLost = errors.New("news of new processes were lost")

func listen() (_ *births, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, fmt.Errorf("socket for process events: %w", err)
	}
	b := &births{fd: fd, buf: make([]byte, 4096), next: map[uint32]uint32{}}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, birthsBuffer); err != nil {
		return nil, fmt.Errorf("buffer for process events: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: cnIdxProc}); err != nil {
		return nil, fmt.Errorf("bind to process events: %w", err)
	}
	order := binary.NativeEndian
	msg := make([]byte, atEvent+4)
	order.PutUint32(msg, uint32(len(msg)))
	order.PutUint16(msg[4:], unix.NLMSG_DONE)
	order.PutUint32(msg[netlinkHeader:], cnIdxProc)
	order.PutUint32(msg[netlinkHeader+4:], cnValProc)
	order.PutUint16(msg[netlinkHeader+16:], 4)
	order.PutUint32(msg[atEvent:], mcListen)
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("ask for process events: %w", err)
	}
	// The kernel answers, but only where it grants them.
	deadline := time.Now().Add(listenTimeout)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return nil, errors.New("the kernel gives no process events to this process")
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
		n, err := b.receive()
		if errors.Is(err, unix.EAGAIN) {
			continue
		} else if err != nil {
			return nil, err
		}
		if n >= atData+4 && order.Uint32(b.buf[atEvent:]) == eventNone {
			if e := order.Uint32(b.buf[atData:]); e != 0 {
				return nil, fmt.Errorf("ask for process events: %w", unix.Errno(e))
			}
			return b, nil
		}
	}
}

// receive takes one message, of the kernel's.
func (b *births) receive() (int, error) {
	for {
		n, from, err := unix.Recvfrom(b.fd, b.buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return 0, err
		}
		if a, ok := from.(*unix.SockaddrNetlink); ok && a.Pid == 0 {
			return n, nil
		}
	}
}

// drain calls fn for each process that was born since the last call, parent and
// child. After errLost nothing can be said any more.
func (b *births) drain(fn func(parent, child int)) error {
	order := binary.NativeEndian
	for {
		n, err := b.receive()
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.ENOBUFS):
			return errLost
		case err != nil:
			return fmt.Errorf("receive process events: %w", err)
		case n < atData:
			continue
		}
		what := order.Uint32(b.buf[atEvent:])
		if what == eventNone {
			continue // somebody else has asked for events
		}
		// Each processor numbers its own; a message that could not be made leaves a gap.
		cpu, sequence := order.Uint32(b.buf[atCPU:]), order.Uint32(b.buf[atSequence:])
		if next, known := b.next[cpu]; known && next != sequence {
			return errLost
		}
		b.next[cpu] = sequence + 1
		if what != eventFork || n < forkEventEnd {
			continue
		}
		parent, child, childProcess := int32(order.Uint32(b.buf[atData+4:])), int32(order.Uint32(b.buf[atData+8:])), int32(order.Uint32(b.buf[atData+12:]))
		if child == childProcess { // else a thread
			fn(int(parent), int(childProcess))
		}
	}
}

func (b *births) close() error { return unix.Close(b.fd) }

// descendants adds to known, which are processes, all their descendants. A process
// whose parent ends meanwhile gets another one that is looked at the next time:
// hence twice.
func descendants(known map[int]bool) error {
	for range 2 {
		parents := map[int]int{}
		stats, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			return err
		}
		for _, path := range stats {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				continue
			}
			text, err := os.ReadFile(path)
			if err != nil {
				continue // it has ended
			}
			// The name may have anything in it but it ends with the last parenthesis.
			fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
			if len(fields) < 2 {
				return fmt.Errorf("unexpected content of %s", path)
			}
			if parents[pid], err = strconv.Atoi(fields[1]); err != nil {
				return fmt.Errorf("unexpected content of %s", path)
			}
		}
		for more := true; more; {
			more = false
			for pid, parent := range parents {
				if known[parent] && !known[pid] {
					known[pid], more = true, true
				}
			}
		}
	}
	return nil
}
