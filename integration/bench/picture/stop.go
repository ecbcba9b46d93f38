// SPDX-License-Identifier: Apache-2.0

package picture

import (
	"fmt"
	"math"

	"github.com/cohort-project/cohort/integration/bench/result"
)

// labels are how the legend names the systems.
var labels = []struct{ system, label, command string }{
	{result.Containerd, "containerd", "ctr c checkpoint --task"},
	{result.CRIU, "plain CRIU", "criu dump --leave-running"},
	{result.Cohort, "cohort", "cohort checkpoint"},
}

// Stop draws the stop against the size of one process that dirties 1 % of its
// memory a second, both logarithmic: a point for the median, a whisker up to the
// longest.
func Stop(f *result.File) ([]byte, error) {
	type point struct{ mib, p50, longest float64 }
	lines := map[string][]point{}
	low, high := 10.0, 100.0
	for _, l := range labels {
		for _, mib := range result.Sizes {
			r := f.Find(result.ProcessCase(mib, 1), l.system)
			if r == nil || r.StopP50 == nil || *r.StopP50 <= 0 {
				continue
			}
			p := point{float64(mib), *r.StopP50, *r.StopP50}
			if r.StopMax != nil {
				p.longest = max(p.longest, *r.StopMax)
			}
			lines[l.system] = append(lines[l.system], p)
			low, high = min(low, p.p50), max(high, p.longest)
		}
	}
	if len(lines) == 0 {
		return nil, fmt.Errorf("one process of several sizes at 1 %%/s: %w", ErrNothing)
	}
	c := newCanvas(760, 480, "How long a process stands still for its checkpoint",
		"Stop in milliseconds against memory in MiB, for containerd, plain CRIU and cohort; both axes are logarithmic.")
	const left, right, top, bottom = 78, 560, 70, 400
	first, last := float64(result.Sizes[0]), float64(result.Sizes[len(result.Sizes)-1])
	// Whole decades, so that the grid has a line at both ends.
	low, high = math.Pow(10, math.Floor(math.Log10(low))), math.Pow(10, math.Ceil(math.Log10(high)))
	x := func(mib float64) float64 {
		return left + 16 + (right-left-32)*math.Log(mib/first)/math.Log(last/first)
	}
	y := func(ms float64) float64 { return bottom - (bottom-top)*math.Log(ms/low)/math.Log(high/low) }

	for decade := low; decade <= high*1.001; decade *= 10 {
		c.line(left, y(decade), right, y(decade), `stroke="`+grid+`"`)
		c.text(left-8, y(decade)+4, duration(decade), `text-anchor="end"`)
	}
	for _, mib := range result.Sizes {
		c.line(x(float64(mib)), bottom, x(float64(mib)), bottom+5, `stroke="`+faint+`"`)
		label := fmt.Sprintf("%d MiB", mib)
		if mib >= 1024 {
			label = fmt.Sprintf("%d GiB", mib/1024)
		}
		c.text(x(float64(mib)), bottom+20, label, `text-anchor="middle"`)
	}
	c.line(left, bottom, right, bottom, `stroke="`+faint+`"`)
	c.text(left, top-14, "stop, as the process felt it", `fill="`+faint+`" font-size="12"`)
	c.text(right, bottom+38, "memory of the process", `fill="`+faint+`" font-size="12" text-anchor="end"`)

	// Labels stand at the lines' ends, apart from each other.
	free := math.Inf(1)
	for i := len(labels) - 1; i >= 0; i-- {
		l := labels[i]
		points := lines[l.system]
		if len(points) == 0 {
			continue
		}
		colour := colours[l.system]
		var path [][2]float64
		for _, p := range points {
			path = append(path, [2]float64{x(p.mib), y(p.p50)})
		}
		c.polyline(path, `stroke="`+colour+`" stroke-width="2"`)
		for _, p := range points {
			c.line(x(p.mib), y(p.p50), x(p.mib), y(p.longest), `stroke="`+colour+`" stroke-width="1.5"`)
			c.line(x(p.mib)-4, y(p.longest), x(p.mib)+4, y(p.longest), `stroke="`+colour+`" stroke-width="1.5"`)
			c.circle(x(p.mib), y(p.p50), 4, `fill="`+colour+`"`)
		}
		end := points[len(points)-1]
		at := min(y(end.p50)+4, free-36)
		free = at
		c.text(right+8, at, l.label+", "+duration(end.p50), `fill="`+colour+`" font-weight="600"`)
		c.text(right+8, at+15, l.command, `fill="`+faint+`" font-size="12"`)
	}
	c.caption("One process that dirties 1 % of its memory a second. Points: median; whiskers: up to the longest. Both axes are logarithmic.", machine(f))
	return c.done(), nil
}
