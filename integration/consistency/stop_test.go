// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"slices"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

func TestTheReportedStopIsTheStopThatMembersFeel(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, time.Minute)
	g := newGroup(t, in, "stop")
	pids := map[string]int{}
	for member, mem := range map[string]string{"small": "8", "large": "128"} {
		pids[member] = g.run(ctx, member, "", "/bin/ticker", "--mem", mem)
	}
	// One process that is not scheduled in time spoils one measurement, not most.
	const rounds = 7
	excess, short := map[string][]float64{}, map[string][]float64{}
	for range rounds {
		for _, pid := range pids {
			ask[programs.Ticker](ctx, t, pid) // begins a new measurement
		}
		_, cut, err := g.checkpoint(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range cut.Members {
			felt := ask[programs.Ticker](ctx, t, pids[m.Name]).MaxGapMS
			t.Logf("%s felt %.1f ms, reported %.1f ms, the group %.1f ms", m.Name, felt, m.StopMS, cut.StopMS)
			if m.StopMS > cut.StopMS {
				t.Errorf("member %s stopped for %.1f ms and its group for %.1f ms", m.Name, m.StopMS, cut.StopMS)
			}
			excess[m.Name] = append(excess[m.Name], felt-(1.3*m.StopMS+20))
			short[m.Name] = append(short[m.Name], felt-m.StopMS/2)
		}
		slowest(t, cut)
	}
	for name := range pids {
		if by := median(excess[name]); by > 0 {
			t.Errorf("member %s mostly felt a stop %.1f ms longer than what was reported, a third of it and 20 ms", name, by)
		}
		if by := median(short[name]); by < 0 {
			t.Errorf("member %s mostly felt a stop %.1f ms shorter than half of what was reported", name, -by)
		}
	}
}

// slowest makes sure that the group's stop is not less than any phase that its
// members stand still in.
func slowest(t *testing.T, cut shop.Checkpoint) {
	t.Helper()
	if capture := cut.PhasesMS["capture"]; capture > cut.StopMS {
		t.Errorf("capturing took %.1f ms of a stop of %.1f ms", capture, cut.StopMS)
	}
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}
