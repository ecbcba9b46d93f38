// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// A CRIU image is two little-endian words, then messages with their size in
// front (criu/image.c, criu/protobuf.c). A pages image is pages and nothing
// else. Values from criu/include/magic.h.
const (
	magicCommon  = 0x54564319
	magicPagemap = 0x56084025
	magicMM      = 0x57492820
)

// Flags of a pagemap entry (criu/include/pagemap.h).
const (
	flagParent  = 1 << 0
	flagPresent = 1 << 2
)

// Fields of pagemap_head and pagemap_entry (images/pagemap.proto). go-criu's
// generated code is older than CRIU's 64-bit nr_pages, so they are read and
// written here.
const (
	headPagesID    protowire.Number = 1
	entryAddr      protowire.Number = 1
	entryNrOld     protowire.Number = 2 // required, 0 when written by CRIU 4.2
	entryInParent  protowire.Number = 3 // before flags
	entryFlags     protowire.Number = 4
	entryNr        protowire.Number = 5
	maxEntrySize                    = 1 << 10
	maxMMSize                       = 64 << 20 // vm.max_map_count mappings of 100 bytes are a tenth
	maxPagemapSize                  = 1 << 30
)

// errImage classes a file that is not what CRIU writes.
var errImage = errors.New("malformed CRIU image")

// entry is one of a pagemap.
type entry struct {
	addr  uint64
	nr    uint64
	flags uint64
}

func (e entry) end() uint64 { return e.addr + e.nr*pageSize }

func (e entry) present() bool { return e.flags&flagPresent != 0 }

// pagemap is a pagemap-N.img: where the pages are, and what is in the file.
type pagemap struct {
	pagesID uint32
	entries []entry
}

// present returns the pages that the pages file holds.
func (m *pagemap) present() ([]Range, error) {
	out := make([]Range, 0, len(m.entries))
	for _, e := range m.entries {
		if e.present() {
			out = append(out, Range{e.addr, e.end()})
		}
	}
	return normalize(out)
}

// bytes is the size that the pages file must have.
func (m *pagemap) bytes() (n uint64) {
	for _, e := range m.entries {
		if e.present() {
			n += e.nr * pageSize
		}
	}
	return n
}

// appendPresent adds pages behind all others of the pages file, joined to the
// last entry where they follow on.
func (m *pagemap) appendPresent(r Range) {
	if n := len(m.entries); n > 0 {
		if last := &m.entries[n-1]; last.present() && last.end() == r.Start && last.nr+r.Pages() <= maxExtent {
			last.nr += r.Pages()
			return
		}
	}
	m.append(r, flagPresent)
}

// appendParent adds pages that are in a parent.
func (m *pagemap) appendParent(r Range) { m.append(r, flagParent) }

// append adds entries of at most maxExtent pages each.
func (m *pagemap) append(r Range, flags uint64) {
	for r.Start < r.End {
		nr := min(r.Pages(), maxExtent)
		m.entries = append(m.entries, entry{r.Start, nr, flags})
		r.Start += nr * pageSize
	}
}

type imageReader struct {
	r    *bufio.Reader
	left int64
	buf  []byte
}

func newImageReader(f *os.File, magic uint32, maxSize int64) (*imageReader, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > maxSize {
		return nil, fmt.Errorf("%d bytes, more than %d: %w", st.Size(), maxSize, errImage)
	}
	r := &imageReader{r: bufio.NewReaderSize(f, 64<<10), left: st.Size()}
	for _, want := range []uint32{magicCommon, magic} {
		if got, err := r.word(); err != nil {
			return nil, err
		} else if got != want {
			return nil, fmt.Errorf("magic %#x where %#x was due: %w", got, want, errImage)
		}
	}
	return r, nil
}

func (r *imageReader) word() (uint32, error) {
	var b [4]byte
	if _, err := io.ReadFull(r.r, b[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return 0, fmt.Errorf("truncated: %w", errImage)
		}
		return 0, err
	}
	r.left -= int64(len(b))
	return binary.LittleEndian.Uint32(b[:]), nil
}

// next returns the next message, good until the call after; io.EOF at the end.
func (r *imageReader) next(maxSize int64) ([]byte, error) {
	size, err := r.word()
	if err != nil {
		return nil, err
	}
	if int64(size) > min(maxSize, r.left) {
		return nil, fmt.Errorf("message of %d bytes: %w", size, errImage)
	}
	if uint32(cap(r.buf)) < size {
		r.buf = make([]byte, size)
	}
	r.buf = r.buf[:size]
	if _, err := io.ReadFull(r.r, r.buf); err != nil {
		return nil, fmt.Errorf("truncated: %w", errImage)
	}
	r.left -= int64(size)
	return r.buf, nil
}

// parse calls field for each number in a message of numbers.
func parse(msg []byte, field func(protowire.Number, uint64)) error {
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return fmt.Errorf("%w: %w", protowire.ParseError(n), errImage)
		}
		msg = msg[n:]
		if typ == protowire.VarintType {
			v, n := protowire.ConsumeVarint(msg)
			if n < 0 {
				return fmt.Errorf("%w: %w", protowire.ParseError(n), errImage)
			}
			field(num, v)
			msg = msg[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, msg); n < 0 {
			return fmt.Errorf("%w: %w", protowire.ParseError(n), errImage)
		}
		msg = msg[n:]
	}
	return nil
}

