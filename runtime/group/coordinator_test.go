// SPDX-License-Identifier: Apache-2.0

package group

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// script is a group whose members do what they are told and write it down.
type script struct {
	mu    sync.Mutex
	calls []string
	// fail answers a call "Freeze m1" with an error, hang not at all.
	fail  map[string]error
	hang  map[string]bool
	takes map[string]time.Duration
	// during is called in a call.
	during map[string]func()
	began  time.Time
	told   []int64 // when to freeze
}

type scripted struct {
	s  *script
	id string
}

func (s *script) members(n int) []Member {
	s.began = time.Now()
	var m []Member
	for i := range n {
		m = append(m, scripted{s, fmt.Sprintf("m%d", i)})
	}
	return m
}

func (m scripted) call(ctx context.Context, name string) error {
	name += " " + m.id
	m.s.mu.Lock()
	m.s.calls = append(m.s.calls, name)
	err, hang, takes := m.s.fail[name], m.s.hang[name], m.s.takes[name]
	during := m.s.during[name]
	m.s.mu.Unlock()
	if during != nil {
		during()
	}
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	select {
	case <-time.After(takes):
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m scripted) now() int64 { return int64(time.Since(m.s.began)) + 1 }

func (m scripted) ID() string                                { return m.id }
func (m scripted) Prepare(c context.Context, _ Epoch) error  { return m.call(c, "Prepare") }
func (m scripted) Lock(c context.Context, _ string) error    { return m.call(c, "Lock") }
func (m scripted) Capture(c context.Context, _ string) error { return m.call(c, "Capture") }
func (m scripted) Unlock(c context.Context, _ string) error  { return m.call(c, "Unlock") }
func (m scripted) Seal(c context.Context, _ string) error    { return m.call(c, "Seal") }
func (m scripted) Finish(c context.Context, _ string) error  { return m.call(c, "Finish") }
func (m scripted) Abort(c context.Context, _ string) error   { return m.call(c, "Abort") }
func (m scripted) Renew(c context.Context, _ string) error   { return m.call(c, "Renew") }
func (m scripted) Freeze(c context.Context, _ string, at int64) (int64, int64, error) {
	m.s.mu.Lock()
	m.s.told = append(m.s.told, at)
	m.s.mu.Unlock()
	asked := m.now()
	err := m.call(c, "Freeze")
	return asked, m.now(), err
}

func (m scripted) Resume(c context.Context, _ string, stop bool) (int64, error) {
	name := "Resume"
	if stop {
		name = "Stop"
	}
	err := m.call(c, name)
	return m.now(), err
}

// order is the calls' names in order of their first occurrence, without Renew
// between the phases.
func (s *script) order() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, c := range s.calls {
		name, _, _ := strings.Cut(c, " ")
		if name != "Renew" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

func (s *script) count(call string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.calls {
		if c == call {
			n++
		}
	}
	return n
}

func (s *script) run(ctx context.Context, n int, cfg Config) (Result, error) {
	cfg.Epoch.ID = "e"
	return Run(ctx, cfg, s.members(n), func(ctx context.Context) error {
		return scripted{s, "caller"}.call(ctx, "export")
	})
}

// bubble runs a test in virtual time.
func bubble(t *testing.T, f func(t *testing.T, s *script)) {
	synctest.Test(t, func(t *testing.T) {
		f(t, &script{during: map[string]func(){}, fail: map[string]error{}, hang: map[string]bool{}, takes: map[string]time.Duration{}})
	})
}

func TestPhasesComeInOrder(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		if _, err := s.run(t.Context(), 3, Config{}); err != nil {
			t.Fatal(err)
		}
		if got, want := s.order(), "Prepare Freeze Lock Capture Unlock Resume Seal export Finish"; got != want {
			t.Errorf("order is %s, want %s", got, want)
		}
	})
	bubble(t, func(t *testing.T, s *script) {
		if _, err := s.run(t.Context(), 3, Config{Epoch: Epoch{Stop: true}}); err != nil {
			t.Fatal(err)
		}
		if got, want := s.order(), "Prepare Freeze Lock Capture Seal Stop Unlock export Finish"; got != want {
			t.Errorf("order is %s, want %s", got, want)
		}
	})
}

