// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/checkpoint-restore/go-criu/v7/stats"
	"google.golang.org/protobuf/proto"
)

const (
	// ParentDir is CRIU's name, below a directory of images, for those that they build
	// on (criu/include/image.h, CR_PARENT_LINK). CRIU makes it a symbolic link unless
	// something of the name is there (criu/image.c, open_image_dir); here it is always
	// a directory.
	ParentDir = "parent"
	// preDumpLog is CRIU's log of a pre-dump, beside its images.
	preDumpLog = "pre-dump.log"
	// preDumpGrace is how long a pre-dump may go on after its context has ended: one
	// that is killed leaves its parasite code in the tasks.
	preDumpGrace = 15 * time.Second
)

// ErrNoSoftDirty is a kernel that does not track the memory that tasks write.
var ErrNoSoftDirty = errors.New("the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")

// PreDumps copies the memory of a running container in rounds, by CRIU's own
// pre-dump: each round has what was written since the one before, by the kernel's
// soft-dirty bits. The last round becomes the parent of a dump, which then need not hold
// what did not change.
//
// The tasks are stopped for the beginning of each round, while CRIU looks at their
// mappings: some ten milliseconds, longer with many processes. Its methods are called
// one at a time.
type PreDumps struct {
	container *Container
	freezer   string
	external  []string
	dir       string
	rounds    int
	failed    error
}

// Round says what one round did.
type Round struct {
	// Bytes were copied; Skipped are those that the round before has.
	Bytes, Skipped uint64
	// Frozen is how long the tasks were stopped.
	Frozen time.Duration
}

// NewPreDumps begins nothing yet. dir is made for the images of the rounds, on the file
// system of the dump's; freezer and external are what the dump will be given.
func NewPreDumps(c *Container, freezer string, external []string, dir string) (*PreDumps, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make a directory for pre-dumps: %w", err)
	}
	return &PreDumps{container: c, freezer: freezer, external: external, dir: dir}, nil
}

// newest are the images of the last round, next those of one that is under way.
func (p *PreDumps) newest() string { return filepath.Join(p.dir, "newest") }
func (p *PreDumps) next() string   { return filepath.Join(p.dir, "next") }

// Round copies once. A round that fails or is cancelled is the last: the kernel may have
// been told to forget what it was to copy, so nothing of the rounds can be used. A kernel
// that lacks what it takes gives ErrNoSoftDirty, before any task is touched.
func (p *PreDumps) Round(ctx context.Context) (Round, error) {
	if p.failed != nil {
		return Round{}, p.failed
	}
	r, err := p.round(ctx)
	if err != nil {
		p.failed = fmt.Errorf("pre-dump of container %s: %w", p.container.ID, err)
		return r, p.failed
	}
	return r, nil
}

func (p *PreDumps) round(ctx context.Context) (r Round, err error) {
	if err := ctx.Err(); err != nil {
		return r, err
	}
	if err := os.Mkdir(p.next(), 0o700); err != nil {
		return r, err
	}
	if err := p.stack(); err != nil {
		return r, err
	}
	opts, err := p.container.preDumpOptions(p.freezer, p.external, p.rounds > 0)
	if err != nil {
		return r, err
	}
	if err := preDump(ctx, opts, p.next()); err != nil {
		return r, err
	}
	if r, err = readRound(p.next()); err != nil {
		return r, err
	}
	return r, p.accept()
}

// stack puts the round before below the one to come.
func (p *PreDumps) stack() error {
	if p.rounds == 0 {
		return nil
	}
	return os.Rename(p.newest(), filepath.Join(p.next(), ParentDir))
}

// accept makes the round that is complete the newest.
func (p *PreDumps) accept() error {
	p.rounds++
	return os.Rename(p.next(), p.newest())
}

// Rounds is how many there were.
func (p *PreDumps) Rounds() int { return p.rounds }

// Hand makes the rounds the parent of the images to be dumped to imagesDir, which is
// empty. Config.PreDumped is for that dump.
func (p *PreDumps) Hand(imagesDir string) error {
	if p.failed != nil {
		return p.failed
	}
	if p.rounds == 0 {
		return errors.New("there was no pre-dump")
	}
	if err := forgetLogs(p.newest(), p.rounds); err != nil {
		return err
	}
	return os.Rename(p.newest(), filepath.Join(imagesDir, ParentDir))
}

// forgetLogs removes what only the rounds needed: what remains is part of a checkpoint.
func forgetLogs(dir string, rounds int) error {
	for range rounds {
		for _, name := range []string{preDumpLog, stats.StatsDump} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		dir = filepath.Join(dir, ParentDir)
	}
	return nil
}

