// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/pace"
)

// ErrExited is returned by Copy for a process that has ended. What the store
// has of it is of no use.
var ErrExited = errors.New("the process has ended")

// Copied says what one Copy did, in pages.
type Copied struct {
	// Pages were read and are in the store.
	Pages uint64
	// New is how many of them were not there before.
	New uint64
	// Gone were not stored: unmapped since they were reported, or after an error.
	Gone uint64
}

// Add adds up rounds.
func (c *Copied) Add(o Copied) {
	c.Pages += o.Pages
	c.New += o.New
	c.Gone += o.Gone
}

// iovMax is the kernel's UIO_MAXIOV (include/uapi/linux/uio.h).
const iovMax = 1024

// Copy reads the pages of ranges from the process, running or not, into the
// store; what it has of them already is replaced. The ranges are in the order
// of addresses and do not overlap.
//
// hostPid is the process in this process's pid namespace. It is the caller's
// duty that the first Copy is given the right one; from then on a pid that
// was used again is noticed. After an execve the tracker starts anew and reports
// all there is, so that nothing has to be forgotten.
//
// A page that cannot be read is counted, and [Process.Missing] reports it: it
// was unmapped meanwhile, in which case nobody will ask for it. After an error,
// that of ctx too, the same holds for all of ranges that was not stored: the
// tracker has forgotten by then that these pages were written. ranges is walked
// to its end in any case.
func (p *Process) Copy(ctx context.Context, hostPid int, ranges iter.Seq[Range]) (Copied, error) {
	return p.run(ctx, hostPid, func(b *batch) (err error) {
		for r := range ranges {
			if e := b.accept(r); err == nil {
				err = e
			}
		}
		return err
	})
}

// CopyFrom is Copy from a tracker that takes back what was not wanted: take
// calls its argument for each range, and where that returns an error, the range
// counts as written still, as do those behind it. Pre-copy can so be ended by ctx
// in mid-round, and nothing is missing. An error of take ends the round, too; what
// it gave before is copied.
func (p *Process) CopyFrom(ctx context.Context, hostPid int, take func(accept func(Range) error) error) (Copied, error) {
	return p.run(ctx, hostPid, func(b *batch) error {
		if b.failed != nil {
			return b.failed
		}
		return take(b.accept)
	})
}

func (p *Process) run(ctx context.Context, hostPid int, feed func(*batch) error) (Copied, error) {
	b := &batch{p: p, ctx: ctx, pid: hostPid}
	b.failed = b.open()
	err := feed(b)
	// What was accepted is stored, whatever came after it.
	b.ctx = context.WithoutCancel(ctx)
	if e := b.flush(); err == nil {
		err = e
	}
	err = errors.Join(err, p.settle())
	// The pid named this process all the time if it does still: every read was from it.
	if err == nil && p.pidfd != nil && exited(p.pidfd) {
		err = ErrExited
	}
	b.close()
	if err != nil {
		err = fmt.Errorf("copy pages of %s: %w", p, err)
	}
	b.done.Gone = b.offered - b.done.Pages
	return b.done, err
}

// open prepares the process for copying.
func (b *batch) open() (err error) {
	p := b.p
	if p.source == nil && p.pidfd == nil {
		fd, err := unix.PidfdOpen(b.pid, 0)
		if errors.Is(err, unix.ESRCH) {
			return ErrExited
		}
		if err != nil {
			return fmt.Errorf("open pidfd: %w", err)
		}
		p.pidfd, p.host = os.NewFile(uintptr(fd), "pidfd"), b.pid
	}
	if p.host != b.pid {
		return fmt.Errorf("the store holds pages of process %d under this name, which has to be forgotten first", p.host)
	}
	if p.base == nil {
		if p.base, err = p.newLevel("base"); err != nil {
			return err
		}
	}
	b.buf, err = p.store.buffer()
	return err
}

// accept takes a range over. With an error, what of it is not in the store is
// known not to be.
func (b *batch) accept(r Range) error {
	if b.failed == nil && (!r.valid() || r.Start < b.last) {
		b.failed = fmt.Errorf("range %s is not in whole pages behind %#x", r, b.last)
	}
	if b.failed == nil {
		b.failed = b.ctx.Err()
	}
	if r.Start > r.End {
		return b.failed
	}
	b.last = r.End
	b.offered += r.Pages()
	for part := range b.p.parts(r) {
		if b.failed == nil {
			b.failed = b.add(part)
		} else {
			b.p.forget(part)
		}
	}
	return b.failed
}

