// SPDX-License-Identifier: Apache-2.0

package result

import "fmt"

// Names of cases that targets and pictures ask for.
const (
	ShopCase     = "shop"
	PostgresCase = "postgres"
	RunCase      = "run_latency"
)

// ProcessCase is one process of a size, dirtying so much of it a second.
func ProcessCase(mib int, percent float64) string {
	return fmt.Sprintf("process-%dMiB-%gpct", mib, percent)
}

// GroupCase is a group of members of a size each, dirtying 1 % a second.
func GroupCase(members, mib int) string { return fmt.Sprintf("group-%dx%dMiB", members, mib) }

// IncrementCase is the nth checkpoint of a process, 1 % of which changed since
// the one before; how tells how the change is found.
func IncrementCase(how string, n int) string { return fmt.Sprintf("increment-%s-%d", how, n) }

// Sizes are the sizes of one process, in MiB.
var Sizes = []int{16, 256, 1024, 4096}

// Ways to find what changed, as IncrementCase names them.
var Ways = []string{"tracked", "content"}

// Verdict is a target and how it was met.
type Verdict struct {
	What string
	// Have is nil where it was not measured.
	Have *float64
	Want float64
	// AtLeast: more is better. Else less is.
	AtLeast bool
	Unit    string
}

// Met tells whether the target was met; false if it was not measured.
func (v Verdict) Met() bool {
	return v.Have != nil && (v.AtLeast && *v.Have >= v.Want || !v.AtLeast && *v.Have <= v.Want)
}

// Measured is what was measured, with its unit.
func (v Verdict) Measured() string {
	if v.Have == nil {
		return "-"
	}
	return fmt.Sprintf("%.4g%s", *v.Have, v.Unit)
}

// Target is what was wanted.
func (v Verdict) Target() string {
	sign := "≤"
	if v.AtLeast {
		sign = "≥"
	}
	return fmt.Sprintf("%s %g%s", sign, v.Want, v.Unit)
}

func (v Verdict) String() string {
	switch {
	case v.Have == nil:
		return "not measured"
	case v.Met():
		return "met"
	}
	by := *v.Have - v.Want
	if v.AtLeast {
		by = -by
	}
	if v.Want == 0 {
		return fmt.Sprintf("missed by %.4g%s", by, v.Unit)
	}
	return fmt.Sprintf("missed by %.4g%s (%.0f %%)", by, v.Unit, 100*by/v.Want)
}

// Verdicts holds a run against the targets.
func (f *File) Verdicts() []Verdict {
	get := func(name, system string, field func(*Row) *float64) *float64 {
		if r := f.Find(name, system); r != nil {
			return field(r)
		}
		return nil
	}
	stop := func(r *Row) *float64 { return r.StopP50 }
	restore := func(r *Row) *float64 { return r.Restore }
	over := func(a, b *float64) *float64 {
		if a == nil || b == nil || *b == 0 {
			return nil
		}
		return Round(*a / *b)
	}
	var out []Verdict
	for _, mib := range Sizes {
		out = append(out, Verdict{What: fmt.Sprintf("stop of one process of %d MiB at 1 %%/s", mib), Have: get(ProcessCase(mib, 1), Cohort, stop), Want: 25, Unit: " ms"})
	}
	growth := Verdict{What: "more stop per further GiB, between 1 and 4 GiB", Want: 2, Unit: " ms"}
	if a, b := get(ProcessCase(1024, 1), Cohort, stop), get(ProcessCase(4096, 1), Cohort, stop); a != nil && b != nil {
		growth.Have = Round((*b - *a) / 3)
	}
	out = append(out, growth,
		Verdict{What: "stop of four members of 1 GiB at 1 %/s", Have: get(GroupCase(4, 1024), Cohort, stop), Want: 60, Unit: " ms"})
	skew := Verdict{What: "skew between members, the largest of all checkpoints", Want: 5, Unit: " ms"}
	for _, r := range f.Rows {
		if r.SkewMax != nil && r.Members > 1 && (skew.Have == nil || *r.SkewMax > *skew.Have) {
			skew.Have = r.SkewMax
		}
	}
	out = append(out, skew,
		Verdict{What: "stop of the shop under load", Have: get(ShopCase, Cohort, stop), Want: 80, Unit: " ms"},
		Verdict{What: "times shorter than containerd's, 1 GiB at 1 %/s", Have: over(get(ProcessCase(1024, 1), Containerd, stop), get(ProcessCase(1024, 1), Cohort, stop)), Want: 100, AtLeast: true},
	)
	for _, way := range Ways {
		for _, n := range []int{2, 10} {
			out = append(out, Verdict{
				What: fmt.Sprintf("image of increment %d, 1 %% changed (%s), of the full one", n, way),
				Have: get(IncrementCase(way, n), Cohort, func(r *Row) *float64 { return r.ImageShare }), Want: 3, Unit: " %",
			})
		}
	}
	return append(out,
		Verdict{What: "sealing 1 GiB, a second", Have: get(ProcessCase(1024, 1), Cohort, func(r *Row) *float64 { return r.SealMiBs }), Want: 500, AtLeast: true, Unit: " MiB"},
		Verdict{What: "slow-down of PostgreSQL over the checkpoint", Have: get(PostgresCase, Cohort, func(r *Row) *float64 { return r.SlowDown }), Want: 10, Unit: " %"},
		Verdict{What: "restore of 1 GiB over CRIU's own", Have: over(get(ProcessCase(1024, 1), Cohort, restore), get(ProcessCase(1024, 1), CRIU, restore)), Want: 1},
	)
}