// readPagemap reads a pagemap image. Its entries are checked to be in order,
// apart, and of whole pages. A file that is missing is os.ErrNotExist.
func readPagemap(path string) (*pagemap, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := decodePagemap(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return m, nil
}

func decodePagemap(f *os.File) (*pagemap, error) {
	r, err := newImageReader(f, magicPagemap, maxPagemapSize)
	if err != nil {
		return nil, err
	}
	msg, err := r.next(maxEntrySize)
	if err != nil {
		return nil, err
	}
	m := &pagemap{}
	if err := parse(msg, func(n protowire.Number, v uint64) {
		if n == headPagesID {
			m.pagesID = uint32(v)
		}
	}); err != nil {
		return nil, err
	}
	var last uint64
	for {
		msg, err := r.next(maxEntrySize)
		if errors.Is(err, io.EOF) {
			return m, nil
		}
		if err != nil {
			return nil, err
		}
		e, err := decodeEntry(msg)
		if err != nil {
			return nil, err
		}
		if e.addr < last || e.addr%pageSize != 0 || e.nr == 0 || e.nr > (math.MaxUint64-e.addr)/pageSize {
			return nil, fmt.Errorf("entry of %d pages at %#x behind %#x: %w", e.nr, e.addr, last, errImage)
		}
		if len(m.entries) == maxEntries {
			return nil, fmt.Errorf("more than %d entries: %w", maxEntries, errImage)
		}
		last = e.end()
		m.entries = append(m.entries, e)
	}
}

// decodeEntry fills in what older CRIU left out, as init_compat_pagemap_entry
// in criu/pagemap.c does.
func decodeEntry(msg []byte) (e entry, err error) {
	var old uint64
	var inParent, hasFlags, hasNr bool
	err = parse(msg, func(n protowire.Number, v uint64) {
		switch n {
		case entryAddr:
			e.addr = v
		case entryNrOld:
			old = v
		case entryInParent:
			inParent = v != 0
		case entryFlags:
			e.flags, hasFlags = v, true
		case entryNr:
			e.nr, hasNr = v, true
		}
	})
	if inParent {
		e.flags |= flagParent
	} else if !hasFlags {
		e.flags = flagPresent
	}
	if !hasNr {
		e.nr = old
	}
	return e, err
}

// encode writes the image.
func (m *pagemap) encode(f io.Writer) error {
	w := bufio.NewWriterSize(f, 64<<10)
	var msg, frame []byte
	put := func() {
		frame = binary.LittleEndian.AppendUint32(frame[:0], uint32(len(msg)))
		_, _ = w.Write(frame) // bufio keeps the error for Flush
		_, _ = w.Write(msg)
	}
	number := func(n protowire.Number, v uint64) {
		msg = protowire.AppendVarint(protowire.AppendTag(msg, n, protowire.VarintType), v)
	}
	frame = binary.LittleEndian.AppendUint32(frame, magicCommon)
	frame = binary.LittleEndian.AppendUint32(frame, magicPagemap)
	_, _ = w.Write(frame)
	number(headPagesID, uint64(m.pagesID))
	put()
	for _, e := range m.entries {
		msg = msg[:0]
		number(entryAddr, e.addr)
		// Both counts, for readers that know only the older.
		number(entryNrOld, min(e.nr, math.MaxUint32))
		number(entryFlags, e.flags)
		number(entryNr, e.nr)
		put()
	}
	return w.Flush()
}

// Bits of a mapping in mm-N.img: its status (criu/include/image.h), and flags
// of mmap(2).
const (
	vmaRegular     = 1 << 0
	vmaFilePrivate = 1 << 6
	vmaAnonPrivate = 1 << 9
	vmaVVar        = 1 << 12
	vmaAIORing     = 1 << 13
	vmaShadowStack = 1 << 15
	vmaGuard       = 1 << 16
	vmaExtPlugin   = 1 << 27

	mapDroppable = 0x08
	mapHugeTLB   = 0x40000
)

// mappings are those of a process that CRIU restores pages into.
type mappings struct {
	private []Range // may come from a parent
	direct  []Range // are read from the topmost pages file only
}

// readMappings reads mm-N.img. os.ErrNotExist is a process without memory: a zombie.
func readMappings(dir string, pid int) (*mappings, error) {
	path := filepath.Join(dir, fmt.Sprintf("mm-%d.img", pid))
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := decodeMappings(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return m, nil
}

func decodeMappings(f *os.File) (*mappings, error) {
	r, err := newImageReader(f, magicMM, maxMMSize)
	if err != nil {
		return nil, err
	}
	msg, err := r.next(maxMMSize)
	if err != nil {
		return nil, err
	}
	var e mm.MmEntry
	if err := proto.Unmarshal(msg, &e); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errImage)
	}
	m := &mappings{}
	for _, v := range e.GetVmas() {
		r := Range{v.GetStart(), v.GetEnd()}
		status, flags := v.GetStatus(), v.GetFlags()
		if !r.valid() {
			return nil, fmt.Errorf("mapping %s: %w", r, errImage)
		}
		// As vma_entry_is_private in criu/include/vma.h, less what CRIU never
		// dumps (criu/mem.c, generate_vma_iovs).
		private := status&vmaRegular != 0 && status&(vmaAnonPrivate|vmaFilePrivate) != 0 ||
			status&(vmaShadowStack|vmaAIORing) != 0
		if !private || status&(vmaVVar|vmaGuard) != 0 || flags&mapDroppable != 0 {
			continue
		}
		// premap_priv_vmas in criu/mem.c passes over these, and what was not
		// mapped before is filled from the topmost file.
		if flags&mapHugeTLB != 0 || status&vmaExtPlugin != 0 {
			m.direct = append(m.direct, r)
		} else {
			m.private = append(m.private, r)
		}
	}
	if m.private, err = normalize(m.private); err != nil {
		return nil, err
	}
	m.direct, err = normalize(m.direct)
	return m, err
}
