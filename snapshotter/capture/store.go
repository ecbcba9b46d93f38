// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/overlay"
)

// Leases of unsealed captures: the length when a caller names none, and the longest
// one that is granted.
const (
	defaultLease = 30 * time.Second
	longestLease = time.Hour
)

// Info describes one capture.
type Info struct {
	ID     string
	State  State
	Labels map[string]string
	// Dir is ROOT/captures/ID.
	Dir string
	// StorageBytes is the size of the regular files in fs; 0 until sealed.
	StorageBytes uint64
	// UnchangedBytes is the size of the regular files that Seal left to the layers below.
	UnchangedBytes uint64
}

// Path is the directory of one part of the capture.
func (i Info) Path(p Part) string { return filepath.Join(i.Dir, string(p)) }

// Store holds all captures of one root. Its methods may be called concurrently;
// calls for the same capture wait for each other.
type Store struct {
	dir     string
	backend backend.Backend

	mu   sync.Mutex
	byID map[string]*capture
	shut bool
}

// capture is one capture; mu orders the calls for it and guards the fields.
type capture struct {
	mu     sync.Mutex
	rec    record
	dir    string
	live   backend.Capture // nil when not under way in this process
	until  time.Time       // end of the lease
	expiry *time.Timer
	took   time.Duration
	gone   bool

	// What Seal has done to fs, for a second one after an error.
	uppers  []string // that fs is being reduced against
	reduced *overlay.Delta
	torn    bool // half reduced
}

// NewStore opens the captures in root, discarding what an earlier process left
// unsealed. Recover must be called before the first Adopt.
func NewStore(ctx context.Context, root string, b backend.Backend) (*Store, error) {
	s := &Store{dir: filepath.Join(root, "captures"), backend: b, byID: map[string]*capture{}}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		dir := filepath.Join(s.dir, e.Name())
		rec, err := readRecord(dir)
		if err == nil && rec.State == Sealed {
			s.byID[rec.ID] = &capture{rec: *rec, dir: dir}
			continue
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			// Sealed or not, nobody can say: better kept than lost.
			log.G(ctx).WithError(err).Errorf("capture %s has no readable record, it is left alone: remove %s by hand", e.Name(), dir)
			continue
		}
		log.G(ctx).WithField("capture", e.Name()).Info("discarding a capture that was never sealed")
		if err := s.remove(dir); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Backend is the backend that captures.
func (s *Store) Backend() backend.Backend { return s.backend }

// Close stops all leases' timers. Unsealed captures are discarded, since nobody
// could go on with them.
func (s *Store) Close() error {
	s.mu.Lock()
	s.shut = true
	all := slices.Collect(maps.Values(s.byID))
	s.mu.Unlock()
	var errs []error
	for _, c := range all {
		c.mu.Lock()
		if !c.gone && c.rec.State != Sealed {
			errs = append(errs, s.discard(c))
		}
		c.mu.Unlock()
	}
	return errors.Join(errs...)
}

// lock returns the capture, locked.
func (s *Store) lock(id string) (*capture, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	s.mu.Lock()
	c := s.byID[id]
	s.mu.Unlock()
	if c != nil {
		c.mu.Lock()
		if !c.gone {
			return c, nil
		}
		c.mu.Unlock()
	}
	return nil, fmt.Errorf("capture %s: there is none (its lease ended, it was discarded or fully adopted): %w", id, errdefs.ErrNotFound)
}

// Open begins a capture of the directory upper. A second call with the same id and
// directory renews the lease and does nothing else.
func (s *Store) Open(ctx context.Context, id, upper string, lease time.Duration, labels map[string]string) (_ Info, err error) {
	if err := CheckID(id); err != nil {
		return Info{}, err
	}
	s.mu.Lock()
	if s.shut {
		s.mu.Unlock()
		return Info{}, fmt.Errorf("cohortd is stopping: %w", errdefs.ErrUnavailable)
	}
	c, known := s.byID[id]
	if !known {
		c = &capture{dir: filepath.Join(s.dir, id)}
		c.mu.Lock() // before anybody else can see it
		s.byID[id] = c
	}
	s.mu.Unlock()
	if known {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.gone && c.rec.State == Open && c.rec.Upper == upper {
			s.renew(c, lease)
			return c.info(), nil
		}
		return Info{}, fmt.Errorf("capture %s: the id is in use: %w", id, errdefs.ErrAlreadyExists)
	}
	defer c.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.discard(c))
		}
	}()

	c.rec = record{ID: id, State: Open, Upper: upper, Labels: labels, Created: time.Now().UTC()}
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		return Info{}, err
	}
	if err := os.Mkdir(filepath.Join(c.dir, string(Checkpoint)), 0o700); err != nil {
		return Info{}, err
	}
	if err := c.rec.write(c.dir); err != nil {
		return Info{}, err
	}
	if err := syncDir(s.dir); err != nil {
		return Info{}, err
	}
	c.live, err = s.backend.Open(ctx, upper, c.part(FS))
	if err != nil {
		return Info{}, fmt.Errorf("open capture %s: %w", id, err)
	}
	s.renew(c, lease)
	return c.info(), nil
}

