// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"google.golang.org/protobuf/proto"
)

// reader resolves pages as criu/pagemap.c does: front to back, the pages file's
// offset counted on by what is passed over, other directories for what is in a
// parent. It goes back as little as CRIU's does.
type reader struct {
	name    string
	entries []entry
	pages   *os.File
	parent  *reader
	cur     int
	off     uint64 // of entries[cur] in pages
}

func openReader(dir string, o Object) (*reader, error) {
	m, err := readPagemap(filepath.Join(dir, o.pagemapName()))
	if err != nil {
		return nil, err
	}
	r := &reader{name: dir, entries: m.entries}
	if r.pages, err = os.Open(imagePath(dir, "pages", int(m.pagesID))); err != nil {
		return nil, err
	}
	if st, err := r.pages.Stat(); err != nil {
		return nil, err
	} else if st.Size() < int64(m.bytes()) {
		return nil, fmt.Errorf("%s is %d bytes long, its pagemap has %d", r.pages.Name(), st.Size(), m.bytes())
	}
	if _, err := os.Stat(filepath.Join(dir, parentDir, o.pagemapName())); err == nil {
		r.parent, err = openReader(filepath.Join(dir, parentDir), o)
		if err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *reader) close() {
	if r != nil {
		r.pages.Close()
		r.parent.close()
	}
}

// page reads the page at addr; false where the images have none.
func (r *reader) page(addr uint64, into []byte) (bool, error) {
	for r.cur < len(r.entries) && r.entries[r.cur].end() <= addr {
		if e := r.entries[r.cur]; e.present() {
			r.off += e.nr * pageSize
		}
		r.cur++
	}
	if r.cur == len(r.entries) || r.entries[r.cur].addr > addr {
		return false, nil
	}
	e := r.entries[r.cur]
	switch {
	case e.present():
		_, err := r.pages.ReadAt(into, int64(r.off+addr-e.addr))
		return true, err
	case e.flags&flagParent != 0 && r.parent != nil:
		ok, err := r.parent.page(addr, into)
		if err == nil && !ok {
			err = fmt.Errorf("%s: %#x is not in the parent", r.name, addr)
		}
		return ok, err
	}
	return false, fmt.Errorf("%s: %#x: flags %d and no parent", r.name, addr, e.flags)
}

// writeCRIU makes the images of one process as CRIU would: its mappings, and the pages at addrs,
// which are in order, with what content returns.
func writeCRIU(t testing.TB, dir string, pid int, maps []*vma.VmaEntry, addrs []uint64, content func(uint64) []byte) {
	t.Helper()
	writeMappings(t, dir, pid, maps)
	writePages(t, dir, Object{Task, uint64(pid)}, 7, addrs, content)
}

func writeMappings(t testing.TB, dir string, pid int, maps []*vma.VmaEntry) {
	t.Helper()
	zero := proto.Uint64(0)
	msg, err := proto.Marshal(&mm.MmEntry{
		MmStartCode: zero, MmEndCode: zero, MmStartData: zero, MmEndData: zero, MmStartStack: zero, MmStartBrk: zero,
		MmBrk: zero, MmArgStart: zero, MmArgEnd: zero, MmEnvStart: zero, MmEnvEnd: zero, ExeFileId: proto.Uint32(1), Vmas: maps,
	})
	if err != nil {
		t.Fatal(err)
	}
	image := binary.LittleEndian.AppendUint32(nil, magicCommon)
	image = binary.LittleEndian.AppendUint32(image, magicMM)
	image = binary.LittleEndian.AppendUint32(image, uint32(len(msg)))
	if err := os.WriteFile(imagePath(dir, "mm", pid), append(image, msg...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// writePages makes a pagemap and its pages file, as CRIU would.
func writePages(t testing.TB, dir string, o Object, id uint32, addrs []uint64, content func(uint64) []byte) {
	t.Helper()
	m := &pagemap{pagesID: id}
	f, err := os.OpenFile(filepath.Join(dir, pagesName(id)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	for _, a := range addrs {
		if _, err := w.Write(content(a)); err != nil {
			t.Fatal(err)
		}
		if n := len(m.entries); n > 0 && m.entries[n-1].end() == a {
			m.entries[n-1].nr++
		} else {
			m.entries = append(m.entries, entry{a, 1, flagPresent})
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := (&composer{}).writePagemap(filepath.Join(dir, o.pagemapName()), m); err != nil {
		t.Fatal(err)
	}
}

func mapping(r Range, status, flags uint32) *vma.VmaEntry {
	return &vma.VmaEntry{
		Start: proto.Uint64(r.Start), End: proto.Uint64(r.End), Pgoff: proto.Uint64(0), Shmid: proto.Uint64(0),
		Prot: proto.Uint32(3), Flags: proto.Uint32(flags), Status: proto.Uint32(status), Fd: proto.Int64(-1),
	}
}
