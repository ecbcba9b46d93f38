// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/track"
)

const (
	// watchLeast is how much data, in bytes, an object must have for its writers to be
	// watched; less is compared as fast.
	watchLeast = 8 << 20
	// maxTables bounds the page tables, in bytes, that watching all mappings of all
	// objects fills: eight bytes for each page.
	maxTables = 64 << 20
)

// Writer is a process of the container, and what tells its writes.
type Writer struct {
	Pid, NsPid int
	// Tracker is nil for one that could not be tracked.
	Tracker *track.Tracker
}

// watch knows who can write to anonymous shared memory. Nobody gets at such memory
// but by being forked from one who has it, and nobody writes to it but through a
// mapping. So it is known what was written where every process that maps it is
// tracked, and nothing happened that page tables do not tell: no process was born
// or has ended, no mapping came, went or moved. If anything did, the object is in
// doubt, and all of it is compared. What was punched out (MADV_REMOVE) page tables do
// not tell either; see witnesses.
//
// One thing it cannot see: a mapping that a process duplicates by mremap(2) with an
// old size of 0, writes to, and unmaps again, all between two looks.
type watch struct {
	births    *births
	device    string
	tracked   map[int]*track.Tracker
	strangers map[int]bool // processes without a tracker
	objects   map[uint64]*watched
	doubt     bool // about all, at this look
}

// watched is what is known of an object since the last look.
type watched struct {
	mappings []mapping
	known    bool // there was a look before, after which nothing was unknown
}

type mapping struct {
	pid int
	track.SharedMapping
}

// startWatch returns nil where nothing is worth it, or possible.
func startWatch(dev uint64, writers []Writer, objects map[uint64]*object) (*watch, error) {
	w := &watch{
		device:  deviceName(dev),
		tracked: map[int]*track.Tracker{}, strangers: map[int]bool{}, objects: map[uint64]*watched{},
	}
	for ino, o := range objects {
		if o.anonymous && bytesOf(o.extents) >= watchLeast {
			w.objects[ino] = &watched{}
		}
	}
	// The init of a pid namespace cannot have siblings made by CLONE_PARENT, whose
	// parent would be a process that is none of the container's.
	if len(w.objects) == 0 || !slices.ContainsFunc(writers, func(p Writer) bool { return p.NsPid == 1 }) {
		return nil, nil
	}
	known := map[int]bool{}
	for _, p := range writers {
		known[p.Pid] = true
		if p.Tracker != nil {
			w.tracked[p.Pid] = p.Tracker
		}
	}
	var err error
	if w.births, err = listen(); err != nil {
		return nil, err
	}
	if err := descendants(known); err != nil {
		return nil, errors.Join(err, w.births.close())
	}
	for pid := range known {
		if w.tracked[pid] == nil {
			w.strangers[pid] = true
		}
	}
	return w, nil
}

// news takes in who was born and who has ended.
func (w *watch) news() error {
	return w.births.drain(func(parent, child int) {
		if w.tracked[parent] != nil || w.strangers[parent] {
			w.strangers[child] = true
			w.doubt = true
		}
	})
}

// look returns for each watched object where it may have been written to since the
// last look, by offset; an object that is not in the result is in doubt. Where the processes
// are frozen it changes nothing; else it begins anew to note writes: what is
// written from then on is in the result of the next look.
func (w *watch) look(frozen bool) (map[uint64][]pages.Range, error) {
	w.doubt = false
	if err := w.news(); err != nil {
		return nil, err
	}
	now := map[uint64][]mapping{}
	for pid, t := range w.tracked {
		list, err := t.SharedMappings(w.device)
		if errors.Is(err, track.ErrGone) || errors.Is(err, track.ErrExec) {
			// What it wrote last is not known.
			delete(w.tracked, pid)
			w.strangers[pid] = true
			w.doubt = true
			continue
		} else if err != nil {
			return nil, err
		}
		for _, m := range list {
			now[m.Inode] = append(now[m.Inode], mapping{pid, m})
		}
	}
	unsure, err := w.mappedByStrangers()
	if err != nil {
		return nil, err
	}
	var tables uint64
	out := map[uint64][]pages.Range{}
	for ino, o := range w.objects {
		list := now[ino]
		slices.SortFunc(list, func(a, b mapping) int {
			if a.pid != b.pid {
				return a.pid - b.pid
			}
			return int(int64(a.Start) - int64(b.Start))
		})
		for _, m := range list {
			tables += m.Size() / pageSize * 8
		}
		if tables > maxTables {
			o.known = false
			continue
		}
		sure := o.known && !w.doubt && !unsure[ino] && slices.Equal(list, o.mappings)
		written, ok := w.written(list, sure, frozen)
		if sure && ok {
			out[ino] = written
		}
		o.mappings, o.known = list, ok && !unsure[ino]
	}
	return out, nil
}

// written returns what was not untouched, and protects it again.
func (w *watch) written(list []mapping, sure, frozen bool) (out []pages.Range, ok bool) {
	for _, m := range list {
		t := w.tracked[m.pid]
		if !frozen {
			fresh, err := t.WatchShared(m.Range)
			if err != nil {
				return nil, false
			}
			sure = sure && !fresh
		}
		at := m.Start
		var touched []track.Range
		note := func(r track.Range) error {
			if at < r.Start {
				touched = append(touched, track.Range{Start: at, End: r.Start})
			}
			at = r.End
			return nil
		}
		if sure {
			if err := t.Untouched(m.Range, note); err != nil {
				return nil, false
			}
		}
		_ = note(track.Range{Start: m.End, End: m.End})
		if !frozen {
			if err := t.Protect(touched); err != nil {
				return nil, false
			}
		}
		for _, r := range touched {
			out = append(out, pages.Range{Start: r.Start - m.Start + m.Offset, End: r.End - m.Start + m.Offset})
		}
	}
	return out, sure || !frozen
}

// mappedByStrangers says which objects processes map whose writes nobody tells,
// and forgets those that have ended.
func (w *watch) mappedByStrangers() (map[uint64]bool, error) {
	out := map[uint64]bool{}
	for _, pid := range slices.Collect(maps.Keys(w.strangers)) {
		err := eachMapping(pid, w.device, func(ino uint64, _, _ string) error {
			out[ino] = true
			return nil
		})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			// It was there at the last look, or born since: then there is doubt already.
			w.doubt = true
			delete(w.strangers, pid)
		} else if err != nil {
			return nil, fmt.Errorf("read the mappings of process %d: %w", pid, err)
		}
	}
	return out, nil
}

// forget puts all objects in doubt until the look after the next.
func (w *watch) forget() {
	if w == nil {
		return
	}
	for _, o := range w.objects {
		o.known = false
	}
}

func (w *watch) close() error {
	if w == nil {
		return nil
	}
	return w.births.close()
}
