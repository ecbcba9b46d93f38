// SPDX-License-Identifier: Apache-2.0

package schedule

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// world is a keeper in simulated time, over a runner that says what it was asked.
type world struct {
	*testing.T
	dir   string
	start time.Time
	k     *Keeper
	end   func()

	mu sync.Mutex
	// begun are the times at which passes began, since the start.
	begun  []time.Duration
	open   map[Key]int
	pruned int
	// takes and fails decide about the pass to come.
	takes    time.Duration
	fails    error
	failsRM  error
	number   uint64
	cutShort int
	// untracked are the groups whose tracking was ended; failsEnd is why it is not.
	untracked []Key
	failsEnd  error
}

func init() { _ = log.SetLevel("fatal") }

func simulate(t *testing.T, test func(w *world)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := &world{T: t, dir: dir, start: time.Now(), open: map[Key]int{}}
		w.boot()
		test(w)
		w.end()
	})
}

// boot starts a keeper on what the last one left.
func (w *world) boot() {
	w.Helper()
	k, bad, err := New(w.dir, w)
	if err != nil || bad != nil {
		w.Fatal(err, bad)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.Run(ctx)
	}()
	w.k = k
	w.end = func() {
		cancel()
		<-done
	}
	synctest.Wait()
}

func (w *world) Checkpoint(ctx context.Context, s Spec) (Epoch, error) {
	w.mu.Lock()
	w.begun = append(w.begun, time.Since(w.start))
	w.open[s.Key()]++
	if w.open[s.Key()] > 1 {
		w.Errorf("two passes of %s at once", s.Key())
	}
	takes, fails := w.takes, w.fails
	w.mu.Unlock()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		fails = ctx.Err()
		// Undoing takes a moment.
		time.Sleep(time.Second)
		w.mu.Lock()
		w.cutShort++
		w.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.open[s.Key()]--
	if fails != nil {
		return Epoch{}, fails
	}
	w.number++
	return Epoch{Number: w.number, Ref: s.Ref, StopMS: 7}, nil
}

func (w *world) Prune(context.Context, Spec) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pruned++
	return w.failsRM
}

func (w *world) EndTracking(ctx context.Context, s Spec) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if ctx.Err() != nil {
		w.Errorf("called with a context that has ended: %v", ctx.Err())
	}
	if w.open[s.Key()] > 0 {
		w.Error("the tracking is ended while a pass goes on, which may begin another")
	}
	w.untracked = append(w.untracked, s.Key())
	return w.failsEnd
}

func (w *world) set(every time.Duration) {
	w.Helper()
	if _, err := w.k.Set(w.Context(), spec(every)); err != nil {
		w.Fatal(err)
	}
}

func spec(every time.Duration) Spec {
	return Spec{Namespace: "default", Group: "shop", Address: "/run/containerd.sock", Ref: "shop:ck", Every: every, Keep: 3}
}

func (w *world) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// after lets time pass and expects the passes to have begun at these seconds.
func (w *world) after(d time.Duration, seconds ...float64) {
	w.Helper()
	time.Sleep(d)
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	var got []float64
	for _, b := range w.begun {
		got = append(got, b.Seconds())
	}
	if !slices.Equal(got, seconds) {
		w.Errorf("after %v passes began at %v s, want %v", time.Since(w.start), got, seconds)
	}
}

func (w *world) status() Status {
	w.Helper()
	list := w.k.List("")
	if len(list) != 1 {
		w.Fatalf("%d schedules: %+v", len(list), list)
	}
	return list[0]
}

func TestPassesBeginAtOnceAndThenAtEveryInterval(t *testing.T) {
	simulate(t, func(w *world) {
		w.takes = time.Second
		w.set(30 * time.Second)
		w.after(100*time.Second, 0, 30, 60, 90)
		s := w.status()
		if s.Passes != 4 || s.Failed != 0 || s.Last == nil || s.Last.Number != 4 || s.Running || s.Next.Sub(w.start) != 120*time.Second || w.pruned != 4 {
			w.Errorf("%+v, pruned %d times", s, w.pruned)
		}
		if s.Ref != "docker.io/library/shop:ck" {
			w.Errorf("the name was not completed: %s", s.Ref)
		}
	})
}

