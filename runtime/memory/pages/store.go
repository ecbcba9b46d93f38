// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// bufferSize is what one process_vm_readv brings, in bytes: large enough for
// its cost to vanish, small enough to stay in the processor's cache.
const bufferSize = 1 << 20

// Store holds the pages of the processes of one member. It is safe for
// concurrent use; each [Process] belongs to one goroutine at a time.
type Store struct {
	dir  string
	held held
	gate *gate // nil: it need not wait
	pace atomic.Int32

	gateDir string

	mu        sync.Mutex
	processes map[int]*Process
	buffers   [][]byte
	closed    bool
}

// Option changes how a store works.
type Option func(*Store)

// NewStore makes an empty store in dir, which must not exist yet or be empty.
// It should be on the file system of the images that it is composed with:
// Compose moves its files there.
func NewStore(dir string, options ...Option) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make a page store: %w", err)
	}
	if entries, err := os.ReadDir(dir); err != nil {
		return nil, fmt.Errorf("make a page store: %w", err)
	} else if len(entries) > 0 {
		return nil, fmt.Errorf("make a page store: %s has %s in it; give an empty directory", dir, entries[0].Name())
	}
	s := &Store{dir: dir, processes: map[int]*Process{}}
	s.held.room = func() bool { return Spare() > 0 }
	for _, o := range options {
		o(s)
	}
	var err error
	if s.gate, err = openGate(s.gateDir); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	return s, nil
}

// Process returns the pages of one process. nsPid is its pid as CRIU names it
// in its images, which is the one in the container's pid namespace.
func (s *Store) Process(nsPid int) *Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.processes[nsPid]
	if p == nil {
		p = &Process{store: s, pid: nsPid}
		s.processes[nsPid] = p
	}
	return p
}

// Forget drops what the store has of a process, so that its pid in the
// container can belong to another. No Copy of it may run meanwhile.
func (s *Store) Forget(nsPid int) error {
	s.mu.Lock()
	p := s.processes[nsPid]
	delete(s.processes, nsPid)
	s.mu.Unlock()
	if p == nil {
		return nil
	}
	var errs []error
	for _, l := range p.levels() {
		errs = append(errs, os.Remove(l.path))
	}
	if err := errors.Join(append(errs, p.close())...); err != nil {
		return fmt.Errorf("forget pages of process %d: %w", nsPid, err)
	}
	return nil
}

func (s *Store) lookup(nsPid int) *Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.processes[nsPid]
}

func (s *Store) all() []*Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	pids := slices.Sorted(maps.Keys(s.processes))
	out := make([]*Process, len(pids))
	for i, pid := range pids {
		out[i] = s.processes[pid]
	}
	return out
}

// Sync makes what was copied so far durable. Done before the barrier, it leaves
// less for Compose. No Copy may run meanwhile.
func (s *Store) Sync(ctx context.Context) error {
	for _, p := range s.all() {
		for _, l := range p.levels() {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("sync the page store %s: %w", s.dir, err)
			}
			if err := unix.Fdatasync(int(l.f.Fd())); err != nil {
				return fmt.Errorf("sync the page store %s: %w", l.path, err)
			}
		}
	}
	return nil
}

// Discard closes the store and removes what is left of it, its directory too.
// After a Compose that succeeded these are only leftovers. A second call does
// nothing. No Copy may run meanwhile.
func (s *Store) Discard() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	errs := []error{s.gate.close(), s.held.close()}
	for _, p := range s.processes {
		errs = append(errs, p.close())
	}
	for _, b := range s.buffers {
		errs = append(errs, unix.Munmap(b))
	}
	s.buffers = nil
	if err := os.RemoveAll(s.dir); err != nil {
		errs = append(errs, fmt.Errorf("remove the page store: %w", err))
	}
	return errors.Join(errs...)
}

// buffer hands out a buffer that putBuffer takes back. They are mapped once,
// so that later rounds pay for no page fault of ours.
func (s *Store) buffer() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.buffers); n > 0 {
		b := s.buffers[n-1]
		s.buffers = s.buffers[:n-1]
		return b, nil
	}
	b, err := unix.Mmap(-1, 0, bufferSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map a buffer for pages: %w", err)
	}
	return b, nil
}

func (s *Store) putBuffer(b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = unix.Munmap(b)
		return
	}
	s.buffers = append(s.buffers, b)
}

// Process is the store of one process's pages. Its methods must not run
// concurrently.
type Process struct {
	store *Store
	pid   int // in the container
	// host is its pid here, and pidfd the process; set by the first Copy.
	host  int
	pidfd *os.File
	// source is what an object is read from, instead of a process.
	source io.ReaderAt
	// base is the first round, in which slots follow the addresses; later pages
	// behind its last address join it. grown takes the others as they come.
	base, grown *level
	// extra are pages first copied in the Copy under way, for grown.
	extra []extent
	// lost are pages that were given to a Copy and could not be stored, and have no
	// slot that says so. A checkpoint before this store has them out of date.
	lost []Range
}

