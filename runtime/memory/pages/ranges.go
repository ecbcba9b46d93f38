// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"cmp"
	"fmt"
	"os"
	"slices"
)

// pageSize is the system's, in bytes: CRIU's images count pages of this size.
var pageSize = uint64(os.Getpagesize())

// Range is the addresses [Start, End) of a process, multiples of the page size.
type Range struct {
	Start, End uint64
}

// Pages is the number of pages in r.
func (r Range) Pages() uint64 { return (r.End - r.Start) / pageSize }

func (r Range) String() string { return fmt.Sprintf("%#x-%#x", r.Start, r.End) }

func (r Range) valid() bool {
	return r.Start <= r.End && r.Start%pageSize == 0 && r.End%pageSize == 0
}

// normalize returns the union of ranges by address, without empty or touching
// ones. The argument is left as it is.
func normalize(ranges []Range) ([]Range, error) {
	out := make([]Range, 0, len(ranges))
	sorted := true
	for _, r := range ranges {
		if !r.valid() {
			return nil, fmt.Errorf("range %s is not in whole pages", r)
		}
		if r.Start == r.End {
			continue
		}
		if n := len(out); n > 0 && r.Start < out[n-1].Start {
			sorted = false
		}
		out = append(out, r)
	}
	if !sorted {
		slices.SortFunc(out, func(a, b Range) int { return cmp.Compare(a.Start, b.Start) })
	}
	merged := out[:0]
	for _, r := range out {
		if n := len(merged); n > 0 && r.Start <= merged[n-1].End {
			merged[n-1].End = max(merged[n-1].End, r.End)
			continue
		}
		merged = append(merged, r)
	}
	return merged, nil
}

// intersect returns what is in both; both are normalized, and so is the result
// but for touching ranges, which stay apart where b has a border.
func intersect(a, b []Range) []Range {
	var out []Range
	for i, j := 0, 0; i < len(a) && j < len(b); {
		start, end := max(a[i].Start, b[j].Start), min(a[i].End, b[j].End)
		if start < end {
			out = append(out, Range{start, end})
		}
		if a[i].End < b[j].End {
			i++
		} else {
			j++
		}
	}
	return out
}

// subtract returns what is in a and not in b; both are normalized.
func subtract(a, b []Range) []Range {
	var out []Range
	j := 0
	for _, r := range a {
		for j < len(b) && b[j].End <= r.Start {
			j++
		}
		for k := j; k < len(b) && b[k].Start < r.End; k++ {
			if r.Start < b[k].Start {
				out = append(out, Range{r.Start, b[k].Start})
			}
			r.Start = min(b[k].End, r.End)
		}
		if r.Start < r.End {
			out = append(out, r)
		}
	}
	return out
}

// count is the number of pages in ranges.
func count(ranges []Range) (n uint64) {
	for _, r := range ranges {
		n += r.Pages()
	}
	return n
}
