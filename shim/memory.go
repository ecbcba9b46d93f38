// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/freezer"
	"github.com/cohort-project/cohort/runtime/memory/engine"
	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/precopy"
)

// Memory engines, as results name them.
const (
	engineWP   = string(engine.WPAsync)
	engineFull = string(engine.Full)
)

// How it was found out what did not change since the parent epoch, as results
// name it.
const (
	incrementTracking = "tracking"
	incrementContent  = "content"
)

// sprintTime is how long a member copies without a pause before it freezes, where
// the coordinator has named no time at which all members do.
const sprintTime = 50 * time.Millisecond

// longestSprint bounds what a coordinator can ask for.
const longestSprint = time.Second

// memory takes a container's memory: by pre-copy, or by leaving it all to CRIU.
type memory struct {
	session *precopy.Session // nil: left to CRIU
	soft    *softDirty       // nil: not copied by CRIU beforehand either
	why     string
	// parent is the epoch that this one stores its changes against; nil for a
	// full checkpoint, and fullWhy says why where one was named.
	parent  *parentEpoch
	fullWhy string
	// keep leaves the tracking on when the epoch is sealed.
	keep bool
}

// parentEpoch is a checkpoint that another one builds on.
type parentEpoch struct {
	epoch  string
	number uint64
	memory *pages.Chain
	// length is how many epochs there are, the parent and those it builds on.
	length int
	uppers []string
}

// openParent opens what a request names as parent. One that cannot be used makes
// the checkpoint a full one, which is no failure.
func openParent(p *memberAPI.Parent) (*parentEpoch, error) {
	if p == nil {
		return nil, nil
	}
	var dirs []string
	for _, d := range p.Checkpoints {
		dirs = append(dirs, filepath.Join(d, oci.ImagesDir))
	}
	chain, err := pages.OpenChain(dirs)
	if err != nil {
		return nil, fmt.Errorf("the memory of epoch %d: %w", p.Number, err)
	}
	return &parentEpoch{epoch: p.Epoch, number: p.Number, memory: chain, length: len(p.Checkpoints), uppers: p.Uppers}, nil
}

// startMemory begins to pre-copy the container's processes, for as long as that
// pays. Where the kernel or a process does not allow it CRIU dumps everything:
// slower, but right. It takes over kept.
func startMemory(ctx context.Context, dir string, init int, fz *freezer.Freezer, r *memberAPI.PrepareRequest, c *container, choice engine.Choice) (_ *memory, err error) {
	m := &memory{keep: r.KeepTracking}
	if m.parent, err = openParent(r.Parent); err != nil {
		log.G(ctx).WithError(err).WithField("id", c.id).Warn("the checkpoint will be a full one")
		m.fullWhy = err.Error()
	}
	kept := c.takeKept(m.parent)
	if choice.Engine != engine.WPAsync {
		m.why = choice.Why
		return m, kept.Close()
	}
	list := func() ([]precopy.Process, error) {
		pids, err := fz.Tasks()
		if err != nil {
			return nil, err
		}
		inTree := descendants(init, pids)
		var list []precopy.Process
		for _, p := range pids {
			if !inTree[p] {
				continue
			}
			if proc, err := readProcess(p); err == nil {
				list = append(list, precopy.Process{Pid: p, NsPid: int(proc.NsPid)})
			}
		}
		return list, nil
	}
	o := precopy.Options{Kept: kept}
	if m.parent != nil {
		o.Parent = m.parent.memory
	}
	if m.session, err = precopy.Start(ctx, dir, list, o); err != nil {
		if ctx.Err() != nil {
			return nil, errors.Join(ctx.Err(), m.close())
		}
		m.why = err.Error()
	}
	return m, nil
}

// skipShared lists the shared memory that CRIU leaves out.
func (m *memory) skipShared() string {
	if m.session == nil {
		return ""
	}
	return m.session.SkipShared()
}

// isSmall tells whether what CRIU will dump of the memory is little enough to be kept
// in memory until the container runs again.
func (m *memory) isSmall() bool { return m.session != nil && m.session.Stats().Untracked == 0 }

// catchUp copies what was written since startMemory, when nothing else is left to prepare.
func (m *memory) catchUp(ctx context.Context) error {
	if m.session == nil {
		return nil
	}
	return m.session.CatchUp(ctx)
}

func (m *memory) keepWarm() {
	if m.session != nil {
		m.session.KeepWarm()
	}
}

