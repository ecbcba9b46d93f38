// SPDX-License-Identifier: Apache-2.0

package result

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
)

// columns of both tables.
var columns = []struct {
	name string
	cell func(Row) string
	// ratio is the value that is compared between systems; may be nil.
	ratio func(Row) *float64
}{
	{"n", func(r Row) string { return fmt.Sprint(r.Repeats) }, nil},
	{"stop p50", func(r Row) string { return ms(r.StopP50) }, func(r Row) *float64 { return r.StopP50 }},
	{"stop max", func(r Row) string { return ms(r.StopMax) }, func(r Row) *float64 { return r.StopMax }},
	{"idle gap", func(r Row) string { return ms(r.IdleGapMax) }, nil},
	{"total", func(r Row) string { return ms(r.Total) }, func(r Row) *float64 { return r.Total }},
	{"seal", func(r Row) string { return number(r.SealMiBs, "%.0f MiB/s") }, nil},
	{"export", func(r Row) string { return ms(r.Export) }, nil},
	{"restore", func(r Row) string { return ms(r.Restore) }, func(r Row) *float64 { return r.Restore }},
	{"image", func(r Row) string { return size(r.ImageBytes) }, func(r Row) *float64 {
		if r.ImageBytes == nil {
			return nil
		}
		v := float64(*r.ImageBytes)
		return &v
	}},
	{"run", func(r Row) string { return ms(r.RunP50) }, func(r Row) *float64 { return r.RunP50 }},
}

