// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"slices"
	"testing"
)

func TestMembersYieldToTheOneThatAllWaitFor(t *testing.T) {
	for _, c := range []struct {
		name      string
		processes []int
		cpus      int
		want      []bool
	}{
		{"a shop: one database, three small ones", []int{1, 1, 14, 1}, 2, []bool{true, true, false, true}},
		{"equal members", []int{1, 1, 1, 1}, 2, []bool{false, false, false, false}},
		{"a member alone", []int{20}, 2, []bool{false}},
		{"nothing to share", []int{1, 14}, 1, []bool{false, false}},
		{"the others together take longer", []int{4, 4, 4, 4, 6}, 2, []bool{false, false, false, false, false}},
		{"members of which nothing is known", []int{0, 0}, 2, []bool{false, false}},
		{"none", nil, 2, []bool{}},
	} {
		if got := yieldsOn(c.processes, c.cpus); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
