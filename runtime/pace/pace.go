// SPDX-License-Identifier: Apache-2.0

package pace

import (
	"context"
	"sync/atomic"
	"time"
)

const (
	// Share of all processors that is used of a busy host, if nobody says otherwise.
	Share = 0.1
	// Most is how many times longer at the most anything takes for being paced.
	Most = 10

	// quiet is which part of the processors others may use on a host that counts as
	// idle. It is not told by what they leave to us: an application that waits for
	// its own answers uses less, the more we take.
	quiet = 0.2
	// reserve is which part of the processors is to stay idle when we use more than our
	// share of a host that is not, or reserved of them, if that is less: who has
	// something to do finds a processor then.
	reserve, reserved = 0.5, 2
	// trust is how long a host counts as idle without another look at it while we
	// use our share only: who has the processors less often than we do does not show.
	trust = 2 * time.Second
	// window is how long the host is looked at for one opinion: processor time is told in
	// hundredths of a second (proc_stat(5)). The first look is a short one.
	window, glance = 100 * time.Millisecond, 30 * time.Millisecond
	// others is what containerd and the kernel's threads use for each second of ours:
	// writing back, checksums, receiving and hashing what is exported.
	others = 0.5
	// burst is how much time may be worked without a pause after a rest. A pause is of
	// blink at the least, and of nap at the most: the host may have become idle meanwhile.
	burst, blink, nap = time.Millisecond, 200 * time.Microsecond, 50 * time.Millisecond
)

// Pacer paces one operation of this process. It is safe for concurrent use: while
// one caller sleeps, others that call Pause wait for it.
type Pacer struct {
	share float64
	host  host

	turn chan struct{} // holds what follows

	at   time.Duration // when the last Pause returned
	used time.Duration // of processor time by then
	debt time.Duration // processor time that was used and is to be slept for; below 0 a credit
	may  time.Duration // sleep

	seen   sample  // when rate was found
	rate   float64 // processors that we may use; all of them if free
	isFree bool
	since  time.Duration // it is free
	judged bool          // rate is more than a guess
	busy   atomic.Bool   // not isFree, for those whose turn it is not
}

// sample is what is known of the host and this process at one time.
type sample struct {
	at time.Duration
	// idle and all are the processors' time that nobody used, and all of it.
	idle, all time.Duration
	used      time.Duration
}

// New is a pacer for the given share of all processors, from now on. A share of 0 or
// less, and a host that does not tell how busy it is, give nil, which does not pace.
func New(share float64) *Pacer { return newPacer(share, linux{}) }

func newPacer(share float64, h host) *Pacer {
	if share <= 0 {
		return nil
	}
	p := &Pacer{share: min(share, 1), host: h, turn: make(chan struct{}, 1)}
	var ok bool
	if p.seen, ok = p.sample(); !ok {
		return nil
	}
	p.at, p.used = p.seen.at, p.seen.used
	p.rate = p.least(float64(h.processors()))
	p.busy.Store(true)
	return p
}

type key struct{}

// With puts a pacer, which may be nil, into a context for Pause.
func With(ctx context.Context, p *Pacer) context.Context { return context.WithValue(ctx, key{}, p) }

// From is what With put in, or nil.
func From(ctx context.Context) *Pacer {
	p, _ := ctx.Value(key{}).(*Pacer)
	return p
}

// Pause is [Pacer.Pause] of the context's pacer.
func Pause(ctx context.Context) { From(ctx).Pause(ctx) }

// Busy is [Pacer.Busy] of the context's pacer.
func Busy(ctx context.Context) bool { return From(ctx).Busy() }

// Busy tells whether the host was found busy, or has not been looked at yet: then more
// threads than one, and large pieces, only take processors away from others.
func (p *Pacer) Busy() bool { return p != nil && p.busy.Load() }

// Pause sleeps for as long as what was done since it was called last is to be paid
// for, or until ctx ends.
func (p *Pacer) Pause(ctx context.Context) {
	if p == nil {
		return
	}
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return
	}
	now, used := p.host.now(), p.host.used()
	worked, spent := now-p.at, used-p.used
	p.at, p.used = now, used
	p.may += (Most - 1) * worked
	p.look(now)
	if p.isFree {
		p.debt = 0
		return
	}
	p.debt += time.Duration((1+others)*float64(spent) - p.rate*float64(worked))
	p.debt = max(p.debt, -time.Duration(p.rate*float64(burst)))
	for !p.isFree {
		d := min(time.Duration(float64(p.debt)/p.rate), p.may, nap)
		if d < blink || !p.host.sleep(ctx, d) {
			break
		}
		before := p.at
		p.at, p.used = p.host.now(), p.host.used()
		slept := p.at - before
		p.may -= slept
		p.debt -= time.Duration(p.rate * float64(slept))
		p.look(p.at)
	}
	// Debts that could not be slept for are not carried on.
	p.debt = min(p.debt, time.Duration(p.rate*float64(blink)))
}

// look finds out how much may be used, once there is something to tell it by.
func (p *Pacer) look(now time.Duration) {
	wait := window
	if !p.judged {
		wait = glance
	}
	if now-p.seen.at < wait {
		return
	}
	s, ok := p.sample()
	all := s.all - p.seen.all
	if !ok || all <= 0 {
		return
	}
	processors := float64(all) / float64(s.at-p.seen.at)
	idle := float64(s.idle-p.seen.idle) / float64(all)
	ours := (1 + others) * float64(s.used-p.seen.used) / float64(all)
	p.seen, p.judged = s, true
	wasFree := p.isFree
	p.isFree = p.share >= 1 || 1-idle-ours <= quiet
	if !wasFree {
		p.since = now
	} else if now-p.since > trust && p.share < 1 {
		p.isFree = false
	}
	p.busy.Store(!p.isFree)
	p.rate = p.least(processors)
	if !wasFree {
		p.rate = max(p.rate, processors*(ours+idle-min(reserve, reserved/processors)))
	}
}

// least is how many processors are used in any case.
func (p *Pacer) least(processors float64) float64 {
	return max(p.share*processors, 1/float64(Most))
}

func (p *Pacer) sample() (s sample, ok bool) {
	s.at, s.used = p.host.now(), p.host.used()
	s.idle, s.all, ok = p.host.times()
	return s, ok
}
