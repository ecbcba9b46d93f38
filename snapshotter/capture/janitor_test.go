// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestSealedCapturesThatNobodyExportedGoAfterADayUnlessTheGroupWasToEnd(t *testing.T) {
	ctx := t.Context()
	root := t.TempDir()
	s, _ := newStore(t, root)
	id := func(n int) string { return fmt.Sprintf("%032x", n) }
	for n, labels := range []map[string]string{
		{"stop": "false"}, {"stop": "true"}, nil, {"stop": "false"},
	} {
		_, err := s.Open(ctx, id(n), "/upper", time.Hour, labels)
		must(t, err)
		if n == 3 {
			continue // not sealed: its lease decides
		}
		_, err = s.Take(ctx, id(n), 0)
		must(t, err)
		_, err = s.Seal(ctx, id(n))
		must(t, err)
	}
	have := func() (ids []string) {
		for _, i := range s.List() {
			ids = append(ids, i.ID)
		}
		return ids
	}
	s.DiscardAbandoned(ctx, time.Now().Add(23*time.Hour))
	if got := have(); len(got) != 4 {
		t.Errorf("within a day: %v", got)
	}
	s.DiscardAbandoned(ctx, time.Now().Add(25*time.Hour))
	if got := have(); !slices.Equal(got, []string{id(1), id(2), id(3)}) {
		t.Errorf("after a day: %v", got)
	}
	if _, err := os.Stat(filepath.Join(root, "captures", id(0))); err == nil {
		t.Error("its directory is still there")
	}

	// A part that was adopted before the exporter died is the snapshot's.
	to := filepath.Join(root, "adopted")
	_, err := s.Open(ctx, id(9), "/upper", time.Hour, map[string]string{"stop": "false"})
	must(t, err)
	_, err = s.Take(ctx, id(9), 0)
	must(t, err)
	_, err = s.Seal(ctx, id(9))
	must(t, err)
	a, err := s.Adopt(id(9), FS, "7", to)
	must(t, err)
	a.Done(ctx)
	s.DiscardAbandoned(ctx, time.Now().Add(25*time.Hour))
	if got := have(); slices.Contains(got, id(9)) {
		t.Errorf("half adopted, after a day: %v", got)
	}
	if _, err := os.Stat(filepath.Join(to, "file")); err != nil {
		t.Error(err)
	}
}