// parts yields a range piece by piece, each in one level or in none.
func (p *Process) parts(r Range) iter.Seq[segment] {
	return func(yield func(segment) bool) {
		for r.Start < r.End {
			l, slot, end := p.locate(r)
			if !yield(segment{Range{r.Start, end}, l, slot}) {
				return
			}
			r.Start = end
		}
	}
}

// lose notes that pages without a slot were written and are not stored.
func (p *Process) lose(r Range) {
	// A refused range need not be of whole pages.
	r.Start = r.Start / pageSize * pageSize
	r.End += (pageSize - r.End%pageSize) % pageSize
	if n := len(p.lost); n > 0 && p.lost[n-1].End == r.Start {
		p.lost[n-1].End = r.End
	} else {
		p.lost = append(p.lost, r)
	}
}

// settle takes over what a Copy added.
func (p *Process) settle() (err error) {
	if p.lost, err = normalize(p.lost); err != nil {
		return err
	}
	if len(p.extra) > 0 {
		p.grown.merge(p.extra)
		p.extra = p.extra[:0]
	}
	if p.store.held.on.Load() && p.source == nil {
		return nil // drain does it
	}
	for _, l := range p.levels() {
		if err := l.size(); err != nil {
			return err
		}
	}
	return nil
}

func exited(pidfd *os.File) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n > 0
	}
}

// batch gathers segments until the buffer is full, then reads and stores them.
type batch struct {
	p    *Process
	ctx  context.Context
	pid  int
	buf  []byte
	used uint64 // bytes of buf that segs fill
	segs []segment
	iov  []unix.RemoteIovec
	mem  *os.File // /proc/PID/mem, opened when needed

	last    uint64 // end of the last range
	offered uint64 // pages
	failed  error  // why nothing more is accepted
	done    Copied
}

func (b *batch) close() {
	if b.mem != nil {
		b.mem.Close()
	}
	if b.buf != nil {
		b.p.store.putBuffer(b.buf)
	}
}

// forget notes that what there is of a segment's pages, here or in a checkpoint
// before, is out of date.
func (p *Process) forget(s segment) {
	if s.level == nil {
		p.lose(s.Range)
		return
	}
	for i := range s.Pages() {
		s.level.gone.set(s.slot + i)
	}
}

// add takes a segment, in parts where it is larger than the buffer. In case of
// an error none of what is left of it is in the store.
func (b *batch) add(s segment) error {
	for s.Start < s.End {
		if b.used == uint64(len(b.buf)) || len(b.segs) == iovMax {
			if err := b.flush(); err != nil {
				b.p.forget(s)
				return err
			}
		}
		part := s
		part.End = min(s.End, s.Start+uint64(len(b.buf))-b.used)
		b.segs = append(b.segs, part)
		b.used += part.End - part.Start
		s.slot += part.Pages()
		s.Start = part.End
	}
	return nil
}

func (b *batch) flush() error {
	if len(b.segs) == 0 {
		return nil
	}
	err := b.p.store.gate.pass(Pace(b.p.store.pace.Load()), b.read)
	if !b.p.store.held.on.Load() {
		pace.Pause(b.ctx)
	}
	if err != nil {
		for _, s := range b.segs {
			b.p.forget(s)
		}
	}
	b.segs, b.used = b.segs[:0], 0
	return err
}

