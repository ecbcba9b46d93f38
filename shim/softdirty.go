// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/runtime/criu"
	"github.com/cohort-project/cohort/runtime/memory/engine"
)

// memoryFacts asks the kernel once in the shim's life.
var memoryFacts = sync.OnceValue(engine.Probe)

// chooseEngine is the engine that a request asks for, else the shim's environment, else
// the host's best.
func chooseEngine(asked string) (engine.Choice, error) {
	if asked != "" {
		return engine.Choose(memoryFacts(), asked)
	}
	env := os.Getenv(engine.Env)
	choice, err := engine.Choose(memoryFacts(), env)
	if err != nil {
		return choice, fmt.Errorf("%s=%s in the environment of containerd: %w", engine.Env, env, err)
	}
	return choice, nil
}

// takeMemory begins to take the container's memory by the chosen engine. Where a
// container, unlike the host, does not allow it and nobody insists, CRIU dumps
// everything. CRIU will dump to images, which is empty.
func (a *acts) takeMemory(ctx context.Context, choice engine.Choice, pid int, external []string, images string) (*memory, error) {
	m, err := startMemory(ctx, filepath.Join(a.dir, "pages"), pid, a.fz, a.req, a.c, choice)
	if err != nil {
		return nil, err
	}
	if choice.Engine == engine.SoftDirty {
		m.soft, m.why, err = a.startSoftDirty(ctx, external, images)
	}
	if err == nil && m.session == nil && m.soft == nil && choice.Engine != engine.Full && a.req.Engine == string(choice.Engine) {
		err = fmt.Errorf("the memory of container %s cannot be taken by the engine %s: %s; leave the choice to cohort: %w", a.c.id, choice.Engine, m.why, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

// softDirty is memory that CRIU has copied, by soft-dirty bits, while the container
// ran. There is nothing to do in the barrier: CRIU's dump itself takes what was written
// since.
type softDirty struct {
	dumps  *criu.PreDumps
	work   string // of the dump
	rounds []uint64
	end    string
}

// Bounds of the rounds. Each stops the container for as long as CRIU looks at its
// mappings, so there are fewer than with write protection.
const (
	softRounds = 4
	softEnough = 8 << 20 // bytes
	softTime   = 20 * time.Second
)

// startSoftDirty copies the container's memory in rounds, for as long as that pays, and
// leaves them where the dump to images finds them. Where it does not work, why says why.
func (a *acts) startSoftDirty(ctx context.Context, external []string, images string) (_ *softDirty, why string, err error) {
	dumps, err := criu.NewPreDumps(a.runc, a.fz.Path(), external, filepath.Join(a.dir, "pre-dump"))
	if err != nil {
		return nil, "", err
	}
	s := &softDirty{dumps: dumps, work: a.checkpointDir()}
	begun := time.Now()
	for s.end == "" {
		round, rerr := dumps.Round(ctx)
		if rerr == nil {
			s.rounds = append(s.rounds, round.Bytes)
			s.end = softEnd(s.rounds, time.Since(begun))
			continue
		}
		if ctx.Err() != nil {
			rerr = ctx.Err()
		} else {
			log.G(ctx).WithError(rerr).WithField("id", a.c.id).Warn("memory is not copied beforehand")
			why, rerr = rerr.Error(), nil
		}
		return nil, why, errors.Join(rerr, s.close())
	}
	if err := dumps.Hand(images); err != nil {
		return nil, "", errors.Join(err, s.close())
	}
	return s, "", nil
}

// softEnd says why there is no further round after those that copied so many bytes;
// empty if there is one.
func softEnd(rounds []uint64, took time.Duration) string {
	n := len(rounds)
	last := rounds[n-1]
	switch {
	// What is left for the dump is about what the last round found.
	case n > 1 && last <= softEnough:
		return "enough"
	case n >= softRounds:
		return "rounds"
	case took >= softTime:
		return "time"
	case n > 2 && last >= rounds[n-2]-rounds[n-2]/8:
		return "no longer shrinking"
	}
	return ""
}

// result tells what became of it, when the dump is done. Images that build on one
// another are what CRIU restores from, so there is nothing to put together.
func (s *softDirty) result(m *memberAPI.Memory) error {
	skipped, err := criu.SkippedBytes(s.work)
	if err != nil {
		return err
	}
	m.Engine, m.Why, m.Rounds, m.End, m.PrecopiedBytes = string(engine.SoftDirty), "", uint32(len(s.rounds)), s.end, skipped
	for _, n := range s.rounds {
		m.CopiedBytes += n
	}
	return nil
}

func (s *softDirty) close() error { return s.dumps.Close() }
