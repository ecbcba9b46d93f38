// SPDX-License-Identifier: Apache-2.0

package result

import (
	"math"
	"slices"
)

// Median of an even number is the mean of the two in the middle. It is nil of
// nothing, and rounded as all are.
func Median(list []float64) *float64 {
	if len(list) == 0 {
		return nil
	}
	s := slices.Sorted(slices.Values(list))
	return Round((s[(len(s)-1)/2] + s[len(s)/2]) / 2)
}

// Longest is nil of nothing.
func Longest(list []float64) *float64 {
	if len(list) == 0 {
		return nil
	}
	return Round(slices.Max(list))
}

// Round rounds to a hundredth.
func Round(v float64) *float64 {
	v = math.Round(v*100) / 100
	return &v
}

// Medians takes the median of each key over the maps that have it.
func Medians(list []map[string]float64) map[string]float64 {
	all := map[string][]float64{}
	for _, m := range list {
		for k, v := range m {
			all[k] = append(all[k], v)
		}
	}
	out := map[string]float64{}
	for k, v := range all {
		out[k] = *Median(v)
	}
	return out
}

// Nearest is the index of the value that is nearest to want, -1 of nothing.
func Nearest(list []float64, want float64) int {
	best := -1
	for i, v := range list {
		if best < 0 || math.Abs(v-want) < math.Abs(list[best]-want) {
			best = i
		}
	}
	return best
}

// Per is amount for each second of ms milliseconds, nil where there was no time.
func Per(amount, ms float64) *float64 {
	if ms <= 0 {
		return nil
	}
	return Round(amount / ms * 1000)
}

// SlowDown is how many percent less during is than the mean of before and after;
// negative if it is more. It is nil where nothing was done around it.
func SlowDown(before, during, after float64) *float64 {
	around := (before + after) / 2
	if around <= 0 {
		return nil
	}
	return Round(100 * (1 - during/around))
}