// Ready brings an open capture up to date; Take is due in a moment. ctx may end it.
func (s *Store) Ready(ctx context.Context, id string) error {
	c, err := s.lock(id)
	if err != nil {
		return err
	}
	defer c.mu.Unlock()
	if c.rec.State != Open {
		return nil
	}
	if err := c.live.Ready(ctx); err != nil {
		return fmt.Errorf("make capture %s ready: %w", id, err)
	}
	return nil
}

// Take fixes the content and tells how long that took. A second call replaces what the
// first has taken: its caller knows that the content has changed. A sealed capture stays.
func (s *Store) Take(ctx context.Context, id string, lease time.Duration) (time.Duration, error) {
	c, err := s.lock(id)
	if err != nil {
		return 0, err
	}
	defer c.mu.Unlock()
	if c.rec.State == Sealed {
		return c.took, nil
	}
	begin := time.Now()
	if err := c.live.Take(ctx); err != nil {
		return 0, fmt.Errorf("take capture %s: %w", id, err)
	}
	c.took += time.Since(begin)
	c.rec.State = Taken // not written: see the package's documentation
	if lease > 0 {
		s.renew(c, lease)
	}
	return c.took, nil
}

// Seal completes the capture and makes it durable. Where uppers are given, layers of
// snapshots that were captured of the same container before, newest first, fs is left with
// only what changed since. A second call does nothing.
func (s *Store) Seal(ctx context.Context, id string, uppers ...string) (Info, error) {
	c, err := s.lock(id)
	if err != nil {
		return Info{}, err
	}
	defer c.mu.Unlock()
	switch c.rec.State {
	case Sealed:
		return c.info(), nil
	case Open:
		return Info{}, fmt.Errorf("capture %s was not taken, there is nothing to seal: %w", id, errdefs.ErrFailedPrecondition)
	}
	sealed := c.rec
	if sealed.UnchangedBytes, err = s.fill(ctx, c, uppers); err != nil {
		return Info{}, fmt.Errorf("seal capture %s: %w", id, err)
	}
	if err := removeMountPoints(c.part(FS)); err != nil {
		return Info{}, fmt.Errorf("seal capture %s: %w", id, err)
	}
	if sealed.StorageBytes, err = regularBytes(c.part(FS)); err != nil {
		return Info{}, err
	}
	// Both parts are on one file system, and its other writers' data is all that is
	// flushed needlessly.
	if err := backend.Syncfs(c.dir); err != nil {
		return Info{}, err
	}
	sealed.State = Sealed
	if err := sealed.write(c.dir); err != nil {
		return Info{}, err
	}
	c.rec = sealed
	if c.expiry != nil {
		c.expiry.Stop()
	}
	if err := c.live.Close(); err != nil {
		log.G(ctx).WithError(err).WithField("capture", id).Warn("closing a sealed capture")
	}
	c.live = nil
	return c.info(), nil
}

