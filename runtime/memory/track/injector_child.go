// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// injectorEnv, set to "1", turns a program that links this package into an
// injector before its main runs; see package documentation. injectorSocket is its
// end of the socket.
const (
	injectorEnv    = "_COHORT_TRACK_INJECTOR"
	injectorArg0   = "cohort-track-injector"
	injectorSocket = 3
)

// request is one packet to the injector: inject into a process, or give up on an
// earlier request. Timeout is from receipt: the two clocks are one machine's, but
// a duration needs no such argument.
type request struct {
	ID      uint64
	PID     int
	Timeout time.Duration
	Cancel  bool `json:",omitempty"`
}

// response is one packet back; the userfaultfd, if there is one, comes with it.
type response struct {
	ID      uint64
	Error   string `json:",omitempty"`
	Reason  string `json:",omitempty"` // which sentinel, see reasons
	Stopped time.Duration
	Width   time.Duration
	Rescue  bool
}

// reasons carries sentinels across the socket.
var reasons = map[string]error{
	"gone":        ErrGone,
	"exec":        ErrExec,
	"traced":      ErrTraced,
	"unsupported": ErrUnsupported,
	"canceled":    context.Canceled,
	"deadline":    context.DeadlineExceeded,
}

func init() {
	// Other packages' variables named in this file are ready: Go initializes all of
	// a package's variables before its init functions.
	if len(os.Args) == 0 || os.Args[0] != injectorArg0 {
		return
	}
	switch os.Getenv(injectorEnv) {
	case "1":
		serveInjections()
		os.Exit(0)
	case subjectEnv:
		if err := serveSubject(); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// serveInjections answers requests until the other end of the socket is closed,
// by intention or by death, and every injection under way is finished.
//
// It runs inside init, where the main goroutine is bound to the main thread. That
// matters: an injection needs an OS thread that really ends with its goroutine,
// and the main thread does not.
func serveInjections() {
	// Whoever ends the parent by signalling its group or session must not end an
	// injection half way. The session is our own (Setsid), the rest is ignored.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGPIPE, unix.SIGTSTP, unix.SIGUSR1, unix.SIGUSR2)
	// A collection could pause an injection; the process lives for seconds.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(256 << 20)

	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		cancels = map[uint64]context.CancelFunc{}
		buf     = make([]byte, 64<<10)
	)
	for {
		n, err := unix.Read(injectorSocket, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			break
		}
		var req request
		if json.Unmarshal(buf[:n], &req) != nil {
			break
		}
		mu.Lock()
		if req.Cancel {
			if cancel := cancels[req.ID]; cancel != nil {
				cancel()
			}
			mu.Unlock()
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), req.Timeout)
		cancels[req.ID] = cancel
		mu.Unlock()
		wg.Go(func() {
			inj, err := injectUserfaultfd(ctx, req.PID)
			mu.Lock()
			delete(cancels, req.ID)
			mu.Unlock()
			cancel()
			answer(req.ID, inj, err)
		})
	}
	// The parent is gone: nobody waits for a thread that has not stopped yet.
	mu.Lock()
	for _, cancel := range cancels {
		cancel()
	}
	mu.Unlock()
	wg.Wait()
}

func answer(id uint64, inj injection, err error) {
	resp := response{ID: id, Stopped: inj.stopped, Width: inj.width, Rescue: inj.rescue}
	var rights []byte
	if err != nil {
		resp.Error = err.Error()
		for name, sentinel := range reasons {
			if errors.Is(err, sentinel) {
				resp.Reason = name
			}
		}
	} else {
		rights = unix.UnixRights(inj.fd)
		defer unix.Close(inj.fd)
	}
	data, err := json.Marshal(resp)
	if err != nil {
		return
	}
	// A failure means that nobody listens any more; the descriptor is closed here
	// and the kernel drops the registration with it.
	_ = unix.Sendmsg(injectorSocket, data, rights, nil, unix.MSG_NOSIGNAL)
}
