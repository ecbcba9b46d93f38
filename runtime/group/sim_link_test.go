// SPDX-License-Identifier: Apache-2.0

package group

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"
)

// simCoordinator is a process that runs one epoch. When it dies nothing that it
// does has an effect any more; what it has sent still arrives.
type simCoordinator struct {
	w     *world
	epoch Epoch
	dead  bool // guarded by world.mu
	calls int
	n     map[string]int
	// scripted coordinators die; others only have bad connections.
	mortal bool
}

// simLink is a coordinator's connection to one member. It loses, repeats and
// delays calls.
type simLink struct {
	c *simCoordinator
	m *simMember
}

type simReply struct {
	data []byte
	err  error
}

func (l *simLink) call(ctx context.Context, method string) ([]byte, error) {
	c, w := l.c, l.c.w
	w.mu.Lock()
	name := fmt.Sprintf("%s %s %s", c.epoch.ID, l.m.id, method)
	c.n[name]++
	r := w.chance(name, c.n[name])
	if method != "Renew" && !c.dead {
		c.calls++
	}
	dies := c.mortal && !w.quiet && !c.dead && method != "Renew" && c.calls == w.faults.coordinatorDies
	dead := c.dead || dies && w.faults.dieBefore
	c.dead = c.dead || dies
	f := w.faults
	if w.quiet {
		f = faults{cutOff: -1}
	}
	w.mu.Unlock()
	if dead {
		return nil, errDead
	}

	wire := func() time.Duration { return time.Duration(1+r.IntN(300)) * time.Microsecond }
	request, answer := wire(), wire()
	if r.Float64() < f.late {
		request += time.Duration(r.IntN(4000)) * time.Millisecond
	}
	if f.cutOff == l.m.i || r.Float64() < f.lost {
		if r.IntN(2) == 0 {
			<-ctx.Done() // and nobody says so
			return nil, context.Cause(ctx)
		}
		time.Sleep(wire())
		return nil, errLost
	}
	replyLost := r.Float64() < f.replyLost
	twice := time.Duration(0)
	if r.Float64() < f.twice {
		twice = time.Duration(1+r.IntN(2000)) * time.Millisecond
	}
	// A server learns of its caller's end, or does not.
	server, cancel := ctx, context.CancelFunc(func() {})
	if r.IntN(2) == 0 {
		server, cancel = context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	}
	replies := make(chan simReply, 2)
	deliver := func(ctx context.Context, after time.Duration) {
		time.Sleep(after)
		w.mu.Lock()
		s := l.m.shim
		gone := s.dead
		w.mu.Unlock()
		if gone {
			replies <- simReply{nil, errGone}
			return
		}
		data, err := s.serve(ctx, method, c.epoch)
		time.Sleep(answer)
		replies <- simReply{data, err}
	}
	go func() {
		defer cancel()
		deliver(server, request)
	}()
	if twice > 0 {
		go func() {
			again, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
			defer cancel()
			deliver(again, request+twice)
		}()
	}
	select {
	case reply := <-replies:
		if replyLost {
			return nil, errLost
		}
		return reply.data, reply.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func stamp(data []byte) int64 {
	if len(data) != 8 {
		return 0
	}
	return int64(binary.BigEndian.Uint64(data))
}

func (l *simLink) tell(ctx context.Context, method string) error {
	_, err := l.call(ctx, method)
	return err
}

func (l *simLink) ID() string { return l.m.id }

func (l *simLink) Prepare(ctx context.Context, _ Epoch) error { return l.tell(ctx, "Prepare") }

func (l *simLink) Freeze(ctx context.Context, _ string, _ int64) (asked, frozen int64, err error) {
	asked = int64(l.m.w.now())
	data, err := l.call(ctx, "Freeze")
	return asked, stamp(data), err
}

func (l *simLink) Lock(ctx context.Context, _ string) error    { return l.tell(ctx, "Lock") }
func (l *simLink) Capture(ctx context.Context, _ string) error { return l.tell(ctx, "Capture") }
func (l *simLink) Unlock(ctx context.Context, _ string) error  { return l.tell(ctx, "Unlock") }

func (l *simLink) Resume(ctx context.Context, _ string, stop bool) (int64, error) {
	method := "Resume"
	if stop {
		method = "Stop"
	}
	data, err := l.call(ctx, method)
	return stamp(data), err
}

func (l *simLink) Seal(ctx context.Context, _ string) error   { return l.tell(ctx, "Seal") }
func (l *simLink) Finish(ctx context.Context, _ string) error { return l.tell(ctx, "Finish") }
func (l *simLink) Abort(ctx context.Context, _ string) error  { return l.tell(ctx, "Abort") }
func (l *simLink) Renew(ctx context.Context, _ string) error  { return l.tell(ctx, "Renew") }
