// SPDX-License-Identifier: Apache-2.0

package group

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// world is the simulated host: containers that talk over TCP and share a volume,
// their network namespaces, and the store of captures. Only shims and coordinators act on it.
// It runs in a synctest bubble, so its clock is virtual.
type world struct {
	seed   uint64
	faults faults
	// rulesDoNothing breaks the host: rules are put up and let all packets pass.
	rulesDoNothing bool

	mu       sync.Mutex // never held while sleeping
	traffic  *rand.Rand
	start    time.Time
	advanced time.Time
	members  []*simMember
	pipes    []*pipe
	volume   []uint64                       // a shared volume: what each member wrote to it
	rules    map[int]map[string]bool        // network namespace, owner
	captures map[string]map[int]*simCapture // epoch, member
	exported map[string]bool
	over     map[string]bool // epochs that every member was told to have ended
	wrong    []string
	quiet    bool // no more faults
	longest  time.Duration
}

// faults are probabilities, per call or act; the zero value has none.
type faults struct {
	lost, replyLost, twice, late    float64
	actSlow, actFails, undo, save   float64
	cutOff                          int // member whose calls are all lost, -1 for none
	coordinatorDies, memberDiesStep int // at which call or step, 0 for never
	dyingMember                     int
	memberDeleted                   bool // or only its shim restarted
	dieBefore                       bool // the call or step is not done any more
}

// pipe is one direction of a TCP connection between two members. Numbers are
// byte positions in the stream.
type pipe struct {
	from, to      int
	written       uint64 // by the sending application
	next          uint64 // sent by the sending kernel
	acked         uint64 // known to the sending kernel; before it nothing is kept
	received      uint64 // by the receiving kernel
	read          uint64 // by the receiving application
	segments      [][2]uint64
	confirmations []uint64
}

// simCapture is what a member's checkpoint would contain, and what was true
// around it.
type simCapture struct {
	state                          string // open, taken, sealed
	begun, done                    time.Duration
	frozenAt, lockedAt, releasedAt time.Duration
	written, acked, received, read map[*pipe]uint64
	wrote                          uint64
	volume                         []uint64
}

func newWorld(seed uint64, members int, sharedNet bool) *world {
	w := &world{
		seed: seed, traffic: rand.New(rand.NewPCG(seed, 1)),
		start: time.Now(), advanced: time.Now(),
		rules: map[int]map[string]bool{}, captures: map[string]map[int]*simCapture{}, exported: map[string]bool{}, over: map[string]bool{},
		faults: faults{cutOff: -1},
	}
	for i := range members {
		m := &simMember{w: w, i: i, id: fmt.Sprintf("m%d", i), net: i, alive: true}
		if sharedNet {
			m.net = i / 2
		}
		w.rules[m.net] = map[string]bool{}
		w.members = append(w.members, m)
		w.volume = append(w.volume, 0)
		m.boot()
	}
	for i := range members {
		for j := range members {
			if i != j {
				w.pipes = append(w.pipes, &pipe{from: i, to: j})
			}
		}
	}
	return w
}

func (w *world) now() time.Duration { return time.Since(w.start) + 1 }

func (w *world) complain(format string, args ...any) {
	w.wrong = append(w.wrong, fmt.Sprintf(format, args...))
}

// advance lets applications and kernels do what they can have done since the
// last event. It is called before anything changes, with mu held.
func (w *world) advance() {
	passed := time.Since(w.advanced)
	w.advanced = time.Now()
	if len(w.pipes) == 0 {
		return
	}
	if m := w.members[w.traffic.IntN(len(w.members))]; passed > 0 && m.alive && !m.frozen {
		w.volume[m.i]++
	}
	for range min(int(passed/(150*time.Microsecond)), 12*len(w.pipes)) {
		w.step(w.pipes[w.traffic.IntN(len(w.pipes))], w.traffic.IntN(7))
	}
}