func TestEveryPhaseWaitsForItsLastMember(t *testing.T) {
	for _, slow := range []string{"Prepare", "Freeze", "Lock", "Capture", "Unlock", "Resume", "Seal"} {
		bubble(t, func(t *testing.T, s *script) {
			s.takes[slow+" m1"] = 500 * time.Millisecond
			if _, err := s.run(t.Context(), 3, Config{}); err != nil {
				t.Fatal(err)
			}
			phase := func(call string) int {
				name, _, _ := strings.Cut(call, " ")
				return slices.Index([]string{"Prepare", "Freeze", "Lock", "Capture", "Unlock", "Resume", "Seal", "export", "Finish"}, name)
			}
			last := 0
			for _, c := range s.calls {
				if strings.HasPrefix(c, "Renew") {
					continue
				}
				if phase(c) < last {
					t.Errorf("slow %s: %s came late: %v", slow, c, s.calls)
				}
				last = phase(c)
			}
		})
	}
}

func TestFailureBeforeTheFirstResumeAbortsAll(t *testing.T) {
	cause := errors.New("cause")
	for name, phase := range map[string]string{
		"Prepare": PhasePrepare, "Freeze": PhaseFreeze, "Lock": PhaseClose, "Capture": PhaseCapture, "Unlock": PhaseRelease,
	} {
		for _, hang := range []bool{false, true} {
			bubble(t, func(t *testing.T, s *script) {
				if hang {
					s.hang[name+" m1"] = true
				} else {
					s.fail[name+" m1"] = cause
				}
				result, err := s.run(t.Context(), 3, Config{})
				var pe *PhaseError
				if !errors.As(err, &pe) || pe.Phase != phase || !hang && (pe.Member != "m1" || !errors.Is(err, cause)) {
					t.Errorf("%s fails (hangs: %t): %v", name, hang, err)
				}
				if hang && !strings.Contains(err.Error(), "no answer within") {
					t.Errorf("%s hangs and the error does not say so: %v", name, err)
				}
				if s.count("Resume m0")+s.count("Seal m0")+s.count("export caller") > 0 || result.Sealed {
					t.Errorf("%s fails and the epoch goes on: %v", name, s.calls)
				}
				for _, m := range []string{"m0", "m1", "m2"} {
					if s.count("Abort "+m) != 1 {
						t.Errorf("%s fails and %s is not aborted: %v", name, m, s.calls)
					}
				}
			})
		}
	}
}

func TestCancelBeforeTheFirstResumeAborts(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.takes["Capture m1"] = time.Second
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		_, err := s.run(ctx, 2, Config{})
		if !errors.Is(err, context.DeadlineExceeded) || s.count("Abort m0") != 1 || s.count("Resume m0") != 0 {
			t.Errorf("%v: %v", err, s.calls)
		}
	})
}

func TestOnceOneMemberIsResumedAllAre(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.hang["Resume m1"] = true
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond) // long over when it matters
		defer cancel()
		s.takes["Resume m0"] = 100 * time.Millisecond
		_, err := s.run(ctx, 3, Config{Attempts: 3})
		var pe *PhaseError
		if !errors.As(err, &pe) || pe.Phase != PhaseRelease || pe.Member != "m1" {
			t.Errorf("%v", err)
		}
		if s.count("Resume m0") != 1 || s.count("Resume m1") != 3 || s.count("Resume m2") != 1 {
			t.Errorf("%v", s.calls)
		}
		if s.count("Seal m0") > 0 || s.count("Abort m0") != 1 || s.count("Abort m1") != 1 {
			t.Errorf("a capture that cannot become whole is not discarded: %v", s.calls)
		}
	})
}

func TestRefusalIsNotRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.fail["Resume m1"] = fmt.Errorf("shim: %w", ErrRefused)
		if _, err := s.run(t.Context(), 2, Config{}); !errors.Is(err, ErrRefused) || s.count("Resume m1") != 1 {
			t.Errorf("%v: %v", err, s.calls)
		}
	})
}

func TestNobodyIsKilledBeforeAllIsSealed(t *testing.T) {
	for _, fails := range []string{"Seal m1", "Renew m1"} {
		bubble(t, func(t *testing.T, s *script) {
			s.fail[fails] = ErrRefused
			result, err := s.run(t.Context(), 3, Config{Epoch: Epoch{Stop: true}})
			if err == nil || result.Sealed || s.count("Stop m0") > 0 || s.count("Abort m0") != 1 {
				t.Errorf("%s fails: %v: %v", fails, err, s.calls)
			}
		})
	}
}

func TestBehindTheCommitPointNothingIsAborted(t *testing.T) {
	for _, fails := range []string{"Stop m1", "Unlock m1", "export caller", "Finish m1"} {
		bubble(t, func(t *testing.T, s *script) {
			s.fail[fails] = errors.New("cause")
			result, err := s.run(t.Context(), 3, Config{Epoch: Epoch{Stop: true}})
			if !result.Sealed || s.count("Abort m0")+s.count("Abort m1") > 0 || s.count("Stop m2") != 1 || s.count("export caller") != 1 {
				t.Errorf("%s fails: %v: %v", fails, err, s.calls)
			}
			serious := fails == "Stop m1" || fails == "export caller"
			if (err != nil) != serious {
				t.Errorf("%s fails: %v", fails, err)
			}
			if len(result.Untold) == 0 && fails != "Stop m1" && !serious {
				t.Errorf("%s fails and the result does not tell", fails)
			}
		})
	}
}

func TestCancelBehindTheCommitPointLeavesNobodyHalfKilled(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		ctx, cancel := context.WithCancel(t.Context())
		s.during["Stop m0"] = cancel
		s.takes["Stop m1"] = 100 * time.Millisecond
		result, err := s.run(ctx, 2, Config{Epoch: Epoch{Stop: true}})
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "captures of epoch e are kept") {
			t.Errorf("%v", err)
		}
		if !result.Sealed || result.Exported || s.count("Stop m1") != 1 || s.count("Unlock m1") != 1 || s.count("Abort m0") > 0 {
			t.Errorf("%+v: %v", result, s.calls)
		}
	})
}

func TestMemberThatCannotBeKilledIsLeftToItsLease(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.fail["Stop m1"] = errors.New("connection refused")
		renewed := 0
		s.during["export caller"] = func() { renewed = s.count("Renew m1") }
		s.takes["export caller"] = 10 * time.Second
		_, err := s.run(t.Context(), 2, Config{Epoch: Epoch{Stop: true}})
		if err == nil || !strings.Contains(err.Error(), "m1") {
			t.Errorf("%v", err)
		}
		if n := s.count("Renew m1"); n != renewed {
			t.Errorf("renewed %d times during export: it stays frozen for as long", n-renewed)
		}
	})
}

func TestFailedExportDiscardsCapturesOfLiveMembers(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.fail["export caller"] = errors.New("no space")
		result, err := s.run(t.Context(), 2, Config{})
		var pe *PhaseError
		if !errors.As(err, &pe) || pe.Phase != PhaseExport || result.Sealed || result.Exported || s.count("Abort m1") != 1 {
			t.Errorf("%v, %+v: %v", err, result, s.calls)
		}
	})
}

func TestAbortIsRepeatedAndItsFailureReported(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.fail["Lock m0"] = errors.New("cause")
		s.fail["Abort m1"] = errors.New("connection refused")
		result, _ := s.run(t.Context(), 2, Config{Attempts: 3})
		if s.count("Abort m1") != 3 || len(result.Untold) != 1 || result.Untold[0].Member != "m1" || result.Untold[0].Call != "Abort" {
			t.Errorf("%+v: %v", result.Untold, s.calls)
		}
	})
}