func TestAPassThatTakesTooLongLeavesOutThoseItOverran(t *testing.T) {
	simulate(t, func(w *world) {
		w.takes = 25 * time.Second
		w.set(10 * time.Second)
		w.after(95*time.Second, 0, 30, 60, 90)
		if s := w.status(); !s.Running {
			w.Errorf("not running: %+v", s)
		}
	})
}

func TestFailuresBackOffToABoundAndSuccessEndsThat(t *testing.T) {
	simulate(t, func(w *world) {
		w.fails = errors.New("a manual checkpoint is under way")
		w.set(100 * time.Second)
		// The first is repeated at the next interval, then after 200, then 300 s at the most.
		w.after(1250*time.Second, 0, 100, 300, 600, 900, 1200)
		if s := w.status(); s.Failures != 6 || s.Failed != 6 || s.Error != w.fails.Error() || s.Last != nil {
			w.Errorf("%+v", s)
		}
		w.change(func() { w.fails = nil })
		w.after(400*time.Second, 0, 100, 300, 600, 900, 1200, 1500, 1600)
		if s := w.status(); s.Failures != 0 || s.Failed != 6 || s.Error != "" || s.Passes != 2 {
			w.Errorf("%+v", s)
		}
	})
}

func TestAnIntervalLongerThanTheBoundIsKeptAfterFailures(t *testing.T) {
	simulate(t, func(w *world) {
		w.fails = errors.New("no")
		w.set(time.Hour)
		w.after(3*time.Hour+time.Second, 0, 3600, 7200, 10800)
	})
}

func TestAGroupThatIsGoneStaysScheduledAndComesBack(t *testing.T) {
	simulate(t, func(w *world) {
		w.fails = errdefs.ErrNotFound
		w.set(time.Second)
		time.Sleep(24 * time.Hour)
		w.change(func() { w.fails, w.begun = nil, nil })
		time.Sleep(MaxPause)
		synctest.Wait()
		if s := w.status(); s.Passes == 0 || s.Failures != 0 {
			w.Errorf("%+v", s)
		}
	})
}

func TestAnEpochThatCannotBePrunedIsToldAndTriedAgain(t *testing.T) {
	simulate(t, func(w *world) {
		w.failsRM = errors.New("the image store is locked")
		w.set(10 * time.Second)
		w.after(5*time.Second, 0)
		s := w.status()
		if s.Last == nil || s.Last.Number != 1 || s.Failures != 1 || !strings.Contains(s.Error, "the image store is locked") {
			w.Errorf("%+v", s)
		}
	})
}

func TestATimeThatPassedWhileNoKeeperRanIsMadeUpForOnceAndSoon(t *testing.T) {
	simulate(t, func(w *world) {
		w.set(30 * time.Second)
		w.after(40*time.Second, 0, 30)
		w.end()
		w.after(time.Hour, 0, 30)
		w.boot()
		// At 3640 s, then a start delay later, then on.
		w.after(40*time.Second, 0, 30, 3645, 3675)
		if s := w.status(); s.Passes != 4 || s.Failed != 0 {
			w.Errorf("%+v", s)
		}
	})
}

func TestARestartDoesNotShortenTheInterval(t *testing.T) {
	simulate(t, func(w *world) {
		w.set(time.Minute)
		w.after(20*time.Second, 0)
		w.end()
		w.boot()
		w.after(45*time.Second, 0, 60)
	})
}

func TestTheEndOfTheDaemonCancelsThePassWhichIsTheNextOnesFirst(t *testing.T) {
	simulate(t, func(w *world) {
		w.takes = 20 * time.Second
		w.set(time.Minute)
		w.after(65*time.Second, 0, 60)
		begun := time.Now()
		w.end()
		if took := time.Since(begun); took != time.Second || w.cutShort != 1 {
			w.Errorf("the end took %v, %d passes were cut short", took, w.cutShort)
		}
		w.boot()
		w.after(6*time.Second, 0, 60, 71)
		if s := w.status(); s.Failed != 0 {
			w.Errorf("a cancelled pass counts as failed: %+v", s)
		}
	})
}

