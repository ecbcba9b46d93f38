// SPDX-License-Identifier: Apache-2.0

//go:build brokenmemory

package track

import (
	"context"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

// WrittenRanges lists what Written counts, of what is tracked.
func (t *Tracker) WrittenRanges() (list []Range, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err = t.eachPrivate(func(s span, tracked bool) error {
		if !tracked {
			return nil
		}
		return t.scan(context.Background(), s, selection{with: uapi.PageIsWritten}, 0, func(r Range) error {
			list = append(list, r)
			return nil
		})
	})
	return list, err
}

// Overlook makes pages count as clean although they were written.
func (t *Tracker) Overlook(r Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	sel := selection{with: uapi.PageIsWPAllowed | uapi.PageIsWritten}
	return t.scan(context.Background(), span{Range: r}, sel, uapi.PmScanWPMatching, func(Range) error { return nil })
}