// Discard removes a capture in any state, and is content if there is none.
func (s *Store) Discard(id string) error {
	c, err := s.lock(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.mu.Unlock()
	return s.discard(c)
}

// Renew sets the lease of an unsealed capture; a sealed one needs none.
func (s *Store) Renew(id string, lease time.Duration) error {
	c, err := s.lock(id)
	if err != nil {
		return err
	}
	defer c.mu.Unlock()
	if c.rec.State != Sealed {
		s.renew(c, lease)
	}
	return nil
}

// List shows all captures, ordered by id.
func (s *Store) List() []Info {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.byID))
	s.mu.Unlock()
	var out []Info
	for _, c := range all {
		c.mu.Lock()
		if !c.gone {
			out = append(out, c.info())
		}
		c.mu.Unlock()
	}
	slices.SortFunc(out, func(a, b Info) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// renew sets the lease. c is locked.
func (s *Store) renew(c *capture, lease time.Duration) {
	if lease <= 0 {
		lease = defaultLease
	}
	lease = min(lease, longestLease)
	c.until = time.Now().Add(lease)
	if c.expiry != nil {
		c.expiry.Reset(lease)
		return
	}
	c.expiry = time.AfterFunc(lease, func() { s.expire(c) })
}

// expire discards a capture whose lease has ended. The timer may fire while a renewal
// is under way, so the time is looked at again under the lock.
func (s *Store) expire(c *capture) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone || c.rec.State == Sealed || time.Now().Before(c.until) {
		return
	}
	log.L.WithField("capture", c.rec.ID).Warn("the lease of the capture ended, discarding it")
	if err := s.discard(c); err != nil {
		log.L.WithError(err).WithField("capture", c.rec.ID).Error("discarding a capture")
	}
}

// discard removes c, which is locked, from the disk and from the store. It is out
// of the store also when removing fails; the rest goes at the next start.
func (s *Store) discard(c *capture) error {
	c.gone = true
	if c.expiry != nil {
		c.expiry.Stop()
	}
	var err error
	if c.live != nil {
		err = c.live.Close()
	}
	err = errors.Join(err, s.remove(c.dir))
	s.mu.Lock()
	if s.byID[filepath.Base(c.dir)] == c {
		delete(s.byID, filepath.Base(c.dir))
	}
	s.mu.Unlock()
	return err
}

// remove deletes the directory of a capture. The record goes first: what remains
// after a crash is then an unsealed capture to the next start.
func (s *Store) remove(dir string) error {
	if err := os.Remove(filepath.Join(dir, recordName)); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return err
	}
	if err := s.backend.Discard(filepath.Join(dir, string(FS))); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// criuMount is how the names of empty directories begin that CRIU makes and removes in a
// container's /tmp (criu/mount.c, get_clean_mnt). Take may fall between the two.
const criuMount = "cr-tmpfs."

func removeMountPoints(fs string) error {
	root, err := os.OpenRoot(fs) // the container decides what /tmp is
	if err != nil {
		return err
	}
	defer root.Close()
	tmp, err := root.Open("tmp")
	if err != nil {
		return nil // there is none, or it leads out of the container's files
	}
	defer tmp.Close()
	names, err := tmp.Readdirnames(-1)
	if err != nil {
		return nil // it is no directory
	}
	for _, name := range names {
		if strings.HasPrefix(name, criuMount) {
			// One that is not empty is not CRIU's.
			if err := root.Remove(filepath.Join("tmp", name)); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
				return err
			}
		}
	}
	return nil
}

func (c *capture) part(p Part) string { return filepath.Join(c.dir, string(p)) }

func (c *capture) info() Info {
	return Info{ID: filepath.Base(c.dir), State: c.rec.State, Labels: maps.Clone(c.rec.Labels), Dir: c.dir, StorageBytes: c.rec.StorageBytes, UnchangedBytes: c.rec.UnchangedBytes}
}

// regularBytes adds up the sizes of the regular files in dir, a file with several
// names once.
func regularBytes(dir string) (uint64, error) {
	var sum uint64
	linked := map[uint64]struct{}{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		if st.Nlink > 1 {
			if _, ok := linked[st.Ino]; ok {
				return nil
			}
			linked[st.Ino] = struct{}{}
		}
		sum += uint64(st.Size) //nolint:gosec // not negative
		return nil
	})
	return sum, err
}
