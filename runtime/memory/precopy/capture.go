// SPDX-License-Identifier: Apache-2.0

package precopy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/track"
)

// warmPause is the pause between two rounds while the container waits for the
// slowest member of its group.
const warmPause = 10 * time.Millisecond

// KeepWarm goes on copying in the background what the container writes, so that
// little is left whenever the freeze comes. Cool ends it.
func (s *Session) KeepWarm() {
	ctx, cancel := context.WithCancel(context.Background())
	s.warm, s.warmed = cancel, make(chan struct{})
	go func() {
		defer close(s.warmed)
		for {
			// A round that fails leaves more to CRIU, or fails again in Capture.
			_, _ = s.round(ctx)
			select {
			case <-ctx.Done():
				return
			case <-time.After(warmPause):
			}
		}
	}()
}

// Cool ends what KeepWarm began and returns when it has ended.
func (s *Session) Cool() {
	if s.warm != nil {
		s.warm()
		<-s.warmed
		s.warm = nil
	}
}

// Scan notes, for the frozen container, which pages are in the store as they are.
// It must have returned before CRIU touches the tasks: CRIU writes into their
// memory itself, and a page that it changes after it has passed over it would be
// in neither image.
func (s *Session) Scan() error {
	return s.each(func(m *member) error {
		m.clean = nil
		var list []pages.Range
		err := m.tracker.Clean(func(r track.Range) error {
			list = append(list, pages.Range(r))
			return nil
		})
		if errors.Is(err, track.ErrGone) {
			return nil
		} else if err != nil {
			return fmt.Errorf("find the clean pages of process %d: %w", m.Pid, err)
		}
		m.clean = list
		// It may have begun since to let devices write into its memory.
		if blind, err := track.Blind(m.Pid); err != nil || len(blind) > 0 {
			m.again = true
		}
		return nil
	})
}

// Complete reads pages that count as copied but could not be read when it was
// their turn. CRIU may be at work meanwhile.
func (s *Session) Complete(ctx context.Context) error {
	return s.each(func(m *member) error {
		missing, err := m.store.Missing(m.clean)
		if m.again {
			missing = m.clean
		}
		if err == nil && len(missing) > 0 {
			_, err = m.store.Copy(ctx, m.Pid, slices.Values(missing))
		}
		if err != nil {
			return fmt.Errorf("complete the memory of process %d: %w", m.Pid, err)
		}
		return nil
	})
}

func (s *Session) each(f func(*member) error) error {
	var eg errgroup.Group
	eg.SetLimit(parallel)
	for _, m := range s.members {
		eg.Go(func() error { return f(m) })
	}
	return eg.Wait()
}

// Compose makes one checkpoint of what CRIU wrote to imagesDir and of the store,
// whose files it takes.
func (s *Session) Compose(ctx context.Context, imagesDir string) (pages.Stats, error) {
	clean := map[int][]pages.Range{}
	for _, m := range s.members {
		if m.clean != nil {
			clean[m.NsPid] = m.clean
		}
	}
	// The caller makes the whole capture durable.
	return pages.Compose(ctx, imagesDir, s.store, clean, pages.WithoutSync())
}

// Stats of what was copied so far.
func (s *Session) Stats() Stats { return s.stats }

// Untrack ends the tracking: the processes run as they did before. The store stays.
func (s *Session) Untrack() error {
	s.Cool()
	var errs []error
	for _, m := range s.members {
		errs = append(errs, m.tracker.Close())
	}
	return errors.Join(errs...)
}

// Close ends the tracking and removes the store. It may be called again.
func (s *Session) Close() (err error) {
	s.once.Do(func() { err = errors.Join(s.Untrack(), s.store.Discard()) })
	return err
}