// read brings the batch's pages and stores what came; of b.segs it leaves what
// did not. A page that is not there ends the kernel's walk; it is then tried
// alone, and the walk goes on behind it.
func (b *batch) read() error {
	if b.p.source != nil {
		return b.readSource()
	}
	segs, buf := b.segs, b.buf[:b.used]
	for len(segs) > 0 {
		b.iov = b.iov[:0]
		var total uint64
		for _, s := range segs {
			b.iov = append(b.iov, unix.RemoteIovec{Base: uintptr(s.Start), Len: int(s.End - s.Start)})
			total += s.End - s.Start
		}
		local := []unix.Iovec{{Base: &buf[0]}}
		local[0].SetLen(int(total))
		n, err := unix.ProcessVMReadv(b.pid, local, b.iov, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ESRCH):
			return ErrExited
		case err != nil && !errors.Is(err, unix.EFAULT):
			return fmt.Errorf("read %d bytes at %#x: %w", total, segs[0].Start, err)
		}
		whole := uint64(max(n, 0)) / pageSize * pageSize
		if segs, buf, err = b.keep(segs, buf, whole); err != nil {
			return err
		}
		if len(segs) == 0 || whole > 0 {
			continue
		}
		ok, err := b.force(segs[0].Start, buf[:pageSize])
		if err != nil {
			return err
		}
		if ok {
			segs, buf, err = b.keep(segs, buf, pageSize)
		} else {
			segs, buf = b.lose(segs, buf)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// force reads a page that process_vm_readv may not: that of a mapping without
// read permission, which has content nevertheless and which a debugger may see.
func (b *batch) force(addr uint64, page []byte) (bool, error) {
	if b.mem == nil {
		f, err := os.Open(fmt.Sprintf("/proc/%d/mem", b.pid))
		if errors.Is(err, os.ErrNotExist) {
			return false, ErrExited
		}
		if err != nil {
			return false, err
		}
		b.mem = f
	}
	for {
		n, err := unix.Pread(int(b.mem.Fd()), page, int64(addr))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n == len(page), nil
	}
}

// keep stores the first size bytes of buf, which belong to the first of segs,
// and returns what is left of both. The segments themselves are cut.
func (b *batch) keep(segs []segment, buf []byte, size uint64) ([]segment, []byte, error) {
	for size > 0 {
		s := &segs[0]
		part := min(size, s.End-s.Start)
		if err := b.store(*s, buf[:part]); err != nil {
			return nil, nil, err
		}
		s.Start += part
		s.slot += part / pageSize
		if s.Start == s.End {
			segs = segs[1:]
		}
		buf, size = buf[part:], size-part
	}
	return segs, buf, nil
}

// lose gives the first page up.
func (b *batch) lose(segs []segment, buf []byte) ([]segment, []byte) {
	s := &segs[0]
	if s.level != nil {
		s.level.gone.set(s.slot)
	} else {
		b.p.lose(Range{s.Start, s.Start + pageSize})
	}
	s.Start += pageSize
	s.slot++
	if s.Start == s.End {
		segs = segs[1:]
	}
	return segs, buf[pageSize:]
}

// store writes pages to their slots, or to new ones.
func (b *batch) store(s segment, data []byte) error {
	p, nr := b.p, uint64(len(data))/pageSize
	b.done.Pages += nr
	if s.level != nil {
		if err := write(s.level, data, s.slot); err != nil {
			return err
		}
		s.level.gone.clear(s.slot, nr)
		return nil
	}
	b.done.New += nr
	l := p.base
	if s.Start < p.base.end() {
		if p.grown == nil {
			g, err := p.newLevel("grown")
			if err != nil {
				return err
			}
			p.grown = g
		}
		l = p.grown
	}
	slot, err := l.take(nr)
	if err != nil {
		return err
	}
	if err := writeFresh(l, data, slot); err != nil {
		// Slots are used without gaps, and unused ones are empty.
		l.slots = slot
		return errors.Join(err, l.size())
	}
	if l == p.base {
		l.ext = appendExtent(l.ext, s.Start, slot, nr)
	} else {
		p.extra = appendExtent(p.extra, s.Start, slot, nr)
	}
	return nil
}

// write puts data at a slot.
func write(l *level, data []byte, slot uint64) error {
	for len(data) > 0 && l.hold(data[:pageSize], slot) {
		data, slot = data[pageSize:], slot+1
	}
	if len(data) == 0 {
		return nil
	}
	if l.late.used > 0 {
		// No more room: page by page, since some of these may be in memory.
		for ; len(data) > 0; data, slot = data[pageSize:], slot+1 {
			if l.hold(data[:pageSize], slot) {
				continue
			}
			if _, err := l.f.WriteAt(data[:pageSize], int64(slot*pageSize)); err != nil {
				return fmt.Errorf("write to the page store: %w", err)
			}
		}
		return nil
	}
	if _, err := l.f.WriteAt(data, int64(slot*pageSize)); err != nil {
		return fmt.Errorf("write to the page store: %w", err)
	}
	return nil
}

// writeFresh is write for slots that are still a hole: runs of zero pages stay
// one, which large heaps are full of. Short runs are written, to keep the file
// in one piece.
func writeFresh(l *level, data []byte, slot uint64) error {
	const run = 8
	size := int(pageSize)
	from := 0 // data[from:at] is still to be written
	for at := 0; at < len(data); {
		end := at
		for end < len(data) && isZero(data[end:end+size]) {
			end += size
		}
		if end-at < run*size {
			at = end + size
			continue
		}
		if at > from {
			if err := write(l, data[from:at], slot+uint64(from/size)); err != nil {
				return err
			}
		}
		from, at = end, end
	}
	if from < len(data) {
		return write(l, data[from:], slot+uint64(from/size))
	}
	return nil
}

func isZero(page []byte) bool {
	for len(page) >= 8 {
		if binary.NativeEndian.Uint64(page) != 0 {
			return false
		}
		page = page[8:]
	}
	return true
}