func TestLeaseIsRenewedThroughoutAndNotDuringAbort(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.takes["Prepare m0"], s.takes["Seal m1"], s.takes["export caller"] = 10*time.Second, 10*time.Second, 10*time.Second
		if _, err := s.run(t.Context(), 2, Config{}); err != nil {
			t.Fatal(err)
		}
		for _, m := range []string{"m0", "m1"} {
			if n := s.count("Renew " + m); n < 36 || n > 42 { // 30 s, one every 750 ms
				t.Errorf("%s renewed %d times", m, n)
			}
		}
	})
	bubble(t, func(t *testing.T, s *script) {
		s.fail["Freeze m0"] = errors.New("cause")
		s.hang["Abort m1"] = true
		_, _ = s.run(t.Context(), 2, Config{Attempts: 1})
		if n := s.count("Renew m1"); n > 0 {
			t.Errorf("the lease of a member that cannot be aborted was renewed %d times", n)
		}
	})
}

func TestMemberThatGaveUpEndsTheEpochAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.takes["Capture m0"] = 50 * time.Second
		s.fail["Renew m1"] = ErrRefused
		begun := time.Now()
		_, err := s.run(t.Context(), 2, Config{})
		var pe *PhaseError
		if !errors.As(err, &pe) || pe.Phase != PhaseLease || pe.Member != "m1" {
			t.Errorf("%v", err)
		}
		if took := time.Since(begun); took > time.Second {
			t.Errorf("noticed after %s", took)
		}
	})
}

type phases struct{ seen []string }

func (p *phases) PhaseStarted(name string) { p.seen = append(p.seen, name) }
func (p *phases) PhaseEnded(name string, _ time.Duration, err error) {
	p.seen = append(p.seen, fmt.Sprintf("/%s", name))
}

func TestResultIsByTheMembersOwnStamps(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		s.takes["Freeze m0"], s.takes["Freeze m1"] = 2*time.Millisecond, 5*time.Millisecond
		s.takes["Capture m1"], s.takes["Lock m0"], s.takes["Unlock m0"] = 30*time.Millisecond, time.Millisecond, time.Millisecond
		s.takes["Resume m0"], s.takes["Resume m1"] = 1*time.Millisecond, 3*time.Millisecond
		s.takes["Seal m0"], s.takes["export caller"] = 100*time.Millisecond, 200*time.Millisecond
		watch := &phases{}
		result, err := s.run(t.Context(), 2, Config{Observer: watch})
		if err != nil {
			t.Fatal(err)
		}
		if result.StopMS != 40 || result.SkewMS != 3 || result.Members[0].StopMS != 38 || result.Members[1].StopMS != 40 {
			t.Errorf("%+v", result)
		}
		want := map[string]float64{PhasePrepare: 0, PhaseFreeze: 5, PhaseClose: 1, PhaseCapture: 30, PhaseRelease: 4, PhaseSeal: 100, PhaseExport: 200}
		for name, ms := range want {
			if got, ok := result.PhasesMS[name]; !ok || got != ms {
				t.Errorf("%s took %v ms, want %v", name, got, ms)
			}
		}
		if got := strings.Join(watch.seen, " "); got != "prepare /prepare freeze /freeze close /close capture /capture release /release seal /seal export /export" {
			t.Errorf("observed %s", got)
		}
		if !result.Sealed || !result.Exported {
			t.Errorf("%+v", result)
		}
	})
}

func TestNoBarrierTakesOneMemberAfterTheOther(t *testing.T) {
	bubble(t, func(t *testing.T, s *script) {
		if _, err := s.run(t.Context(), 2, Config{NoBarrier: true}); err != nil {
			t.Fatal(err)
		}
		if slices.Index(s.calls, "Resume m0") > slices.Index(s.calls, "Freeze m1") {
			t.Errorf("%v", s.calls)
		}
	})
	bubble(t, func(t *testing.T, s *script) {
		s.fail["Freeze m1"] = errors.New("cause")
		if _, err := s.run(t.Context(), 2, Config{NoBarrier: true}); err == nil || s.count("Lock m1") > 0 || s.count("Abort m0") != 1 {
			t.Errorf("%v: %v", err, s.calls)
		}
	})
}

