// SPDX-License-Identifier: Apache-2.0

package group

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
)

// State is how far a member has come in the open epoch: the last act that it has
// completed.
type State string

// The states. Which order they are passed in depends on Epoch.Stop.
const (
	Idle     State = "idle"     // no epoch is open
	Prepared State = "prepared" // runs; CRIU held, tracker on, capture open
	Frozen   State = "frozen"
	Locked   State = "locked"   // frozen, communication rules up
	Captured State = "captured" // frozen, rules up, capture complete but not durable
	Unlocked State = "unlocked" // rules down; frozen still, or killed if the epoch stops
	Resumed  State = "resumed"  // runs; capture not durable yet
	Sealed   State = "sealed"   // capture durable; runs, or frozen still if the epoch stops
	Stopped  State = "stopped"  // killed; rules up
)

// Nobody is killed before what survives it is durable: that is the whole
// difference between the two paths.
var (
	livePath = []State{Idle, Prepared, Frozen, Locked, Captured, Unlocked, Resumed, Sealed}
	stopPath = []State{Idle, Prepared, Frozen, Locked, Captured, Sealed, Stopped, Unlocked}
)

// Step is one thing owed when an epoch ends early. Every step is idempotent: it
// succeeds where there is nothing to do.
type Step string

// The steps, in the order in which they are owed. The dump ends first because
// CRIU puts the freezer back as it found it, which was frozen; rules go before
// the thaw so that nothing is sent into them, and behind the kill so that
// nobody hears of it.
const (
	// EndDump ends CRIU and waits until it has let go of the tasks.
	EndDump Step = "end-dump"
	// Kill completes a kill that was begun: what it ends is sealed.
	Kill Step = "kill"
	// RemoveRules removes this member's communication rules, no other's.
	RemoveRules Step = "remove-rules"
	// Thaw lets the container run.
	Thaw Step = "thaw"
	// StopTracking ends page tracking.
	StopTracking Step = "stop-tracking"
	// Discard removes the capture, sealed or not.
	Discard Step = "discard"
)

// keptEndings is how many ended epochs a ledger remembers, so that a call that
// was on its way when its epoch ended cannot open it again.
const keptEndings = 32

// Ending is how an epoch ended at this member.
type Ending struct {
	Epoch string `json:"epoch"`
	// Kept is set if the epoch left a sealed capture.
	Kept bool `json:"kept,omitempty"`
}

// Ledger is what a member must never forget. It is plain data, written to disk
// as JSON before each act and after it: Begin, write, act, Done, write. Whoever
// finds it after a crash calls Lapse and carries out Owed.
//
// The zero Ledger is an idle member's. It is not safe for concurrent use.
type Ledger struct {
	Epoch Epoch `json:"epoch"`
	State State `json:"state,omitempty"`
	// Next is an act that has begun and is not known to be complete.
	Next State `json:"next,omitempty"`
	// Replies are what the completed acts answered, for repeats.
	Replies map[State][]byte `json:"replies,omitempty"`
	// Undo is what is still owed; while it is not empty the epoch is ending.
	Undo []Step `json:"undo,omitempty"`
	// Keep is set while the epoch is ending and its sealed capture stays.
	Keep bool `json:"keep,omitempty"`
	// Ended are the last epochs, oldest first.
	Ended []Ending `json:"ended,omitempty"`
}

// ParseLedger reads what json.Marshal wrote. Empty input is an idle member's. A
// ledger that cannot be understood is answered, beside the error, with one that
// owes every step that is safe without knowing more: all but Kill and Discard.
func ParseLedger(data []byte) (Ledger, error) {
	var l Ledger
	if len(data) == 0 {
		return l, nil
	}
	err := json.Unmarshal(data, &l)
	if err == nil && l.open() && (l.Epoch.ID == "" || l.at(l.State) < 0 || l.Next != "" && l.at(l.Next) != l.at(l.State)+1) {
		err = fmt.Errorf("state %q, act %q in an epoch with id %q", l.State, l.Next, l.Epoch.ID)
	}
	if err != nil {
		return Ledger{
			Epoch: Epoch{ID: "unknown"}, State: Prepared,
			Undo: []Step{EndDump, RemoveRules, Thaw, StopTracking},
		}, fmt.Errorf("read epoch record: %w; everything that may be undone blindly will be", err)
	}
	return l, nil
}

