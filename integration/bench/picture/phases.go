// SPDX-License-Identifier: Apache-2.0

package picture

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cohort-project/cohort/integration/bench/result"
)

// barrier is the phases in which members do not run, or not freely.
var barrier = []string{"close", "freeze", "capture", "release"}

// faded: the barrier's phases are a ground for what stands on it.
const faded = ` fill-opacity="0.35"`

// parts of a member's capture, in the order in which they begin; storage and tmpfs
// are within criu, and have no place of their own here.
var parts = []string{"scan", "criu", "pages"}

// Phases draws one checkpoint of the largest group as a time line: above all of
// it, below the barrier, with a bar for each member.
func Phases(f *result.File) ([]byte, error) {
	var row *result.Row
	for i, r := range f.Rows {
		if r.System == result.Cohort && r.Sample != nil && strings.HasPrefix(r.Case, "group-") &&
			(row == nil || r.Members*r.MemoryMiB >= row.Members*row.MemoryMiB) {
			row = &f.Rows[i]
		}
	}
	if row == nil {
		return nil, fmt.Errorf("a group with cohort: %w", ErrNothing)
	}
	s := row.Sample
	const left, right, lane = 96, 740, 34
	height := 312 + lane*float64(len(s.Members))
	c := newCanvas(760, height, fmt.Sprintf("One checkpoint of %d members of %d MiB, each dirtying 1 %% a second", row.Members, row.MemoryMiB),
		"Time line of the phases of one group checkpoint, and of its barrier member by member.")

	total, inside := 0.0, 0.0
	for _, p := range result.Phases {
		total += s.PhasesMS[p]
	}
	for _, p := range barrier {
		inside += s.PhasesMS[p]
	}
	if total <= 0 || inside <= 0 {
		return nil, fmt.Errorf("phases of %s: %w", row.Case, ErrNothing)
	}

	// All phases. The barrier is too short to be seen: it is marked.
	y := 64.0
	c.text(16, y+19, "all of it", `font-size="12"`)
	scale := (right - left) / total
	at, from, to := 0.0, 0.0, 0.0
	for _, p := range result.Phases {
		width := s.PhasesMS[p]
		if p == barrier[0] {
			from = at
		}
		x := left + at*scale
		c.rect(x, y, width*scale, 28, fill(p))
		if width*scale > 60 {
			c.text(x+width*scale/2, y+18, p+" "+duration(width), `text-anchor="middle" font-size="12"`)
		}
		at += width
		if p == barrier[len(barrier)-1] {
			to = at
		}
	}
	axis(c, left, right, y+28, total)
	below := y + 84
	style := `stroke="` + colours["capture"] + `" stroke-width="1"`
	c.line(left+from*scale, y+28, left, below, style)
	c.line(left+to*scale, y+28, right, below, style)
	c.rect(left+from*scale-0.5, y-6, max((to-from)*scale, 1)+1, 40, fill("capture"))
	middle := left + (from+to)/2*scale
	anchor := "middle"
	if middle > right-120 {
		anchor = "end"
	}
	c.text(middle, y-10, "stop "+duration(s.StopMS), `text-anchor="`+anchor+`" font-weight="600" font-size="12" `+fill("capture"))

	// The barrier.
	y = below
	scale = (right - left) / inside
	c.text(16, y+19, "barrier", `font-size="12"`)
	at = 0
	starts := map[string]float64{}
	for _, p := range barrier {
		starts[p] = at
		width := s.PhasesMS[p]
		c.rect(left+at*scale, y, width*scale, 28, fill(p)+faded)
		if width*scale > 50 {
			c.text(left+(at+width/2)*scale, y+18, p+" "+duration(width), `text-anchor="middle" font-size="12"`)
		}
		at += width
	}
	y += 38
	for _, m := range s.Members {
		c.text(16, y+16, short(m.Name), `font-size="12"`)
		// Members report how long, not since when: they are drawn from the
		// beginning of the phase in which it happens.
		c.rect(left+starts["freeze"]*scale, y, min(m.StopMS, inside-starts["freeze"])*scale, 26, fill("stop"))
		begin := starts["capture"]
		for i, p := range parts {
			width := m.PartsMS[p]
			if p != parts[0] {
				begin = starts["capture"] + m.PartsMS[parts[0]]
			}
			c.rect(left+begin*scale, y+3+7*float64(i), min(width, inside-begin)*scale, 6, fill(p))
		}
		y += lane
	}
	axis(c, left, right, y-4, inside)

	y += 38
	c.text(16, y+10, "phases", `font-size="12" fill="`+faint+`"`)
	x := float64(left)
	for _, p := range result.Phases {
		style := fill(p)
		if slices.Contains(barrier, p) {
			style += faded
		}
		x = c.key(x, y, p, style)
	}
	y += 22
	c.text(16, y+10, "members", `font-size="12" fill="`+faint+`"`)
	x = left
	for _, l := range []struct{ name, text string }{
		{"stop", "stand still"}, {"scan", "dirty pages found"}, {"criu", "CRIU's dump"}, {"pages", "last pages copied"},
	} {
		x = c.key(x, y, l.text, fill(l.name))
	}
	c.caption(fmt.Sprintf("The checkpoint whose stop is nearest to the median of %d; skew between members %s.", row.Repeats, duration(s.SkewMS)),
		machine(f))
	return c.done(), nil
}

// key is an entry of a legend. It returns where the next one begins.
func (c *canvas) key(x, y float64, text, style string) float64 {
	c.rect(x, y, 12, 12, style)
	c.text(x+17, y+10.5, text, `font-size="12"`)
	return x + 34 + 6.6*float64(len(text))
}

// axis draws a scale of 0 to total ms with round steps.
func axis(c *canvas, left, right, y, total float64) {
	step := 0.1
	for i := 0; total/step > 8; i++ {
		step *= []float64{2, 2.5, 2}[i%3]
	}
	c.line(left, y, right, y, `stroke="`+faint+`"`)
	for t := 0.0; t <= total; t += step {
		x := left + (right-left)*t/total
		c.line(x, y, x, y+4, `stroke="`+faint+`"`)
		label := fmt.Sprintf("%g ms", t)
		if step >= 100 {
			label = fmt.Sprintf("%.3g s", t/1000)
		}
		c.text(x, y+16, label, `text-anchor="middle" font-size="11" fill="`+faint+`"`)
	}
}

// short keeps the end of a name that has no room: that is where members differ.
func short(name string) string {
	if len(name) > 11 {
		return "…" + name[len(name)-10:]
	}
	return name
}
