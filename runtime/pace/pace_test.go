// SPDX-License-Identifier: Apache-2.0

package pace

import (
	"context"
	"testing"
	"time"
)

// fake is a host whose time goes on only when somebody works or sleeps.
type fake struct {
	clock, cpu, idleTime time.Duration
	n                    int
	// demand is how many processors others keep busy when they have them to themselves; yields
	// is for those that have less, the more is taken from them.
	demand float64
	yields bool
	blind  bool
	slept  time.Duration
	ctx    context.CancelFunc
}

func (f *fake) now() time.Duration  { return f.clock }
func (f *fake) used() time.Duration { return f.cpu }
func (f *fake) processors() int     { return f.n }

func (f *fake) times() (idle, all time.Duration, ok bool) {
	// The kernel tells hundredths of a second.
	const unit = time.Second / userHZ
	return f.idleTime.Truncate(unit), (time.Duration(f.n) * f.clock).Truncate(unit), !f.blind
}

func (f *fake) sleep(ctx context.Context, d time.Duration) bool {
	f.pass(d, 0)
	f.slept += d
	if f.ctx != nil {
		f.ctx()
	}
	return ctx.Err() == nil
}

// pass lets time go by, in which we use so many processors.
func (f *fake) pass(d time.Duration, ours float64) {
	f.clock += d
	f.cpu += time.Duration(ours * float64(d))
	others := f.demand
	if f.yields {
		others = min(others, (float64(f.n)-ours)*0.8)
	}
	f.idleTime += time.Duration(max(0, float64(f.n)-ours-others) * float64(d))
}

// work does pieces of a millisecond on so many processors at once, and returns how long
// all of it took.
func (f *fake) work(p *Pacer, pieces int, ours float64) time.Duration {
	begun := f.clock
	for range pieces {
		f.pass(time.Millisecond, ours)
		p.Pause(context.Background())
	}
	return f.clock - begun
}

func TestOnABusyHostTheShareIsKept(t *testing.T) {
	for _, c := range []struct {
		n            int
		share, ours  float64
		demand, want float64 // processors
	}{
		{n: 2, share: 0.1, ours: 1, demand: 2, want: 0.2 / (1 + others)},
		// A tenth of the speed at the least.
		{n: 2, share: 0.1, ours: 2, demand: 2, want: 0.2},
		{n: 4, share: 0.1, ours: 1, demand: 4, want: 0.4 / (1 + others)},
		{n: 4, share: 0.25, ours: 3, demand: 3.6, want: 1 / (1 + others)},
		{n: 64, share: 0.1, ours: 2, demand: 64, want: 2},
	} {
		f := &fake{n: c.n, demand: c.demand}
		took := f.work(newPacer(c.share, f), 1000, c.ours)
		got := c.ours * time.Second.Seconds() / took.Seconds()
		if got < 0.85*c.want || got > 1.15*c.want {
			t.Errorf("%+v: used %.3f processors", c, got)
		}
	}
}

func TestOnAnIdleHostNothingSleeps(t *testing.T) {
	for _, c := range []struct {
		n            int
		ours, demand float64
	}{
		{2, 1, 0}, {2, 2, 0}, {2, 1, 0.3}, {8, 2, 3}, {64, 4, 30},
	} {
		f := &fake{n: c.n, demand: c.demand}
		p := newPacer(Share, f)
		f.work(p, 500, c.ours) // until it has seen that
		f.slept = 0
		if f.work(p, 2000, c.ours); f.slept > f.clock/10 {
			t.Errorf("%+v: slept %v of %v", c, f.slept, f.clock)
		}
	}
}

// An application that waits for its own answers leaves more, the more is taken: it
// must not be taken for one that needs no more.
func TestAnApplicationThatYieldsIsNotPushedAside(t *testing.T) {
	f := &fake{n: 2, demand: 1.6, yields: true}
	took := f.work(newPacer(Share, f), 1000, 1)
	if got := 1 / took.Seconds(); got > 0.2 {
		t.Errorf("used %.3f processors of a host that is busy", got)
	}
}

func TestAHostThatBecomesIdleIsUsedAtOnce(t *testing.T) {
	f := &fake{n: 2, demand: 2}
	p := newPacer(Share, f)
	f.work(p, 300, 1)
	f.demand = 0
	f.work(p, 100, 1)
	if took := f.work(p, 1000, 1); took > 1300*time.Millisecond {
		t.Errorf("a second's work took %v", took)
	}
	f.demand = 2
	f.work(p, 300, 1)
	if took := f.work(p, 100, 1); took < 500*time.Millisecond {
		t.Errorf("the host is busy again, and 0.1 s of work took %v only", took)
	}
}

func TestWhatIsPacedTakesTenTimesAsLongAtTheMost(t *testing.T) {
	for _, share := range []float64{1e-9, 0.01, 0.1} {
		for _, ours := range []float64{0.1, 1, 8} {
			f := &fake{n: 1, demand: 1}
			if took := f.work(newPacer(share, f), 1000, ours); took > Most*time.Second {
				t.Errorf("share %v, %v processors: a second's work took %v", share, ours, took)
			}
		}
	}
}

// Work that waits, for the disk say, has paid for itself by then.
func TestTimeSpentWaitingCounts(t *testing.T) {
	f := &fake{n: 2, demand: 2}
	if f.work(newPacer(Share, f), 1000, 0.1); f.slept > 0 {
		t.Errorf("slept %v although no more than the share was used", f.slept)
	}
}

func TestAPauseEndsWithItsContext(t *testing.T) {
	f := &fake{n: 2, demand: 2}
	p := newPacer(Share, f)
	ctx, cancel := context.WithCancel(context.Background())
	f.ctx = cancel
	f.pass(time.Second, 1)
	if p.Pause(ctx); f.slept == 0 || f.slept > nap {
		t.Errorf("slept %v in a pause that ended", f.slept)
	}
	f.slept = 0
	f.pass(time.Second, 1)
	if p.Pause(ctx); f.slept > nap {
		t.Errorf("slept %v although it was over", f.slept)
	}
}

func TestWithoutAPacerNothingSleeps(t *testing.T) {
	begun := time.Now()
	Pause(context.Background())
	Pause(With(context.Background(), New(0)))
	Pause(With(context.Background(), newPacer(Share, &fake{n: 2, blind: true})))
	if d := time.Since(begun); d > time.Second {
		t.Errorf("slept %v", d)
	}
}

func TestTheHostTellsHowBusyItIs(t *testing.T) {
	for text, want := range map[string][2]time.Duration{
		"cpu  100 1 20 1000 50 2 3 4 7 8\ncpu0 1 1 1 1\n": {1050 * 10 * time.Millisecond, 1180 * 10 * time.Millisecond},
		"cpu 1 2 3 4\n": {40 * time.Millisecond, 100 * time.Millisecond},
	} {
		idle, all, ok := parseStat([]byte(text))
		if !ok || idle != want[0] || all != want[1] {
			t.Errorf("%q: %v %v %v", text, idle, all, ok)
		}
	}
	for _, text := range []string{"", "cpu", "cpu 1 2 3", "intr 1 2 3 4 5", "cpu 1 2 x 4"} {
		if _, _, ok := parseStat([]byte(text)); ok {
			t.Errorf("%q was understood", text)
		}
	}
	h := linux{}
	idle, all, ok := h.times()
	if !ok || all <= 0 || idle > all || h.processors() < 1 || h.used() <= 0 {
		t.Errorf("this host: idle %v of %v, %v; used %v", idle, all, ok, h.used())
	}
}