// Open begins an epoch by its first act, Prepared. Like Begin it reports whether
// there is anything to do.
func (l *Ledger) Open(e Epoch) (todo bool, err error) {
	if e.ID == "" {
		return false, refuse("epoch has no id")
	}
	if l.open() && l.Epoch.ID == e.ID {
		return l.Begin(e.ID, Prepared)
	}
	if l.open() {
		return false, l.otherEpoch(e.ID)
	}
	if _, ended := l.ending(e.ID); ended {
		return false, refuse("epoch %s has ended here: begin a new one", e.ID)
	}
	l.Epoch, l.State, l.Next = e, Idle, Prepared
	return true, nil
}

// Begin records that an act is about to be done. It reports false, and no error,
// if the act was completed before: the repeat is answered from Replies. An act
// that was begun and failed may be begun again.
func (l *Ledger) Begin(epoch string, next State) (todo bool, err error) {
	if err := l.Check(epoch); err != nil {
		return false, err
	}
	to, from := l.at(next), l.at(l.State)
	switch {
	case to <= 0:
		return false, refuse("no member becomes %s in an epoch with stop=%t", next, l.Epoch.Stop)
	case to <= from:
		return false, nil
	case to > from+1:
		return false, refuse("member is %s and cannot become %s: %s comes first", l.State, next, l.path()[from+1])
	}
	l.Next = next
	return true, nil
}

// Done records that the act begun last is complete, and what it answered.
func (l *Ledger) Done(next State, reply []byte) error {
	if len(l.Undo) > 0 || l.Next != next || next == "" {
		return refuse("act %s was not begun, or the epoch ended during it", next)
	}
	l.State, l.Next = next, ""
	if len(reply) > 0 {
		if l.Replies == nil {
			l.Replies = map[State][]byte{}
		}
		l.Replies[next] = reply
	}
	return nil
}

// Check says whether calls for the epoch are welcome.
func (l *Ledger) Check(epoch string) error {
	switch {
	case !l.open():
		if _, ended := l.ending(epoch); ended {
			return refuse("epoch %s has ended here (finished, aborted, or its lease ran out)", epoch)
		}
		return refuse("epoch %s was never opened here: Prepare comes first", epoch)
	case l.Epoch.ID != epoch:
		return l.otherEpoch(epoch)
	case len(l.Undo) > 0:
		return refuse("epoch %s is being undone here", epoch)
	}
	return nil
}

// Abort ends the epoch by the coordinator's will: everything is undone, a sealed
// capture is discarded too. An epoch that was never opened here is remembered as
// ended, and another one that is open goes on. Refused if a kill has begun, and
// if the epoch ended before and left its capture.
func (l *Ledger) Abort(epoch string) error {
	if !l.open() || l.Epoch.ID != epoch {
		if kept, ended := l.ending(epoch); ended && kept {
			return refuse("epoch %s has ended here and its sealed capture is kept: discard it by its id", epoch)
		} else if !ended {
			l.remember(Ending{Epoch: epoch})
		}
		return nil
	}
	if l.killing() {
		return refuse("epoch %s is past abort: the member's kill has begun, its sealed capture is kept", epoch)
	}
	switch {
	case len(l.Undo) == 0:
		l.Undo = append(l.owed(), Discard)
	case l.Keep:
		// The lease ended just before, with the sealed capture to be kept. The
		// coordinator knows better: nobody was killed.
		l.Undo = append(l.Undo, Discard)
	}
	l.Keep = false
	return nil
}

