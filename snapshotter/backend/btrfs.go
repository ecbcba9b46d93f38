// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

// flushInterval is how often dirty data is written back between Open and Take.
// The kernel's snapshot ioctl first writes back what is dirty in the subvolume
// (fs/btrfs/ioctl.c, create_snapshot), so this bounds Take by what is written in one
// interval. Measured on a loop device over ext4 with a writer of 100 MB/s: 4 ms with a
// flush just before, 20 ms without for 200 ms.
const flushInterval = 100 * time.Millisecond

// cutsDir holds the snapshots that exist between Take and Seal. None of them outlives
// the process that made it.
const cutsDir = "cuts"

// mostFiles is up to how many files and directories a capture is taken file by file: a walk
// over so many takes 3 ms on one core. More are left to a snapshot. That takes as long whatever there is, but is a commit
// of the file system: 4 to 12 ms on a quiet disk, more with several members since it waits for
// kernel threads, which stand behind what runs in the barrier (50 ms for four members on two cores),
// and for the disk's flush when that is busy (36 to 800 ms).
const mostFiles = 2048

type btrfs struct {
	root    string
	most    int // see mostFiles; negative for snapshots only
	flusher flusher

	taking sync.Mutex // held during the snapshot ioctl

	mu   sync.Mutex // guards the fields below and cut.users
	next *cut       // not begun yet, can be joined
	made int
}

// cut is one snapshot of the whole root, for all captures that asked for it before it
// began. The members of a group ask within a millisecond, and one snapshot for four takes
// 4 ms where four take 10 (measured on a loop device over ext4).
type cut struct {
	path  string
	done  chan struct{} // closed when err is set
	err   error
	users int
}

// NewBtrfs returns the backend for a root that is itself a btrfs subvolume.
// All snapshots and captures below root must be in this one subvolume. It removes what a
// process that died has left in root/cuts. A capture of few files is taken file by file.
func NewBtrfs(root string) (Backend, error) { return newBackend(root, mostFiles) }

// NewBtrfsSnapshots is NewBtrfs for captures by snapshots, however few files there are.
func NewBtrfsSnapshots(root string) (Backend, error) { return newBackend(root, -1) }

func newBackend(root string, most int) (Backend, error) {
	ok, err := uapi.IsSubvolume(root)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("%s is not a btrfs subvolume: %w", root, errdefs.ErrFailedPrecondition)
	}
	cuts := filepath.Join(root, cutsDir)
	if err := os.MkdirAll(cuts, 0o700); err != nil {
		return nil, err
	}
	left, err := os.ReadDir(cuts)
	if err != nil {
		return nil, err
	}
	for _, e := range left {
		if err := uapi.DestroySubvolume(filepath.Join(cuts, e.Name())); err != nil {
			return nil, err
		}
	}
	return &btrfs{root: root, most: most, flusher: flusher{dir: root}}, nil
}

func (b *btrfs) Name() string { return Btrfs }

func (b *btrfs) Open(ctx context.Context, src, dst string) (Capture, error) {
	rel, err := filepath.Rel(b.root, src)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return nil, fmt.Errorf("%s is not below %s: %w", src, b.root, errdefs.ErrInvalidArgument)
	}
	if err := Syncfs(b.root); err != nil {
		return nil, err
	}
	c := &btrfsCapture{b: b, rel: rel, dst: dst, stop: func() {}}
	if b.most >= 0 {
		c.tree, err = openTree(ctx, tree{src: src, dst: dst, content: clone, lastContent: cloneClean, trustTimes: true, most: b.most})
	}
	if c.tree == nil {
		if ctx.Err() != nil {
			return nil, errors.Join(ctx.Err(), err)
		}
		c.snapshots(err)
	}
	return c, nil
}

// snapshots gives up to take the capture file by file.
func (c *btrfsCapture) snapshots(why error) {
	if why != nil && !errors.Is(why, errTooMany) {
		log.L.WithError(why).WithField("directory", c.rel).Warn("capture by a snapshot")
	}
	c.tree, c.stop = nil, c.b.flusher.start()
}

func (b *btrfs) Discard(dst string) error { return os.RemoveAll(dst) }

