// SPDX-License-Identifier: Apache-2.0

package group

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// recorder is a Host that writes down what is asked of it.
type recorder struct {
	mu      sync.Mutex
	record  []byte
	undone  []Step
	failing map[Step]int // how often each step still fails
	noDisk  bool
}

func (h *recorder) host() Host {
	return Host{
		Save: func(record []byte) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.noDisk {
				return errors.New("no space left on device")
			}
			h.record = slices.Clone(record)
			return nil
		},
		Undo: func(_ context.Context, _ Epoch, s Step) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.failing[s] > 0 {
				h.failing[s]--
				return errors.New("not now")
			}
			h.undone = append(h.undone, s)
			return nil
		},
	}
}

func (h *recorder) participant(t *testing.T) *Participant {
	t.Helper()
	p, err := NewParticipant(h.host(), h.record)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (h *recorder) steps() []Step {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.undone)
}

func done(context.Context) ([]byte, error) { return nil, nil }

// opened gives a participant that has completed the acts up to state.
func opened(t *testing.T, h *recorder, state State) *Participant {
	t.Helper()
	p := h.participant(t)
	for _, s := range livePath[1 : slices.Index(livePath, state)+1] {
		var err error
		if s == Prepared {
			_, err = p.Open(t.Context(), Epoch{ID: "e", Lease: 3 * time.Second}, done)
		} else {
			_, err = p.Do(t.Context(), "e", s, done)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func TestRepeatIsAnsweredFromTheRecord(t *testing.T) {
	h := &recorder{}
	p := opened(t, h, Prepared)
	defer p.Close()
	acts := 0
	for range 3 {
		reply, err := p.Do(t.Context(), "e", Frozen, func(context.Context) ([]byte, error) {
			acts++
			return []byte("at 42"), nil
		})
		if err != nil || string(reply) != "at 42" {
			t.Errorf("%q, %v", reply, err)
		}
	}
	if acts != 1 {
		t.Errorf("act done %d times", acts)
	}
}

func TestActIsOnRecordBeforeItIsDone(t *testing.T) {
	h := &recorder{}
	p := opened(t, h, Prepared)
	defer p.Close()
	_, err := p.Do(t.Context(), "e", Frozen, func(context.Context) ([]byte, error) {
		l, err := ParseLedger(h.record)
		if err != nil || l.Next != Frozen || l.State != Prepared {
			t.Errorf("while freezing the record says %s/%s, %v", l.State, l.Next, err)
		}
		return nil, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	h.noDisk = true
	if _, err := p.Do(t.Context(), "e", Locked, func(context.Context) ([]byte, error) {
		t.Error("an act was done that could not be recorded")
		return nil, nil
	}); err == nil {
		t.Error("no error")
	}
}

func TestUndoNeedsNoDisk(t *testing.T) {
	h := &recorder{}
	p := opened(t, h, Locked)
	defer p.Close()
	h.noDisk = true
	if err := p.Abort(t.Context(), "e"); err == nil {
		t.Error("abort does not say that its record could not be written")
	}
	if !slices.Contains(h.steps(), Thaw) || !slices.Contains(h.steps(), RemoveRules) {
		t.Errorf("undone: %v", h.steps())
	}
}

func TestSilentCoordinatorIsUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{}
		p := opened(t, h, Locked)
		defer p.Close()
		for range 10 {
			time.Sleep(2 * time.Second)
			if err := p.Renew("e"); err != nil {
				t.Fatal(err)
			}
		}
		if len(h.steps()) > 0 {
			t.Fatalf("renewed, yet undone: %v", h.steps())
		}
		time.Sleep(3*time.Second + time.Millisecond)
		synctest.Wait()
		if want := []Step{EndDump, RemoveRules, Thaw, StopTracking, Discard}; !slices.Equal(h.steps(), want) {
			t.Errorf("undone %v, want %v", h.steps(), want)
		}
		if err := p.Renew("e"); !errors.Is(err, ErrRefused) {
			t.Errorf("renewed after its end: %v", err)
		}
	})
}

func TestLeaseEndsDuringAnAct(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{}
		p := opened(t, h, Locked)
		defer p.Close()
		begun := time.Now()
		_, err := p.Do(t.Context(), "e", Captured, func(ctx context.Context) ([]byte, error) {
			<-ctx.Done()
			if len(h.steps()) > 0 {
				t.Error("undone while the act was going on")
			}
			return nil, ctx.Err()
		})
		if !errors.Is(err, ErrRefused) {
			t.Errorf("%v", err)
		}
		if took := time.Since(begun); took != 3*time.Second {
			t.Errorf("interrupted after %s", took)
		}
		synctest.Wait()
		if !slices.Contains(h.steps(), Thaw) {
			t.Errorf("undone: %v", h.steps())
		}
	})
}

