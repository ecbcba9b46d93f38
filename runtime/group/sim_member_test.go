// SPDX-License-Identifier: Apache-2.0

package group

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"time"
)

var (
	errNoTask = errors.New("simulated: container has no task")
	errGone   = errors.New("simulated: connection refused")
	errLost   = errors.New("simulated: connection reset")
	errFault  = errors.New("simulated: act failed")
	errDisk   = errors.New("simulated: no space left on device")
	errDead   = errors.New("simulated: coordinator is dead")
	errExport = errors.New("simulated: export failed")
)

// simMember is a container, the facts about it that outlive its shim, and the
// shim that serves it now.
type simMember struct {
	w   *world
	i   int
	id  string
	net int

	alive, frozen, dump, dumped, tracker bool
	frozenAt, lockedAt                   time.Duration
	killedBy                             string // epoch
	victim                               bool   // of a fault
	disk                                 []byte
	shim                                 *simShim
	steps                                int
}

// simShim is one life of a shim process: the same Participant that runs in a
// real one, with acts on the simulated world.
type simShim struct {
	m    *simMember
	p    *Participant
	ctx  context.Context
	kill context.CancelFunc
	dead bool // guarded by world.mu
	n    map[string]int
}

func (m *simMember) boot() {
	s := &simShim{m: m, n: map[string]int{}}
	s.ctx, s.kill = context.WithCancel(context.Background())
	p, err := NewParticipant(Host{Save: s.save, Undo: s.undo, UndoLimit: 2 * time.Second}, m.disk)
	if err != nil {
		m.w.complain("record of %s cannot be read: %v", m.id, err)
	}
	s.p = p
	m.shim = s
}

// chance gives the randomness of one event by its name, so that a seed gives
// the same run however goroutines are scheduled.
func (w *world) chance(name string, n int) *rand.Rand {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %d", name, n)
	return rand.New(rand.NewPCG(w.seed, h.Sum64()))
}

func (s *simShim) chance(name string) *rand.Rand {
	s.m.w.mu.Lock()
	defer s.m.w.mu.Unlock()
	s.n[name]++
	return s.m.w.chance(fmt.Sprintf("%s %s %d", s.m.id, name, s.m.steps), s.n[name])
}

// on does one thing to the world, if the process still lives. Each is a point at
// which it may die.
func (s *simShim) on(f func()) error {
	w := s.m.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.dead {
		return errGone
	}
	w.advance()
	s.m.steps++
	dies := w.faults.memberDiesStep > 0 && s.m.i == w.faults.dyingMember && s.m.steps == w.faults.memberDiesStep && !w.quiet
	if dies {
		s.die()
		if w.faults.dieBefore {
			return errGone
		}
	}
	f()
	if dies {
		return errGone
	}
	return nil
}

// die is SIGKILL to the shim. containerd notices and has the container deleted,
// or (a shim that is started again) a successor finds the record.
func (s *simShim) die() {
	m, w := s.m, s.m.w
	s.dead = true
	s.kill()
	deleted := w.faults.memberDeleted
	if deleted {
		m.victim = true
	}
	go func() {
		s.p.Close()
		time.Sleep(time.Duration(1+w.chance(m.id+" containerd", 0).IntN(300)) * time.Millisecond)
		w.mu.Lock()
		w.advance()
		m.boot()
		next := m.shim
		if deleted {
			m.end()
		}
		w.mu.Unlock()
		_ = next.p.Lapse(context.Background())
	}()
}

// end is the death of the container's processes.
func (m *simMember) end() {
	m.letGo()
	m.alive, m.frozen, m.tracker = false, false, false
}

// letGo notes that the barrier ends for the member.
func (m *simMember) letGo() {
	for _, c := range m.w.captures {
		if c := c[m.i]; c != nil && c.state != "open" && c.releasedAt == 0 {
			c.releasedAt = m.w.now()
		}
	}
}

func (m *simMember) thaw() {
	if m.frozen {
		m.w.longest = max(m.w.longest, m.w.now()-m.frozenAt)
		m.letGo()
	}
	m.frozen = false
}

func (s *simShim) save(record []byte) error {
	r := s.chance("save")
	s.m.w.mu.Lock()
	quiet := s.m.w.quiet
	s.m.w.mu.Unlock()
	if !quiet && r.Float64() < s.m.w.faults.save {
		return errDisk
	}
	return s.on(func() { s.m.disk = bytes.Clone(record) })
}

func (s *simShim) undo(ctx context.Context, e Epoch, step Step) error {
	m, w := s.m, s.m.w
	r := s.chance("undo " + string(step))
	if err := s.sleep(ctx, time.Duration(r.IntN(3000))*time.Microsecond); err != nil {
		return err
	}
	w.mu.Lock()
	fails := !w.quiet && r.Float64() < w.faults.undo
	w.mu.Unlock()
	if fails && r.IntN(2) == 0 {
		return errFault
	}
	err := s.on(func() {
		switch step {
		case EndDump:
			// CRIU puts the freezer back as it found it.
			m.frozen = m.frozen || m.dumped && m.alive
			m.dump, m.dumped = false, false
		case Kill:
			m.killedBy = e.ID
			m.end()
		case RemoveRules:
			m.letGo()
			delete(w.rules[m.net], m.id)
		case Thaw:
			m.thaw()
		case StopTracking:
			m.tracker = false
		case Discard:
			delete(w.captures[e.ID], m.i)
		}
	})
	if err == nil && fails {
		err = errFault
	}
	return err
}