func TestADaemonKilledInAPassIsSeenByTheNext(t *testing.T) {
	simulate(t, func(w *world) {
		w.takes = 10 * time.Second
		w.set(20 * time.Second)
		w.after(5*time.Second, 0)
		// What a kill would leave.
		path := filepath.Join(w.dir, "default", "shop.json")
		left, err := os.ReadFile(path)
		if err != nil {
			w.Fatal(err)
		}
		w.end()
		if err := os.WriteFile(path, left, 0o600); err != nil {
			w.Fatal(err)
		}
		w.boot()
		s := w.status()
		if s.Failures != 1 || s.Error != errCut.Error() {
			w.Errorf("%+v", s)
		}
		w.after(16*time.Second, 0, 20)
	})
}

func TestRemoveEndsAPassUnderWayAndTheScheduleForGood(t *testing.T) {
	simulate(t, func(w *world) {
		w.takes = 20 * time.Second
		w.set(time.Minute)
		w.after(10*time.Second, 0)
		if err := w.k.Remove(w.Context(), spec(0).Key()); err != nil {
			w.Fatal(err)
		}
		if w.cutShort != 1 || len(w.k.List("")) != 0 {
			w.Errorf("%d cut short, list %v", w.cutShort, w.k.List(""))
		}
		if err := w.k.Remove(w.Context(), spec(0).Key()); !errdefs.IsNotFound(err) {
			w.Errorf("removing what is not there: %v", err)
		}
		w.end()
		w.boot()
		w.after(time.Hour, 0)
	})
}

func TestRemoveEndsTheTrackingThatPassesKept(t *testing.T) {
	for name, takes := range map[string]time.Duration{"between passes": 0, "in a pass": 20 * time.Second} {
		t.Run(name, func(t *testing.T) {
			simulate(t, func(w *world) {
				w.takes = takes
				w.set(time.Minute)
				w.after(10*time.Second, 0)
				if len(w.untracked) != 0 {
					w.Errorf("ended before: %v", w.untracked)
				}
				if err := w.k.Remove(w.Context(), spec(0).Key()); err != nil || !slices.Equal(w.untracked, []Key{spec(0).Key()}) {
					w.Errorf("ended: %v, %v", w.untracked, err)
				}
			})
		})
	}
	t.Run("before the keeper runs", func(t *testing.T) {
		simulate(t, func(w *world) {
			w.set(time.Minute)
			w.after(time.Second, 0)
			w.end()
			k, bad, err := New(w.dir, w)
			if err != nil || bad != nil {
				w.Fatal(err, bad)
			}
			if err := k.Remove(w.Context(), spec(0).Key()); err != nil || len(w.untracked) != 1 {
				w.Errorf("ended: %v, %v", w.untracked, err)
			}
		})
	})
}

func TestTheEndOfTheDaemonLeavesTheTrackingToTheNext(t *testing.T) {
	simulate(t, func(w *world) {
		w.set(time.Minute)
		w.after(10*time.Second, 0)
		w.end()
		if len(w.untracked) != 0 {
			w.Errorf("ended: %v", w.untracked)
		}
	})
}

func TestTrackingThatMayGoOnAfterARemoveIsTold(t *testing.T) {
	simulate(t, func(w *world) {
		w.failsEnd = errors.New("no containerd")
		w.set(time.Minute)
		w.after(10*time.Second, 0)
		err := w.k.Remove(w.Context(), spec(0).Key())
		if !errors.Is(err, w.failsEnd) || !strings.Contains(err.Error(), "is removed, but") {
			w.Errorf("%v", err)
		}
		w.after(time.Hour, 0)
		if n := len(w.k.List("")); n != 0 {
			w.Errorf("%d schedules are left", n)
		}
	})
}

