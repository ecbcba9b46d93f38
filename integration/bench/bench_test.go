// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/bench/result"
)

func at(ms int) time.Time { return time.Unix(1000, int64(ms)*1e6) }

func TestThroughputIsCountedByWindow(t *testing.T) {
	var done []time.Time
	for ms := 0; ms < 1000; ms += 10 {
		// Nothing between 500 and 600, where the checkpoint is.
		if ms <= 500 || ms >= 600 {
			done = append(done, at(ms))
		}
	}
	have := rates(done, window{at(495), at(605)}, 100*time.Millisecond)
	if have.before != 100 || have.after != 90 && have.after != 100 || have.during > 20 || have.silence != 100 {
		t.Errorf("%+v", have)
	}
}

func TestPgbenchLogsAreRead(t *testing.T) {
	dir := t.TempDir()
	// The second file's last line is still being written.
	for name, text := range map[string]string{
		"tx.7": "0 1 2300 0 1000 500000\n1 1 2300 0 1000 100000\n", "tx.7.1": "2 1 900 0 1000 300000\n2 2 90",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	done, err := pgbench{dir: dir}.transactions()
	if err != nil {
		t.Fatal(err)
	}
	if want := []time.Time{at(100), at(300), at(500)}; !reflect.DeepEqual(done, want) {
		t.Errorf("have %v, want %v", done, want)
	}
}

func TestEverySystemHasItsTurnsAndNoMore(t *testing.T) {
	list := []*turns{{s: stock, want: 3}, {s: plainCRIU, want: 1}, {s: cohort, want: 20}}
	count := map[*system]int{}
	var order []*system
	rotate(t.Context(), "test", time.Hour, list, func(x *turns, n int) error {
		count[x.s] += n
		order = append(order, x.s)
		return nil
	})
	if count[stock] != 3 || count[plainCRIU] != 1 || count[cohort] != 20 {
		t.Errorf("measured %v", count)
	}
	if len(order) != 3+1+mostRounds || order[len(order)-1] == order[0] && order[0] == order[1] {
		t.Errorf("turns: %v", order)
	}
}

func TestNumbersOfRepeatsAreScaled(t *testing.T) {
	for _, c := range []struct{ n, full, want int }{{20, 20, 20}, {20, 3, 3}, {2, 20, 2}, {2, 3, 1}, {2, 0, 0}, {40, 5, 10}} {
		if have := (plan{n: c.n}).times(c.full); have != c.want {
			t.Errorf("BENCH_N=%d makes %d of %d, want %d", c.n, have, c.full, c.want)
		}
	}
}

func TestARowKeepsWhatWasMeasuredBeforeAFailure(t *testing.T) {
	f := findings{list: []taken{
		{stop: 20, total: 1000, bytes: 7, report: &result.Report{StopMS: 19, PhasesMS: map[string]float64{"seal": 500, "export": 800}}},
		{stop: 30, total: 3000, bytes: 9, report: &result.Report{StopMS: 29, PhasesMS: map[string]float64{"seal": 1500, "export": 900}}},
	}}
	f.failed(os.ErrDeadlineExceeded)
	r := f.row(workload{title: "x", members: 1, mib: 1024}, result.Cohort)
	if r.Repeats != 2 || r.Failures != 1 || r.Error == "" || *r.StopP50 != 25 || *r.StopMax != 30 || *r.SealMiBs != 1024 || *r.Export != 850 || r.Sample == nil {
		t.Errorf("%+v", r)
	}
	r = (&findings{}).row(workload{title: "x"}, result.CRIU)
	if r.StopP50 != nil || r.Restore != nil || r.Sample != nil {
		t.Errorf("of nothing: %+v", r)
	}
}
