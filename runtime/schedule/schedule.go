// SPDX-License-Identifier: Apache-2.0

package schedule

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/oci/names"
)

// Bounds on what can be asked for.
const (
	// MinEvery is the shortest interval.
	MinEvery = time.Second
	// MaxEvery is the longest, a year: sums of it and a time do not overflow.
	MaxEvery = 366 * 24 * time.Hour
	// MaxPause bounds the pause after failures, where the interval is not longer.
	MaxPause = 5 * time.Minute
	// maxTag is the longest tag, by the distribution spec; maxNumber how much of it
	// ".N" may take, and maxMember what is left to "-MEMBER" at the least.
	maxTag    = 128
	maxNumber = 11
	maxMember = 2
)

// Key names a schedule: containerd's namespace and the group in it.
type Key struct {
	Namespace, Group string
}

func (k Key) String() string { return k.Namespace + "/" + k.Group }

// Spec is what a schedule is to do.
type Spec struct {
	Namespace string `json:"namespace"`
	Group     string `json:"group"`
	// Address is the gRPC socket of the containerd that runs the group.
	Address string `json:"address"`
	// Ref names the newest epoch; Ref and ".N" names epoch N.
	Ref string `json:"ref"`
	// Every is the time from the beginning of one pass to that of the next.
	Every time.Duration `json:"every_ns"`
	// Keep is how many epochs of the schedule stay.
	Keep int `json:"keep"`
}

// Key is the name of the schedule.
func (s Spec) Key() Key { return Key{s.Namespace, s.Group} }

// check refuses what cannot work, and completes the name of the image.
func (s *Spec) check() error {
	wrong := func(format string, args ...any) error {
		return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	if err := identifiers.Validate(s.Namespace); err != nil {
		return fmt.Errorf("namespace of the schedule: %w", err)
	}
	if err := oci.ValidGroup(s.Group); err != nil {
		return err
	}
	if !strings.HasPrefix(strings.TrimPrefix(s.Address, "unix://"), "/") {
		return wrong("containerd's address %q: give the absolute path of its socket", s.Address)
	}
	ref, err := names.NormalizeRef(s.Ref)
	if err != nil {
		return err
	}
	// NormalizeRef has given it a tag.
	if tag := ref[strings.LastIndexByte(ref, ':')+1:]; len(tag)+maxNumber+maxMember > maxTag {
		return wrong("the tag of %q is %d characters long: a schedule needs room for the number of the epoch and the name of the member, choose one of %d at the most",
			s.Ref, len(tag), maxTag-maxNumber-maxMember)
	}
	s.Ref = ref
	if s.Every < MinEvery || s.Every > MaxEvery {
		return wrong("an interval of %s: choose one from %s to %s", s.Every, MinEvery, MaxEvery)
	}
	if s.Keep < 1 || s.Keep > math.MaxInt32 {
		return wrong("keep %d epochs: keep one at least", s.Keep)
	}
	return nil
}

// Epoch is a checkpoint that a pass made.
type Epoch struct {
	ID     string  `json:"id"`
	Number uint64  `json:"number"`
	Ref    string  `json:"ref"`
	StopMS float64 `json:"stop_ms"`
	// At is when the pass was over.
	At time.Time `json:"at"`
}

// Progress is how a schedule goes.
type Progress struct {
	Created time.Time `json:"created"`
	// Begun is when the latest pass began; zero if none is to be counted. Passes are
	// at multiples of the interval from here.
	Begun time.Time `json:"begun,omitzero"`
	// Ended is when it ended; before Begun while it goes on.
	Ended time.Time `json:"ended,omitzero"`
	// Last is the newest epoch.
	Last *Epoch `json:"last,omitempty"`
	// Passes have succeeded, Failed have not.
	Passes uint64 `json:"passes"`
	Failed uint64 `json:"failed"`
	// Failures are those in a row up to now; Error is the latest, empty if none.
	Failures int       `json:"failures"`
	Error    string    `json:"error,omitempty"`
	ErrorAt  time.Time `json:"error_at,omitzero"`
}

// Status is a schedule as List tells of it.
type Status struct {
	Spec
	Progress
	// Running is set while a pass goes on; Next is when one begins otherwise.
	Running bool
	Next    time.Time
}

// Runner does what a schedule is for. Its methods return soon after their context
// ends, with the group running on.
type Runner interface {
	// Checkpoint takes one epoch, which is then named by Ref and by Ref and its number.
	Checkpoint(ctx context.Context, s Spec) (Epoch, error)
	// Prune removes the schedule's epochs but for the newest s.Keep.
	Prune(ctx context.Context, s Spec) error
	// EndTracking ends what the last pass left in the members for a next one.
	EndTracking(ctx context.Context, s Spec) error
}

// due is when the next pass begins. A clock that was set back does not put it
// further away than one pause.
func (s Spec) due(p Progress, now time.Time) time.Time {
	if p.Begun.IsZero() {
		return now
	}
	pause := s.pause(p.Failures)
	next := p.Begun.Add(pause)
	if late := p.Ended.Sub(next); late > 0 {
		// It took longer than the interval: to the next multiple.
		late += s.Every - 1
		next = next.Add(late - late%s.Every)
	}
	if latest := now.Add(pause); next.After(latest) {
		return latest
	}
	return next
}

// pause is the interval, which doubles with each failure after the first.
func (s Spec) pause(failures int) time.Duration {
	limit := max(MaxPause, s.Every)
	pause := s.Every
	for range failures - 1 {
		if pause *= 2; pause >= limit {
			return limit
		}
	}
	return pause
}
