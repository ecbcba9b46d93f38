// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

const (
	// LogFile is CRIU's log, in the work directory of the dump.
	LogFile = "dump.log"
	// logLevel keeps errors and warnings only: a debug log of a container with
	// many mappings is megabytes, written while it is frozen.
	logLevel = 2
	// ghostLimit is the largest unlinked file that is carried inside the
	// images, in bytes. CRIU's default of 1 MiB is too small for databases,
	// which unlink temporary files early.
	ghostLimit = 512 << 20
)

// Config describes one dump.
type Config struct {
	// Container is what runc knows about the container.
	Container *Container
	// ImagesDir receives the images; it exists, mode 0700.
	ImagesDir string
	// WorkDir receives CRIU's log and statistics; it exists.
	WorkDir string
	// FreezeCgroup is the container's own freezer directory. The caller freezes
	// it; CRIU finds it frozen, seizes the tasks and leaves it frozen.
	FreezeCgroup string
	// External are mount points whose content the caller carries itself.
	External []string
	// SkipClean leaves out pages of tracked private mappings that were not written
	// since they were last taken: somebody else has them (runtime/memory/precopy).
	SkipClean bool
}

// Dump is a dump under way. Its methods are called from one goroutine, except
// Kill.
type Dump struct {
	s    *swrk
	cfg  Config
	imgs *os.File
	work *os.File
	// managed is set if the container's cgroups are part of the dump.
	managed bool
}

// Start starts CRIU and returns when it waits at "pre-dump". No task of the
// container has been touched then.
func Start(ctx context.Context, cfg Config) (_ *Dump, retErr error) {
	opts, err := cfg.Container.dumpOptions(cfg.FreezeCgroup, cfg.External)
	if err != nil {
		return nil, err
	}
	d := &Dump{cfg: cfg, managed: opts.GetManageCgroupsMode() != rpc.CriuCgMode_IGNORE}
	defer func() {
		if retErr != nil {
			d.closeFiles()
		}
	}()
	if d.imgs, err = os.Open(cfg.ImagesDir); err != nil {
		return nil, fmt.Errorf("open images directory: %w", err)
	}
	if d.work, err = os.Open(cfg.WorkDir); err != nil {
		return nil, fmt.Errorf("open CRIU work directory: %w", err)
	}
	if err := cfg.Container.writeDescriptors(cfg.ImagesDir); err != nil {
		return nil, err
	}
	var env []string
	if cfg.SkipClean {
		env = append(env, "COHORT_CRIU_SKIP_CLEAN=1") // see contrib/criu-preload
	}
	if d.s, err = startSwrk(cfg.WorkDir, env...); err != nil {
		return nil, err
	}
	pid := d.s.cmd.Process.Pid
	// CRIU opens both through /proc/PID/fd of its peer, which is this process
	// (criu/cr-service.c, resolve_images_dir_path).
	opts.ImagesDirFd = proto.Int32(int32(d.imgs.Fd()))
	opts.WorkDirFd = proto.Int32(int32(d.work.Fd()))
	if cfg.FreezeCgroup != "" {
		opts.FreezeCgroup = proto.String(cfg.FreezeCgroup)
	}
	stop := context.AfterFunc(ctx, d.s.kill)
	defer stop()
	t := rpc.CriuReqType_DUMP
	if err := d.s.send(&rpc.CriuReq{Type: &t, Opts: opts}); err != nil {
		d.Kill()
		return nil, d.explain(fmt.Errorf("ask CRIU (pid %d) for a dump: %w", pid, err))
	}
	resp, err := d.s.recv()
	if err == nil {
		err = expect(resp, "pre-dump")
	}
	if err != nil {
		d.Kill()
		return nil, d.explain(err)
	}
	return d, nil
}

func expect(resp *rpc.CriuResp, script string) error {
	if !resp.GetSuccess() {
		return respError(resp)
	}
	if got := resp.GetNotify().GetScript(); resp.GetType() != rpc.CriuReqType_NOTIFY || got != script {
		return fmt.Errorf("CRIU sent %s %q where %q was due", resp.GetType(), got, script)
	}
	return nil
}

func respError(resp *rpc.CriuResp) error {
	msg := resp.GetCrErrmsg()
	if msg == "" {
		msg = fmt.Sprintf("type %s errno %d", resp.GetType(), resp.GetCrErrno())
	}
	return errors.New("CRIU failed: " + msg)
}

// Pid of the CRIU process, for the undo record.
func (d *Dump) Pid() int { return d.s.cmd.Process.Pid }

// Finish lets CRIU dump the (frozen) container. atPostDump runs when all is in
// the images and all tasks are still stopped; its error fails the dump, and
// CRIU then leaves the tasks as they were. When Finish returns, CRIU is gone
// and the cgroup is frozen as before.
//
// When ctx ends, Finish waits for grace before it kills CRIU: a CRIU killed in
// mid-dump leaves its parasite code in the tasks.
func (d *Dump) Finish(ctx context.Context, grace time.Duration, atPostDump func() error) error {
	defer d.closeFiles()
	defer d.s.close(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(grace):
			d.s.kill()
		case <-d.s.done:
		}
	})
	defer stop()
	if err := d.s.ack(true); err != nil {
		return d.explain(fmt.Errorf("let CRIU go: %w", err))
	}
	var hookErr error
	for {
		resp, err := d.s.recv()
		if err != nil {
			return d.explain(errors.Join(hookErr, err))
		}
		if !resp.GetSuccess() {
			if hookErr != nil {
				return hookErr
			}
			return d.explain(respError(resp))
		}
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			return errors.Join(hookErr, d.forgetCgroup())
		}
		if resp.GetNotify().GetScript() == "post-dump" {
			hookErr = errors.Join(ctx.Err(), atPostDump())
		}
		if err := d.s.ack(hookErr == nil); err != nil {
			return d.explain(errors.Join(hookErr, err))
		}
	}
}

// forgetCgroup removes the image of the cgroups where they were not managed. CRIU
// writes the path of the container's cgroup into it all the same (criu/cgroup.c,
// dump_sets), and a restore would put a copy of the container into the original's cgroup.
func (d *Dump) forgetCgroup() error {
	if d.managed {
		return nil
	}
	err := os.Remove(filepath.Join(d.cfg.ImagesDir, cgroupImage))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Cancel ends a dump that waits at "pre-dump"; no task notices.
func (d *Dump) Cancel(ctx context.Context) error {
	defer d.closeFiles()
	// Before it has seized anything CRIU can be killed without harm; asking it
	// to fail costs a log and the same exit.
	d.s.kill()
	return d.s.close(ctx)
}

// Kill ends CRIU at once, whatever it is doing.
func (d *Dump) Kill() {
	d.s.kill()
	<-d.s.done
	d.closeFiles()
}

func (d *Dump) closeFiles() {
	for _, f := range []*os.File{d.imgs, d.work} {
		if f != nil {
			f.Close()
		}
	}
}

func (d *Dump) explain(err error) error {
	return Explain(err, filepath.Join(d.cfg.WorkDir, LogFile))
}
