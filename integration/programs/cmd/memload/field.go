// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/programs/internal/pattern"
)

const (
	pageBytes = 4096
	pageWords = pageBytes / 8
)

// field is memory whose every page is known at any time from one number, how
// many touches there have been: each page holds pseudo-random words, which no
// compression makes smaller, and in its first word the number of the touch that
// met it last. So nothing has to be written beside the page that is touched,
// and the rate at which pages get dirty is the rate of touches.
//
// It is for one goroutine at a time.
type field struct {
	words   []uint64
	touched uint64
}

// newField maps the memory itself: Go's own would be given back to the kernel,
// and moved about, as its runtime sees fit.
func newField(bytes int) (*field, error) {
	words, err := mapWords(bytes)
	if err != nil {
		return nil, err
	}
	for i := range words {
		if i%pageWords != 0 {
			words[i] = pattern.Mix(uint64(i))
		}
	}
	// The first words are 0, no touch: every page is populated by the others.
	return &field{words: words}, nil
}

func mapWords(bytes int) ([]uint64, error) {
	m, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(m))), bytes/8), nil
}

func (f *field) pages() uint64 { return uint64(len(f.words) / pageWords) }

// page is the page that the nth touch meets. The constant keeps the order of
// touches apart from the content of pages.
func (f *field) page(n uint64) uint64 { return pattern.Mix(n^0x70ac4ed) % f.pages() }

// touch touches the next n pages, which are spread evenly over the memory.
func (f *field) touch(n uint64) {
	for range n {
		f.touched++
		f.words[f.page(f.touched)*pageWords] = f.touched
	}
}

// verify holds every byte against what the number of touches says. A page that
// came back old, zero or from elsewhere is found.
func (f *field) verify() error {
	pages := f.pages()
	last, err := mapWords(int(pages) * 8)
	if err != nil {
		return err
	}
	defer func() {
		_ = unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(last))), len(last)*8)) // ours, whole
	}()
	for n := uint64(1); n <= f.touched; n++ {
		last[f.page(n)] = n
	}
	for p := range pages {
		page := f.words[p*pageWords : (p+1)*pageWords]
		if page[0] != last[p] {
			return fmt.Errorf("memory is corrupt: page %d says that touch %d met it last, and it was touch %d", p, page[0], last[p])
		}
		for i, w := range page[1:] {
			if want := pattern.Mix(p*pageWords + uint64(i) + 1); w != want {
				return fmt.Errorf("memory is corrupt: word %d of page %d is %016x and should be %016x", i+1, p, w, want)
			}
		}
	}
	return nil
}
