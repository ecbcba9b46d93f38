// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/runtime/freezer"
	"github.com/cohort-project/cohort/runtime/memory/precopy"
)

// Memory engines, as results name them.
const (
	engineWP   = "wp-async" // pre-copied while the container runs
	engineFull = "full"     // dumped by CRIU inside the barrier
)

// memoryEnv set to "full" switches pre-copy off.
const memoryEnv = "COHORT_MEMORY"

// memory takes a container's memory: by pre-copy, or by leaving it all to CRIU.
type memory struct {
	session *precopy.Session // nil: left to CRIU
	why     string
}

// startMemory begins to pre-copy the container's processes, for as long as that
// pays. Where the kernel or a process does not allow it CRIU dumps everything:
// slower, but right.
func startMemory(ctx context.Context, dir string, init int, fz *freezer.Freezer) (*memory, error) {
	if os.Getenv(memoryEnv) == engineFull {
		return &memory{why: memoryEnv + " is set"}, nil
	}
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
	session, err := precopy.Start(ctx, dir, list, precopy.Options{})
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return &memory{why: err.Error()}, nil
	}
	return &memory{session: session}, nil
}

func (m *memory) keepWarm() {
	if m.session != nil {
		m.session.KeepWarm()
	}
}

func (m *memory) cool() {
	if m.session != nil {
		m.session.Cool()
	}
}

// scan notes what is good of the copies; the container is frozen, CRIU has not begun.
func (m *memory) scan() error {
	if m.session == nil {
		return nil
	}
	return m.session.Scan()
}

// complete copies what is missing; the container is frozen, CRIU may be at work.
func (m *memory) complete(ctx context.Context) error {
	if m.session == nil {
		return nil
	}
	return m.session.Complete(ctx)
}

// compose ends the tracking and makes one checkpoint of the copies and what CRIU
// wrote. The container runs again, or is about to be ended.
func (m *memory) compose(ctx context.Context, images string) (*memberAPI.Memory, error) {
	if m.session == nil {
		return &memberAPI.Memory{Engine: engineFull, Why: m.why, BarrierBytes: imageBytes(images)}, nil
	}
	if err := m.session.Untrack(); err != nil {
		return nil, err
	}
	own := imageBytes(images)
	st, err := m.session.Compose(ctx, images)
	if err != nil {
		return nil, fmt.Errorf("put the memory together: %w", err)
	}
	p := m.session.Stats()
	return &memberAPI.Memory{
		Engine: engineWP, Rounds: uint32(p.Rounds), CopiedBytes: p.CopiedBytes, End: p.End, Untracked: uint32(p.Untracked),
		BarrierBytes: own, PrecopiedBytes: st.ParentPages * uint64(os.Getpagesize()),
	}, m.session.Close()
}

// close ends the tracking and removes the copies.
func (m *memory) close() error {
	if m.session == nil {
		return nil
	}
	return m.session.Close()
}

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
