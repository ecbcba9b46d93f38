// SPDX-License-Identifier: Apache-2.0

package result

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestMedians(t *testing.T) {
	for _, c := range []struct {
		list []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 2, 100}, 3}, {[]float64{0.123, 0.128}, 0.13}} {
		if m := Median(c.list); m == nil || *m != c.want {
			t.Errorf("median of %v is %v, want %v", c.list, m, c.want)
		}
	}
	if Median(nil) != nil || Longest(nil) != nil || Nearest(nil, 1) != -1 {
		t.Error("something came of nothing")
	}
	if i := Nearest([]float64{1, 8, 5}, 6); i != 2 {
		t.Errorf("nearest to 6 is number %d", i)
	}
	have := Medians([]map[string]float64{{"a": 1, "b": 5}, {"a": 3}})
	if want := map[string]float64{"a": 2, "b": 5}; !reflect.DeepEqual(have, want) {
		t.Errorf("have %v, want %v", have, want)
	}
}

func TestRates(t *testing.T) {
	if v := Per(1024, 2000); v == nil || *v != 512 {
		t.Errorf("1024 in two seconds is %v a second", v)
	}
	if Per(1, 0) != nil || SlowDown(0, 5, 0) != nil {
		t.Error("a division by nothing has a result")
	}
	if v := SlowDown(90, 80, 110); v == nil || *v != 20 {
		t.Errorf("80 instead of 100 is %v %% slower", v)
	}
}

func TestVerdicts(t *testing.T) {
	have := func(v float64) *float64 { return &v }
	for _, c := range []struct {
		v    Verdict
		want string
	}{
		{Verdict{Want: 25, Unit: " ms"}, "not measured"},
		{Verdict{Want: 25, Have: have(25)}, "met"},
		{Verdict{Want: 25, Have: have(30), Unit: " ms"}, "missed by 5 ms (20 %)"},
		{Verdict{Want: 100, Have: have(150), AtLeast: true}, "met"},
		{Verdict{Want: 100, Have: have(80), AtLeast: true}, "missed by 20 (20 %)"},
	} {
		if s := c.v.String(); s != c.want {
			t.Errorf("%s: %q, want %q", c.v.Target(), s, c.want)
		}
	}
}

func TestTargetsFindTheirCases(t *testing.T) {
	v := func(x float64) *float64 { return &x }
	f := &File{}
	for _, mib := range Sizes {
		f.Rows = append(f.Rows,
			Row{Case: ProcessCase(mib, 1), System: Cohort, Members: 1, StopP50: v(10), Restore: v(5), SealMiBs: v(600)},
			Row{Case: ProcessCase(mib, 1), System: Containerd, StopP50: v(2000)},
			Row{Case: ProcessCase(mib, 1), System: CRIU, Restore: v(10)})
	}
	for _, way := range Ways {
		for _, n := range []int{2, 10} {
			f.Rows = append(f.Rows, Row{Case: IncrementCase(way, n), System: Cohort, ImageShare: v(1)})
		}
	}
	f.Rows = append(f.Rows,
		Row{Case: GroupCase(4, 1024), System: Cohort, Members: 4, StopP50: v(50), SkewMax: v(1)},
		Row{Case: ShopCase, System: Cohort, Members: 4, StopP50: v(50), SkewMax: v(2)},
		Row{Case: PostgresCase, System: Cohort, SlowDown: v(3)})
	for _, verdict := range f.Verdicts() {
		if !verdict.Met() {
			t.Errorf("%s: %s", verdict.What, verdict)
		}
	}
}

func TestResultsAreReadAsTheyWereWritten(t *testing.T) {
	v := 1.5
	f := &File{Header: Header{Kernel: "6.18", Versions: map[string]string{"criu": "4.2"}}, Rows: []Row{
		{Case: "a", System: Cohort, StopP50: &v, Sample: &Report{StopMS: 3}}, {Case: "a", System: CRIU, Error: "two\nlines"},
	}}
	path := filepath.Join(t.TempDir(), "out")
	if err := f.Write(path); err != nil {
		t.Fatal(err)
	}
	back, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(f, back) {
		t.Errorf("wrote %+v, read %+v", f, back)
	}
	if err := f.Print(&strings.Builder{}); err != nil {
		t.Error(err)
	}
}

func TestTablesReplaceThoseOfThePage(t *testing.T) {
	f := &File{Rows: []Row{{Case: "a", System: Cohort}}}
	once, err := f.Insert("head\n" + Begin + "\nold\n" + End + "\ntail\n")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(once, "old") || !strings.HasPrefix(once, "head\n") || !strings.HasSuffix(once, End+"\ntail\n") {
		t.Errorf("the page is now\n%s", once)
	}
	twice, err := f.Insert(once)
	if err != nil || twice != once {
		t.Errorf("written twice it differs: %v", err)
	}
	if _, err := f.Insert("no marks"); err == nil {
		t.Error("a page without marks was taken")
	}
}

func TestACaseThatWasMeasuredAgainTakesItsPlace(t *testing.T) {
	f := &File{}
	f.Replace(&File{Rows: []Row{{Case: "a", System: Cohort}, {Case: "b", System: Containerd, Repeats: 1}, {Case: "b", System: Cohort, Repeats: 1}}})
	f.Replace(&File{Rows: []Row{{Case: "c", System: Cohort}, {Case: "b", System: Cohort, Repeats: 2}, {Case: "b", System: CRIU, Repeats: 2}}})
	var have []string
	for _, r := range f.Rows {
		have = append(have, r.Case+" "+r.System)
	}
	want := []string{"a cohort", "b cohort", "b criu", "c cohort"}
	if !reflect.DeepEqual(have, want) || f.Find("b", Cohort).Repeats != 2 {
		t.Errorf("have %v, want %v", have, want)
	}
}