// sprint comes right before the freeze.
func (m *memory) sprint(ctx context.Context, d time.Duration) {
	if m.session != nil {
		m.session.Sprint(ctx, d)
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// rearm begins to note the writes that come after the cut; the container is
// frozen and CRIU is done with its memory.
func (m *memory) rearm(ctx context.Context) error {
	if m.session == nil || !m.keep {
		return nil
	}
	return m.session.Rearm(ctx)
}

// scan copies what is left and notes what is good of the copies; the container is frozen,
// CRIU has not touched it. It returns the processes of which CRIU is to dump only what was written.
func (m *memory) scan(ctx context.Context) ([]int, error) {
	if m.session == nil {
		return nil, nil
	}
	err := m.session.Scan(ctx)
	return m.session.Held(), err
}

// complete copies what is missing; the container is frozen, CRIU may be at work.
func (m *memory) complete(ctx context.Context) error {
	if m.session == nil {
		return nil
	}
	return m.session.Complete(ctx)
}

// composed is a member's memory as it is stored.
type composed struct {
	memory *memberAPI.Memory
	// tracking goes on; nil where it was not to be kept.
	tracking *precopy.Tracking
	// bytes are all that a restore brings back, the parent's too.
	bytes uint64
}

// compose makes one checkpoint of the copies and what CRIU wrote, with only what
// changed since the parent epoch in it, and ends the tracking or gives it to c. The
// container runs again, or is about to be ended.
func (m *memory) compose(ctx context.Context, images string) (_ *composed, err error) {
	out := &memberAPI.Memory{Engine: engineFull, Why: m.why, FullWhy: m.fullWhy, BarrierBytes: imageBytes(images)}
	done := &composed{memory: out, bytes: out.BarrierBytes}
	tracked := false
	if m.session != nil {
		if m.keep {
			done.tracking = m.session.Keep()
			defer func() {
				if err != nil {
					err = errors.Join(err, done.tracking.Close())
				}
			}()
		}
		if err := m.session.Untrack(); err != nil {
			return nil, err
		}
		st, err := m.session.Compose(ctx, images)
		if err != nil {
			return nil, fmt.Errorf("put the memory together: %w", err)
		}
		p := m.session.Stats()
		tracked, out.Why = p.Continuous > 0, p.Why
		out.Engine, out.Rounds, out.CopiedBytes, out.End, out.Untracked = engineWP, uint32(p.Rounds), p.CopiedBytes, p.End, uint32(p.Untracked)
		done.bytes += (st.ParentPages + st.InheritedPages) * pageSize
		// What shared memory was held in the barrier is composed like what was copied before.
		out.BarrierBytes += p.Shared.Held + p.BarrierBytes
		out.PrecopiedBytes = st.ParentPages*pageSize - min(p.Shared.Held+p.BarrierBytes, st.ParentPages*pageSize)
		out.SharedPrecopiedBytes, out.SharedBarrierBytes, out.SharedWhy = p.Shared.Precopied, p.Shared.Held+p.Shared.Criu, p.Shared.Why
	}
	if m.soft != nil {
		if err := m.soft.result(out); err != nil {
			return nil, err
		}
		done.bytes += out.PrecopiedBytes
	}
	if m.parent != nil {
		st, err := pages.Dedupe(ctx, images, m.parent.memory, pages.WithoutSync())
		if err != nil {
			return nil, fmt.Errorf("compare the memory with epoch %d: %w", m.parent.number, err)
		}
		out.ParentBytes = st.InheritedPages * pageSize
		if out.Increment = incrementContent; tracked {
			out.Increment = incrementTracking
		}
	}
	return done, m.close()
}

// close ends the tracking, but for what was kept, and removes the copies.
func (m *memory) close() error {
	var errs []error
	if m.session != nil {
		errs = append(errs, m.session.Close())
	}
	if m.soft != nil {
		errs = append(errs, m.soft.close())
	}
	if m.parent != nil {
		errs = append(errs, m.parent.memory.Close())
	}
	return errors.Join(errs...)
}

var pageSize = uint64(os.Getpagesize())

// imageBytes sums the page images that CRIU wrote.
func imageBytes(dir string) (n uint64) {
	files, _ := filepath.Glob(filepath.Join(dir, "pages-*.img"))
	for _, f := range files {
		if fi, err := os.Stat(f); err == nil {
			n += uint64(fi.Size())
		}
	}
	return n
}
