// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// heldAnyway is what a store keeps in memory after Hold without asking whether there
	// is enough, in bytes.
	heldAnyway = 256 << 20
	// askEvery is how often it asks beyond that, in bytes.
	askEvery = 64 << 20

	chunkPages = 256
	// spareChunks bounds what Reserve takes.
	spareChunks = 16
)

// held is what levels keep in memory: chunks of memory that the garbage collector knows
// nothing of. What does not fit is written at once.
type held struct {
	on atomic.Bool
	// room says whether there is memory for more; for tests.
	room func() bool

	mu    sync.Mutex
	taken uint64 // bytes
	full  bool
	spare [][]byte
}

// Hold has the store keep in memory what is copied from now on from processes,
// until Compose: a file system that is about to be snapshotted is flushed by that,
// and what was written to it last would be paid for while everybody stands still.
// Beyond 256 MiB it takes only what the host, or the cgroup that this process is in, has to spare
// (see [Spare]).
// Shared memory is written on as it comes, because it is compared with its file.
func (s *Store) Hold() { s.held.on.Store(true) }

// Reserve has memory at hand for about so many bytes, at most 16 MiB, so that no page
// fault of ours is paid for in the barrier.
func (s *Store) Reserve(bytes uint64) {
	h := &s.held
	h.mu.Lock()
	defer h.mu.Unlock()
	for want := min(int(bytes/(chunkPages*pageSize)), spareChunks); len(h.spare) < want && h.mayTake(); {
		c, err := newChunk()
		if err != nil {
			return // it is asked for again when needed
		}
		h.spare = append(h.spare, c)
	}
}

func newChunk() ([]byte, error) {
	return unix.Mmap(-1, 0, chunkPages*int(pageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
}

// mayTake accounts for one more chunk.
func (h *held) mayTake() bool {
	if h.full {
		return false
	}
	if h.taken >= heldAnyway && h.taken%askEvery == 0 && !h.room() {
		h.full = true
		return false
	}
	h.taken += chunkPages * pageSize
	return true
}

// take returns nil where there is no more.
func (h *held) take() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.spare); n > 0 {
		c := h.spare[n-1]
		h.spare = h.spare[:n-1]
		return c
	}
	if !h.mayTake() {
		return nil
	}
	c, err := newChunk()
	if err != nil {
		h.full = true
		return nil
	}
	return c
}

func (h *held) close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := unmapAll(h.spare)
	h.spare = nil
	return err
}

func unmapAll(chunks [][]byte) (err error) {
	for _, c := range chunks {
		err = errors.Join(err, unix.Munmap(c))
	}
	return err
}

// late are the pages of a level that are in memory only.
type late struct {
	// at has, for a slot, the place of its page among all of chunks, counted from 1.
	at     []uint32
	used   uint32
	chunks [][]byte
}

func (l *late) page(place uint32) []byte {
	at := int(place-1) % chunkPages * int(pageSize)
	return l.chunks[(place-1)/chunkPages][at : at+int(pageSize)]
}

// hold keeps one page for a slot; false where it is to be written to the file.
func (l *level) hold(page []byte, slot uint64) bool {
	if slot < uint64(len(l.late.at)) && l.late.at[slot] != 0 {
		copy(l.late.page(l.late.at[slot]), page)
		return true
	}
	if l.held == nil || !l.held.on.Load() {
		return false
	}
	if int(l.late.used) == len(l.late.chunks)*chunkPages {
		c := l.held.take()
		if c == nil {
			return false
		}
		l.late.chunks = append(l.late.chunks, c)
	}
	if n := int(slot) + 1 - len(l.late.at); n > 0 {
		n = max(n, int(l.slots)-len(l.late.at))
		l.late.at = append(l.late.at, make([]uint32, n)...)
	}
	l.late.used++
	l.late.at[slot] = l.late.used
	copy(l.late.page(l.late.used), page)
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
	return s.held.close()
}

func (l *level) drain() (err error) {
	kept := l.late
	l.late = late{}
	defer func() { err = errors.Join(err, unmapAll(kept.chunks)) }()
	run := make([]byte, 0, bufferSize)
	for slot, place := range kept.at {
		if place == 0 {
			continue
		}
		run = append(run, kept.page(place)...)
		if slot+1 < len(kept.at) && kept.at[slot+1] != 0 && len(run) < bufferSize {
			continue
		}
		if err := write(l, run, uint64(slot)+1-uint64(len(run))/pageSize); err != nil {
			return err
		}
		run = run[:0]
	}
	return l.size()
}
