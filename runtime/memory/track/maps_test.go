// SPDX-License-Identifier: Apache-2.0

package track

import (
	"fmt"
	"slices"
	"testing"
)

func TestMapsLinesAreReadAndJudged(t *testing.T) {
	cases := []struct {
		line string
		want Range
		file bool
		why  string
	}{
		{"55c6db130000-55c6db151000 rw-p 00000000 00:00 0                          [heap]", Range{0x55c6db130000, 0x55c6db151000}, false, ""},
		{"7f5edb519000-7f5edb51b000 rw-p 001d3000 fe:00 326269                     /usr/lib/libc.so.6", Range{0x7f5edb519000, 0x7f5edb51b000}, true, ""},
		{"7f5edb519000-7f5edb51b000 rw-p 001d3000 fe:00 326269  /a file with  spaces (deleted)", Range{0x7f5edb519000, 0x7f5edb51b000}, true, ""},
		{"7f5edb000000-7f5edb040000 ---p 00000000 00:00 0 ", Range{0x7f5edb000000, 0x7f5edb040000}, false, ""},
		{"7f5edb000000-7f5edb040000 rw-s 00000000 00:01 1036 /dev/zero (deleted)", Range{0x7f5edb000000, 0x7f5edb040000}, true, whyShared},
		{"7f5edb000000-7f5edb040000 rw-p 00000000 00:05 4 /dev/zero", Range{0x7f5edb000000, 0x7f5edb040000}, false, ""},
		{"7f5edb000000-7f5edb040000 rw-p 00000000 00:05 4 /dev/mem", Range{0x7f5edb000000, 0x7f5edb040000}, true, whyDevice},
		{"7f5edb533000-7f5edb537000 r--p 00000000 00:00 0                          [vvar]", Range{0x7f5edb533000, 0x7f5edb537000}, false, whyKernel},
		{"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]", Range{0xffffffffff600000, 0xffffffffff601000}, false, whyKernel},
	}
	for _, c := range cases {
		a, err := parseArea(c.line)
		if err != nil {
			t.Errorf("%q: %v", c.line, err)
			continue
		}
		if a.Range != c.want || a.untrackable() != c.why || (c.why == "" && a.file() != c.file) {
			t.Errorf("%q: %+v, file %v, %q", c.line, a, a.file(), a.untrackable())
		}
	}
	for _, bad := range []string{"", "x", "1-2", "2000-1000 rw-p 0 0:0 0", "1000-2000 rw 0 0:0 0", "1000-2000 rw-p 0 0:0 x", "1000 rw-p 0 0:0 0"} {
		if _, err := parseArea(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestSplitCoversARangeOnceInOrder(t *testing.T) {
	spans := []span{{Range: Range{10, 20}}, {Range: Range{20, 30}, file: true}, {Range: Range{40, 50}}}
	cases := []struct {
		r    Range
		want string
	}{
		{Range{0, 5}, "[0-5 false]"},
		{Range{0, 10}, "[0-10 false]"},
		{Range{10, 20}, "[10-20 true]"},
		{Range{15, 45}, "[15-20 true 20-30 true 30-40 false 40-45 true]"},
		{Range{0, 60}, "[0-10 false 10-20 true 20-30 true 30-40 false 40-50 true 50-60 false]"},
		{Range{50, 60}, "[50-60 false]"},
		{Range{30, 40}, "[30-40 false]"},
	}
	for _, c := range cases {
		var got []string
		if err := split(c.r, spans, func(part Range, inside bool) error {
			got = append(got, fmt.Sprintf("%d-%d %v", part.Start, part.End, inside))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(got) != c.want {
			t.Errorf("split %v: %v, want %s", c.r, got, c.want)
		}
	}
}

func TestPiecesEndAtMultiplesOfTheirSize(t *testing.T) {
	got := slices.Collect(span{Range: Range{5, 40}}.pieces(16))
	if want := []Range{{5, 16}, {16, 32}, {32, 40}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
