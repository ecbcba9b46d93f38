// SPDX-License-Identifier: Apache-2.0

package pattern

import (
	"bytes"
	"slices"
	"testing"
)

func TestAnyCutOfTheStreamIsTheSameStream(t *testing.T) {
	whole := make([]byte, 100)
	Fill(whole, 3)
	for cut := range whole {
		parts := make([]byte, len(whole))
		Fill(parts[:cut], 3)
		Fill(parts[cut:], 3+uint64(cut))
		if !bytes.Equal(whole, parts) {
			t.Fatalf("cut at %d", cut)
		}
		if _, bad := Verify(whole[cut:], 3+uint64(cut)); bad {
			t.Fatalf("verify from %d", cut)
		}
	}
}

func TestALostDoubledOrMovedByteIsFound(t *testing.T) {
	b := make([]byte, 4096)
	Fill(b, 0)
	for name, damaged := range map[string][]byte{
		"lost":    slices.Delete(slices.Clone(b), 1000, 1001),
		"doubled": slices.Insert(slices.Clone(b), 1000, b[1000]),
		"moved":   append(slices.Clone(b[8:]), b[:8]...),
		"changed": func() []byte { c := slices.Clone(b); c[1000] ^= 1; return c }(),
	} {
		at, bad := Verify(damaged, 0)
		if !bad {
			t.Errorf("%s: not found", name)
		} else if name != "moved" && (at < 1000 || at > 1010) {
			t.Errorf("%s: found at %d", name, at)
		}
	}
}
