// SPDX-License-Identifier: Apache-2.0

package group

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// ErrRefused is the class of every answer by which a member says that it is not
// in a state to do what is asked: the epoch has ended, another one is open, or
// the order of the calls is wrong. Asking again is of no use. It crosses the
// wire as FAILED_PRECONDITION; an implementation of [Member] maps it back.
var ErrRefused = errors.New("refused by the member")

// Member is one container, as its coordinator sees it. It is implemented over
// ttrpc; api/member/v1 has the same calls with the same meaning.
//
// Every call is idempotent: repeated, it does nothing and answers as it did. It
// must return soon after its context ends, whether or not the member has been
// reached. Errors that wrap [ErrRefused] are final, all others may be passing.
// Calls for different members are made concurrently; for one member only Renew
// is concurrent with other calls. All times are CLOCK_MONOTONIC of the one host
// that the group runs on, in nanoseconds.
type Member interface {
	// ID is unique in the group.
	ID() string
	// Prepare opens the epoch and does all that can be done while running.
	Prepare(context.Context, Epoch) error
	// Freeze freezes at the given time, or if that is 0 or has passed when it
	// likes, and returns once every task is frozen: when it was asked to, and when the last
	// task stood.
	Freeze(ctx context.Context, epoch string, atNs int64) (askedNs, frozenNs int64, err error)
	// Lock puts up the communication rules.
	Lock(ctx context.Context, epoch string) error
	// Capture saves the frozen container, not yet durably.
	Capture(ctx context.Context, epoch string) error
	// Unlock takes down the communication rules.
	Unlock(ctx context.Context, epoch string) error
	// Resume thaws the container, or kills it if stop is set, and tells when
	// that was complete.
	Resume(ctx context.Context, epoch string, stop bool) (resumedNs int64, err error)
	// Seal makes the capture durable.
	Seal(ctx context.Context, epoch string) error
	// Finish ends the epoch; the sealed capture stays.
	Finish(ctx context.Context, epoch string) error
	// Abort ends the epoch and undoes it: the container runs, the capture is
	// discarded. Refused once a kill has begun.
	Abort(ctx context.Context, epoch string) error
	// Renew extends the lease; refused when the epoch is not open.
	Renew(ctx context.Context, epoch string) error
}

// Epoch is what a member is told when an epoch is opened.
type Epoch struct {
	// ID is unguessable and never used twice, [0-9a-f]{32}.
	ID string `json:"id"`
	// Group names the group; for people and for the record.
	Group string `json:"group,omitempty"`
	// Number counts the epochs of the group; for people and for the record.
	Number uint64 `json:"number,omitempty"`
	// Stop ends the members in the barrier.
	Stop bool `json:"stop,omitempty"`
	// Lease is how long a member waits for its coordinator; 3 s if zero.
	Lease time.Duration `json:"lease_ns"`
}

// The phases, as they are named in results and progress lines. "close" is the
// call Lock, "release" the calls Unlock and Resume; Finish counts as export.
const (
	PhasePrepare = "prepare"
	PhaseFreeze  = "freeze"
	PhaseClose   = "close"
	PhaseCapture = "capture"
	PhaseRelease = "release"
	PhaseSeal    = "seal"
	PhaseExport  = "export"
	// PhaseLease is no phase: it is where an epoch failed if a member gave it
	// up on its own between two calls.
	PhaseLease = "lease"
)

// Limits are the longest that one call of a phase may take. A zero takes the
// default, which is given with each.
type Limits struct {
	Prepare time.Duration // 60 s: pre-copy and a first flush
	Freeze  time.Duration // 2 s
	Close   time.Duration // 1 s
	Capture time.Duration // 60 s: the members stand still for as long
	Release time.Duration // 2 s, each attempt
	Seal    time.Duration // 120 s
	Finish  time.Duration // 5 s, each attempt
	Abort   time.Duration // 10 s, each attempt; more than an interrupted dump needs to let go
}

