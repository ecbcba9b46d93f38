// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
)

const (
	// least is how much data, in bytes, an object must have to be worth a copy of its own.
	least = 256 << 10
	// bufferSize is what is read at once, in bytes: it stays in the processor's cache
	// until it has been compared.
	bufferSize = 256 << 10
	// jobSize is what one worker compares before it takes up more, in bytes.
	jobSize = 4 << 20
	// workers is how many compare at once in the barrier.
	workers = 4
	// arenaSize is the memory made ready for what is taken in the barrier, in bytes;
	// what does not fit there is allocated when it is found.
	arenaSize = 16 << 20
	// idle is how many times as long as a look at all objects took it waits before the
	// next, so that a container that waits for others is not slowed down.
	idle = 10
)

// Session copies the shared memory of one container. Its methods are called one at
// a time.
type Session struct {
	store *pages.Store
	finding
	watch *watch    // nil: nobody tells what was written
	next  time.Time // no round before

	buffers [][]byte
	arena   []byte
	mu      sync.Mutex // of arena's rest and held pieces, while workers run
	rest    []byte

	held uint64 // bytes that the last Take kept
	// compared is how many bytes it read for that.
	compared uint64
	// unwatched is why there is no watch, if that has a reason.
	unwatched error
	stats     Stats
}

// Stats tell what became of the shared memory, in bytes.
type Stats struct {
	// Precopied were in the store when the barrier came.
	Precopied uint64
	// Held were taken in the barrier, because they had changed since.
	Held uint64
	// Criu were dumped by CRIU, in the barrier.
	Criu uint64
	// Compared were read in the barrier to find what had changed.
	Compared uint64
	// Why has a reason for each object that is in Criu.
	Why []string
}