// Print prints the rows for a terminal, below each case's the ratio of every
// other system's values to cohort's, then the targets.
func (f *File) Print(w io.Writer) error {
	var b bytes.Buffer
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "case\tsystem\t")
	for _, c := range columns {
		fmt.Fprintf(t, "%s\t", c.name)
	}
	fmt.Fprintln(t)
	var remarks []string
	for i, r := range f.Rows {
		if r.Skipped != "" {
			remarks = append(remarks, fmt.Sprintf("%s, %s: skipped: %s", r.Case, r.System, r.Skipped))
			continue
		}
		if r.Error != "" {
			first, _, _ := strings.Cut(r.Error, "\n")
			remarks = append(remarks, fmt.Sprintf("%s, %s: %d of %d failed: %s", r.Case, r.System, r.Failures, r.Failures+r.Repeats, first))
		}
		if more := remark(r); more != "" {
			remarks = append(remarks, fmt.Sprintf("%s, %s: %s", r.Case, r.System, more))
		}
		fmt.Fprintf(t, "%s\t%s\t", r.Case, r.System)
		for _, c := range columns {
			fmt.Fprintf(t, "%s\t", c.cell(r))
		}
		fmt.Fprintln(t)
		if i+1 == len(f.Rows) || f.Rows[i+1].Case != r.Case {
			f.ratios(t, r.Case)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, line := range remarks {
		fmt.Fprintln(&b, line)
	}
	fmt.Fprintln(&b)
	t = tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "target\twanted\tmeasured\tverdict")
	for _, v := range f.Verdicts() {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", v.What, v.Target(), v.Measured(), v)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := w.Write(b.Bytes())
	return err
}

func (f *File) ratios(w io.Writer, name string) {
	to := f.Find(name, Cohort)
	if to == nil {
		return
	}
	for _, r := range f.Rows {
		if r.Case != name || r.System == Cohort || r.Skipped != "" {
			continue
		}
		fmt.Fprintf(w, "\t%s : %s\t", r.System, Cohort)
		for _, c := range columns {
			cell := ""
			if c.ratio != nil {
				cell = ratio(c.ratio(r), c.ratio(*to))
			}
			fmt.Fprintf(w, "%s\t", cell)
		}
		fmt.Fprintln(w)
	}
}

// remark is what only some cases have.
func remark(r Row) string {
	var out []string
	if r.ImageShare != nil {
		out = append(out, fmt.Sprintf("image %.2f %% of the full one", *r.ImageShare))
	}
	if r.Increment != "" {
		out = append(out, fmt.Sprintf("found by %s, %d epochs", r.Increment, r.Chain))
	}
	if r.FullWhy != "" {
		out = append(out, "a full one: "+r.FullWhy)
	}
	if r.Merge != nil {
		out = append(out, fmt.Sprintf("merged into a full one afterwards, in %s", ms(r.Merge)))
	}
	if r.RateDuring != nil {
		out = append(out, fmt.Sprintf("%s transactions a second before, %s over the checkpoint, %s after",
			number(r.RateBefore, "%.0f"), number(r.RateDuring, "%.0f"), number(r.RateAfter, "%.0f")))
	}
	if r.SlowDown != nil {
		out = append(out, fmt.Sprintf("%.1f %% slower", *r.SlowDown))
	}
	if r.ClientGap != nil {
		out = append(out, fmt.Sprintf("longest time without an answer to any client %.1f ms", *r.ClientGap))
	}
	return strings.Join(out, "; ")
}

// Markdown is the results as tables of a page.
func (f *File) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured %s on: %s. The whole run took %.0f minutes.\n\n", f.Header.Time.Format("2006-01-02 15:04 MST"), f.Header, f.Header.TookSeconds/60)
	for _, program := range []string{"containerd", "runc", "criu", "cohort"} {
		if v := f.Header.Versions[program]; v != "" {
			fmt.Fprintf(&b, "- %s: `%s`\n", program, v)
		}
	}
	b.WriteString("\n### Targets\n\n| target | wanted | measured | verdict |\n|---|---|---|---|\n")
	for _, v := range f.Verdicts() {
		verdict := v.String()
		if !v.Met() {
			verdict = "**" + verdict + "**"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", v.What, v.Target(), v.Measured(), verdict)
	}
	b.WriteString("\n### All cases\n\n| case | system |")
	rule := "|---|---|"
	for _, c := range columns {
		fmt.Fprintf(&b, " %s |", c.name)
		rule += "--:|"
	}
	fmt.Fprintf(&b, "\n%s\n", rule)
	var remarks []string
	for _, r := range f.Rows {
		name := r.Case + ", " + r.System
		if r.Skipped != "" {
			remarks = append(remarks, name+": not run: "+r.Skipped)
			continue
		}
		if r.Error != "" {
			remarks = append(remarks, fmt.Sprintf("%s: %d of %d failed", name, r.Failures, r.Failures+r.Repeats))
		}
		if more := remark(r); more != "" {
			remarks = append(remarks, name+": "+more)
		}
		fmt.Fprintf(&b, "| %s | %s |", r.Case, r.System)
		for _, c := range columns {
			fmt.Fprintf(&b, " %s |", c.cell(r))
		}
		b.WriteString("\n")
	}
	if len(remarks) > 0 {
		b.WriteString("\n")
	}
	for _, line := range remarks {
		fmt.Fprintf(&b, "- %s\n", line)
	}
	f.where(&b)
	return b.String()
}

// where tells in which phases and parts of cohort's checkpoints the time goes.
func (f *File) where(b *strings.Builder) {
	// In the order in which they happen, as far as they are known here.
	parts := []string{"scan", "criu", "pages", "storage", "tmpfs"}
	for _, r := range f.Rows {
		for _, p := range slices.Sorted(maps.Keys(r.Parts)) {
			if !slices.Contains(parts, p) {
				parts = append(parts, p)
			}
		}
	}
	fmt.Fprintf(b, "\n### Where cohort's time goes\n\nMedians of each phase, in ms, and of the parts of `capture` over all members.\n\n| case | %s | %s | in the barrier |\n|---|%s--:|\n",
		strings.Join(Phases, " | "), strings.Join(parts, " | "), strings.Repeat("--:|", len(Phases)+len(parts)))
	for _, r := range f.Rows {
		if len(r.Phases) == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s |", r.Case)
		for _, p := range Phases {
			fmt.Fprintf(b, " %s |", cell(r.Phases, p))
		}
		for _, p := range parts {
			fmt.Fprintf(b, " %s |", cell(r.Parts, p))
		}
		bytes := "-"
		if r.BarrierBytes != nil {
			n := int64(*r.BarrierBytes)
			bytes = size(&n)
		}
		fmt.Fprintf(b, " %s |\n", bytes)
	}
}

func cell(m map[string]float64, key string) string {
	v, ok := m[key]
	if !ok {
		return "-"
	}
	return fmt.Sprintf("%.1f", v)
}

// Begin and End are the lines of a page between which the tables stand.
const (
	Begin = "<!-- results: written by the benchmark, do not edit -->"
	End   = "<!-- end of results -->"
)

// Insert puts the tables into a page, between the lines Begin and End.
func (f *File) Insert(page string) (string, error) {
	head, rest, ok := strings.Cut(page, Begin)
	if !ok {
		return "", fmt.Errorf("the page has no line %q", Begin)
	}
	_, tail, ok := strings.Cut(rest, End)
	if !ok {
		return "", fmt.Errorf("the page has no line %q after the results' begin", End)
	}
	return head + Begin + "\n\n" + f.Markdown() + "\n" + End + tail, nil
}

func ms(v *float64) string {
	if v != nil && *v >= 1000 {
		return number(v, "%.0f ms")
	}
	return number(v, "%.1f ms")
}

func number(v *float64, format string) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf(format, *v)
}

func size(v *int64) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f MiB", float64(*v)/(1<<20))
}

func ratio(other, to *float64) string {
	if other == nil || to == nil || *to == 0 {
		return ""
	}
	return fmt.Sprintf("%.3g", *other / *to)
}
