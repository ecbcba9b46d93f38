// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// FuzzImages: whatever a file holds, it is read or refused, and what is read is in order.
func FuzzImages(f *testing.F) {
	var image bytes.Buffer
	good := &pagemap{pagesID: 3, entries: []entry{{pageSize, 2, flagPresent}, {5 * pageSize, 1 << 33, flagParent}}}
	if err := good.encode(&image); err != nil {
		f.Fatal(err)
	}
	f.Add(image.Bytes())
	f.Add(image.Bytes()[:image.Len()-3])
	huge := binary.LittleEndian.AppendUint32(bytes.Clone(image.Bytes()[:8]), 0xffffffff)
	f.Add(huge)
	mmImage := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, magicCommon), magicMM)
	f.Add(append(mmImage, 1, 0, 0, 0, 8))
	path := filepath.Join(f.TempDir(), "image")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if m, err := decodePagemap(file); err == nil {
			if !slices.IsSortedFunc(m.entries, func(a, b entry) int { return int(min(a.end()-1, b.addr)) - int(b.addr) }) {
				t.Errorf("entries not in order: %v", m.entries)
			}
		}
		if _, err := file.Seek(0, 0); err != nil {
			t.Fatal(err)
		}
		_, _ = decodeMappings(file)
	})
}

// TestPagemapsOfOtherCRIUVersionsAreRead: 32-bit counts, no flags, "in parent" as a field of its own.
func TestPagemapsOfOtherCRIUVersionsAreRead(t *testing.T) {
	number := func(msg []byte, n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(slices.Clone(msg), n, protowire.VarintType), v)
	}
	old := number(number(nil, entryAddr, pageSize), entryNrOld, 5)
	for _, test := range []struct {
		msg  []byte
		want entry
	}{
		{old, entry{pageSize, 5, flagPresent}},
		{number(old, entryInParent, 1), entry{pageSize, 5, flagParent}},
		{number(old, entryFlags, 6), entry{pageSize, 5, 6}},
		{number(number(number(nil, entryAddr, pageSize), entryNrOld, 0), entryNr, 1<<33), entry{pageSize, 1 << 33, flagPresent}},
	} {
		got, err := decodeEntry(test.msg)
		if err != nil || got != test.want {
			t.Errorf("%x: %+v, %v; want %+v", test.msg, got, err, test.want)
		}
	}
}

// TestAPagemapIsReadAsItWasWritten, and by readers that know only the older count.
func TestAPagemapIsReadAsItWasWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pagemap-1.img")
	want := &pagemap{pagesID: 42, entries: []entry{{0x1000 * pageSize, 1, flagPresent}, {0x2000 * pageSize, maxExtent, flagParent}}}
	if err := (&composer{}).writePagemap(path, want); err != nil {
		t.Fatal(err)
	}
	got, err := readPagemap(path)
	if err != nil || got.pagesID != want.pagesID || !slices.Equal(got.entries, want.entries) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := readPagemap(path + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