// sleep is a piece of work; it ends with the call or with the process.
func (s *simShim) sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.ctx.Done():
		return errGone
	}
}

// act is work of up to longest milliseconds, done in parts with time passing
// before each and after the last. It may be slow, and it may fail anywhere.
func (s *simShim) act(name string, longest int, parts ...func()) Act {
	return func(ctx context.Context) ([]byte, error) {
		r := s.chance(name)
		f := &s.m.w.faults
		s.m.w.mu.Lock()
		quiet := s.m.w.quiet
		s.m.w.mu.Unlock()
		slow, failing := !quiet && r.Float64() < f.actSlow, -1
		if !quiet && r.Float64() < f.actFails {
			failing = r.IntN(len(parts) + 1)
		}
		for i := 0; ; i++ {
			d := time.Duration(1+r.IntN(longest*1000)) * time.Microsecond
			if slow {
				d += time.Duration(r.IntN(6000)) * time.Millisecond
			}
			if err := s.sleep(ctx, d/time.Duration(len(parts)+1)); err != nil {
				return nil, err
			}
			if i == failing {
				return nil, errFault
			}
			if !s.running() && name != "Seal" && name != "Stop" && name != "Unlock" {
				return nil, errNoTask
			}
			if i == len(parts) {
				return nil, nil
			}
			if err := s.on(parts[i]); err != nil {
				return nil, err
			}
		}
	}
}

func (s *simShim) running() bool {
	s.m.w.mu.Lock()
	defer s.m.w.mu.Unlock()
	return s.m.alive
}

// stamped lets an act answer the time at which it was complete.
func (s *simShim) stamped(a Act) Act {
	return func(ctx context.Context) ([]byte, error) {
		_, err := a(ctx)
		return binary.BigEndian.AppendUint64(nil, uint64(s.m.w.now())), err
	}
}

func (s *simShim) serve(ctx context.Context, method string, e Epoch) ([]byte, error) {
	m, w := s.m, s.m.w
	captured := func(f func(*simCapture)) func() {
		return func() {
			if c := w.captures[e.ID][m.i]; c != nil {
				f(c)
			} else {
				w.complain("%s of %s: capture of the open epoch is gone", method, m.id)
			}
		}
	}
	switch method {
	case "Prepare":
		return s.p.Open(ctx, e, s.act(method, 30,
			func() {
				if w.over[e.ID] {
					w.complain("%s begins epoch %s after its end", m.id, e.ID)
				}
				if w.captures[e.ID] == nil {
					w.captures[e.ID] = map[int]*simCapture{}
				}
				w.captures[e.ID][m.i] = &simCapture{state: "open"}
			},
			func() { m.tracker = true },
			func() { m.dump = true },
		))
	case "Freeze":
		return s.p.Do(ctx, e.ID, Frozen, s.stamped(s.act(method, 3, func() {
			if m.alive && !m.frozen {
				m.frozen, m.frozenAt = true, w.now()
			}
		})))
	case "Lock":
		return s.p.Do(ctx, e.ID, Locked, s.act(method, 2, func() {
			w.rules[m.net][m.id] = true
			m.lockedAt = w.now()
		}))
	case "Capture":
		// The dump comes to each socket at a time of its own.
		parts := []func(){captured(func(c *simCapture) {
			m.dumped = true
			*c = simCapture{
				state: "open", begun: w.now(), frozenAt: m.frozenAt, lockedAt: m.lockedAt,
				written: map[*pipe]uint64{}, acked: map[*pipe]uint64{}, received: map[*pipe]uint64{}, read: map[*pipe]uint64{},
			}
		})}
		for _, p := range w.pipes {
			if p.from == m.i {
				parts = append(parts, captured(func(c *simCapture) { c.written[p], c.acked[p] = p.written, p.acked }))
			} else if p.to == m.i {
				parts = append(parts, captured(func(c *simCapture) { c.received[p], c.read[p] = p.received, p.read }))
			}
		}
		parts = append(parts,
			captured(func(c *simCapture) { c.wrote = w.volume[m.i] }),
			captured(func(c *simCapture) { c.volume = slices.Clone(w.volume) }))
		parts = append(parts, captured(func(c *simCapture) {
			m.dump, m.dumped = false, false
			c.state, c.done = "taken", w.now()
		}))
		return s.p.Do(ctx, e.ID, Captured, s.act(method, 40, parts...))
	case "Unlock":
		return s.p.Do(ctx, e.ID, Unlocked, s.act(method, 2, func() {
			m.letGo()
			delete(w.rules[m.net], m.id)
		}))
	case "Resume":
		return s.p.Do(ctx, e.ID, Resumed, s.stamped(s.act(method, 2, m.thaw)))
	case "Stop":
		return s.p.Do(ctx, e.ID, Stopped, s.stamped(s.act(method, 2, func() {
			if m.alive {
				m.killedBy = e.ID
			}
			m.end()
		})))
	case "Seal":
		return s.p.Do(ctx, e.ID, Sealed, s.act(method, 60, captured(func(c *simCapture) { c.state = "sealed" })))
	case "Finish":
		return nil, s.p.Finish(ctx, e.ID)
	case "Abort":
		return nil, s.p.Abort(ctx, e.ID)
	case "Renew":
		return nil, s.p.Renew(e.ID)
	}
	panic(method)
}