// Start finds the shared memory of the processes and copies it into the store,
// while they run.
//
// Writers are all processes of the container. Their trackers are used between the
// calls of Session's methods only; they may be closed after Scan.
func Start(ctx context.Context, writers []Writer, store *pages.Store) (_ *Session, err error) {
	dev, err := internal()
	if err != nil {
		return nil, err
	}
	s := &Session{store: store, finding: finding{dev: dev, objects: map[uint64]*object{}, sysv: map[uint64]uint64{}}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	pids := make([]int, len(writers))
	for i, w := range writers {
		pids[i] = w.Pid
	}
	if err := s.find(pids); err != nil {
		return nil, err
	}
	for ino, o := range s.objects {
		if o.extents, err = data(o.file); err != nil {
			return nil, o.failed(err)
		}
		// The id of a System V segment is its inode number: the images of the two would
		// have one name.
		if _, twice := s.sysv[ino]; twice || bytesOf(o.extents) < least {
			o.file.Close()
			delete(s.objects, ino)
			continue
		}
		o.store = store.Shared(uint32(ino))
	}
	// Without it, all is compared.
	s.watch, s.unwatched = startWatch(dev, writers, s.objects)
	return s, s.begin(ctx)
}

// StartFiles copies files into a store of their own, while others write to them.
// It takes the files, which are of one file system, also when it fails. They are
// not CRIU's: of the methods Skip and Compose are of no use for them, and Write is.
func StartFiles(ctx context.Context, files []*os.File, store *pages.Store) (_ *Session, err error) {
	s := &Session{store: store, finding: finding{objects: map[uint64]*object{}}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	for i, f := range files {
		var st unix.Stat_t
		err = errors.Join(err, unix.Fstat(int(f.Fd()), &st))
		if s.objects[st.Ino] != nil {
			err = errors.Join(err, f.Close()) // two names of one
			continue
		}
		s.objects[st.Ino] = &object{ino: st.Ino, file: f, store: store.Shared(uint32(i))}
	}
	if err != nil {
		return nil, err
	}
	return s, s.begin(ctx)
}

// begin makes the memory of the barrier ready, and the first copy.
func (s *Session) begin(ctx context.Context) (err error) {
	if len(s.objects) == 0 {
		return nil
	}
	for range workers {
		b, err := anonymous(bufferSize)
		if err != nil {
			return err
		}
		s.buffers = append(s.buffers, b)
	}
	if s.arena, err = anonymous(arenaSize); err != nil {
		return err
	}
	_, err = s.Round(ctx)
	// How long the first copy took says nothing of what a look costs, and while it was
	// made much was written.
	s.next = time.Time{}
	return err
}

// anonymous returns memory that is there already: no page fault in the barrier.
func anonymous(size int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	return b, nil
}

// Round looks at all objects and copies what has changed, while the processes
// run. It does nothing where the last one was but now.
func (s *Session) Round(ctx context.Context) (copied uint64, err error) {
	begin := time.Now()
	if begin.Before(s.next) || len(s.objects) == 0 {
		return 0, nil
	}
	written := s.look(false)
	for _, o := range s.sorted() {
		suspects, sure := written[o.ino]
		n, err := o.copy(ctx, s.buffers[0], sure, suspects, s.watch != nil)
		copied += n
		if err != nil {
			// What the look has told is not told again.
			s.watch.forget()
			return copied, err
		}
	}
	s.next = time.Now().Add(idle * time.Since(begin))
	return copied, nil
}

// look asks the watch, and does without it from its first error on.
func (s *Session) look(frozen bool) map[uint64][]pages.Range {
	if s.watch == nil {
		return nil
	}
	written, err := s.watch.look(frozen)
	if err != nil {
		s.unwatched = errors.Join(err, s.watch.close())
		s.watch = nil
	}
	return written
}

// Scan finds out what Take need not look at. The processes are frozen; CRIU may be at
// work, which writes to none of these objects. Without it, or if the page tables of a process do not tell all of its
// writes any more (blind), Take looks at everything.
func (s *Session) Scan(blind bool) {
	if blind {
		s.watch.forget()
	}
	written := s.look(true)
	for ino, o := range s.objects {
		o.suspects, o.sure = written[ino]
	}
}

func (s *Session) sorted() []*object {
	return slices.SortedFunc(maps.Values(s.objects), func(a, b *object) int { return cmp.Compare(a.ino, b.ino) })
}

// Skip tells the preload library of CRIU (contrib/criu-preload,
// COHORT_CRIU_SKIP_SHMEM) which objects it must find empty. All of them are taken
// in the barrier, whatever happens to them until then.
func (s *Session) Skip() string {
	var list []string
	for _, o := range s.sorted() {
		list = append(list, fmt.Sprintf("%d:%d", s.dev, o.ino))
	}
	return strings.Join(list, ",")
}

// job is a stretch of an object to compare, or to see that nothing was punched out.
type job struct {
	o       *object
	r       pages.Range
	witness bool
}

func cut(jobs []job, o *object, ranges []pages.Range, witness bool) []job {
	for _, r := range ranges {
		for at := r.Start; at < r.End; at += jobSize {
			jobs = append(jobs, job{o, pages.Range{Start: at, End: min(r.End, at+jobSize)}, witness})
		}
	}
	return jobs
}

// Take compares all objects with their copies, but what Scan has found to be
// untouched, and keeps in memory what differs.
// The processes are frozen; CRIU, which changes none of these objects, may be at
// work meanwhile.
func (s *Session) Take(ctx context.Context) error {
	s.rest, s.held, s.compared = s.arena, 0, 0
	objects := s.sorted()
	for len(objects) > 0 {
		var jobs []job
		for _, o := range objects {
			var look []pages.Range
			var err error
			o.held, o.punched = nil, atomic.Bool{}
			if o.clean, look, err = o.current(o.sure, o.suspects); err != nil {
				return o.failed(err)
			}
			s.compared += bytesOf(look)
			jobs = cut(jobs, o, look, false)
			if o.sure {
				jobs = cut(jobs, o, pages.Without(o.clean, look), true)
			}
			o.sure = false
		}
		if err := s.work(ctx, jobs); err != nil {
			return err
		}
		// Once more, without believing anything.
		objects = slices.DeleteFunc(objects, func(o *object) bool { return !o.punched.Load() })
	}
	return nil
}

func (s *Session) work(ctx context.Context, jobs []job) error {
	queue := make(chan job, len(jobs))
	for _, j := range jobs {
		queue <- j
	}
	close(queue)
	eg, ctx := errgroup.WithContext(ctx)
	for _, buf := range s.buffers[:min(len(jobs), len(s.buffers))] {
		eg.Go(func() error {
			for j := range queue {
				var err error
				if j.witness {
					err = j.o.checkWitnesses(j.r)
				} else {
					err = s.compare(ctx, j, buf)
				}
				if err != nil {
					return j.o.failed(err)
				}
			}
			return nil
		})
	}
	return eg.Wait()
}

func (s *Session) compare(ctx context.Context, j job, buf []byte) error {
	var end uint64
	err := j.o.read(j.r, buf, func(at uint64, data []byte) error {
		end = at + uint64(len(data))
		j.o.store.Changed(at, data, func(r pages.Range) {
			s.hold(j.o, r.Start, data[r.Start-at:r.End-at])
		})
		return ctx.Err()
	})
	if err == nil && end < j.r.End {
		err = fmt.Errorf("it ended at %d, before %d, while its processes were frozen: does a process outside of the container use it?", end, j.r.End)
	}
	return err
}

// hold keeps a copy of data.
func (s *Session) hold(o *object, off uint64, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var mine []byte
	if len(s.rest) >= len(data) {
		mine, s.rest = s.rest[:len(data):len(data)], s.rest[len(data):]
	} else {
		mine = make([]byte, len(data))
	}
	copy(mine, data)
	o.held = append(o.held, piece{off, mine})
	s.held += uint64(len(mine))
}

// Compose completes the store, once the processes run again, and returns what
// pages.Compose needs to know of the objects. imagesDir is as CRIU has left it.
func (s *Session) Compose(ctx context.Context, imagesDir string) (map[int][]pages.Range, error) {
	if err := s.account(imagesDir); err != nil {
		return nil, err
	}
	clean := map[int][]pages.Range{}
	for _, o := range s.sorted() {
		if err := o.settle(ctx); err != nil {
			return nil, err
		}
		clean[pages.ObjectKey(uint32(o.ino))] = o.clean
	}
	return clean, nil
}

// Held is how many bytes the last Take kept because they had changed, of how many
// that have data.
func (s *Session) Held() (held, data uint64) {
	for _, o := range s.objects {
		data += bytesOf(o.clean)
	}
	return s.held, data
}

// Has says whether a file, by its inode number, is among those of StartFiles.
func (s *Session) Has(ino uint64) bool { return s.objects[ino] != nil }

// Write writes the content of a file as it was at the last Take, size bytes of it.
// What is behind its data is zeros.
func (s *Session) Write(ctx context.Context, w io.Writer, ino, size uint64) error {
	o := s.objects[ino]
	err := o.settle(ctx)
	if err == nil {
		err = o.store.Map()
	}
	if err != nil {
		return err
	}
	at := uint64(0)
	put := func(data []byte) error {
		data = data[:min(uint64(len(data)), size-at)]
		at += uint64(len(data))
		_, err := w.Write(data)
		return err
	}
	zeros := make([]byte, bufferSize)
	fill := func(end uint64) (err error) {
		for at < min(end, size) && err == nil {
			err = put(zeros[:min(end-at, uint64(len(zeros)))])
		}
		return err
	}
	for _, r := range o.clean {
		err := fill(r.Start)
		if err == nil {
			err = o.store.View(r, put)
		}
		if err != nil {
			return err
		}
	}
	return fill(size)
}

// Close lets go of the objects. The store stays. It may be called again.
func (s *Session) Close() error {
	errs := []error{s.watch.close()}
	s.watch = nil
	for _, o := range s.objects {
		errs = append(errs, o.unmap(), o.file.Close())
	}
	s.objects = nil
	for _, b := range append(s.buffers, s.arena) {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	s.buffers, s.arena, s.rest = nil, nil, nil
	return errors.Join(errs...)
}
