// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"errors"
	"os"
	"testing"
	"time"
)

// far is CRIU's end of a gate.
func far(t *testing.T) (*gate, *os.File) {
	t.Helper()
	g, f, err := newGate()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.close()
		f.Close()
	})
	return g, f
}

func say(t *testing.T, f *os.File, what byte) {
	t.Helper()
	if _, err := f.Write([]byte{what}); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, f *os.File) byte {
	t.Helper()
	var b [1]byte
	if _, err := f.Read(b[:]); err != nil {
		t.Fatal(err)
	}
	return b[0]
}

func TestCRIUIsLetAtTheTasksAfterWhatGoesBefore(t *testing.T) {
	for _, want := range []error{nil, errors.New("the scan failed")} {
		g, f := far(t)
		say(t, f, gateHello)
		if !g.isThere() {
			t.Fatal("the gate is not there")
		}
		say(t, f, gateTasks)
		if err := g.await(t.Context(), gateTasks); err != nil {
			t.Fatal(err)
		}
		if err := g.open(gateTasks); err != nil || hear(t, f) != 'a' {
			t.Fatalf("the first gate stays closed (%v)", err)
		}
		beside := 0
		finish, finished := make(chan struct{}), make(chan struct{})
		ready := g.openAfter(func() ([]int, error) {
			<-finish
			close(finished)
			return []int{12, 3456}, want
		}, func() { beside++ })
		say(t, f, gateTouch)
		time.AfterFunc(20*time.Millisecond, func() { close(finish) })
		// Where the dump will fail it is to be over soon: nobody's clean pages are dumped.
		told := "b12,3456\n"
		if want != nil {
			told = "b*\n"
		}
		for i := range len(told) {
			if got := hear(t, f); got != told[i] {
				t.Errorf("the second gate says %q, want %q of %q", got, told[i], told)
			}
		}
		select {
		case <-finished:
		default:
			t.Error("CRIU was let at the tasks before its time")
		}
		for range 2 {
			if err := ready(); !errors.Is(err, want) || (want == nil && err != nil) {
				t.Errorf("%v; want %v", err, want)
			}
		}
		if beside == 1 != (want == nil) {
			t.Errorf("what goes on beside CRIU has begun %d times (%v)", beside, want)
		}
	}
}

func TestCRIUThatKnowsNoGateIsNotedBeforeItIsLetGo(t *testing.T) {
	g, f := far(t)
	if g.isThere() {
		t.Error("a gate is there that nobody spoke of")
	}
	// One that speaks of it and passes, or dies, is found out.
	ready := g.openAfter(func() ([]int, error) { return nil, nil }, func() { t.Error("it goes on") })
	f.Close()
	if ready() == nil {
		t.Error("CRIU has not waited and nobody noticed")
	}
}
