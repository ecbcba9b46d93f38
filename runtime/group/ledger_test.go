// SPDX-License-Identifier: Apache-2.0

package group

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// ledgerAt gives a ledger whose last completed act is state, with the next act
// begun if pending is set.
func ledgerAt(t *testing.T, stop bool, state State, pending bool) Ledger {
	t.Helper()
	var l Ledger
	path := livePath
	if stop {
		path = stopPath
	}
	end := slices.Index(path, state)
	if pending {
		end++
	}
	for i, s := range path[1 : end+1] {
		var todo bool
		var err error
		if s == Prepared {
			todo, err = l.Open(Epoch{ID: "e", Stop: stop})
		} else {
			todo, err = l.Begin("e", s)
		}
		if err != nil || !todo {
			t.Fatalf("begin %s: todo=%t, %v", s, todo, err)
		}
		if pending && i == end-1 {
			break
		}
		if err := l.Done(s, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// everyLedger calls f for every state that a ledger can be in while its epoch is
// open and not ending.
func everyLedger(t *testing.T, f func(name string, stop, pending bool, l Ledger)) {
	for _, stop := range []bool{false, true} {
		path := livePath
		if stop {
			path = stopPath
		}
		for i, s := range path {
			if i > 0 {
				f(fmt.Sprintf("%s, stop=%t", s, stop), stop, false, ledgerAt(t, stop, s, false))
			}
			if i+1 < len(path) {
				f(fmt.Sprintf("%s begun, stop=%t", path[i+1], stop), stop, true, ledgerAt(t, stop, s, true))
			}
		}
	}
}

func TestOnlyTheNextActMayBegin(t *testing.T) {
	all := []State{Idle, Prepared, Frozen, Locked, Captured, Unlocked, Resumed, Sealed, Stopped, "nonsense", ""}
	everyLedger(t, func(name string, _, _ bool, l Ledger) {
		path := l.path()
		at := slices.Index(path, l.State)
		if l.State == "" {
			at = 0
		}
		for _, next := range all {
			c := l.clone()
			todo, err := c.Begin("e", next)
			to := slices.Index(path, next)
			wantTodo, wantErr := to == at+1, to <= 0 || to > at+1
			if todo != wantTodo || (err != nil) != wantErr {
				t.Errorf("%s: begin %q gives todo=%t, %v", name, next, todo, err)
			}
			if err != nil && !errors.Is(err, ErrRefused) {
				t.Errorf("%s: begin %q: %v is no refusal", name, next, err)
			}
			if _, err := c.Begin("other", next); !errors.Is(err, ErrRefused) {
				t.Errorf("%s: begin %q of another epoch: %v", name, next, err)
			}
		}
		if _, err := l.Open(Epoch{ID: "other"}); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: a second epoch opens: %v", name, err)
		}
	})
}

func TestRecordSurvivesTheDisk(t *testing.T) {
	everyLedger(t, func(name string, _, _ bool, l Ledger) {
		for range 2 {
			data, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			back, err := ParseLedger(data)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if !reflect.DeepEqual(l, back) {
				t.Errorf("%s: %+v came back as %+v", name, l, back)
			}
			l.Lapse()
		}
	})
}

func TestUnreadableRecordOwesWhatIsSafe(t *testing.T) {
	for _, data := range []string{"{", "null]", `{"epoch":{"id":"e"},"state":"nonsense"}`, `{"epoch":{"id":"e"},"state":"prepared","next":"sealed"}`} {
		l, err := ParseLedger([]byte(data))
		if err == nil {
			t.Errorf("%s is accepted as %+v", data, l)
		}
		owed := l.Owed()
		if !slices.Contains(owed, Thaw) || !slices.Contains(owed, RemoveRules) || slices.Contains(owed, Discard) || slices.Contains(owed, Kill) {
			t.Errorf("%s owes %v", data, owed)
		}
		for _, s := range owed {
			l.Undone(s)
		}
		if todo, err := l.Open(Epoch{ID: "new"}); !todo || err != nil {
			t.Errorf("%s: after undoing, a new epoch does not open: %v", data, err)
		}
	}
}

func TestEndedEpochNeverOpensAgain(t *testing.T) {
	var l Ledger
	if err := l.Abort("late"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Open(Epoch{ID: "late"}); !errors.Is(err, ErrRefused) {
		t.Errorf("aborted before its Prepare arrived, the epoch opens: %v", err)
	}
	open := ledgerAt(t, false, Frozen, false)
	if err := open.Abort("late"); err != nil || open.Epoch.ID != "e" || len(open.Owed()) > 0 {
		t.Errorf("abort of an epoch that is not here disturbs the one that is: %v, %+v", err, open)
	}
	everyLedger(t, func(name string, _, _ bool, l Ledger) {
		l.Lapse()
		for _, s := range l.Owed() {
			l.Undone(s)
		}
		if _, err := l.Open(Epoch{ID: "e"}); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: the epoch opens again: %v", name, err)
		}
	})
}

func TestSealedCaptureGoesOnlyByAbort(t *testing.T) {
	everyLedger(t, func(name string, _, _ bool, l Ledger) {
		lapsed := l.clone()
		lapsed.Lapse()
		if sealed := l.reached(Sealed); slices.Contains(lapsed.Owed(), Discard) == sealed {
			t.Errorf("%s: lapse owes %v", name, lapsed.Owed())
		}
		aborted := l.clone()
		err := aborted.Abort("e")
		if l.killing() {
			if !errors.Is(err, ErrRefused) || len(aborted.Owed()) > 0 {
				t.Errorf("%s: abort behind the commit point: %v, owing %v", name, err, aborted.Owed())
			}
			return
		}
		if err != nil || !slices.Contains(aborted.Owed(), Discard) {
			t.Errorf("%s: abort owes %v, %v", name, aborted.Owed(), err)
		}
		// The abort may come while the lapse is being undone.
		if err := lapsed.Abort("e"); err != nil || !slices.Contains(lapsed.Owed(), Discard) || lapsed.Keep {
			t.Errorf("%s: abort behind a lapse owes %v, %v", name, lapsed.Owed(), err)
		}
	})
}

func TestAbortOfAnEndedEpochSaysThatItsCaptureIsKept(t *testing.T) {
	l := ledgerAt(t, false, Sealed, false)
	if err := l.Finish("e"); err != nil {
		t.Fatal(err)
	}
	for _, s := range l.Owed() {
		l.Undone(s)
	}
	if err := l.Abort("e"); !errors.Is(err, ErrRefused) {
		t.Errorf("%v", err)
	}
	if err := l.Finish("e"); err != nil {
		t.Errorf("repeated Finish: %v", err)
	}
}

func TestFinishWantsACompleteEpoch(t *testing.T) {
	everyLedger(t, func(name string, _, pending bool, l Ledger) {
		path := l.path()
		complete := !pending && l.State == path[len(path)-1]
		if err := l.Finish("e"); (err == nil) != complete {
			t.Errorf("%s: finish gives %v", name, err)
		}
	})
}

// TestDocumentedStateTable keeps the table in docs/barrier.md equal to what the
// ledger does.
func TestDocumentedStateTable(t *testing.T) {
	doc, err := os.ReadFile("../../docs/barrier.md")
	if err != nil {
		t.Fatal(err)
	}
	steps := func(l Ledger) string {
		var s []string
		for _, o := range l.Owed() {
			s = append(s, string(o))
		}
		return strings.Join(s, ", ")
	}
	var want []string
	everyLedger(t, func(_ string, stop, pending bool, l Ledger) {
		state, kind := "`"+string(l.State)+"`", "live"
		if pending {
			state = "`" + string(l.Next) + "` begun"
		}
		if stop {
			kind = "stop"
		}
		lapsed, aborted := l.clone(), l.clone()
		lapsed.Lapse()
		abort := "refused"
		if aborted.Abort("e") == nil {
			abort = steps(aborted)
			if abort == steps(lapsed) {
				abort = "the same"
			}
		}
		kept := "discarded"
		if lapsed.Keep {
			kept = "kept"
		}
		want = append(want, fmt.Sprintf("| %s | %s | %s | %s | %s |", kind, state, steps(lapsed), kept, abort))
	})
	for _, row := range want {
		if !strings.Contains(string(doc), row+"\n") {
			t.Errorf("docs/barrier.md lacks the row\n%s", row)
		}
	}
	if t.Failed() {
		t.Logf("all rows:\n%s", strings.Join(want, "\n"))
	}
}
