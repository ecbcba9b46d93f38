// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
)

// maxHeld bounds what a store keeps in memory after Hold, in bytes; what does not
// fit there is written at once.
const maxHeld = 256 << 20

// held is what levels keep in memory.
type held struct {
	on    atomic.Bool
	bytes atomic.Int64
}

// Hold has the store keep in memory what is copied from now on from processes,
// until Compose: a file system that is about to be snapshotted is flushed by that,
// and what was written to it last would be paid for while everybody stands still.
// Shared memory is written on as it comes, because it is compared with its file.
func (s *Store) Hold() { s.held.on.Store(true) }

// hold keeps one page for a slot; false where it is to be written to the file.
func (l *level) hold(page []byte, slot uint64) bool {
	if have := l.late[slot]; have != nil {
		copy(have, page)
		return true
	}
	if l.held == nil || !l.held.on.Load() || l.held.bytes.Add(int64(pageSize)) > maxHeld {
		return false
	}
	if len(l.room) < int(pageSize) {
		l.room = make([]byte, 256*pageSize)
	}
	mine := l.room[:pageSize:pageSize]
	l.room = l.room[pageSize:]
	copy(mine, page)
	if l.late == nil {
		l.late = map[uint64][]byte{}
	}
	l.late[slot] = mine
	return true
}

// drain writes what was kept, and everything that follows at once.
func (s *Store) drain() error {
	s.held.on.Store(false)
	for _, p := range s.all() {
		for _, l := range p.levels() {
			if err := l.drain(); err != nil {
				return fmt.Errorf("write what was copied last: %w", err)
			}
		}
	}
	return nil
}

func (l *level) drain() error {
	slots := slices.Sorted(maps.Keys(l.late))
	late := l.late
	l.late, l.room = nil, nil
	run := make([]byte, 0, bufferSize)
	for i, slot := range slots {
		run = append(run, late[slot]...)
		if i+1 < len(slots) && slots[i+1] == slot+1 && len(run) < bufferSize {
			continue
		}
		if err := write(l, run, slot+1-uint64(len(run))/pageSize); err != nil {
			return err
		}
		run = run[:0]
	}
	return l.size()
}