// Close removes what was not handed over.
func (p *PreDumps) Close() error {
	p.failed = errors.New("the pre-dumps are closed")
	return os.RemoveAll(p.dir)
}

// preDumpOptions is the request of one round.
func (c *Container) preDumpOptions(freezer string, external []string, parent bool) (*rpc.CriuOpts, error) {
	opts, err := c.dumpOptions(freezer, external)
	if err != nil {
		return nil, err
	}
	opts.LogFile = proto.String(preDumpLog)
	// There is nothing to wait for, and nobody who answers.
	opts.NotifyScripts = nil
	// Without it CRIU goes on where the kernel tracks nothing, and then ends by an
	// assertion with its code in the tasks (criu/mem.c, task_reset_dirty_track).
	opts.TrackMem = proto.Bool(true)
	// Memory is read when the tasks run again, and need not fit into pipes.
	mode := rpc.CriuPreDumpMode_VM_READ
	opts.PreDumpMode = &mode
	if parent {
		opts.ParentImg = proto.String(ParentDir)
	}
	// The freezer would be polled (criu/seize.c, freeze_processes).
	opts.FreezeCgroup = nil
	return opts, nil
}

// preDump runs CRIU for one round.
func preDump(ctx context.Context, opts *rpc.CriuOpts, dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	opts.ImagesDirFd = proto.Int32(int32(d.Fd()))
	opts.WorkDirFd = opts.ImagesDirFd
	s, err := startSwrk(dir, nil)
	if err != nil {
		return err
	}
	defer s.close(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(preDumpGrace):
			s.kill()
		case <-s.done:
		}
	})
	defer stop()
	explain := func(err error) error {
		err = Explain(err, filepath.Join(dir, preDumpLog))
		if noTracking(FirstError(filepath.Join(dir, preDumpLog))) {
			return fmt.Errorf("%w: %w", ErrNoSoftDirty, err)
		}
		return errors.Join(ctx.Err(), err)
	}
	t := rpc.CriuReqType_SINGLE_PRE_DUMP
	if err := s.send(&rpc.CriuReq{Type: &t, Opts: opts}); err != nil {
		return explain(fmt.Errorf("ask CRIU for a pre-dump: %w", err))
	}
	resp, err := s.recv()
	switch {
	case err != nil:
		return explain(err)
	case !resp.GetSuccess():
		return explain(respError(resp))
	case resp.GetType() != t:
		return fmt.Errorf("CRIU sent %s where %s was due", resp.GetType(), t)
	}
	return ctx.Err()
}

// readRound reads what CRIU counted (images/stats.proto).
func readRound(dir string) (Round, error) {
	st, err := readStats(dir)
	if err != nil {
		return Round{}, err
	}
	page := uint64(os.Getpagesize())
	return Round{
		Bytes: st.GetPagesWritten() * page, Skipped: st.GetPagesSkippedParent() * page,
		Frozen: time.Duration(st.GetFrozenTime()) * time.Microsecond,
	}, nil
}

// readStats reads the statistics of a dump from its work directory.
func readStats(dir string) (*stats.DumpStatsEntry, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	// The reader trusts the file to have its header: two magics and a size
	// (criu/include/magic.h), which one cut short by a full disk has not.
	if fi, err := os.Stat(filepath.Join(dir, stats.StatsDump)); err != nil || fi.Size() < stats.PayloadOffset {
		return nil, fmt.Errorf("CRIU left no statistics in %s (%w)", dir, errors.Join(err, io.ErrUnexpectedEOF))
	}
	st, err := stats.CriuGetDumpStats(d)
	if err != nil {
		return nil, fmt.Errorf("read CRIU's statistics: %w", err)
	}
	return st, nil
}

// SkippedBytes is how much a dump into workDir left to its parent.
func SkippedBytes(workDir string) (uint64, error) {
	st, err := readStats(workDir)
	return st.GetPagesSkippedParent() * uint64(os.Getpagesize()), err
}

// addParent has a dump build on pre-dumps.
func (cfg Config) addParent(opts *rpc.CriuOpts) {
	if !cfg.PreDumped {
		return
	}
	opts.TrackMem = proto.Bool(true)
	opts.ParentImg = proto.String(ParentDir)
}

// noTracking recognizes CRIU's refusal (criu/config.c, check_options).
func noTracking(line string) bool { return strings.Contains(line, "Tracking memory is not available") }
