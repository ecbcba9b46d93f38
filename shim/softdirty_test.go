// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/runtime/memory/engine"
)

func TestPreDumpsEndWhenTheyNoLongerPay(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name   string
		rounds []uint64
		took   time.Duration
		want   string
	}{
		{"the first is always followed by one", []uint64{0}, time.Second, ""},
		{"small", []uint64{512 * mib, 2 * mib}, time.Second, "enough"},
		{"shrinking", []uint64{512 * mib, 64 * mib}, time.Second, ""},
		{"shrinking on", []uint64{512 * mib, 64 * mib, 20 * mib}, time.Second, ""},
		{"not", []uint64{512 * mib, 64 * mib, 63 * mib}, time.Second, "no longer shrinking"},
		{"often", []uint64{512 * mib, 64 * mib, 40 * mib, 20 * mib}, time.Second, "rounds"},
		{"long", []uint64{8192 * mib}, time.Minute, "time"},
	} {
		if got := softEnd(c.rounds, c.took); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestTheEnvironmentChoosesWhereNobodyAsks(t *testing.T) {
	t.Setenv(engine.Env, "full")
	if c, err := chooseEngine(""); err != nil || c.Engine != engine.Full {
		t.Errorf("%v, %v", c, err)
	}
	// A request says what is to be; "auto" is a request, too.
	if c, err := chooseEngine("auto"); err != nil || c.Why == "it was asked for" {
		t.Errorf("%v, %v", c, err)
	}
	t.Setenv(engine.Env, "fast")
	if _, err := chooseEngine(""); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "COHORT_MEMORY=fast") {
		t.Errorf("%v", err)
	}
	if !memoryFacts().SoftDirty {
		t.Setenv(engine.Env, "soft-dirty")
		if _, err := chooseEngine(""); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%v", err)
		}
	}
}