// snapshot returns a snapshot of the root that began after the call. The caller
// releases it.
func (b *btrfs) snapshot() (*cut, error) {
	b.mu.Lock()
	c := b.next
	leads := c == nil
	if leads {
		b.made++
		c = &cut{path: filepath.Join(b.root, cutsDir, strconv.Itoa(b.made)), done: make(chan struct{})}
		b.next = c
	}
	c.users++
	b.mu.Unlock()

	if leads {
		b.taking.Lock() // meanwhile others join
		b.mu.Lock()
		b.next = nil // from here on they would come too late
		b.mu.Unlock()
		c.err = uapi.SnapshotSubvolume(b.root, c.path)
		b.taking.Unlock()
		close(c.done)
	}
	<-c.done
	if c.err != nil {
		return nil, errors.Join(fmt.Errorf("snapshot %s: %w", b.root, c.err), b.release(c))
	}
	return c, nil
}

// release gives up one use of the snapshot; the last one deletes it.
func (b *btrfs) release(c *cut) error {
	b.mu.Lock()
	c.users--
	last := c.users == 0
	b.mu.Unlock()
	if !last || c.err != nil {
		return nil //nolint:nilerr // a snapshot that was not made has nothing to delete
	}
	return uapi.DestroySubvolume(c.path)
}

type btrfsCapture struct {
	b        *btrfs
	rel, dst string
	tree     *treeCapture // nil: by a snapshot
	stop     func()       // ends the flushes ahead of a snapshot
	cut      *cut         // between Take and Seal
	older    []*cut
	taken    bool
}

// Ready implements Capture.
func (c *btrfsCapture) Ready(ctx context.Context) error {
	if c.tree == nil {
		return Syncfs(c.b.root)
	}
	err := c.tree.Ready(ctx)
	if errors.Is(err, errTooMany) {
		c.giveUp(err)
		return nil
	}
	return err
}

// giveUp goes over to a snapshot; Seal removes what is in dst.
func (c *btrfsCapture) giveUp(why error) {
	_ = c.tree.Close()
	c.snapshots(why)
}

// Take does not look at its context for a snapshot: the ioctl cannot be interrupted.
func (c *btrfsCapture) Take(ctx context.Context) error {
	if c.tree != nil {
		err := c.tree.Take(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		c.giveUp(err)
	}
	cut, err := c.b.snapshot()
	if err != nil {
		return err
	}
	if c.cut != nil {
		c.older = append(c.older, c.cut) // deleted when nobody waits
	}
	c.cut, c.taken = cut, true
	c.stop()
	return nil
}

// Seal clones the captured directory out of a snapshot of everything, into the
// one subvolume where inode numbers are unique (see the package's documentation).
func (c *btrfsCapture) Seal(ctx context.Context) error {
	if c.tree != nil {
		return c.tree.Seal(ctx)
	}
	return c.SealReduced(ctx, func(string) (map[string]struct{}, error) { return nil, nil })
}

// SealReduced implements Reducer: to clone a file takes as long as to compare five.
func (c *btrfsCapture) SealReduced(ctx context.Context, choose func(string) (map[string]struct{}, error)) error {
	if c.tree != nil {
		return fmt.Errorf("what was taken file by file is there already: %w", errdefs.ErrNotImplemented)
	}
	if !c.taken {
		return errNotTaken
	}
	if c.cut == nil {
		return nil // sealed already
	}
	t := tree{src: filepath.Join(c.cut.path, c.rel), dst: c.dst, content: clone, trustTimes: true, static: true}
	if err := os.RemoveAll(c.dst); err != nil { // of a Seal that failed
		return err
	}
	var err error
	if t.without, err = choose(t.src); err != nil {
		return err
	}
	if err := t.pass(ctx, true); err != nil {
		return fmt.Errorf("clone the captured files: %w", err)
	}
	return c.Close()
}

func (c *btrfsCapture) Close() error {
	if c.tree != nil {
		return c.tree.Close()
	}
	c.stop()
	var errs []error
	for _, cut := range append(c.older, c.cut) {
		if cut != nil {
			errs = append(errs, c.b.release(cut))
		}
	}
	c.older, c.cut = nil, nil
	return errors.Join(errs...)
}

// flusher writes back the file system of dir again and again, as long as anybody
// needs it.
type flusher struct {
	dir string

	mu    sync.Mutex
	users int
	quit  chan struct{}
}

// start begins to flush, or joins. The function that it returns ends it, and may be
// called again.
func (f *flusher) start() func() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.users++; f.users == 1 {
		f.quit = make(chan struct{})
		go f.run(f.quit)
	}
	return sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.users--; f.users == 0 {
			close(f.quit)
		}
	})
}

func (f *flusher) run(quit <-chan struct{}) {
	tick := time.NewTicker(flushInterval)
	defer tick.Stop()
	for {
		select {
		case <-quit:
			return
		case <-tick.C:
		}
		if err := Syncfs(f.dir); err != nil {
			log.L.WithError(err).Warn("flush ahead of a capture")
			return
		}
	}
}