// Config tells [Run] how to take an epoch.
type Config struct {
	Epoch  Epoch
	Limits Limits
	// Attempts bounds the calls that are repeated: those behind the commit
	// point and Abort. Default 4.
	Attempts int
	// Observer is told of the phases; may be nil.
	Observer Observer
	// Lead is from the call of Freeze to the time that all members are to freeze at; 0
	// leaves the time to each of them. However late its call reaches a member within
	// Lead, it freezes with the others.
	Lead time.Duration
	// Hurry has this process run before others until the function that it returns is
	// called; may be nil. Run asks for it while members stand still and what it does itself
	// lies between two calls to them: on a busy host others would run then.
	Hurry func() (calm func())
	// NoBarrier is a test hook, the negative control of consistency tests: each
	// member is frozen, captured and resumed on its own, one after the other, so
	// there is no instant at which all stand. No released command sets it.
	NoBarrier bool
}

// Observer follows an epoch for progress lines. Its methods are called one at a
// time from Run's own goroutine and must not block: the members may be frozen.
type Observer interface {
	PhaseStarted(phase string)
	PhaseEnded(phase string, took time.Duration, err error)
}

// Result is what an epoch took. It is filled as far as the epoch came, also
// where Run returns an error. Times are milliseconds.
type Result struct {
	// StopMS is from the first member asked to freeze to the last one running
	// again (or dead), by the members' own stamps.
	StopMS float64 `json:"stop_ms"`
	// SkewMS is the largest distance between two members' frozen instants.
	SkewMS float64 `json:"skew_ms"`
	// PhasesMS is by phase name.
	PhasesMS map[string]float64 `json:"phases_ms"`
	// Members are in the order given to Run.
	Members []MemberResult `json:"members"`
	// Sealed is set when every member's capture is durable and kept.
	Sealed bool `json:"sealed"`
	// Exported is set when the caller's export has succeeded.
	Exported bool `json:"exported"`
	// Untold lists calls that had to reach a member and did not. Its lease, or
	// containerd's deletion of a dead member, does what they would have done.
	Untold []Untold `json:"untold,omitempty"`
}

// MemberResult is one member's part of a Result.
type MemberResult struct {
	ID     string  `json:"id"`
	StopMS float64 `json:"stop_ms"`
}

// Untold is a call that could not be delivered.
type Untold struct {
	Member string `json:"member"`
	Call   string `json:"call"`
	Reason string `json:"reason"`
}

// PhaseError tells in which phase, and at which member, an epoch failed. Member
// is empty where no single member is to blame (a cancelled context, export).
type PhaseError struct {
	Phase  string
	Member string
	Err    error
}

func (e *PhaseError) Error() string {
	if e.Member == "" {
		return fmt.Sprintf("%s: %v", e.Phase, e.Err)
	}
	return fmt.Sprintf("%s of member %s: %v", e.Phase, e.Member, e.Err)
}

// Unwrap gives the cause.
func (e *PhaseError) Unwrap() error { return e.Err }

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, value time.Duration) {
		if *d <= 0 {
			*d = value
		}
	}
	set(&c.Epoch.Lease, 3*time.Second)
	set(&c.Limits.Prepare, 60*time.Second)
	set(&c.Limits.Freeze, 2*time.Second)
	set(&c.Limits.Close, time.Second)
	set(&c.Limits.Capture, 60*time.Second)
	set(&c.Limits.Release, 2*time.Second)
	set(&c.Limits.Seal, 120*time.Second)
	set(&c.Limits.Finish, 5*time.Second)
	set(&c.Limits.Abort, 10*time.Second)
	if c.Attempts <= 0 {
		c.Attempts = 4
	}
	if c.Hurry == nil {
		c.Hurry = func() func() { return func() {} }
	}
	return c
}

func (c Config) check(members []Member) error {
	if c.Epoch.ID == "" {
		return errors.New("epoch has no id: give each epoch a new random one")
	}
	if len(members) == 0 {
		return errors.New("group has no member: name at least one container")
	}
	if c.NoBarrier && c.Epoch.Stop {
		return errors.New("NoBarrier is a control for groups that run on: do not combine it with Stop")
	}
	seen := map[string]bool{}
	for _, m := range members {
		if seen[m.ID()] {
			return fmt.Errorf("member %s is in the group twice", m.ID())
		}
		seen[m.ID()] = true
	}
	return nil
}