// Lapse ends the epoch for want of a coordinator: the lease has run out, or the
// process that watched it is gone. A sealed capture is kept, for this member
// cannot know whether another was killed for it; a kill that was begun is
// completed, for only a decided coordinator begins it.
func (l *Ledger) Lapse() {
	if !l.open() || len(l.Undo) > 0 {
		return
	}
	l.Undo = l.owed()
	l.Keep = l.reached(Sealed)
	if !l.Keep {
		l.Undo = append(l.Undo, Discard)
	}
}

// Finish ends an epoch that is complete. Repeats succeed, also where the lease
// ended first: the capture is kept either way.
func (l *Ledger) Finish(epoch string) error {
	if !l.open() || l.Epoch.ID != epoch {
		if kept, _ := l.ending(epoch); kept {
			return nil
		}
		return l.Check(epoch)
	}
	if len(l.Undo) > 0 && l.Keep {
		return nil
	}
	if err := l.Check(epoch); err != nil {
		return err
	}
	path := l.path()
	if last := path[len(path)-1]; l.State != last {
		return refuse("member is %s and cannot finish before it is %s", l.State, last)
	}
	l.Undo, l.Keep = l.owed(), true
	return nil
}

// Undone records that a step was carried out. The last one ends the epoch. While
// EndDump is owed no other step counts: a dump that ends late puts the freezer
// back to frozen and may write once more into its capture.
func (l *Ledger) Undone(s Step) {
	if len(l.Undo) == 0 || s != EndDump && slices.Contains(l.Undo, EndDump) {
		return
	}
	l.Undo = slices.DeleteFunc(slices.Clone(l.Undo), func(o Step) bool { return o == s })
	if len(l.Undo) > 0 {
		return
	}
	e := Ending{Epoch: l.Epoch.ID, Kept: l.Keep}
	*l = Ledger{Ended: l.Ended}
	l.remember(e)
}

// Owed is what remains to be done, in order; empty unless the epoch is ending.
func (l *Ledger) Owed() []Step { return slices.Clone(l.Undo) }

// owed is what ends the epoch, but for the question of the capture. It is never
// empty in an open epoch.
func (l *Ledger) owed() []Step {
	var steps []Step
	if !l.reached(Captured) {
		steps = append(steps, EndDump)
	}
	if l.killing() && !l.reached(Stopped) {
		steps = append(steps, Kill)
	}
	if l.begun(Locked) && !l.reached(Unlocked) {
		steps = append(steps, RemoveRules)
	}
	if l.begun(Frozen) && !l.killing() && !l.reached(Resumed) {
		steps = append(steps, Thaw)
	}
	return append(steps, StopTracking)
}

func (l *Ledger) open() bool { return l.Epoch.ID != "" }

func (l *Ledger) killing() bool { return l.begun(Stopped) }

func (l *Ledger) path() []State {
	if l.Epoch.Stop {
		return stopPath
	}
	return livePath
}

func (l *Ledger) at(s State) int {
	if s == "" {
		s = Idle
	}
	return slices.Index(l.path(), s)
}

// reached reports whether the act is complete; begun also whether it may be.
func (l *Ledger) reached(s State) bool { return l.at(s) >= 0 && l.at(s) <= l.at(l.State) }
func (l *Ledger) begun(s State) bool   { return l.reached(s) || l.Next == s }

func (l *Ledger) ending(epoch string) (kept, ended bool) {
	i := slices.IndexFunc(l.Ended, func(e Ending) bool { return e.Epoch == epoch })
	return i >= 0 && l.Ended[i].Kept, i >= 0
}

func (l *Ledger) remember(e Ending) {
	l.Ended = append(slices.Clone(l.Ended), e)
	l.Ended = l.Ended[max(0, len(l.Ended)-keptEndings):]
}

func (l *Ledger) clone() Ledger {
	c := *l
	c.Replies, c.Undo, c.Ended = maps.Clone(l.Replies), slices.Clone(l.Undo), slices.Clone(l.Ended)
	return c
}

func (l *Ledger) otherEpoch(epoch string) error {
	return refuse("epoch %s is open here, not %s: wait until it has ended", l.Epoch.ID, epoch)
}

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
}
