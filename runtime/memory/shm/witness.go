// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
)

// witnesses find pages of anonymous memory that were punched out and perhaps read
// since, which no page table tells. Such a page is zeros. So for each page there
// is one word of the copy that is not zero, and in the barrier it is looked at
// whether the memory has it, too: one word of each page instead of all. A page of
// the copy that is all zeros needs no witness.
type witnesses struct {
	view []byte   // of the object
	word []uint16 // by page: which word of it, or none
}

const (
	wordSize  = 8
	noWitness = 0xffff
)

// call finds the witnesses of ranges that were copied just now.
func (o *object) call(ranges []pages.Range) error {
	if o.view == nil {
		fi, err := o.file.Stat()
		if err != nil {
			return err
		}
		// Nobody can change the size of anonymous memory, so that it can be read through
		// a mapping without fear.
		size := int(fi.Size()) / int(pageSize) * int(pageSize)
		if o.view, err = unix.Mmap(int(o.file.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED); err != nil {
			return fmt.Errorf("map %d bytes: %w", size, err)
		}
		o.word = make([]uint16, size/int(pageSize))
	}
	for _, r := range ranges {
		at := r.Start
		err := o.store.View(r, func(data []byte) error {
			for ; len(data) > 0; data, at = data[pageSize:], at+pageSize {
				o.word[at/pageSize] = firstWord(data[:pageSize])
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func firstWord(page []byte) uint16 {
	for i := 0; i < len(page); i += wordSize {
		if binary.NativeEndian.Uint64(page[i:]) != 0 {
			return uint16(i / wordSize)
		}
	}
	return noWitness
}

// checkWitnesses sets punched if a page in r is not what was copied. The processes
// are frozen, and r has no hole, which reading would fill.
func (o *object) checkWitnesses(r pages.Range) error {
	if o.view == nil || r.End > uint64(len(o.view)) {
		o.punched.Store(true)
		return nil
	}
	at := r.Start
	return o.store.View(r, func(kept []byte) error {
		for ; len(kept) > 0; kept, at = kept[pageSize:], at+pageSize {
			w := o.word[at/pageSize]
			if w == noWitness {
				continue
			}
			i := uint64(w) * wordSize
			if binary.NativeEndian.Uint64(kept[i:]) != binary.NativeEndian.Uint64(o.view[at+i:]) {
				o.punched.Store(true)
				return nil
			}
		}
		return nil
	})
}

func (o *object) unmap() error {
	if o.view == nil {
		return nil
	}
	err := unix.Munmap(o.view)
	o.view = nil
	return os.NewSyscallError("munmap", err)
}
