// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/programs/internal/pattern"
)

const (
	chunkBytes = 64 << 10
	chunkWords = chunkBytes / 8
)

// heap is memory full of pseudo-random words, which no compression makes
// smaller, with a sum for each chunk that is kept right through every write.
// A page that comes back old, zero or from elsewhere breaks its chunk's sum.
type heap struct {
	words []uint64
	sums  []uint64
	rng   uint64
	next  int

	verified, writes atomic.Uint64
}

// newHeap maps the memory itself: Go's own would be given back to the kernel,
// and moved about, as its runtime sees fit.
func newHeap(bytes int) (*heap, error) {
	m, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	h := &heap{
		words: unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(m))), bytes/8),
		sums:  make([]uint64, (bytes+chunkBytes-1)/chunkBytes),
		rng:   0x5eed,
	}
	for i := range h.words {
		h.words[i] = pattern.Mix(uint64(i))
	}
	for c := range h.sums {
		h.sums[c] = h.sum(c)
	}
	return h, nil
}

func (h *heap) chunks() int { return len(h.sums) }

// weigh makes a word count for what it is and for where it is.
func weigh(i int, w uint64) uint64 { return pattern.Mix(w ^ uint64(i)*0x9e3779b97f4a7c15) }

func (h *heap) sum(c int) (s uint64) {
	from := c * chunkWords
	for i := from; i < min(from+chunkWords, len(h.words)); i++ {
		s += weigh(i, h.words[i])
	}
	return s
}

// scribble writes n random bytes at random places.
func (h *heap) scribble(n int) {
	for range n {
		h.rng++
		r := pattern.Mix(h.rng)
		i := int(r>>16) % len(h.words)
		shift := (r & 7) * 8
		old := h.words[i]
		word := old&^(0xff<<shift) | (r>>8&0xff)<<shift
		h.words[i] = word
		h.sums[i/chunkWords] += weigh(i, word) - weigh(i, old)
	}
	h.writes.Add(uint64(n))
}

// verify verifies the next n chunks, round and round.
func (h *heap) verify(n int) error {
	for range n {
		c := h.next
		h.next = (c + 1) % len(h.sums)
		if s := h.sum(c); s != h.sums[c] {
			return fmt.Errorf("memory is corrupt: the sum of bytes %d to %d is %016x and should be %016x",
				c*chunkBytes, (c+1)*chunkBytes-1, s, h.sums[c])
		}
		h.verified.Add(chunkBytes)
	}
	return nil
}