// step is one thing that an application or a kernel does. Kernels do not stop
// for a freezer; only rules stop them.
func (w *world) step(p *pipe, what int) {
	from, to := w.members[p.from], w.members[p.to]
	if !from.alive || !to.alive {
		return
	}
	passes := func(m *simMember) bool { return w.rulesDoNothing || len(w.rules[m.net]) == 0 }
	switch what {
	case 0: // the application writes
		if !from.frozen {
			p.written += uint64(1 + w.traffic.IntN(5))
		}
	case 1, 2: // the kernel sends what was not sent
		if p.written > p.next && passes(from) {
			p.segments = append(p.segments, [2]uint64{p.next, p.written})
		}
		p.next = p.written // dropped is as good as sent, to TCP
	case 3: // or its retransmission timer fires
		if p.next > p.acked && passes(from) {
			p.segments = append(p.segments, [2]uint64{p.acked, p.next})
		}
	case 4: // a segment arrives and is acknowledged
		if len(p.segments) == 0 {
			return
		}
		s := p.segments[0]
		p.segments = p.segments[1:]
		if !passes(to) || w.traffic.IntN(2) == 0 { // networks lose, too
			return
		}
		if s[0] <= p.received && p.received < s[1] {
			p.received = s[1]
		}
		p.confirmations = append(p.confirmations, p.received)
	case 5: // an acknowledgement arrives
		if len(p.confirmations) == 0 {
			return
		}
		c := p.confirmations[0]
		p.confirmations = p.confirmations[1:]
		if passes(from) {
			p.acked = max(p.acked, c)
		}
	case 6: // the application reads
		if !to.frozen {
			p.read = p.received
		}
	}
}

// consistent says what is wrong with a whole epoch's cut, empty if nothing.
func (w *world) consistent(epoch string) string {
	c := w.captures[epoch]
	for _, p := range w.pipes {
		s, r := c[p.from], c[p.to]
		if s == nil || r == nil {
			continue // not in this epoch's group
		}
		switch {
		case r.received[p] > s.written[p]:
			return fmt.Sprintf("m%d has received byte %d from m%d, which has only written %d", p.to, r.received[p], p.from, s.written[p])
		case s.acked[p] > r.received[p]:
			return fmt.Sprintf("m%d has dropped bytes up to %d as acknowledged, m%d has received only %d", p.from, s.acked[p], p.to, r.received[p])
		case r.read[p] > r.received[p]:
			return fmt.Sprintf("m%d has read byte %d and received only %d", p.to, r.read[p], r.received[p])
		}
	}
	for i, a := range c {
		for j, b := range c {
			if a.volume[j] != b.wrote {
				return fmt.Sprintf("the volume as m%d has it contains %d writes of m%d, which has done %d", i, a.volume[j], j, b.wrote)
			}
		}
	}
	return ""
}

// barrierHeld says whether there was an instant before all captures at which
// every member was frozen and locked, and none was let go before all had ended.
func (w *world) barrierHeld(epoch string) string {
	for i, a := range w.captures[epoch] {
		for j, b := range w.captures[epoch] {
			if a.frozenAt == 0 || a.lockedAt == 0 || a.frozenAt > b.begun || a.lockedAt > b.begun {
				return fmt.Sprintf("capture of m%d began at %s; m%d was frozen at %s and locked at %s", j, b.begun, i, a.frozenAt, a.lockedAt)
			}
			if a.releasedAt != 0 && a.releasedAt < b.done {
				return fmt.Sprintf("m%d was released at %s; the capture of m%d ended at %s", i, a.releasedAt, j, b.done)
			}
		}
	}
	return ""
}

// whole reports whether every one of the members has a sealed capture.
func (w *world) whole(epoch string, members []*simMember) bool {
	for _, m := range members {
		if c := w.captures[epoch][m.i]; c == nil || c.state != "sealed" {
			return false
		}
	}
	return true
}

// drained lets the network come to rest and reports a pipe that does not.
func (w *world) drained() string {
	for _, p := range w.pipes {
		if !w.members[p.from].alive || !w.members[p.to].alive {
			continue
		}
		for n := 0; p.read != p.written; n++ {
			if n > 1000 {
				return fmt.Sprintf("m%d to m%d: %d written, %d acked, %d read", p.from, p.to, p.written, p.acked, p.read)
			}
			for _, what := range []int{2, 3, 4, 5, 6} {
				w.step(p, what)
			}
		}
	}
	return ""
}