func TestWrongConfigurationIsRefused(t *testing.T) {
	s := &script{}
	two := s.members(2)
	for name, run := range map[string]func() (Result, error){
		"no id":     func() (Result, error) { return Run(t.Context(), Config{}, two, nil) },
		"no member": func() (Result, error) { return Run(t.Context(), Config{Epoch: Epoch{ID: "e"}}, nil, nil) },
		"twice": func() (Result, error) {
			return Run(t.Context(), Config{Epoch: Epoch{ID: "e"}}, []Member{two[0], two[0]}, nil)
		},
		"stop, alone": func() (Result, error) {
			return Run(t.Context(), Config{Epoch: Epoch{ID: "e", Stop: true}, NoBarrier: true}, two, nil)
		},
	} {
		if _, err := run(); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if len(s.calls) > 0 {
		t.Errorf("called %v", s.calls)
	}
}

// The coordinator runs before others from before the first member freezes until the last
// one runs, or until it is known that nobody will, and not in what is slow.
func TestCoordinatorIsInAHurryWhileMembersStand(t *testing.T) {
	for _, c := range []struct {
		name string
		stop bool
		fail map[string]error
		in   string
	}{
		{"live", false, nil, "Freeze Lock Capture Unlock Resume"},
		{"stopped", true, nil, "Freeze Lock Capture"},
		{"failed to prepare", false, map[string]error{"Prepare m1": errors.New("no")}, ""},
		{"failed to freeze", false, map[string]error{"Freeze m1": errors.New("no")}, "Freeze"},
		{"failed to capture", false, map[string]error{"Capture m0": errors.New("no")}, "Freeze Lock Capture"},
		{"failed to capture, to be stopped", true, map[string]error{"Capture m0": errors.New("no")}, "Freeze Lock Capture"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var mu sync.Mutex
			held, raised := 0, 0
			var in []string
			s := &script{fail: c.fail, during: map[string]func(){}}
			for _, name := range []string{"Prepare", "Freeze", "Lock", "Capture", "Unlock", "Resume", "Stop", "Seal", "Finish"} {
				s.during[name+" m0"] = func() {
					mu.Lock()
					defer mu.Unlock()
					if held > 0 {
						in = append(in, name)
					}
				}
			}
			_, err := s.run(t.Context(), 2, Config{Attempts: 1, Epoch: Epoch{Stop: c.stop}, Hurry: func() func() {
				mu.Lock()
				defer mu.Unlock()
				held++
				raised++
				return func() {
					mu.Lock()
					defer mu.Unlock()
					held--
				}
			}})
			if (err != nil) != (c.fail != nil) {
				t.Errorf("ended with %v", err)
			}
			if got := strings.Join(in, " "); got != c.in || held != 0 || raised > 1 {
				t.Errorf("in a hurry in %q, want %q; still %d, raised %d times", got, c.in, held, raised)
			}
		})
	}
}

func TestAllMembersAreToldTheSameTimeToFreeze(t *testing.T) {
	for _, lead := range []time.Duration{0, 60 * time.Millisecond} {
		s := &script{}
		before := Monotonic()
		if _, err := s.run(t.Context(), 4, Config{Lead: lead}); err != nil {
			t.Fatal(err)
		}
		if len(s.told) != 4 || slices.Max(s.told) != slices.Min(s.told) {
			t.Errorf("lead %s: told %v", lead, s.told)
		}
		if at := s.told[0]; lead == 0 && at != 0 || lead > 0 && (at < before+int64(lead) || at > Monotonic()+int64(lead)) {
			t.Errorf("lead %s: told %d at %d", lead, at, before)
		}
	}
}