func TestASetDuringARemoveWaitsUntilThePassIsUndone(t *testing.T) {
	simulate(t, func(w *world) {
		w.takes = 20 * time.Second
		w.set(time.Minute)
		w.after(10*time.Second, 0)
		go func() { _ = w.k.Remove(w.Context(), spec(0).Key()) }()
		synctest.Wait()
		w.set(time.Minute)
		// Undone at 11 s.
		w.after(5*time.Second, 0, 11)
	})
}

func TestSetReplacesAndTheRunningPassDoesNotReportToTheNewSchedule(t *testing.T) {
	simulate(t, func(w *world) {
		w.takes, w.fails = 10*time.Second, errors.New("of the old one")
		w.set(time.Minute)
		w.after(5*time.Second, 0)
		w.change(func() { w.fails = nil })
		w.set(30 * time.Second)
		w.after(20*time.Second, 0, 10)
		s := w.status()
		if s.Failed != 0 || s.Passes != 1 || s.Every != 30*time.Second {
			w.Errorf("%+v", s)
		}
	})
}

func TestAClockThatWasSetBackDoesNotPutPassesOff(t *testing.T) {
	s := spec(time.Minute)
	now := time.Now()
	p := Progress{Begun: now.Add(24 * time.Hour), Ended: now.Add(24 * time.Hour)}
	if d := s.due(p, now).Sub(now); d != time.Minute {
		t.Errorf("due in %v", d)
	}
}

func TestManyGroupsRunBesideEachOther(t *testing.T) {
	simulate(t, func(w *world) {
		w.takes = 5 * time.Second
		for _, g := range []string{"a", "b", "c"} {
			s := spec(10 * time.Second)
			s.Group = g
			if _, err := w.k.Set(w.Context(), s); err != nil {
				w.Fatal(err)
			}
		}
		w.after(12*time.Second, 0, 0, 0, 10, 10, 10)
		if n := len(w.k.List("other")); n != 0 {
			w.Errorf("%d schedules in another namespace", n)
		}
	})
}

func TestWhatCannotWorkIsRefused(t *testing.T) {
	for name, change := range map[string]func(*Spec){
		"interval":   func(s *Spec) { s.Every = time.Millisecond },
		"too long":   func(s *Spec) { s.Every = 1 << 62 },
		"keep":       func(s *Spec) { s.Keep = 0 },
		"ref":        func(s *Spec) { s.Ref = "UPPER" },
		"digest":     func(s *Spec) { s.Ref = "shop@sha256:" + strings.Repeat("0", 64) },
		"tag":        func(s *Spec) { s.Ref = "shop:" + strings.Repeat("x", 116) },
		"group":      func(s *Spec) { s.Group = "../shop" },
		"no group":   func(s *Spec) { s.Group = "" },
		"namespace":  func(s *Spec) { s.Namespace = "a/b" },
		"no address": func(s *Spec) { s.Address = "" },
		"relative":   func(s *Spec) { s.Address = "containerd.sock" },
	} {
		s := spec(time.Second)
		change(&s)
		if err := s.check(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := spec(time.Second)
	if err := s.check(); err != nil {
		t.Error(err)
	}
}

func TestASpoiledFileIsToldAndLeftAloneAndTheOthersGoOn(t *testing.T) {
	dir := t.TempDir()
	good := record{Spec: spec(time.Minute)}
	if err := good.check(); err != nil {
		t.Fatal(err)
	}
	if err := good.write(dir); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(good.path(dir))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	foreign, _ := json.Marshal(good)
	for name, content := range map[string]string{"half.json": `{"namespace":`, "other.json": string(foreign), ".shop.tmp": "{"} {
		if err := os.WriteFile(filepath.Join(dir, "default", name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k, bad, err := New(dir, nil)
	if err != nil || len(k.List("")) != 1 {
		t.Fatalf("%v, %v", err, k.List(""))
	}
	if bad == nil || !strings.Contains(bad.Error(), "half.json") || !strings.Contains(bad.Error(), "other.json") || strings.Contains(bad.Error(), "shop.tmp") {
		t.Errorf("told: %v", bad)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "default", "*.json")); len(left) != 3 {
		t.Errorf("left: %v", left)
	}
}
