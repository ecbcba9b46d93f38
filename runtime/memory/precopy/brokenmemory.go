// SPDX-License-Identifier: Apache-2.0

//go:build brokenmemory

package precopy

import (
	"math/rand/v2"

	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/track"
)

// breakMemory makes one page of a process that was written since it was copied
// count as clean, so that what it held before is restored. Only the test of the
// tests builds with this tag.
func breakMemory(m *member) error {
	written, err := m.tracker.WrittenRanges()
	if err != nil {
		return err
	}
	var stale []track.Range
	for _, r := range written {
		for at := r.Start; at < r.End; at += pageSize {
			page := track.Range{Start: at, End: at + pageSize}
			if missing, err := m.store.Missing([]pages.Range{pages.Range(page)}); err == nil && len(missing) == 0 {
				stale = append(stale, page)
			}
		}
	}
	if len(stale) == 0 {
		return nil
	}
	return m.tracker.Overlook(stale[rand.IntN(len(stale))])
}
