// SPDX-License-Identifier: Apache-2.0

package track

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Range is a stretch of a process's address space: bytes, page aligned, End excluded.
type Range struct{ Start, End uint64 }

// Size is in bytes.
func (r Range) Size() uint64 { return r.End - r.Start }

// Mapping is a stretch of memory that is not tracked, and the reason.
type Mapping struct {
	Range
	Path string // as in /proc/PID/maps, may be empty
	Why  string
}

// area is one line of /proc/PID/maps.
type area struct {
	Range
	perms  string // rwxp
	offset uint64 // in the file
	device string // of the file, major:minor in hexadecimal
	inode  uint64
	path   string
}

// Reasons for which a mapping is not tracked.
const (
	whyShared   = "shared: other processes write to it unseen"
	whyDevice   = "device memory"
	whyKernel   = "provided by the kernel"
	whyReadOnly = "read-only file without private pages"
	whyOther    = "registered with another userfaultfd"
	whyRefused  = "the kernel refuses to track it"
)

func (a area) shared() bool { return len(a.perms) == 4 && a.perms[3] == 's' }

func (a area) writable() bool { return len(a.perms) == 4 && a.perms[1] == 'w' }

// file tells private mappings of files, whose pages come from the page cache
// until they are written to. Private mappings of /dev/zero are anonymous.
func (a area) file() bool { return a.inode != 0 && !strings.HasPrefix(a.path, "/dev/zero") }

// untrackable says why a mapping is left out before the kernel is even asked;
// empty when it is not. Only private memory has all its writers in one address
// space, and only there "not written" can be believed.
func (a area) untrackable() string {
	switch {
	case strings.HasPrefix(a.path, "[vvar"), a.path == "[vdso]", a.path == "[vsyscall]", a.path == "[uprobes]", a.path == "[sigpage]":
		return whyKernel
	case a.shared():
		return whyShared
	case strings.HasPrefix(a.path, "/dev/") && !strings.HasPrefix(a.path, "/dev/zero") && !strings.HasPrefix(a.path, "/dev/shm/") && !strings.HasPrefix(a.path, "/dev/hugepages/"):
		return whyDevice
	}
	return ""
}

// readMaps reads a maps file, in address order. An empty one means that the
// address space is gone.
func readMaps(path string) ([]area, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, goneIfMissing(err)
	}
	if len(data) == 0 {
		return nil, ErrGone
	}
	return parseMaps(data)
}

// parseMaps reads the format of fs/proc/task_mmu.c, show_map_vma.
func parseMaps(data []byte) ([]area, error) {
	areas := make([]area, 0, bytes.Count(data, []byte{'\n'}))
	for line := range bytes.Lines(data) {
		a, err := parseArea(strings.TrimSuffix(string(line), "\n"))
		if err != nil {
			return nil, err
		}
		areas = append(areas, a)
	}
	return areas, nil
}

func parseArea(line string) (area, error) {
	bad := func() (area, error) { return area{}, fmt.Errorf("unexpected line in a maps file: %q", line) }
	var fields [5]string
	rest := line
	for i := range fields {
		rest = strings.TrimLeft(rest, " ")
		field, after, _ := strings.Cut(rest, " ")
		if field == "" {
			return bad()
		}
		fields[i], rest = field, after
	}
	lo, hi, ok := strings.Cut(fields[0], "-")
	if !ok {
		return bad()
	}
	var a area
	var err error
	if a.Start, err = strconv.ParseUint(lo, 16, 64); err != nil {
		return bad()
	}
	if a.End, err = strconv.ParseUint(hi, 16, 64); err != nil || a.End <= a.Start {
		return bad()
	}
	if a.perms = fields[1]; len(a.perms) != 4 {
		return bad()
	}
	if a.offset, err = strconv.ParseUint(fields[2], 16, 64); err != nil {
		return bad()
	}
	a.device = fields[3]
	if a.inode, err = strconv.ParseUint(fields[4], 10, 64); err != nil {
		return bad()
	}
	a.path = strings.TrimLeft(rest, " ")
	return a, nil
}

// split cuts r where it enters and leaves the sorted, disjoint spans and calls fn
// with each part.
func split(r Range, spans []span, fn func(part Range, inside bool) error) error {
	i, _ := slices.BinarySearchFunc(spans, r.Start, func(c span, at uint64) int {
		if c.End <= at {
			return -1
		}
		return 1
	})
	for ; r.Start < r.End; i++ {
		if i == len(spans) || spans[i].Start >= r.End {
			return fn(r, false)
		}
		if c := spans[i]; c.Start > r.Start {
			if err := fn(Range{r.Start, c.Start}, false); err != nil {
				return err
			}
			r.Start = c.Start
		}
		end := min(spans[i].End, r.End)
		if err := fn(Range{r.Start, end}, true); err != nil {
			return err
		}
		r.Start = end
	}
	return nil
}

// within reports whether all of r is in the sorted, disjoint spans.
func within(r Range, spans []span) bool {
	err := split(r, spans, func(_ Range, inside bool) error {
		if !inside {
			return errors.ErrUnsupported
		}
		return nil
	})
	return err == nil
}

// span is a stretch of private memory of one kind.
type span struct {
	Range
	file  bool // a private mapping of a file
	alone bool // (a part of) one anonymous mapping of at least Tracker.alone
}

// aloneLeast is the size in bytes from which a mapping is worth two system calls of its own.
const aloneLeast = 1 << 20

// pieces cuts it at the multiples of size, a power of two.
func (s span) pieces(size uint64) iter.Seq[Range] {
	return func(yield func(Range) bool) {
		for at := s.Start; at < s.End; {
			end := min((at|(size-1))+1, s.End)
			if !yield(Range{at, end}) {
				return
			}
			at = end
		}
	}
}

// join appends s to spans in address order, merging neighbours of one kind.
func join(spans []span, s span) []span {
	if n := len(spans); n > 0 && spans[n-1].End == s.Start && spans[n-1].file == s.file && !spans[n-1].alone && !s.alone {
		spans[n-1].End = s.End
		return spans
	}
	return append(spans, s)
}