func TestAbortInterruptsAndNothingBeginsBehindIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{}
		p := opened(t, h, Locked)
		defer p.Close()
		queued := make(chan error, 1)
		go func() {
			_, _ = p.Do(t.Context(), "e", Captured, func(ctx context.Context) ([]byte, error) {
				<-ctx.Done()
				time.Sleep(time.Second) // letting go takes a while
				return nil, ctx.Err()
			})
		}()
		synctest.Wait()
		go func() { // a repeat waits for its turn, before the abort does
			_, err := p.Do(t.Context(), "e", Captured, func(context.Context) ([]byte, error) {
				t.Error("an act began behind an abort")
				return nil, nil
			})
			queued <- err
		}()
		synctest.Wait()
		begun := time.Now()
		if err := p.Abort(t.Context(), "e"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took != time.Second {
			t.Errorf("abort took %s, the act needed 1s", took)
		}
		if err := <-queued; !errors.Is(err, ErrRefused) {
			t.Errorf("queued repeat: %v", err)
		}
		if l := p.Ledger(); l.open() {
			t.Errorf("still open: %+v", l)
		}
	})
}

func TestAbortGoesOnWhenItsCallerIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{}
		p := opened(t, h, Locked)
		defer p.Close()
		go func() {
			_, _ = p.Do(t.Context(), "e", Captured, func(ctx context.Context) ([]byte, error) {
				time.Sleep(time.Second)
				return nil, ctx.Err()
			})
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := p.Abort(ctx, "e"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		time.Sleep(2 * time.Second)
		if !slices.Contains(h.steps(), Thaw) {
			t.Errorf("undone: %v", h.steps())
		}
	})
}

func TestUndoIsRepeatedUntilItSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{failing: map[Step]int{RemoveRules: 4, Discard: 6}}
		p := opened(t, h, Locked)
		defer p.Close()
		if err := p.Abort(t.Context(), "e"); err == nil {
			t.Error("abort does not say that steps have failed")
		}
		if !slices.Contains(h.steps(), Thaw) {
			t.Error("a rule that cannot be removed keeps the container frozen")
		}
		if _, err := p.Open(t.Context(), Epoch{ID: "next"}, done); !errors.Is(err, ErrRefused) {
			t.Errorf("a new epoch opens while the last is being undone: %v", err)
		}
		time.Sleep(time.Minute)
		if l := p.Ledger(); l.open() {
			t.Errorf("still owed: %v", l.Owed())
		}
		if _, err := p.Open(t.Context(), Epoch{ID: "next"}, done); err != nil {
			t.Error(err)
		}
	})
}

// TestThawIsRepeatedBehindALateDump: CRIU puts the freezer back as it found it.
func TestThawIsRepeatedBehindALateDump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{failing: map[Step]int{EndDump: 1}}
		p := opened(t, h, Locked)
		defer p.Close()
		_ = p.Abort(t.Context(), "e")
		time.Sleep(time.Second)
		end := slices.Index(h.steps(), EndDump)
		if end < 0 || !slices.Contains(h.steps()[:end], Thaw) || !slices.Contains(h.steps()[end:], Thaw) {
			t.Errorf("want a thaw at once and another behind end-dump: %v", h.steps())
		}
	})
}

func TestSuccessorUndoesWhatItFinds(t *testing.T) {
	h := &recorder{}
	p := opened(t, h, Captured)
	p.Close()
	next := h.participant(t)
	defer next.Close()
	if err := next.Lapse(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := []Step{RemoveRules, Thaw, StopTracking, Discard}; !slices.Equal(h.steps(), want) {
		t.Errorf("undone %v, want %v", h.steps(), want)
	}
	last := h.participant(t)
	defer last.Close()
	if l := last.Ledger(); l.open() {
		t.Errorf("record is left open: %+v", l)
	}
}
