// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"fmt"
	"maps"
	"slices"

	"github.com/cohort-project/cohort/runtime/memory/pages"
)

// account finds out what CRIU has dumped itself, and why.
func (s *Session) account(imagesDir string) error {
	dumped, err := pages.DumpedObjects(imagesDir)
	if err != nil {
		return fmt.Errorf("see what CRIU dumped of shared memory: %w", err)
	}
	s.stats = Stats{Compared: s.compared}
	for _, o := range s.sorted() {
		// Of an object that CRIU has not met nothing is restored, and what it has
		// dumped itself is restored from there.
		if n, met := dumped[uint32(o.ino)]; !met || n > 0 {
			continue
		}
		held := o.heldBytes()
		s.stats.Held += held
		s.stats.Precopied += bytesOf(o.clean) - held
	}
	for _, id := range slices.Sorted(maps.Keys(dumped)) {
		n := dumped[id]
		if n == 0 {
			continue
		}
		s.stats.Criu += n
		s.stats.Why = append(s.stats.Why, fmt.Sprintf("%d KiB of object %d: %s", n>>10, id, s.why(uint64(id), n)))
	}
	return nil
}

func (s *Session) why(id, n uint64) string {
	_, sysv := s.sysv[id]
	switch {
	case sysv:
		return "System V shared memory"
	case s.objects[id] != nil:
		return "CRIU was to leave it out and did not; is its preload library of this version?"
	case n < least:
		return "too small to be worth it"
	}
	return "it came, or grew, when pre-copy had begun"
}

// Stats of what Compose has found.
func (s *Session) Stats() Stats { return s.stats }
