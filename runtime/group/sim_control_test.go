// SPDX-License-Identifier: Apache-2.0

package group

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// oneEpoch simulates a single epoch of three members with the given faults and
// driver, and answers the settled and checked world.
func oneEpoch(t *testing.T, seed uint64, f faults, stop bool, prepare func(*world), noBarrier bool, drive driver) (w *world, e *simEpoch) {
	synctest.Test(t, func(*testing.T) {
		w = newWorld(seed, 3, seed%2 == 0)
		defer w.close()
		w.faults = f
		if prepare != nil {
			prepare(w)
		}
		time.Sleep(20 * time.Millisecond)
		e = w.run(context.Background(), w.coordinator(1, stop, true), w.members, noBarrier, drive)
		w.settle()
		w.check(e)
	})
	return w, e
}

func noFaults() faults { return faults{cutOff: -1} }

func TestCoordinatorMayDieAtEveryCall(t *testing.T) {
	for _, stop := range []bool{false, true} {
		for _, before := range []bool{false, true} {
			call := 0
			for died := true; died; {
				call++
				f := noFaults()
				f.coordinatorDies, f.dieBefore = call, before
				w, e := oneEpoch(t, uint64(call), f, stop, nil, false, Run)
				died = e.c.dead
				if len(w.wrong) > 0 {
					t.Errorf("stop=%t, dies at call %d (before it: %t):\n\t%s", stop, call, before, strings.Join(w.wrong, "\n\t"))
				}
			}
			if call < 20 {
				t.Errorf("stop=%t: only %d calls were made: the epoch did not run", stop, call)
			}
		}
	}
}

func TestMemberMayDieAtEveryStep(t *testing.T) {
	for _, stop := range []bool{false, true} {
		for variant := range 4 {
			step := 0
			for died := true; died; {
				step++
				f := noFaults()
				f.dyingMember, f.memberDiesStep = 1, step
				f.dieBefore, f.memberDeleted = variant&1 == 0, variant&2 == 0
				w, _ := oneEpoch(t, uint64(step), f, stop, nil, false, Run)
				died = w.members[1].steps >= step
				if len(w.wrong) > 0 {
					t.Errorf("stop=%t, dies at step %d (before it: %t, deleted: %t):\n\t%s", stop, step, f.dieBefore, f.memberDeleted, strings.Join(w.wrong, "\n\t"))
				}
			}
			if step < 20 {
				t.Errorf("stop=%t: only %d steps were made: the epoch did not run", stop, step)
			}
		}
	}
}

// verdicts count, over runs without faults, what is wrong with whole epochs: bytes
// of TCP streams, writes to the shared volume, no instant at which all stood.
type verdicts struct{ tcp, volume, barrier int }

func judge(t *testing.T, runs int, prepare func(*world), noBarrier bool, drive driver) (v verdicts) {
	for seed := range runs {
		w, e := oneEpoch(t, uint64(seed), noFaults(), false, prepare, noBarrier, drive)
		if e.err != nil {
			t.Fatalf("seed %d: epoch failed, so that its cut says nothing: %v", seed, e.err)
		}
		for _, wrong := range w.wrong {
			switch {
			case strings.Contains(wrong, "no barrier"):
				v.barrier++
			case strings.Contains(wrong, "inconsistent: the volume"):
				v.volume++
			case strings.Contains(wrong, "inconsistent"):
				v.tcp++
			default:
				t.Errorf("seed %d: %s", seed, wrong)
			}
		}
	}
	t.Logf("of %d whole epochs: %+v", runs, v)
	return v
}

const controlRuns = 100

func TestWithTheBarrierEveryCutIsConsistent(t *testing.T) {
	if v := judge(t, controlRuns, nil, false, Run); v != (verdicts{}) {
		t.Errorf("%+v", v)
	}
}

func TestWithoutTheBarrierCutsAreInconsistent(t *testing.T) {
	if v := judge(t, controlRuns, nil, true, Run); v.tcp < controlRuns/2 {
		t.Errorf("of %d only %+v: the simulation cannot tell", controlRuns, v)
	}
}

// TestRulesAreNeeded shows that frozen tasks are not enough: kernels go on, and
// now and then one acknowledges what a capture has not seen.
func TestRulesAreNeeded(t *testing.T) {
	const runs = 400
	broken := func(w *world) { w.rulesDoNothing = true }
	if v := judge(t, runs, broken, false, Run); v.tcp < runs/100 {
		t.Errorf("of %d only %+v: the simulation cannot tell", runs, v)
	}
}

// TestBrokenOrderIsCaught drives the members in wrong orders, each of which every
// single member accepts: only all together are they wrong.
func TestBrokenOrderIsCaught(t *testing.T) {
	sequence := func(r *run, phases ...string) call {
		calls := map[string]call{"freeze": r.freeze, "lock": r.lock, "capture": r.capture, "unlock": r.unlock, "resume": r.resume}
		return func(ctx context.Context, m int) error {
			time.Sleep(time.Duration(m) * 40 * time.Millisecond) // nobody is equally quick
			for _, p := range phases {
				if err := calls[p](ctx, m); err != nil {
					return fmt.Errorf("%s: %w", p, err)
				}
			}
			return nil
		}
	}
	// wrong makes a driver whose calls wait for each other only between stages.
	wrong := func(stages ...[]string) driver {
		return func(ctx context.Context, cfg Config, members []Member, export func(context.Context) error) (Result, error) {
			r := newRun(cfg.withDefaults(), members)
			guarded := r.holdLeases(ctx)
			defer r.dropLeases()
			err := r.phase(guarded, PhasePrepare, r.prepareAll)
			for _, s := range stages {
				if err == nil {
					err = r.each(guarded, "broken", time.Minute, sequence(r, s...))
				}
			}
			if err == nil {
				err = r.sealAndExport(ctx, guarded, export)
			}
			return r.measured(), err
		}
	}
	for name, broken := range map[string]struct {
		drive driver
		// harmless is set where TCP and volumes happen to stay consistent, because
		// each member's own rules stand before its own capture.
		harmless bool
	}{
		"capture before all are frozen":    {drive: wrong([]string{"freeze", "lock", "capture"}, []string{"unlock"}, []string{"resume"})},
		"capture before all are locked":    {drive: wrong([]string{"freeze"}, []string{"lock", "capture"}, []string{"unlock"}, []string{"resume"}), harmless: true},
		"release before all are captured":  {drive: wrong([]string{"freeze"}, []string{"lock"}, []string{"capture", "unlock", "resume"})},
		"no waiting for each other at all": {drive: wrong([]string{"freeze", "lock", "capture", "unlock", "resume"})},
	} {
		t.Run(name, func(t *testing.T) {
			v := judge(t, controlRuns, nil, false, broken.drive)
			if v.barrier < controlRuns/2 || v.tcp+v.volume < controlRuns/2 && !broken.harmless {
				t.Errorf("of %d only %+v were caught", controlRuns, v)
			}
		})
	}
}

// TestUndoOrderMatters shows that the simulated CRIU does put the freezer back,
// so that the order of undoing is tested by every other run.
func TestUndoOrderMatters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(1, 1, false)
		defer w.close()
		m := w.members[0]
		m.frozen, m.dump, m.dumped = true, true, true
		for _, s := range []Step{Thaw, EndDump} {
			if err := m.shim.undo(t.Context(), Epoch{ID: "e"}, s); err != nil {
				t.Fatal(err)
			}
		}
		if !m.frozen {
			t.Error("thawed before its dump had ended, the member must be frozen again")
		}
	})
}
