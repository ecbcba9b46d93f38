// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
)

const (
	benchBase  = 0x7f0000000000
	benchCount = 1 << 30 / 4096 // pages of a process of 1 GiB
)

// benchImages makes images of a process of 1 GiB, sparse but for pages that have a number of their own.
func benchImages(b *testing.B, dir string, m *pagemap, written map[uint64]uint64) {
	must(b, os.MkdirAll(dir, 0o700))
	m.pagesID = 1
	must(b, (&composer{noSync: true}).writePagemap(filepath.Join(dir, testTask.pagemapName()), m))
	writeMappings(b, dir, testPid, []*vma.VmaEntry{mapping(Range{benchBase, benchBase + benchCount*pageSize}, vmaRegular|vmaAnonPrivate, 0x22)})
	f, err := os.Create(filepath.Join(dir, pagesName(1)))
	must(b, err)
	defer f.Close()
	must(b, f.Truncate(int64(m.bytes())))
	for slot, value := range written {
		_, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, value), int64(slot*pageSize))
		must(b, err)
	}
}

// benchFull has its pages in runs of so many.
func benchFull(run uint64) *pagemap {
	m := &pagemap{}
	for i := uint64(0); i < benchCount; i += run {
		m.entries = append(m.entries, entry{benchBase + i*pageSize, run, flagPresent})
	}
	return m
}

// benchChain is a full checkpoint and n more, each with one page of a hundred changed, by chance.
func benchChain(b *testing.B, root string, n int) (dirs []string) {
	rnd := rand.New(rand.NewPCG(1, 1))
	dirs = []string{filepath.Join(root, "0")}
	benchImages(b, dirs[0], benchFull(benchCount), nil)
	for i := range n {
		own := map[uint64]bool{}
		for range benchCount / 100 {
			own[rnd.Uint64N(benchCount)] = true
		}
		m := &pagemap{}
		for page := range uint64(benchCount) {
			flags := uint64(flagParent)
			if own[page] {
				flags = flagPresent
			}
			if n := len(m.entries); n > 0 && m.entries[n-1].flags == flags {
				m.entries[n-1].nr++
			} else {
				m.entries = append(m.entries, entry{benchBase + page*pageSize, 1, flags})
			}
		}
		dir := filepath.Join(root, fmt.Sprint(i+1))
		benchImages(b, dir, m, nil)
		dirs = slices.Insert(dirs, 0, dir)
	}
	return dirs
}

// BenchmarkDedupe compares 1 GiB in the page cache with the checkpoint before.
func BenchmarkDedupe(b *testing.B) {
	changed := map[uint64]uint64{}
	rnd := rand.New(rand.NewPCG(1, 1))
	for range benchCount / 100 {
		changed[rnd.Uint64N(benchCount)] = 1
	}
	for _, test := range []struct {
		name    string
		run     uint64 // pages that are in one piece
		written map[uint64]uint64
	}{
		{"equal", benchCount, nil},
		{"1-percent-changed", benchCount, changed},
		{"in-pieces-of-a-page", 1, nil},
	} {
		b.Run(test.name, func(b *testing.B) {
			root := benchDir(b)
			before, after := filepath.Join(root, "before"), filepath.Join(root, "after")
			benchImages(b, before, benchFull(benchCount), nil)
			benchImages(b, after, benchFull(test.run), test.written)
			chain, err := OpenChain([]string{before})
			must(b, err)
			defer chain.Close()
			for _, dir := range []string{before, after} { // into the page cache
				f, err := os.Open(filepath.Join(dir, pagesName(1)))
				must(b, err)
				_, err = io.Copy(io.Discard, f)
				must(b, err)
				f.Close()
			}
			b.SetBytes(benchCount * int64(pageSize))
			b.ResetTimer()
			for i := range b.N {
				b.StopTimer()
				// Its files are replaced, never written to.
				dir := filepath.Join(root, fmt.Sprint(i))
				must(b, os.Mkdir(dir, 0o700))
				names, err := os.ReadDir(after)
				must(b, err)
				for _, n := range names {
					must(b, os.Link(filepath.Join(after, n.Name()), filepath.Join(dir, n.Name())))
				}
				b.StartTimer()
				stats, err := Dedupe(context.Background(), dir, chain)
				if err != nil || stats.OwnPages != uint64(len(test.written)) {
					b.Fatal(stats, err)
				}
			}
		})
	}
}

// BenchmarkChain opens eight increments of a process of 1 GiB, links them, and asks in the barrier what is missing.
func BenchmarkChain(b *testing.B) {
	dirs := benchChain(b, benchDir(b), 8)
	b.Run("open", func(b *testing.B) {
		for range b.N {
			c, err := OpenChain(dirs)
			must(b, err)
			must(b, c.Close())
		}
	})
	b.Run("link", func(b *testing.B) {
		root := benchDir(b)
		for i := range b.N {
			must(b, Link(filepath.Join(root, fmt.Sprint(i)), dirs))
		}
	})
	b.Run("missing", func(b *testing.B) {
		c, err := OpenChain(dirs)
		must(b, err)
		defer c.Close()
		s, err := NewStore(filepath.Join(benchDir(b), "store"))
		must(b, err)
		defer s.Discard()
		var clean []Range
		for i := uint64(0); i < benchCount; i += 100 {
			clean = append(clean, Range{benchBase + i*pageSize, benchBase + min(i+99, benchCount)*pageSize})
		}
		for b.Loop() {
			if missing, err := s.Process(testPid).MissingFrom(c, clean); err != nil || len(missing) > 0 {
				b.Fatal(missing, err)
			}
		}
	})
}