// Pages is how many pages the store holds of this process, stale ones too.
func (p *Process) Pages() (n uint64) {
	for _, l := range p.levels() {
		n += l.slots
	}
	return n
}

func (p *Process) levels() []*level {
	out := make([]*level, 0, 2)
	for _, l := range []*level{p.base, p.grown} {
		if l != nil && l.f != nil {
			out = append(out, l)
		}
	}
	return out
}

// Missing returns the parts of clean, which is by address, that the store
// does not hold: pages that could not be read when it was their turn. In the
// barrier they can be given to Copy.
func (p *Process) Missing(clean []Range) ([]Range, error) {
	clean, err := normalize(clean)
	if err != nil {
		return nil, fmt.Errorf("clean pages of process %d: %w", p.pid, err)
	}
	_, missing := p.resolve(clean)
	return missing, nil
}

// MissingFrom is Missing for a process that was tracked without a gap since
// the barrier of the checkpoint that chain begins with (see [WithParent]): what
// that checkpoint has and this store was never given is not missing. It reads no
// file. A nil chain has nothing.
func (p *Process) MissingFrom(chain *Chain, clean []Range) ([]Range, error) {
	missing, err := p.Missing(clean)
	if err != nil {
		return nil, err
	}
	_, missing = p.inherit(missing, chain.lookup(objectOf(p.pid)))
	return missing, nil
}

// inherit divides pages that the store does not hold into those that m has as
// they are, and others. p may be nil.
func (p *Process) inherit(missing []Range, m *memory) (inherited, still []Range) {
	if m == nil {
		return nil, missing
	}
	inherited = intersect(missing, m.has)
	if p != nil {
		for _, l := range p.levels() {
			// Pages that have a slot and are missing were written since.
			if len(l.gone) > 0 {
				inherited = subtract(inherited, l.addresses())
			}
		}
		inherited = subtract(inherited, p.lost)
	}
	return inherited, subtract(missing, inherited)
}

// segment is a run of pages in one level.
type segment struct {
	Range
	level *level
	slot  uint64
}

// resolve finds where pages are; ranges are normalized.
func (p *Process) resolve(ranges []Range) (found []segment, missing []Range) {
	lost := func(r Range) {
		if n := len(missing); n > 0 && missing[n-1].End == r.Start {
			missing[n-1].End = r.End
		} else {
			missing = append(missing, r)
		}
	}
	for _, r := range ranges {
		for r.Start < r.End {
			l, slot, end := p.locate(r)
			part := Range{r.Start, end}
			r.Start = end
			if l == nil {
				lost(part)
				continue
			}
			if len(l.gone) == 0 {
				found = append(found, segment{part, l, slot})
				continue
			}
			for part.Start < part.End {
				gone, run := l.gone.has(slot), uint64(1)
				for part.Start+run*pageSize < part.End && l.gone.has(slot+run) == gone {
					run++
				}
				piece := Range{part.Start, part.Start + run*pageSize}
				if gone {
					lost(piece)
				} else {
					found = append(found, segment{piece, l, slot})
				}
				part.Start, slot = piece.End, slot+run
			}
		}
	}
	return found, missing
}

// locate says where the page at r.Start is and up to which address in r the
// answer holds; the level is nil where the page was never stored.
func (p *Process) locate(r Range) (in *level, slot, end uint64) {
	end = r.End
	for _, l := range []*level{p.base, p.grown} {
		if l == nil {
			continue
		}
		i := l.find(r.Start)
		if i == len(l.ext) {
			continue
		}
		e := l.ext[i]
		if e.addr <= r.Start {
			return l, uint64(e.slot) + (r.Start-e.addr)/pageSize, min(r.End, e.end())
		}
		end = min(end, e.addr)
	}
	return nil, 0, end
}

// String names p in errors.
func (p *Process) String() string {
	if o := objectOf(p.pid); o.Kind == Shmem {
		return o.String()
	}
	return fmt.Sprintf("process %d (%d in the container)", p.host, p.pid)
}

func (p *Process) newLevel(name string) (*level, error) {
	l, err := newLevel(filepath.Join(p.store.dir, fmt.Sprintf("%s-%d", name, p.pid)))
	if err == nil && objectOf(p.pid).Kind == Task {
		l.held = &p.store.held
	}
	return l, err
}

func (p *Process) close() error {
	errs := []error{p.base.close(), p.grown.close()}
	if p.pidfd != nil {
		errs = append(errs, p.pidfd.Close())
		p.pidfd = nil
	}
	return errors.Join(errs...)
}
